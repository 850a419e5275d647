from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sam3.engine import amp, batch, distributed
from tests.engine.processes import fork, join


def test_one_plain_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.start("cpu") as world:
        assert (world.rank, world.size, world.device, world.is_main) == (0, 1, torch.device("cpu"), True)
        assert not dist.is_initialized()
        assert distributed.gather_objects("x") == ["x"]
        assert distributed.broadcast_object([1]) == [1]
        assert distributed.mean_over_ranks({"a": torch.tensor(2.0), "b": 3}) == {"a": 2.0, "b": 3.0}
        distributed.barrier()
        model = nn.Linear(2, 2)
        assert distributed.wrap(model, world.device) is model


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("tpu", 1, "device 'tpu' is unknown"),
        ("xla", 1, "device 'xla' is not supported"),
        ("cuda:99", 1, r"device cuda:99 was asked for, but \d+ CUDA devices are visible here"),
        ("mps", 2, "MPS runs one process, not 2|device mps was asked for, but this machine has none"),
    ],
)
def test_devices_that_cannot_be(name, size, message):
    with pytest.raises(ValueError, match=message):
        distributed.choose_device(name, size)


def test_planned_world_size(monkeypatch):
    assert distributed.planned_world_size() == 1
    monkeypatch.setenv("SAM3_PLANNED_WORLD_SIZE", "16")
    assert distributed.planned_world_size() == 16


def _exchange(argv: list[str]) -> int:
    """Run in three processes; each writes what it saw."""
    folder = Path(argv[0])
    with distributed.start("cpu") as world:
        seen = {
            "world": [world.rank, world.size, distributed.rank(), distributed.world_size()],
            "sum": distributed.sum_over_ranks({"b": world.rank, "a": torch.tensor(1.5)}),
            "mean": distributed.mean_over_ranks({"x": float(world.rank)}),
            "gathered": distributed.gather_objects({"rank": world.rank}),
            "broadcast": distributed.broadcast_object(f"from {world.rank}", source=1),
        }
        with distributed.main_first():
            if world.is_main:
                time.sleep(0.2)
                (folder / "cache").write_text("done")
            seen["cache"] = (folder / "cache").read_text()
        model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        model[0].running_mean.fill_(float(world.rank))
        model[0].running_var.copy_(torch.tensor([1.0, 10.0]) * (world.rank + 1))
        model[0].num_batches_tracked.fill_(7)
        distributed.average_batchnorm(model)
        seen["bn"] = [model[0].running_mean.tolist(), model[0].running_var.tolist(), int(model[0].num_batches_tracked)]
    seen["left"] = not dist.is_initialized()
    (folder / f"seen_{world.rank}.json").write_text(json.dumps(seen))
    return 0


def test_three_processes(tmp_path):
    assert join(fork(_exchange, [str(tmp_path)], 3)) == [0, 0, 0]
    for rank in range(3):
        seen = json.loads((tmp_path / f"seen_{rank}.json").read_text())
        assert seen["world"] == [rank, 3, rank, 3]
        assert seen["sum"] == {"a": 4.5, "b": 3.0}
        assert seen["mean"] == {"x": 1.0}
        assert seen["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert seen["broadcast"] == "from 1"
        assert seen["cache"] == "done"
        assert seen["bn"] == [[1.0, 1.0], [2.0, 20.0], 7]
        assert seen["left"]


def _fail_in_main(argv: list[str]) -> int:
    with distributed.start("cpu") as world:
        if world.is_main:
            raise ValueError("no such file")
    return int(dist.is_initialized())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
def test_the_group_is_left_on_errors(tmp_path):
    assert join(fork(_fail_in_main, [], 2)) == [1, 0]


def test_synchronised_batchnorm_needs_cuda():
    with pytest.raises(ValueError, match="runs on CUDA only, not on cpu"):
        distributed.sync_batchnorm(nn.BatchNorm1d(2), torch.device("cpu"))


def test_batches_move_as_they_are():
    @dataclass
    class Inner:
        sizes: torch.Tensor
        key: str

    @dataclass
    class Outer:
        images: torch.Tensor
        inner: Inner
        more: dict

    moved = batch.to_device(
        Outer(torch.zeros(2, dtype=torch.uint8), Inner(torch.ones(1).half(), "k"), {"a": [torch.ones(1)]}),
        torch.device("meta"),
    )
    assert moved.images.is_meta
    assert moved.images.dtype == torch.uint8
    assert moved.inner.sizes.is_meta
    assert moved.inner.sizes.dtype == torch.float16
    assert moved.inner.key == "k"
    assert moved.more["a"][0].is_meta


def test_amp_choices():
    cpu = torch.device("cpu")
    assert amp.resolve_amp_dtype(False, "fp16", cpu) is None
    assert amp.resolve_amp_dtype(True, "auto", cpu) is None
    assert amp.resolve_amp_dtype(True, "bf16", cpu) is torch.bfloat16
    assert amp.resolve_amp_dtype(True, "fp16", cpu) is torch.float16
    with pytest.raises(ValueError, match="AMP_DTYPE is 'int8'"):
        amp.resolve_amp_dtype(True, "int8", cpu)
    with amp.autocast(cpu, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with amp.autocast(cpu, None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_an_optimizer_that_is_not_fused_skips_too():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adagrad([weight], lr=1.0)
    scaler = amp.make_scaler(torch.device("cpu"), None)
    weight.grad = torch.ones(2)
    amp.step_unless_bad(optimizer, scaler, torch.tensor(True))
    assert torch.equal(weight, torch.ones(2))
    amp.step_unless_bad(optimizer, scaler, torch.tensor(False))
    assert not torch.equal(weight, torch.ones(2))
