"""Going on after a stop, at the very step; several processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sam3.engine import distributed, training_run
from stage2 import train_memory_stage2
from tests.engine.processes import fork, join, wait_for
from tests.stage1.runs import assert_same_weights, finish, metrics, model_of, start
from tests.stage2.runs import TRAIN, Inputs

# One and a half epochs in which all that is drawn takes part: clips, prompts, dropout.
STEPS = {
    "TRAIN__MAX_STEPS": 6,
    "TRAIN__SAVE_INTERVAL": 1,
    "TRAIN__LATEST_INTERVAL": 1,
    "DATA__NUM_FRAMES": 2,
    "MODEL__MEMORY_ATTENTION__DROPOUT": 0.1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    """An uninterrupted run, in a process like those that are stopped below: threads decide the last bits."""
    output = tmp_path_factory.mktemp("whole")
    assert join(fork(train_memory_stage2.main, inputs.arguments(output, **STEPS))) == [0]
    return output


@pytest.mark.parametrize("step", [4, 5], ids=["between-epochs", "in-epoch-1"])
def test_from_a_kept_step_it_goes_on_to_the_same_weights(step: int, whole: Path, inputs: Inputs, tmp_path: Path):
    shutil.copy(whole / f"ckpt_step_{step}.pth", tmp_path)
    assert join(fork(train_memory_stage2.main, inputs.arguments(tmp_path, **STEPS))) == [0]
    assert metrics(tmp_path, "train/loss_total") == metrics(whole, "train/loss_total")[step:]
    assert metrics(tmp_path, "val/jf") == metrics(whole, "val/jf")
    assert_same_weights(tmp_path / "ckpt_latest.pth", whole / "ckpt_latest.pth")


def test_resume_takes_a_checkpoint_of_another_folder(whole: Path, inputs: Inputs, tmp_path: Path):
    arguments = inputs.arguments(tmp_path, "--resume", str(whole / "ckpt_step_3.pth"), **STEPS)
    assert join(fork(train_memory_stage2.main, arguments)) == [0]
    assert len(metrics(tmp_path, "train/loss_total")) == 3
    assert_same_weights(tmp_path / "ckpt_latest.pth", whole / "ckpt_latest.pth")
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*gone.pth does not exist"):
        inputs.train(tmp_path / "other", "--resume", str(tmp_path / "gone.pth"), **STEPS)


def test_a_truncated_checkpoint_is_passed_over(whole: Path, inputs: Inputs, tmp_path: Path):
    shutil.copy(whole / "ckpt_step_5.pth", tmp_path)
    (tmp_path / "ckpt_latest.pth").write_bytes((whole / "ckpt_latest.pth").read_bytes()[:5000])
    assert join(fork(train_memory_stage2.main, inputs.arguments(tmp_path, **STEPS))) == [0]
    assert len(metrics(tmp_path, "train/loss_total")) == 1
    assert_same_weights(tmp_path / "ckpt_latest.pth", whole / "ckpt_latest.pth")


def test_another_run_is_not_resumed(memory_run: Path, inputs: Inputs, tmp_path: Path):
    shutil.copytree(memory_run, tmp_path, dirs_exist_ok=True)
    for key, value, message in (
        ("MODEL__MEMORY_ATTENTION__POOL_SIZE", 1, "memory.pool_size is 2 there and 1 here"),
        ("MODEL__PERCEIVER__HEADS", 1, "memory.perceiver_heads is 2 there and 1 here"),
        ("DATA__NUM_FRAMES", 2, "DATA.NUM_FRAMES is 3 there and 2 here"),
        ("SEED", 5, "SEED is 42 there and 5 here"),
    ):
        with pytest.raises(ValueError, match=rf"belongs to another run: .*{message}"):
            inputs.train(tmp_path, **{key: value})
    assert (tmp_path / "config.yaml").read_text() == (memory_run / "config.yaml").read_text()


def test_what_another_machine_or_a_longer_run_needs_may_change(memory_run: Path, inputs: Inputs, tmp_path: Path):
    shutil.copytree(memory_run, tmp_path, dirs_exist_ok=True)
    moved = shutil.copytree(inputs.frames, tmp_path / "frames")
    others = {"TRAIN__MAX_STEPS": 5, "DATA__NUM_WORKERS": 1, "DATA__SKIP_BAD_VIDEOS": True, "DATA__SAV_ROOT": moved}
    assert inputs.train(tmp_path, TRAIN__USE_CHECKPOINT=True, **others) == 0
    assert torch.load(tmp_path / "ckpt_latest.pth", weights_only=True)["step"] == 5


# Several processes --------------------------------------------------------------------------------------------------

# Without Adam, which makes steps of one size out of gradients that are next to nothing, two sums of the same numbers in
# another order stay close.
COMPARABLE = {
    "TRAIN__OPTIMIZER__NAME": "sgd",
    "TRAIN__EFFECTIVE_BATCH": 2,
    "TRAIN__MAX_STEPS": 2,
    "TRAIN__WARMUP_STEPS": 0,
    "TRAIN__CLIP_GRAD": 0.0,
    "DATA__NUM_FRAMES": 2,
    "DATA__VAL_SPLIT": 0.4,  # a val clip for each process
    "DATA__TRAIN_SPLIT": 0.6,
}


def _train_and_keep_weights(argv: Sequence[str]) -> int:
    """Runs in each process, which leaves its own student beside the output folder's files."""
    train = training_run.train

    def keep(model: torch.nn.Module, *args, output: Path, **kwargs):
        result = train(model, *args, output=output, **kwargs)
        torch.save(model.state_dict(), output / f"rank{distributed.rank()}.pt")
        return result

    training_run.train = keep  # in this process only, which ends
    return train_memory_stage2.main(argv)


