"""What the training loop saves and when, and that a run which was cut off ends as if it had not been."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

from sam3.engine import checkpoint
from sam3.engine.log import MetricLog
from sam3.engine.signals import StoppedBySignal
from tests.engine import toy_train
from tests.engine.test_loop import CPU, assert_same


def test_two_epochs_plus_two_resumed_equal_four(tmp_path):
    toy_train.run(tmp_path / "whole", CPU, epochs=4)
    short = tmp_path / "short"
    toy_train.run(short, CPU, epochs=4)
    (short / "ckpt_epoch_2.pth").unlink()
    (short / "ckpt_epoch_3.pth").unlink()
    toy_train.run(short, CPU, epochs=4, resume=checkpoint.newest(short))
    assert_same(checkpoint.load(tmp_path / "whole/ckpt_epoch_3.pth"), checkpoint.load(short / "ckpt_epoch_3.pth"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_in_the_middle_of_an_epoch_is_bit_equal(tmp_path, optimizer):
    """4 steps = 2 + resume + 2, with accumulation, dropout, BatchNorm and validation drawing random numbers."""

    def validate(epoch: int, step: int) -> dict[str, float]:
        return {"val/noise": float(torch.rand(()))}

    options = {"epochs": 1, "accumulation": 2, "clip_grad": 1.0, "validate": validate, "optimizer": optimizer}
    toy_train.run(tmp_path, CPU, save_steps=2, **options)
    whole = checkpoint.load(tmp_path / "ckpt_epoch_0.pth")
    (tmp_path / "ckpt_epoch_0.pth").unlink()
    middle = checkpoint.newest(tmp_path)
    assert middle.name == "ckpt_epoch_0_step_2.pth"
    torch.manual_seed(99)
    result, _ = toy_train.run(tmp_path, CPU, resume=middle, **options)
    assert result.position.step == 4
    assert_same(whole, checkpoint.load(tmp_path / "ckpt_epoch_0.pth"))


def test_max_steps_stops_in_mid_epoch_and_goes_on_from_there(tmp_path):
    options = {"epochs": 2, "batch_size": 4}
    result, _ = toy_train.run(tmp_path, CPU, max_steps=11, **options)
    assert result.position == checkpoint.Position(1, 11, 12)
    assert checkpoint.newest(tmp_path).name == "ckpt_epoch_1_step_11.pth"
    again, _ = toy_train.run(tmp_path, CPU, max_steps=11, resume=checkpoint.newest(tmp_path), **options)
    assert again.position.step == 11
    more, _ = toy_train.run(tmp_path, CPU, max_steps=13, resume=checkpoint.newest(tmp_path), **options)
    assert more.position == checkpoint.Position(1, 13, 20)


def test_nothing_is_saved_without_output(tmp_path):
    result, _ = toy_train.run(None, CPU, epochs=1, save_steps=1)
    assert result.position.step == 8
    assert result.step_s > 0
    assert not list(tmp_path.iterdir())


def test_save_freq_always_saves_the_last_epoch(tmp_path):
    toy_train.run(tmp_path, CPU, epochs=5, save_freq=2)
    assert {p.name for p in tmp_path.glob("*.pth")} == {f"ckpt_epoch_{e}.pth" for e in (1, 3, 4)}


def test_keep_last_keeps_the_newest_and_the_best(tmp_path):
    values = iter([3.0, 1.0, 2.0, 5.0])
    result, _ = toy_train.run(
        tmp_path,
        CPU,
        epochs=4,
        save_steps=4,
        keep_last=2,
        best_metric="val/mse",
        validate=lambda epoch, step: {"val/mse": next(values)},
    )
    assert {p.name for p in tmp_path.glob("*.pth")} == {
        "ckpt_epoch_3.pth",
        "ckpt_epoch_3_step_28.pth",
        "ckpt_best.pth",
    }
    assert result.best == {"metric": "val/mse", "value": 1.0, "epoch": 1, "step": 16}
    assert checkpoint.load(tmp_path / "ckpt_best.pth")["epoch"] == 1
    assert checkpoint.load(tmp_path / "ckpt_epoch_3.pth")["best"]["value"] == 1.0


def test_best_survives_a_resume(tmp_path):
    options = {"best_metric": "a", "best_mode": "max"}
    toy_train.run(tmp_path, CPU, epochs=2, validate=lambda e, s: {"a": [5.0, 4.0][e]}, **options)
    result, _ = toy_train.run(
        tmp_path, CPU, epochs=3, validate=lambda e, s: {"a": 4.5}, resume=checkpoint.newest(tmp_path), **options
    )
    assert result.best["value"] == 5.0
    assert checkpoint.load(tmp_path / "ckpt_best.pth")["epoch"] == 0


def test_unknown_best_metric_is_named():
    with pytest.raises(ValueError, match=r"best_metric 'x' is not among the validation's results: a"):
        toy_train.run(None, CPU, epochs=1, best_metric="x", validate=lambda e, s: {"a": 1.0})


def test_a_signal_saves_and_the_next_run_ends_bit_equal(tmp_path):
    toy_train.run(tmp_path / "whole", CPU, epochs=2)

    def stop_at_step_11(epoch: int, step: int) -> dict[str, float]:
        if step == 11:
            signal.raise_signal(signal.SIGTERM)
        return {}

    with pytest.raises(StoppedBySignal) as caught:
        toy_train.run(tmp_path / "cut", CPU, epochs=2, validate=stop_at_step_11, validate_steps=11)
    assert caught.value.code == 143
    path = checkpoint.newest(tmp_path / "cut")
    assert path.name == "ckpt_epoch_1_step_11.pth"
    assert str(path) in caught.value.message
    toy_train.run(tmp_path / "cut", CPU, epochs=2, resume=path)
    assert_same(
        checkpoint.load(tmp_path / "whole/ckpt_epoch_1.pth"), checkpoint.load(tmp_path / "cut/ckpt_epoch_1.pth")
    )


def test_a_signal_in_the_last_validation_leaves_the_validation_to_do(tmp_path):
    def stop(epoch: int, step: int) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return {}

    with pytest.raises(StoppedBySignal) as caught:
        toy_train.run(tmp_path, CPU, epochs=1, validate=stop)
    assert caught.value.code == 130
    assert checkpoint.newest(tmp_path).name == "ckpt_epoch_0_step_8.pth"
    seen = []
    result, _ = toy_train.run(
        tmp_path, CPU, epochs=1, resume=checkpoint.newest(tmp_path), validate=lambda e, s: seen.append((e, s)) or {}
    )
    assert seen == [(0, 8)]
    assert result.position == checkpoint.Position(1, 8, 0)
    assert checkpoint.newest(tmp_path).name == "ckpt_epoch_0.pth"


@pytest.mark.parametrize("error", [ValueError("a bad picture"), OSError("the disk is gone"), RuntimeError("no memory")])
def test_an_error_in_validation_costs_no_epoch(tmp_path, error):
    toy_train.run(tmp_path / "whole", CPU, epochs=2)

    def fail(epoch: int, step: int) -> dict[str, float]:
        if epoch == 1:
            raise error
        return {}

    with pytest.raises(type(error), match=str(error)):
        toy_train.run(tmp_path / "cut", CPU, epochs=2, validate=fail)
    path = checkpoint.newest(tmp_path / "cut")
    assert path.name == "ckpt_epoch_1_step_16.pth"
    seen = []
    toy_train.run(tmp_path / "cut", CPU, epochs=2, resume=path, validate=lambda e, s: seen.append((e, s)) or {"a": 1.0})
    assert seen == [(1, 16)]  # the validation alone is repeated
    assert_same(
        checkpoint.load(tmp_path / "whole/ckpt_epoch_1.pth"), checkpoint.load(tmp_path / "cut/ckpt_epoch_1.pth")
    )


def test_an_unknown_best_metric_costs_no_epoch(tmp_path):
    with pytest.raises(ValueError, match="best_metric 'x' is not among"):
        toy_train.run(tmp_path, CPU, epochs=1, best_metric="x", validate=lambda e, s: {"a": 1.0})
    assert checkpoint.newest(tmp_path).name == "ckpt_epoch_0_step_8.pth"


def test_an_error_in_mid_epoch_validation_saves_too(tmp_path):
    def fail(epoch: int, step: int) -> dict[str, float]:
        raise ValueError("a bad picture")

    with pytest.raises(ValueError, match="a bad picture"):
        toy_train.run(tmp_path, CPU, epochs=1, validate=fail, validate_steps=3)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["ckpt_epoch_0_step_3.pth"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    toy_train.run(None, CPU, epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_weights_of_another_model_are_refused(tmp_path):
    toy_train.run(tmp_path, CPU, epochs=1, noisy=False)
    with pytest.raises(ValueError, match="weights do not fit the model"):
        toy_train.run(tmp_path, CPU, epochs=2, noisy=True, resume=tmp_path / "ckpt_epoch_0.pth")


def test_another_data_set_is_refused_in_mid_epoch(tmp_path):
    toy_train.run(tmp_path, CPU, epochs=1, max_steps=2)
    with pytest.raises(ValueError, match="num_samples 32, this run's over 36"):
        toy_train.run(tmp_path, CPU, epochs=1, num_samples=36, resume=checkpoint.newest(tmp_path))


@pytest.mark.parametrize("limit", [{}, {"max_steps": 25}])
def test_another_batch_size_on_resume_keeps_the_schedule_in_place(tmp_path, limit):
    """12 of 32 samples of the second epoch are used; with batch 2 that is step 16 + 6 of 32."""
    toy_train.run(tmp_path, CPU, epochs=2, max_steps=11)
    with MetricLog(tmp_path, tensorboard=False) as metrics:
        newest = checkpoint.newest(tmp_path)
        result, _ = toy_train.run(
            tmp_path, CPU, epochs=2, batch_size=2, resume=newest, print_freq=1, metrics=metrics, **limit
        )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 12
    assert lines[0]["train/lr"] == pytest.approx(0.025 * (1 + math.cos(math.pi * 22 / 32)))
    assert result.position.step == 11 + 10


def test_settings_of_the_optimizer_are_the_resumed_runs_own(tmp_path):
    toy_train.run(tmp_path, CPU, epochs=1)  # its weight decay is 0.1
    payload = checkpoint.load(tmp_path / "ckpt_epoch_0.pth")
    for group in payload["optimizer"]["param_groups"]:
        group["weight_decay"] = 0.7
    checkpoint.save(tmp_path, payload, "ckpt_epoch_0_other.pth")
    toy_train.run(tmp_path, CPU, epochs=2, resume=tmp_path / "ckpt_epoch_0_other.pth")
    groups = checkpoint.load(tmp_path / "ckpt_epoch_1.pth")["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]
