"""Going on after a stop, at the very step; several processes."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sam3.engine import distributed, training_run
from sam3.engine.checkpoint import newest
from stage1_geometry_finetune import train_geometry_finetune
from tests.engine.processes import fork, join
from tests.stage1.runs import assert_same_weights, finish, metrics, model_of, start
from tests.stage1_geometry_finetune.runs import TUNE, Inputs

# All that is drawn takes part: objects, jitter, kinds, refine points.
DRAWN = {
    "DISTILL__MAX_PROMPTS": 1,
    "DISTILL__PROMPT_MIX": True,
    "DISTILL__DECODE_ITERS": 2,
    "DISTILL__POINTS_PER_REFINE_ITER_MIN": 1,
    "DISTILL__POINTS_PER_REFINE_ITER_MAX": 3,
    "DATA__NUM_VAL_SAMPLES": 1,
}


def test_stopped_in_mid_epoch_it_goes_on_to_the_same_weights(inputs: Inputs, tmp_path: Path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert inputs.tune(whole, SAVE_STEPS=2, **DRAWN) == 0
    halves.mkdir()
    shutil.copy(whole / "ckpt_epoch_0_step_2.pth", halves)
    assert inputs.tune(halves, SAVE_STEPS=2, **DRAWN) == 0
    assert [len(metrics(output, "train/loss_total")) for output in (whole, halves)] == [4, 2]
    assert metrics(halves, "train/loss_total") == metrics(whole, "train/loss_total")[2:]
    assert_same_weights(halves / "ckpt_epoch_0.pth", whole / "ckpt_epoch_0.pth")


def test_a_limit_of_steps_can_be_raised(inputs: Inputs, tmp_path: Path):
    constant = {**DRAWN, "TRAIN__BASE_LR": 1e-4, "TRAIN__MIN_LR": 1e-4, "DATA__NUM_VAL_SAMPLES": 0}
    assert inputs.tune(tmp_path / "whole", "--max-steps", "2", **constant) == 0
    for limit in ("1", "2"):
        assert inputs.tune(tmp_path / "parts", "--max-steps", limit, **constant) == 0
    last = "ckpt_epoch_0_step_2.pth"
    assert_same_weights(tmp_path / "parts" / last, tmp_path / "whole" / last)


def test_another_run_is_not_resumed(tuned: Path, inputs: Inputs, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(tuned, output)
    for key, value, message in (
        ("MODEL__BACKBONE", "efficientvit_b1", r"ES-EV-M|efficientvit_b1"),
        ("DISTILL__MASK_DICE_WEIGHT", 5.0, "DISTILL.MASK_DICE_WEIGHT is 1.0 there and 5.0 here"),
        ("DISTILL__TEXT_PROMPT", "none", "DISTILL.TEXT_PROMPT is 'visual' there and 'none' here"),
        ("SEED", 5, "SEED is 0 there and 5 here"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs.tune(output, **{key: value})
    assert (output / "config.json").read_text() == (tuned / "config.json").read_text()


@pytest.mark.slow
def test_a_truncated_newest_checkpoint_is_passed_over(tuned: Path, inputs: Inputs, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(tuned, output)
    last = output / "ckpt_epoch_1.pth"
    last.write_bytes(last.read_bytes()[:5000])
    assert inputs.tune(output, TRAIN__EPOCHS=2) == 0
    assert_same_weights(last, tuned / "ckpt_epoch_1.pth")


# Several processes --------------------------------------------------------------------------------------------------

# Without Adam, which makes steps of one size out of gradients that are next to nothing, two sums of the same numbers in
# another order stay close. BatchNorm would else see half of the batch.
COMPARABLE = {
    "TRAIN__OPTIMIZER__NAME": "sgd",
    "TRAIN__BASE_LR": 1e-3,
    "TRAIN__EVAL_BN_WHEN_TRAINING": True,
    "TRAIN__MAX_STEPS": 2,
    **{key: value for key, value in DRAWN.items() if key != "DATA__NUM_VAL_SAMPLES"},
}


def _train_and_keep_weights(argv: Sequence[str]) -> int:
    """Runs in each process, which leaves its own student beside the output folder's files."""
    train = training_run.train

    def keep(model: torch.nn.Module, *args, output: Path, **kwargs):
        result = train(model, *args, output=output, **kwargs)
        torch.save(model.student_trunk.state_dict(), output / f"rank{distributed.rank()}.pt")
        return result

    training_run.train = keep  # in this process only, which ends
    return train_geometry_finetune.main(argv)


