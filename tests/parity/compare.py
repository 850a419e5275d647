"""The pass rule of the fixtures: relative distance over the finite values."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tests.parity.fill import probe


def distance(ours: Tensor, theirs: np.ndarray) -> float:
    """norm(ours - theirs) / norm(theirs) of the probes; infinite where one is finite and the other is not."""
    probes = probe(ours)
    assert probes.shape == theirs.shape, f"{probes.shape} probes of {tuple(ours.shape)}, expected {theirs.shape}"
    finite = np.isfinite(theirs)
    if not np.array_equal(finite, np.isfinite(probes)):
        return float("inf")
    return float(np.linalg.norm((probes - theirs)[finite]) / np.linalg.norm(theirs[finite]))
