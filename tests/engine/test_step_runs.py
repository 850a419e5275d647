"""The loop counting steps: when it validates and saves, and that it goes on from any of its files."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from sam3.engine import checkpoint
from sam3.engine.distributed import World
from sam3.engine.loop_settings import LoopSettings
from sam3.engine.signals import StoppedBySignal
from tests.engine import toy_train
from tests.engine.processes import fork, join
from tests.engine.test_loop import assert_same

CPU = World(0, 1, 0, torch.device("cpu"))
# 8 steps an epoch: every epoch but the last ends at a validation.
STEPS = {"epochs": 0, "max_steps": 19, "latest_steps": 3, "validate_steps": 4, "save_steps": 5}
BEST = {"best_metric": "val/far", "best_mode": "max"}


def far(epoch: int, step: int) -> dict[str, float]:
    """Best at step 8 of 4, 8, 12, 16, 19; draws random numbers."""
    return {"val/far": float(-abs(step - 8)), "val/noise": float(torch.rand(()))}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.pth")}


def same_run(first: Path, second: Path) -> None:
    for name in ("ckpt_latest.pth", "ckpt_best.pth"):
        one, other = checkpoint.load(first / name), checkpoint.load(second / name)
        assert_same(one, other)
        assert (one["best"], one["validated_step"]) == (other["best"], other["validated_step"])


def test_what_is_written_and_when(tmp_path):
    seen, latest = [], []

    def validate(epoch: int, step: int) -> dict[str, float]:
        seen.append((epoch, step))
        latest.append(checkpoint.load(tmp_path / "ckpt_latest.pth")["step"])
        return far(epoch, step)

    result, _ = toy_train.run(tmp_path, CPU, validate=validate, **STEPS, **BEST)
    assert seen == [(0, 4), (0, 8), (1, 12), (1, 16), (2, 19)]
    assert latest == [4, 8, 12, 16, 19]  # saved before a validation too, which may take long
    assert names(tmp_path) == {
        *("ckpt_latest.pth", "ckpt_best.pth"),
        *("ckpt_step_5.pth", "ckpt_step_10.pth", "ckpt_step_15.pth"),
    }
    assert result.position == checkpoint.Position(2, 19, 12)
    assert result.best == {"metric": "val/far", "value": 0.0, "epoch": 0, "step": 8}
    steps = {name: checkpoint.load(tmp_path / name)["step"] for name in names(tmp_path)}
    assert (steps["ckpt_latest.pth"], steps["ckpt_best.pth"], steps["ckpt_step_10.pth"]) == (19, 8, 10)
    assert checkpoint.load(tmp_path / "ckpt_latest.pth")["best"]["step"] == 8


def test_the_latest_is_saved_at_its_interval(tmp_path):
    saved = []

    def validate(epoch: int, step: int) -> dict[str, float]:
        raise ValueError("a bad clip")

    original = checkpoint.save

    def save(folder, payload, name=None):
        saved.append((name, payload["step"]))
        return original(folder, payload, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(ValueError, match="a bad clip"):
            toy_train.run(tmp_path, CPU, validate=validate, **{**STEPS, "validate_steps": 11})
    latest = [step for name, step in saved if name == "ckpt_latest.pth"]
    assert latest == [3, 6, 9, 11, 11]  # the last one when the error came
    assert names(tmp_path) == {"ckpt_latest.pth", "ckpt_step_5.pth", "ckpt_step_10.pth"}


def test_without_validation_and_intervals_there_is_one_file_in_the_end(tmp_path):
    toy_train.run(tmp_path, CPU, epochs=0, max_steps=9)
    assert names(tmp_path) == {"ckpt_latest.pth"}


def test_keep_last_keeps_the_newest_numbered(tmp_path):
    toy_train.run(tmp_path, CPU, validate=far, keep_last=1, **STEPS, **BEST)
    assert names(tmp_path) == {"ckpt_latest.pth", "ckpt_best.pth", "ckpt_step_15.pth"}


@pytest.mark.parametrize("name", ["ckpt_step_5.pth", "ckpt_step_10.pth", "ckpt_best.pth", "ckpt_latest.pth"])
def test_it_goes_on_from_any_file_bit_equal(tmp_path, name):
    """Steps 5 and 10 lie inside an epoch, step 8 of the best at the end of one."""
    options = {"validate": far, "accumulation": 1, "clip_grad": 1.0, **STEPS, **BEST}
    toy_train.run(tmp_path / "whole", CPU, **options)
    torch.manual_seed(99)
    toy_train.run(tmp_path / "cut", CPU, resume=tmp_path / "whole" / name, **options)
    if name == "ckpt_step_5.pth":
        same_run(tmp_path / "whole", tmp_path / "cut")
    elif name != "ckpt_latest.pth":  # a finished run writes nothing
        whole, cut = (checkpoint.load(tmp_path / folder / "ckpt_latest.pth") for folder in ("whole", "cut"))
        assert_same(whole, cut)
        assert whole["best"] == cut["best"]


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(tmp_path):
    toy_train.run(tmp_path, CPU, validate=far, **STEPS, **BEST)
    before = (tmp_path / "ckpt_latest.pth").stat().st_mtime_ns
    seen = []

    def validate(epoch: int, step: int) -> dict[str, float]:
        seen.append(step)
        return far(epoch, step)

    toy_train.run(tmp_path, CPU, validate=validate, resume=checkpoint.newest(tmp_path), **STEPS, **BEST)
    assert not seen and (tmp_path / "ckpt_latest.pth").stat().st_mtime_ns == before
    longer = {**STEPS, "max_steps": 21}
    result, _ = toy_train.run(tmp_path, CPU, validate=validate, resume=checkpoint.newest(tmp_path), **longer, **BEST)
    assert seen == [20, 21] and result.position.step == 21


@pytest.mark.parametrize("at", [4, 8, 19])
def test_a_validation_that_was_stopped_is_made_up_for(tmp_path, at):
    """By a signal inside an epoch, at the end of one, and at the end of the run."""
    toy_train.run(tmp_path / "whole", CPU, validate=far, **STEPS, **BEST)

    def stop(epoch: int, step: int) -> dict[str, float]:
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return far(epoch, step)

    cut = tmp_path / "cut"
    with pytest.raises(StoppedBySignal) as caught:
        toy_train.run(cut, CPU, validate=stop, **STEPS, **BEST)
    assert str(cut / "ckpt_latest.pth") in caught.value.message
    assert checkpoint.load(cut / "ckpt_latest.pth")["validated_step"] < at
    seen = []

    def validate(epoch: int, step: int) -> dict[str, float]:
        seen.append(step)
        return far(epoch, step)

    toy_train.run(cut, CPU, validate=validate, resume=checkpoint.newest(cut), **STEPS, **BEST)
    assert seen == [step for step in (4, 8, 12, 16, 19) if step >= at]
    same_run(tmp_path / "whole", cut)


def test_a_smaller_machine_does_all_the_steps(tmp_path):
    """With larger batches an epoch has fewer steps, so that more epochs are behind than today's batch would need."""
    toy_train.run(tmp_path, CPU, batch_size=16, epochs=0, max_steps=12)
    result, _ = toy_train.run(
        tmp_path, CPU, batch_size=4, epochs=0, max_steps=15, resume=tmp_path / "ckpt_latest.pth", validate=far
    )
    assert result.position.step == 15


