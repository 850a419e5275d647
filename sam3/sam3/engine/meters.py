"""Sums of a training run that stay on the device until a print step reads them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sam3.engine.log import duration


@dataclass(frozen=True)
class BadSteps:
    """Steps with non-finite gradients: all so far, the longest run of them and the step at which it ended."""

    total: int
    longest: int
    longest_end: int


class StepMeter:
    """Adds up losses, gradient norms and bad steps on the device. `read` is the only call that waits for it."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), device=device)
        self._zero = zero
        self._run, self._total, self._longest, self._longest_end = zero, zero, zero, zero
        self._reset()

    def _reset(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._norm_sum = self._norm_count = self._zero
        self._micro = 0

    @torch.no_grad()
    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Losses of one micro-batch: named scalars on the device."""
        for name, value in losses.items():
            value = value.detach().float()
            self._losses[name] = self._losses[name] + value if name in self._losses else value
        self._micro += 1

    @torch.no_grad()
    def add_step(self, norm: Tensor, step: int) -> Tensor:
        """Gradient norm of optimizer step `step`. Returns bool scalar on the device: is it NaN or infinite?"""
        bad = ~torch.isfinite(norm)
        self._norm_sum = self._norm_sum + torch.where(bad, 0.0, norm.float())
        self._norm_count = self._norm_count + ~bad
        self._run = (self._run + 1) * bad
        self._total = self._total + bad
        longer = self._run > self._longest
        self._longest = torch.where(longer, self._run, self._longest)
        self._longest_end = torch.where(longer, float(step), self._longest_end)
        return bad

    def read(self) -> tuple[dict[str, float], float, BadSteps]:
        """Mean losses, mean of the finite gradient norms (NaN if none is) since the last call; count of bad steps."""
        names = sorted(self._losses)
        tail = [self._norm_sum, self._norm_count, self._total, self._longest, self._longest_end]
        numbers = torch.stack([*(self._losses[name] for name in names), *tail]).tolist()
        norm_sum, norm_count, total, longest, longest_end = numbers[len(names) :]
        losses = {name: number / max(self._micro, 1) for name, number in zip(names, numbers, strict=False)}
        self._reset()
        norm = norm_sum / norm_count if norm_count else float("nan")
        return losses, norm, BadSteps(int(total), int(longest), int(longest_end))


class Stopwatch:
    """Seconds per step and seconds spent waiting for data, over the window since the last print and over the run."""

    def __init__(self) -> None:
        self.steps = self.total_steps = 0
        self.seconds = self.total_seconds = self.data_seconds = 0.0
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Count from now on; what was done since the last `tick` (validation, saving) is left out."""
        self._since = time.perf_counter()

    def add_data(self, seconds: float) -> None:
        self.data_seconds += seconds

    def tick(self, steps: int = 1) -> None:
        """`steps` more steps are done."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self.total_seconds += now - self._since
        self._since = now
        self.steps += steps
        self.total_steps += steps

    def window(self) -> tuple[float, float]:
        """Seconds per step, and of these waiting for data, since the last call."""
        steps = max(self.steps, 1)
        result = (self.seconds / steps, self.data_seconds / steps)
        self.steps, self.seconds, self.data_seconds = 0, 0.0, 0.0
        return result

    @property
    def seconds_per_step(self) -> float:
        """Over the whole run."""
        return self.total_seconds / max(self.total_steps, 1)


def max_memory_gib(device: torch.device) -> float:
    """Most memory that tensors took on the device, or that this process took on the CPU, so far; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def step_line(
    done: int, total: int, values: Mapping[str, float], unit: str, remaining_s: float, shown: Mapping[str, str]
) -> str:
    """A print step's `train/...` values for people. shown: losses to print -> their names; none: all of them."""
    losses = {name[11:]: value for name, value in values.items() if name.startswith("train/loss_")}
    labels = {name: shown[name] for name in shown if name in losses} or dict(zip(losses, losses, strict=True))
    listed = " ".join(f"{label} {losses[name]:.4g}" for name, label in labels.items())
    skipped = f" | skipped {values['train/skipped_steps']}" if values["train/skipped_steps"] else ""
    return (
        f"step {done}/{total} ({100 * done / total:.1f}%) | loss {listed} | lr {values['train/lr']:.3g} | "
        f"grad norm {values['train/grad_norm']:.3g} | {values['train/step_ms']:.0f} ms/step, "
        f"data {values['train/data_ms']:.0f} ms, {values[f'train/{unit}_per_s']:.3g} {unit}/s | "
        f"{values['train/max_mem_gib']:.2f} GiB | ETA {duration(remaining_s)}{skipped}"
    )
