"""Removes holes and specks from masks, on the CPU through OpenCV.

Letters: N masks, h w their rows and columns.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor


def require_opencv() -> None:
    """OSError with the command to run if OpenCV is not installed."""
    if find_spec("cv2") is None:
        raise OSError("filling holes in masks needs OpenCV: pip install opencv-python, or set the hole area to 0")


def fill_holes(logits: Tensor, area: int, value: float) -> Tensor:
    """Mask logits (N, 1, h, w) whose background regions of at most `area` cells are set to `value`.

    Cells that touch by a corner are of one region. A mask is where the logit is above 0.
    """
    small = _small_regions(logits <= 0, torch.full((len(logits),), area))
    return torch.where(small, value, logits)


def remove_specks(logits: Tensor, area: int, value: float) -> Tensor:
    """Mask logits (N, 1, h, w) whose foreground regions of at most `area` cells are set to `value`.

    Regions of more than half of a mask stay, so that small objects do not vanish.
    """
    mask = logits > 0
    half = mask.flatten(1).sum(dim=1) // 2
    small = _small_regions(mask, half.clamp(max=area))
    return torch.where(small, value, logits)


def _small_regions(regions: Tensor, areas: Tensor) -> Tensor:
    """Of bool (N, 1, h, w), the 8-connected regions of at most `areas` (N,) cells."""
    import cv2  # only this needs it

    result = np.zeros(tuple(regions.shape), dtype=bool)
    limits = areas.tolist()
    for n, cells in enumerate(regions[:, 0].to("cpu", torch.uint8).numpy()):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
        small = stats[:, cv2.CC_STAT_AREA] <= limits[n]
        small[0] = False  # what is not in `regions`
        result[n, 0] = small[labels]
    return torch.from_numpy(result).to(regions.device)