def test_settings_that_count_steps():
    counting = LoopSettings(0, max_steps=5)
    assert counting.counts_steps and counting.total_steps(2) == 5
    assert [LoopSettings(3, max_steps=limit).total_steps(4) for limit in (0, 5, 50)] == [12, 5, 12]
    assert not LoopSettings(3, max_steps=5).counts_steps
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        LoopSettings(0)
    with pytest.raises(ValueError, match="latest_steps must not be negative, got -1"):
        LoopSettings(0, max_steps=5, latest_steps=-1)


def kill_arguments(output: Path) -> list[str]:
    numbers = {"epochs": 0, "max-steps": 24, "latest-steps": 2, "validate-steps": 7, "save-steps": 10}
    return ["--output", str(output), "--sleep-s", "0.002", *(f"--{n}={v}" for n, v in numbers.items())]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_it_ends_bit_equal(tmp_path, seed):
    moments = random.Random(seed)
    kills = 0
    for attempt in range(60):
        (process,) = fork(toy_train.main, kill_arguments(tmp_path / "cut"))
        process.join(moments.uniform(0.02, 0.25 + 0.05 * attempt))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode == 0:
            break
        else:
            pytest.fail(f"exit code {process.exitcode} after {kills} kills")
    assert kills > 0
    assert join(fork(toy_train.main, kill_arguments(tmp_path / "whole"))) == [0]
    assert (
        names(tmp_path / "cut")
        == names(tmp_path / "whole")
        == {
            *("ckpt_latest.pth", "ckpt_best.pth"),
            *("ckpt_step_10.pth", "ckpt_step_20.pth"),
        }
    )
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
def test_two_processes_save_validate_and_go_on_together(tmp_path):
    arguments = [*kill_arguments(tmp_path / "two"), "--accumulation", "2"]
    assert join(fork(toy_train.main, arguments, 2)) == [0, 0]
    for name in ("ckpt_latest.pth", "ckpt_best.pth", "ckpt_step_20.pth"):
        (tmp_path / "two" / name).unlink()
    whole = checkpoint.load(tmp_path / "two/ckpt_step_10.pth")
    assert (whole["world_size"], whole["epoch"], whole["samples"]) == (2, 4, 32)
    assert join(fork(toy_train.main, arguments, 2)) == [0, 0]
    assert join(fork(toy_train.main, [*kill_arguments(tmp_path / "once"), "--accumulation", "2"], 2)) == [0, 0]
    same_run(tmp_path / "once", tmp_path / "two")
