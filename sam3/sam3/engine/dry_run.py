"""Timing for `--dry-run`: a few real iterations, then the length of the whole job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

MAX_ITERATIONS = 5
MAX_SECONDS = 30.0


def seconds_per_iteration(batches: Iterable[Any], run: Callable[[Any], Any], device: torch.device) -> float:
    """Mean seconds of `run(batch)` with the time to load the batch; the first of several is a warm-up and left out.

    At most MAX_ITERATIONS, and none begun after MAX_SECONDS. Raises ValueError if there is no batch.
    """
    iterator = iter(batches)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) <= MAX_ITERATIONS and time.perf_counter() - start < MAX_SECONDS:
        begin = time.perf_counter()
        if (batch := next(iterator, None)) is None:
            break
        run(batch)
        _wait(device)
        times.append(time.perf_counter() - begin)
    if not times:
        raise ValueError("there is nothing to time: no batch could be loaded")
    measured = times[1:] or times
    return sum(measured) / len(measured)


def repeated(batches: Iterable[Sized]) -> Iterator[Any]:
    """The batches that hold pictures, again and again, so that a small data set can be timed too; ends if none does."""
    found = True
    while found:
        found = False
        for batch in batches:
            if len(batch):
                found = True
                yield batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
