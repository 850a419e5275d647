"""Mixed precision, and optimizer steps that leave everything as it was when a gradient is not finite."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def resolve_amp_dtype(enable: bool, name: str, device: torch.device) -> torch.dtype | None:
    """The type of autocast, or None for float32 throughout.

    name: `bf16` | `fp16` | `auto`, which is bf16 where the accelerator computes in it, else fp16; on the CPU, where
    bf16 is emulated on most machines and slower, it is float32.
    """
    if not enable:
        return None
    if name in ("bf16", "fp16"):
        return torch.bfloat16 if name == "bf16" else torch.float16
    if name != "auto":
        raise ValueError(f"AMP_DTYPE is {name!r}; choose auto, bf16 or fp16")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else None
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype` on `device`; nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def make_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """A loss scaler that acts for float16 only; bf16 has float32's range."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def step_unless_bad(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: Tensor) -> None:
    """One optimizer step, or none if `bad` (bool scalar on the device) is true; the CPU does not wait for the answer.

    With an enabled scaler, which has unscaled the gradients, its own check decides and its scale is updated.
    Otherwise `bad` goes to the fused kernel, which reads it on the device. An optimizer that is not fused has no such
    input; for it the CPU waits.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # the interface GradScaler uses
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bad.item():
        optimizer.step()
