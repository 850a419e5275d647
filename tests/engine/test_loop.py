"""The steps of the training loop: updates, accumulation, bad gradients, mixed precision, validation, its log."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sam3.engine import checkpoint
from sam3.engine.distributed import World
from sam3.engine.log import MetricLog
from sam3.engine.loop_settings import LoopSettings
from tests.engine import toy_train

CPU = World(0, 1, 0, torch.device("cpu"))


def assert_same(first: dict, second: dict) -> None:
    """Two checkpoints hold bit-equal weights, optimizer state and random numbers, at the same place."""
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    for index, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["optimizer"]["state"][index][name])), name
    assert torch.equal(first["rng"][0]["torch"], second["rng"][0]["torch"])
    assert [first[k] for k in ("epoch", "step", "samples", "epoch_complete")] == [
        second[k] for k in ("epoch", "step", "samples", "epoch_complete")
    ]


def test_training_lowers_the_loss_and_writes_what_it_says(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as metrics:
        result, _ = toy_train.run(tmp_path, CPU, epochs=30, noisy=False, print_freq=8, metrics=metrics, save_freq=10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.position == checkpoint.Position(30, 240, 0)
    assert [line["step"] for line in lines] == list(range(8, 241, 8))
    assert lines[-1]["train/loss_total"] < 0.1 * lines[0]["train/loss_total"]
    assert {"train/lr", "train/grad_norm", "train/step_ms", "train/data_ms", "train/images_per_s"} <= lines[0].keys()
    assert sorted(p.name for p in tmp_path.glob("ckpt*")) == [f"ckpt_epoch_{e}.pth" for e in (19, 29, 9)]


def test_first_adamw_step_is_the_one_worked_out_by_hand(tmp_path):
    """Adam's first update is -lr sign(g) for gradients far above eps; decay multiplies by 1 - lr * 0.1 before."""
    before = toy_train.ToyDistiller(noisy=False)
    for i, parameter in enumerate(before.parameters()):
        torch.nn.init.uniform_(parameter, -0.5, 0.5, generator=torch.Generator().manual_seed(i))
    data = toy_train.ToyData(4)
    before(toy_train.ToyBatch(data.inputs, data.targets))["total"].backward()
    _, after = toy_train.run(None, CPU, epochs=1, num_samples=4, noisy=False, lr=0.01)
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        decay = 1 - 0.01 * 0.1 if p.ndim > 1 else 1.0
        expected = p * decay - 0.01 * p.grad.sign() * (p.grad != 0)
        torch.testing.assert_close(q, expected, atol=1e-5, rtol=0)


def test_accumulation_equals_the_larger_batch(tmp_path):
    _, joined = toy_train.run(None, CPU, batch_size=8, noisy=False, clip_grad=0.5)
    _, split = toy_train.run(None, CPU, batch_size=2, accumulation=4, noisy=False, clip_grad=0.5)
    for p, q in zip(joined.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("remainder", "steps"), [(False, 2), (True, 3)])
def test_remainder_of_an_accumulation_group(remainder, steps):
    result, _ = toy_train.run(None, CPU, epochs=1, accumulation=3, step_remainder=remainder)  # 8 batches
    assert result.position.step == steps


def test_validation_sees_eval_mode_and_leaves_random_numbers_alone(tmp_path):
    plain = toy_train.run(None, CPU, epochs=2)[1]

    def validate(epoch: int, step: int) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        torch.rand(7)
        return {}

    checked = toy_train.run(None, CPU, epochs=2, validate=validate, validate_steps=3)[1]
    for p, q in zip(plain.parameters(), checked.parameters(), strict=True):
        assert torch.equal(p, q)


