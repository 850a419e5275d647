"""Seeds and the state of all random generators, in forms that `torch.load(weights_only=True)` reads back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch (all devices), numpy and python. Pass a different seed to each process: `SEED + rank`.

    deterministic: fail on operations whose result varies between runs, instead of picking the fastest.
    """
    reseed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def reseed(seed: int) -> None:
    """Seed torch (all devices), numpy and python, and change nothing else."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from numpy's global generator
    torch.manual_seed(seed)


def get_state() -> dict[str, Any]:
    """State of the generators of torch (CPU and this process's accelerator), numpy and python."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(words, dtype=torch.int64), next_gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_state(state: Mapping[str, Any]) -> None:
    """Put back what `get_state` returned; a device that is not here now is passed over."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), next_gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


@contextmanager
def preserved(seed: int | None = None) -> Iterator[None]:
    """Leave all generators afterwards as they were before; inside, start from `seed` if one is given."""
    state = get_state()
    try:
        if seed is not None:
            reseed(seed)
        yield
    finally:
        set_state(state)
