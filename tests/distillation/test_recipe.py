"""Learning rates, steps of an epoch, and names of numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillation.config import DistillationConfig, Phase
from distillation.recipe import by_phase, learning_rate, loader_workers, run_keys, tags
from sam3.engine.sampler import EpochSampler

CPU = torch.device("cpu")


def settings_of(config: DistillationConfig, pictures: int, processes: int = 1, **options):
    keys = run_keys(config, config.phase(1), Path("out"), CPU, **options)
    sampler = EpochSampler(pictures, config.batch_size, world_size=processes, drop_last=False)
    return by_phase(config.phase(1))(keys, sampler, CPU), sampler


def test_rates_are_the_closed_form():
    phase, total = Phase(1, epochs=5, lr=1e-4, warmup=500), 20_350
    assert learning_rate(0, total, phase) == pytest.approx(1e-4 / 500)
    assert learning_rate(249, total, phase) == pytest.approx(0.5e-4)
    assert learning_rate(499, total, phase) == pytest.approx(1e-4)
    assert learning_rate(500, total, phase) == pytest.approx(1e-4)
    assert learning_rate((500 + 20_350) // 2, total, phase) == pytest.approx(0.5e-4)
    last = 0.5e-4 * (1 + math.cos(math.pi * 19_849 / 19_850))
    assert learning_rate(20_349, total, phase) == pytest.approx(last) and last < 1e-11
    assert learning_rate(20_350, total, phase) == 0


def test_without_warm_up_the_first_rate_is_the_highest():
    assert learning_rate(0, 100, Phase(2, epochs=1, lr=5e-5, warmup=0)) == 5e-5


@pytest.mark.parametrize(("pictures", "steps"), [(32_558, 4_070), (8, 1), (9, 2), (7, 1)])
def test_an_epoch_has_a_step_for_its_remainder(pictures: int, steps: int):
    recipe, sampler = settings_of(DistillationConfig(), pictures)
    assert recipe.settings.steps_in(sampler.batches_per_epoch()) == steps


def test_rates_of_a_run_reach_its_end():
    config = DistillationConfig(phase1_epochs=2, phase1_warmup=2, grad_accum_steps=4)
    recipe, _ = settings_of(config, 10)  # 3 steps an epoch
    expected = [learning_rate(step, 6, config.phase(1)) for step in range(6)]
    assert [recipe.lr_at(step) for step in range(6)] == expected
    assert expected[:3] == [0.5e-4, 1e-4, 1e-4]


def test_a_warm_up_that_fills_the_run_is_warned_of(caplog):
    settings_of(DistillationConfig(phase1_epochs=1), 16)
    assert "phase1_warmup" in caplog.text


def test_settings_reach_the_loop():
    config = DistillationConfig(max_grad_norm=0.5, save_every_steps=7, keep_last=2, log_every_steps=3)
    settings = settings_of(config, 16, max_steps=5)[0].settings
    assert (settings.clip_grad, settings.save_steps, settings.keep_last, settings.print_freq) == (0.5, 7, 2, 3)
    assert (settings.max_steps, settings.accumulation, settings.step_remainder) == (5, 8, True)
    assert settings.amp_dtype is None  # on the CPU


@pytest.mark.parametrize(
    ("precision", "kind", "wanted"),
    [("amp_fp16", "cuda", (True, "fp16")), ("amp_bf16", "cuda", (True, "bf16")), ("fp32", "cuda", (False, "fp16")),
     ("amp_fp16", "mps", (True, "fp16")), ("amp_fp16", "cpu", (False, "fp16"))],
)  # fmt: skip
def test_precision_follows_the_device(precision: str, kind: str, wanted: tuple[bool, str]):
    config = DistillationConfig(student_precision=precision)
    keys = run_keys(config, config.phase(1), Path("out"), torch.device(kind))
    assert wanted == (keys.AMP_ENABLE, keys.AMP_DTYPE)


def test_workers_follow_the_device():
    config = DistillationConfig()
    assert [loader_workers(config, torch.device(kind)) for kind in ("cuda", "mps", "cpu")] == [4, 0, 0]
    assert loader_workers(replace(config, num_workers=2), CPU) == 2


def test_raw_terms_are_the_weighted_ones_over_their_weights():
    names = tags(DistillationConfig(fpn_feature_loss_weight=0))
    assert names["train/loss_mask_loss"] == [("train/mask_loss", 1), ("train_raw/mask_loss", 0.2)]
    assert names["train/loss_fpn_feature_loss"] == [("train/fpn_feature_loss", 1)]
    assert names["train/loss_total"] == [("train/total_loss", 1)]
    assert names["train/step_ms"] == [("sys/sec_per_step", 1e-3)]