def test_eval_bn_keeps_running_statistics():
    _, model = toy_train.run(None, CPU, epochs=1, eval_bn=True)
    assert torch.equal(model.student[1].running_mean, torch.zeros(8))
    _, model = toy_train.run(None, CPU, epochs=1)
    assert model.student[1].running_mean.abs().sum() > 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_with_bad_gradients_changes_nothing(optimizer):
    """One of four samples is NaN: the other three steps are done, also if it comes first, before any state exists."""
    options = {"batch_size": 1, "num_samples": 4, "noisy": False, "epochs": 1, "optimizer": optimizer, "lr": 0.01}
    order = toy_train.EpochSampler(4, 1, seed=3).permutation().tolist()
    for position in (0, 3):
        _, model = toy_train.run(None, CPU, bad=[order[position]], clip_grad=1.0, **options)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        expected = _steps_by_hand([i for i in order if i != order[position]], order, optimizer)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def _steps_by_hand(used: list[int], order: list[int], name: str) -> torch.nn.Module:
    """Plain torch over the good samples, each with the learning rate of its own step."""
    model = toy_train.ToyDistiller(noisy=False)
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.uniform_(parameter, -0.5, 0.5, generator=torch.Generator().manual_seed(i))
    groups = toy_train.parameter_groups(model, 0.1)
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, foreach=False)
    data = toy_train.ToyData(4)
    for i in used:
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (1 + math.cos(math.pi * order.index(i) / 4))
        optimizer.zero_grad()
        model(toy_train.ToyBatch(data.inputs[i : i + 1], data.targets[i : i + 1]))["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def test_training_aborts_after_bad_steps_in_a_row():
    with pytest.raises(ValueError, match=r"not finite in 8 steps in a row, up to step 8"):
        toy_train.run(None, CPU, epochs=1, bad=range(32), noisy=False, max_bad_steps=5, print_freq=100)


def test_bad_steps_apart_do_not_abort():
    order = toy_train.EpochSampler(32, 4, seed=3).permutation().tolist()
    result, _ = toy_train.run(
        None, CPU, epochs=1, bad=[order[0], order[8], order[16]], noisy=False, max_bad_steps=2, print_freq=1
    )
    assert result.position.step == 8


def test_a_model_poisoned_with_nan_is_not_saved(tmp_path):
    """BatchNorm's running statistics take NaN in from the forward pass, though the step itself is skipped."""
    with pytest.raises(ValueError, match=r"1\.running_mean holds NaN or infinite values after step 8"):
        toy_train.run(tmp_path, CPU, epochs=1, bad=[0])
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_resumes(tmp_path, dtype):
    options = {"noisy": False, "amp_dtype": dtype, "print_freq": 4}
    toy_train.run(tmp_path, CPU, epochs=12, **options)
    last = checkpoint.load(tmp_path / "ckpt_epoch_11.pth")
    assert bool(last["scaler"]) == (dtype == torch.float16)
    for epoch in range(6, 12):
        (tmp_path / f"ckpt_epoch_{epoch}.pth").unlink()
    toy_train.run(tmp_path, CPU, epochs=12, resume=checkpoint.newest(tmp_path), **options)
    assert_same(last, checkpoint.load(tmp_path / "ckpt_epoch_11.pth"))
    data = toy_train.ToyData(32)
    model = toy_train.ToyDistiller(noisy=False)
    model.student.load_state_dict(last["model"])
    assert model(toy_train.ToyBatch(data.inputs, data.targets))["total"] < 1.0


def test_fp16_overflow_lowers_the_scale_and_skips(tmp_path):
    """Gradients of a few units times the first scale of 65536 overflow float16; the scale halves until they fit."""
    with MetricLog(tmp_path, tensorboard=False) as metrics:
        toy_train.run(None, CPU, noisy=False, amp_dtype=torch.float16, print_freq=1, metrics=metrics, lr=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = lines[-1]["train/skipped_steps"]
    assert skipped > 0
    assert lines[-1]["train/amp_scale"] == 65536 / 2**skipped
    assert [line["train/grad_norm"] for line in lines].count(None) == skipped  # no finite norm in these


def test_too_few_batches_for_one_step():
    with pytest.raises(ValueError, match=r"8 batches per epoch and process are fewer than the 9 accumulated"):
        toy_train.run(None, CPU, accumulation=9)


@pytest.mark.parametrize("field", ["epochs", "accumulation", "print_freq", "save_freq", "max_bad_steps"])
def test_settings_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        LoopSettings(**{"epochs": 1, field: 0})


class CountReads(TorchDispatchMode):
    """Counts values that Python asks a tensor for (`item()`, `bool()`, `float()`): on a GPU each one waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_value_is_read_from_the_device_between_print_steps(dtype, optimizer):
    counts = []
    for num_samples in (8, 80):  # 2 and 20 steps, one print each
        with CountReads() as reads:
            toy_train.run(
                None,
                CPU,
                epochs=1,
                num_samples=num_samples,
                clip_grad=1.0,
                print_freq=1000,
                amp_dtype=dtype,
                optimizer=optimizer,
            )
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_log_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sam3"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="sam3.train"):
        toy_train.run(None, CPU, epochs=1, print_freq=4)
    assert "epoch 0/1 step 4/8 (50.0%) | loss mse" in caplog.text
    assert "images/s" in caplog.text