def test_two_processes_train_to_the_weights_of_one(inputs: Inputs, tmp_path: Path):
    arguments = inputs.arguments(tmp_path / "two", DATA__BATCH_SIZE=1, **COMPARABLE)
    assert join(fork(_train_and_keep_weights, arguments, 2)) == [0, 0]
    assert inputs.tune(tmp_path / "one", **COMPARABLE) == 0
    ranks = [torch.load(tmp_path / f"two/rank{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(value, ranks[1][key]) for key, value in ranks[0].items())
    before = {f"student_trunk.{key}": value for key, value in model_of(inputs.start).items()}
    two, one = (model_of(tmp_path / f"{name}/ckpt_epoch_0_step_2.pth") for name in ("two", "one"))
    moved = [key for key, value in one.items() if not torch.equal(value, before[key])]
    assert len(moved) > 100
    for key in moved:
        way = (one[key] - before[key]).abs().max().item()
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=0.02 * way + 1e-7, msg=lambda m, k=key: f"{k}: {m}")
    for name in ("val/mse", "val/mask_iou"):
        assert metrics(tmp_path / "two", name) == pytest.approx(metrics(tmp_path / "one", name), rel=1e-3)
    assert (tmp_path / "two/log_rank1.txt").exists()


@pytest.mark.slow
def test_torchrun_trains_and_one_process_goes_on(inputs: Inputs, tmp_path: Path):
    code, text = finish(start(TUNE, inputs.arguments(tmp_path, DATA__BATCH_SIZE=1, **DRAWN), 2))
    assert code == 0, text
    assert "effective batch 2 = 1 x 2 processes x 1 accumulated" in text
    assert inputs.tune(tmp_path, TRAIN__EPOCHS=2, **DRAWN) == 0
    assert (tmp_path / "ckpt_epoch_1.pth").exists()
    assert len(metrics(tmp_path, "val/mask_iou")) == 2


@pytest.mark.slow
def test_loader_processes_change_nothing(inputs: Inputs, tmp_path: Path):
    """Also in the second epoch, of which they must know to draw other prompts."""
    opts = {"TRAIN__EPOCHS": 2, **DRAWN}
    for workers in (0, 2):
        assert inputs.tune(tmp_path / str(workers), DATA__NUM_WORKERS=workers, **opts) == 0
    assert_same_weights(tmp_path / "0/ckpt_epoch_1.pth", tmp_path / "2/ckpt_epoch_1.pth")


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    """A run in a program of its own, as those are that get signals: the number of threads decides the last bits."""
    output = tmp_path_factory.mktemp("whole")
    code, text = finish(start(TUNE, inputs.arguments(output, **DRAWN)))
    assert code == 0, text
    return output


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(inputs: Inputs, whole: Path, tmp_path: Path):
    arguments = inputs.arguments(tmp_path, **DRAWN)
    process = start(TUNE, arguments)
    lines = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 128 + signal.SIGTERM, text
    assert "the same command goes on from there" in text
    assert "step" in newest(tmp_path).name
    code, text = finish(start(TUNE, arguments))
    assert code == 0, text
    assert_same_weights(tmp_path / "ckpt_epoch_0.pth", whole / "ckpt_epoch_0.pth")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(inputs: Inputs, whole: Path, tmp_path: Path):
    arguments = inputs.arguments(tmp_path, SAVE_STEPS=1, **DRAWN)
    moments, kills = random.Random(1), 0
    for _ in range(3):
        process = start(TUNE, arguments)
        before = set(tmp_path.glob("ckpt_epoch_*.pth"))
        while process.poll() is None and set(tmp_path.glob("ckpt_epoch_*.pth")) == before:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        finish(process)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    code, text = finish(start(TUNE, arguments))
    assert code == 0, text
    assert_same_weights(tmp_path / "ckpt_epoch_0.pth", whole / "ckpt_epoch_0.pth")
