"""Batches as dataclasses of tensors, moved between devices."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all tensors on `device`, in their stored types; CUDA copies of pinned ones are not waited for.

    A batch is a tensor, a dataclass, dict, list or tuple of batches; anything else is kept as it is.
    """
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))


def pin(batch: Batch) -> Batch:
    """The batch with all tensors in page-locked memory.

    A DataLoader pins what has a `pin_memory()` method; a batch dataclass writes `return pin(self)` there.
    """
    return _map(batch, lambda tensor: tensor.pin_memory())


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _map(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return value