def test_two_processes_train_to_the_weights_of_one(inputs: Inputs, tmp_path: Path):
    still = {**COMPARABLE, "TRAIN__LR": 0.0, "TRAIN__WARMUP_LR": 0.0, "TRAIN__MIN_LR": 0.0, "TRAIN__MAX_STEPS": 1}
    assert inputs.train(tmp_path / "start", DATA__BATCH_SIZE=2, **still) == 0
    arguments = inputs.arguments(tmp_path / "two", DATA__BATCH_SIZE=1, **COMPARABLE)
    assert join(fork(_train_and_keep_weights, arguments, 2)) == [0, 0]
    assert inputs.train(tmp_path / "one", DATA__BATCH_SIZE=2, **COMPARABLE) == 0
    ranks = [torch.load(tmp_path / f"two/rank{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(value, ranks[1][key]) for key, value in ranks[0].items())
    before, two, one = (model_of(tmp_path / name / "ckpt_latest.pth") for name in ("start", "two", "one"))
    moved = [key for key, value in one.items() if not torch.equal(value, before[key])]
    assert len(moved) > 80
    for key in moved:
        way = (one[key] - before[key]).abs().max().item()
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=0.02 * way + 1e-7, msg=lambda m, k=key: f"{k}: {m}")
    for name in ("train/loss_total", "val/jf", "val/agreement"):
        assert metrics(tmp_path / "two", name) == pytest.approx(metrics(tmp_path / "one", name), rel=1e-3)
    assert (tmp_path / "two/log_rank1.txt").exists()


@pytest.mark.slow
def test_torchrun_trains_and_one_process_goes_on(inputs: Inputs, tmp_path: Path):
    opts = {"DATA__NUM_FRAMES": 2, "TRAIN__EFFECTIVE_BATCH": 2, "TRAIN__LATEST_INTERVAL": 1}
    code, text = finish(start(TRAIN, inputs.arguments(tmp_path, TRAIN__MAX_STEPS=2, **opts), 2))
    assert code == 0, text
    assert "effective batch 2 = 1 x 2 processes x 1 accumulated" in text
    assert inputs.train(tmp_path, TRAIN__MAX_STEPS=3, **opts) == 0
    assert len(metrics(tmp_path, "train/loss_total")) == 3
    assert "1 x 1 processes x 2 accumulated" in (tmp_path / "train.log").read_text()


# Signals ------------------------------------------------------------------------------------------------------------


def test_sigterm_saves_and_the_same_command_goes_on(whole: Path, inputs: Inputs, tmp_path: Path):
    arguments = inputs.arguments(tmp_path, **{**STEPS, "TRAIN__SAVE_INTERVAL": 0, "TRAIN__LATEST_INTERVAL": 0})
    (process,) = fork(train_memory_stage2.main, arguments)
    lines = tmp_path / "metrics.jsonl"
    wait_for(lambda: lines.exists() and lines.stat().st_size > 0, "the first step")
    os.kill(process.pid, signal.SIGTERM)
    assert join([process]) == [128 + signal.SIGTERM]
    assert "the same command goes on from there" in (tmp_path / "train.log").read_text()
    done = torch.load(tmp_path / "ckpt_latest.pth", weights_only=True)["step"]
    assert 1 <= done < 6
    assert join(fork(train_memory_stage2.main, arguments)) == [0]
    assert len(metrics(tmp_path, "train/loss_total")) == 6
    assert_same_weights(tmp_path / "ckpt_latest.pth", whole / "ckpt_latest.pth")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(whole: Path, inputs: Inputs, tmp_path: Path):
    arguments = inputs.arguments(tmp_path, **STEPS)
    moments, kills = random.Random(1), 0
    for number in range(1, 4):
        (process,) = fork(train_memory_stage2.main, arguments)
        while process.is_alive() and len(list(tmp_path.glob("ckpt_step_*.pth"))) < number:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        kills += join([process]) == [-signal.SIGKILL]
    assert kills >= 2
    assert join(fork(train_memory_stage2.main, arguments)) == [0]
    assert_same_weights(tmp_path / "ckpt_latest.pth", whole / "ckpt_latest.pth")
