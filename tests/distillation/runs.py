"""Command lines of the distillation at sizes for tests, in this process and in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import train_distill

PROGRAM = "train_distill.py"
# 112 px with the made-up teacher: grids 32, 16, 8 against the student's 28, 14, 7, and 20 queries against 10.
SMALL: dict[str, Any] = {
    "teacher_backend": "fake",
    "image_size": 112,
    "student": "tiny",
    "num_val": 3,
    "device": "cpu",
    "grad_accum_steps": 2,
    "phase1_epochs": 1,
    "phase1_lr": 1e-3,
    "phase1_warmup": 2,
    "phase2_epochs": 1,
    "log_every_steps": 1,
    "save_every_steps": 1,
    "keep_last": 0,
    "tensorboard": "false",
    "memory_budget_gb": 64,  # the peak is that of the whole process, and these tests share theirs with large models
}


def arguments(data: Path, output: Path, *flags: str, **settings: Any) -> list[str]:
    """8 pictures and 3 for validation: 4 steps an epoch; `settings` are fields of DistillationConfig."""
    pairs = [f"{key}={value}" for key, value in {**SMALL, "log_dir": output / "logs", **settings}.items()]
    return ["--data", str(data), "--output", str(output), *flags, "--opts", *pairs]


def run(data: Path, output: Path, *flags: str, **settings: Any) -> int:
    """The program in this process: see `arguments`. Returns its exit code."""
    return train_distill.main(arguments(data, output, *flags, **settings))
