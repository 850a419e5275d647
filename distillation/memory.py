"""The memory budget: what a run takes at least, what it took at most, and whether the system is short of it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import torch
from torch import nn

from distillation.config import DistillationConfig
from sam3.engine import meters

YELLOW = 2  # of macOS's levels 1 normal, 2 warning, 4 critical
logger = logging.getLogger("sam3.distillation")


def fixed_gb(teacher: nn.Module | None, student: nn.Module) -> dict[str, float]:
    """GB (1e9 bytes) that stay taken in training: by the teacher, the student, its gradients and AdamW's moments."""
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    return {
        "teacher": _gb(teacher) if teacher is not None else 0.0,
        "student": _gb(student),
        "gradients": trained / 1e9,
        "AdamW": 2 * trained / 1e9,
    }


def peak_gb(device: torch.device) -> float:
    """Most GB that tensors took on the device, or this process on the CPU, so far; NaN if the system does not say."""
    return meters.max_memory_gib(device) * 2**30 / 1e9


def pressure_level() -> int | None:
    """macOS's memory pressure: 1 normal, 2 warning ("yellow"), 4 critical; None elsewhere."""
    if sys.platform != "darwin" or not (sysctl := shutil.which("sysctl")):
        return None
    command = [sysctl, "-n", "kern.memorystatus_vm_pressure_level"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def over_budget(config: DistillationConfig, device: torch.device) -> str:
    """What is wrong with the memory so far, or "" if all is well."""
    problems = []
    if (peak := peak_gb(device)) > config.memory_budget_gb:
        problems.append(f"{peak:.2f} GB were taken on {device}, above memory_budget_gb {config.memory_budget_gb:g}")
    if (level := pressure_level()) is not None and level >= YELLOW:
        problems.append(f"the system is short of memory (pressure level {level}, normal is 1)")
    return "; ".join(problems)


def check_budget(config: DistillationConfig, device: torch.device) -> None:
    """Warn above the budget; ValueError with strict_memory."""
    if problem := over_budget(config, device):
        if config.strict_memory:
            raise ValueError(f"{problem}; lower batch_size, cache the teacher, or leave --strict-memory out")
        logger.warning(problem)


def _gb(module: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())) / 1e9
