"""What the benchmarks of training and of the memory share: a measurement in a process of its own, and timed steps."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3.engine import amp
from sam3.engine.meters import max_memory_gib

TOLERANCE = {None: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # relative distance of the losses, by autocast


def measure_apart(
    program: str, what: str, flags: Sequence[str], args: Namespace, options: Sequence[str]
) -> dict[str, Any]:
    """Figures of one measurement in a fresh process, so that its peak memory is its own.

    Runs `program` (a path) with `flags`, with the values that `args` has for `options`, and with `--result FILE`, where
    it puts its figures by `torch.save`: a dict of numbers and texts. `what` is measured, for the user to read.
    Raises ValueError if the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        command = [sys.executable, program, *flags, "--result", str(result)]
        for name in options:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        print(f"measuring {what} ...", file=sys.stderr, flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise ValueError(f"measuring {what} failed, out of memory if it says nothing else above")
        return torch.load(result, weights_only=True)


def measure_training(
    distiller: nn.Module, batch: Any, device: torch.device, amp_dtype: str, repeats: int
) -> dict[str, Any]:
    """Times `repeats` steps (forward, backward, AdamW) on one batch, both on `device` already.

    `distiller(batch)["total"]` is the loss; `amp_dtype` is auto, bf16, fp16 or off. Returns `step_s` of the fastest
    step, `peak_gib` of the process, `loss` of the first step and the `tolerance` within which another way of computing
    it agrees, `trained` parameters, `autocast` and `device` as texts.
    """
    dtype = amp.resolve_amp_dtype(amp_dtype != "off", amp_dtype, device)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-6)
    losses = []

    def step() -> None:
        with amp.autocast(device, dtype):
            loss = distiller(batch)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return {
        "step_s": fastest(step, repeats, device)[0],
        "peak_gib": max_memory_gib(device),
        "loss": losses[0],
        "trained": sum(p.numel() for p in distiller.parameters()),
        "tolerance": TOLERANCE[dtype],
        "autocast": str(dtype).removeprefix("torch.") if dtype else "off",
        "device": device_name(device),
    }


def fastest(function: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, float]:
    """Smallest wall time and smallest processor time of `repeats` runs, in seconds, the device's work included."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        synchronize(device)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The name of a CUDA card, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
