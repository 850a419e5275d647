"""Processes and devices: the same program runs as one plain process or under torchrun, on CUDA, MPS or the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Who this process is. `with distributed.start() as world:` leaves the process group at the end, come what may."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        stop()


def start(device: str = "auto", timeout: timedelta = TIMEOUT) -> World:
    """Join the other processes, if torchrun started any, and choose the device.

    device: `auto` (CUDA, else MPS, else CPU) | `cpu` | `cuda` | `cuda:N` | `mps`. timeout: how long a process waits
    for the others wherever they meet; one that died is noticed at once, so this is for those that hang.
    Raises ValueError for a device that is not there.
    """
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, size, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # gloo beside nccl: small numbers and objects travel between CPUs, without touching the GPU's queue
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    return World(rank, size, local_rank, chosen)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def planned_world_size() -> int:
    """Processes that the real run will have. A launcher's dry run is one process and states it in the environment."""
    return int(os.environ.get("SAM3_PLANNED_WORLD_SIZE") or world_size())


def choose_device(name: str | torch.device = "auto", size: int = 1, local_rank: int = 0) -> torch.device:
    """The device of this process: see `start`; `meta`, which holds shapes only, is accepted as well.

    size: processes in all; local_rank: which of its machine's this one is.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() and size == 1 else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; choose auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise ValueError(f"device cuda:{index} was asked for, but {count} CUDA devices are visible here")
        if size > 1 and device.index is not None:
            raise ValueError(f"device {name} would put all {size} processes on one GPU; ask for cuda")
        return torch.device("cuda", index)
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device mps was asked for, but this machine has none")
        if size > 1:
            raise ValueError(f"MPS runs one process, not {size}; start python without torchrun")
    elif device.type not in ("cpu", "meta"):
        raise ValueError(f"device {name!r} is not supported; choose auto, cpu, cuda, cuda:N or mps")
    return device


# Who am I, without passing World around -----------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


# Exchange: every process of the run must call these in the same order -----------------------------------------------


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU; dist.barrier() would occupy a GPU


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the body first, the others after it: for a file or cache that one writes and all read."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The value that process `source` passed, on every process. The object is pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """What each process passed, in the order of ranks, on every process. The objects are pickled."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Sums of named scalars over all processes, in one collective. Every process passes the same names."""
    names = sorted(values)
    total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
    if world_size() > 1 and names:
        dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def mean_over_ranks(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Means of named scalars over all processes, in one collective. Every process passes the same names."""
    return {name: value / world_size() for name, value in sum_over_ranks(values).items()}


# Models -------------------------------------------------------------------------------------------------------------


def wrap(model: nn.Module, device: torch.device, find_unused_parameters: bool = False) -> nn.Module:
    """DistributedDataParallel around `model` if there are several processes, else `model` itself.

    BatchNorm statistics stay each process's own until `average_batchnorm`.
    """
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
    )


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with BatchNorm statistics taken over all processes; the parameters stay the same objects."""
    if device.type != "cuda":
        raise ValueError(f"synchronised BatchNorm runs on CUDA only, not on {device.type}; leave out TRAIN.USE_SYNC_BN")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@torch.no_grad()
def average_batchnorm(model: nn.Module) -> None:
    """Replace BatchNorm's running means and variances by their averages over all processes, in one collective."""
    if world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    if not buffers:
        return
    flat = torch.cat([b.double().flatten() for b in buffers])  # several processes never run on MPS, which lacks float64
    dist.all_reduce(flat)
    for buffer, mean in zip(buffers, (flat / world_size()).split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
