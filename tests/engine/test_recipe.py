"""What a run that counts steps reads from its config, with numbers worked out by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from sam3.engine import recipe
from sam3.engine.config import leaf_keys, load_config, shared_defaults
from sam3.engine.sampler import EpochSampler

CPU = torch.device("cpu")


def config(*opts: str) -> CfgNode:
    defaults = shared_defaults()
    recipe.step_keys(defaults)
    return load_config(defaults, opts=opts, retired=recipe.STEP_RETIRED, choices=recipe.STEP_CHOICES)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sam3"), "propagate", True)
    return caplog


def test_the_keys_of_epochs_are_replaced():
    keys = leaf_keys(config())
    assert not set(keys) & recipe.STEP_RETIRED.keys()
    assert {"TRAIN.LR", "TRAIN.MAX_STEPS", "TRAIN.WARMUP_STEPS", "TRAIN.EFFECTIVE_BATCH", "TRAIN.AMP"} <= set(keys)
    assert set(recipe.STEP_CONDITIONS) <= set(keys)
    for key in recipe.STEP_RETIRED:
        with pytest.raises(ValueError, match=rf"{key} .* cannot be set: "):
            config(key, "1")


def test_the_rate_warms_up_and_falls_from_there_to_the_last_step():
    values = "TRAIN.LR 3e-4 TRAIN.MAX_STEPS 130 TRAIN.WARMUP_STEPS 30 TRAIN.WARMUP_LR 1e-7 TRAIN.MIN_LR 1e-5"
    made = recipe.by_steps(config(*values.split()), EpochSampler(8, 2), CPU)
    middle = 1e-5 + 0.5 * (3e-4 - 1e-5)
    wanted = {0: 1e-7, 15: (1e-7 + 3e-4) / 2, 30: 3e-4, 80: middle, 130: 1e-5, 200: 1e-5}
    assert [made.lr_at(step) for step in wanted] == pytest.approx(list(wanted.values()))
    assert made.peak_lr == 3e-4
    linear = recipe.by_steps(config(*values.split(), "TRAIN.LR_SCHEDULER.NAME", "linear"), EpochSampler(8, 2), CPU)
    assert linear.lr_at(130) == pytest.approx(3e-6)  # a hundredth


def test_settings_and_optimizer():
    values = (
        "TRAIN.MAX_STEPS 9 TRAIN.VAL_INTERVAL 4 TRAIN.SAVE_INTERVAL 5 TRAIN.LATEST_INTERVAL 3 TRAIN.LOG_INTERVAL 2 "
        "TRAIN.CLIP_GRAD 0.1 TRAIN.WEIGHT_DECAY 0.2 KEEP_LAST 6 TRAIN.AMP False TRAIN.MAX_BAD_STEPS 7"
    )
    made = recipe.by_steps(config(*values.split()), EpochSampler(8, 2), CPU)
    s = made.settings
    assert (s.max_steps, s.validate_steps, s.save_steps, s.latest_steps, s.print_freq) == (9, 4, 5, 3, 2)
    assert (s.clip_grad, s.keep_last, s.amp_dtype, s.max_bad_steps) == (0.1, 6, None, 7)
    assert s.counts_steps
    optimizer = made.make_optimizer(nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    half = recipe.by_steps(config("AMP_DTYPE", "bf16"), EpochSampler(8, 2), CPU).settings
    assert half.amp_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("batch_size", "processes", "opts", "accumulation", "warned"),
    [
        (4, 1, (), 64, False),
        (4, 8, (), 8, False),
        (3, 1, (), 86, True),  # 258
        (300, 1, (), 1, True),
        (4, 8, ("TRAIN.EFFECTIVE_BATCH", "32"), 1, False),
        (4, 8, ("TRAIN.ACCUMULATION_STEPS", "3"), 3, False),
    ],
)
def test_accumulation(batch_size, processes, opts, accumulation, warned, monkeypatch, warnings):
    monkeypatch.setenv("SAM3_PLANNED_WORLD_SIZE", str(processes))
    sampler = EpochSampler(5000, batch_size, world_size=processes)
    assert recipe.by_steps(config(*opts), sampler, CPU).settings.accumulation == accumulation
    text = f"the effective batch is {batch_size * processes * accumulation} = {batch_size} x {processes} processes x "
    assert (text in warnings.text) == warned


@pytest.mark.parametrize(("videos", "samples"), [(1000, 1000), (256, 256), (255, 510), (10, 260), (1, 256), (0, 0)])
def test_a_small_set_is_gone_through_until_it_fills_a_step(videos, samples):
    assert recipe.samples_per_epoch(config("DATA.BATCH_SIZE", "4"), videos) == samples


def test_a_warm_up_longer_than_the_run():
    recipe.check_steps(config("TRAIN.MAX_STEPS", "10", "TRAIN.WARMUP_STEPS", "10"))
    with pytest.raises(ValueError, match=r"WARMUP_STEPS \(=11\) must not be above TRAIN.MAX_STEPS \(=10\)"):
        recipe.check_steps(config("TRAIN.MAX_STEPS", "10", "TRAIN.WARMUP_STEPS", "11"))
