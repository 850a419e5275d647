"""The teacher that a configuration names."""

from __future__ import annotations

from typing import Any

import torch

from distillation.config import DistillationConfig
from distillation.teachers.fake import FakeTeacher
from distillation.teachers.hf import HFTeacher, describe_hf
from distillation.teachers.native import NativeTeacher, describe_native
from distillation.teachers.teacher import Teacher

CLASSES = {"native": NativeTeacher, "hf": HFTeacher, "fake": FakeTeacher}


def build_teacher(config: DistillationConfig, device: str | torch.device = "auto", with_trunk: bool = True) -> Teacher:
    """Frozen, on `device`, its prompts encoded; all processes of a run must call it.

    with_trunk: False for a trunk cache: the trunk is neither built nor read.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that fits; the message says what to set.
    """
    return CLASSES[config.teacher_backend](config, device, with_trunk)


def describe_teacher(config: DistillationConfig) -> dict[str, Any]:
    """`build_teacher(config).meta`, without building it where it is large: what caches are compared with."""
    if config.teacher_backend == "native":
        return describe_native(config)
    if config.teacher_backend == "hf":
        return describe_hf(config)
    return FakeTeacher(config, "cpu").meta
