"""All of SAM3 distilled into a slim student: its outputs by set prediction, and its features.

The names below are imported when they are first used: a program that only reads a student needs no training code.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DistillationConfig": "distillation.config",
    "SA1BDistillDataset": "distillation.dataset",
    "HungarianMatcher": "distillation.hungarian",
    "DistillationLoss": "distillation.losses",
    "DistillationTrainer": "distillation.trainer",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
