"""Masks of a video over the cells of the model's square.

Letters: H W rows and columns of the video, S side of the square, h w rows and columns of the video inside it, M side of
the grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.transforms import Preprocess

HALF = 0.5 - 1e-4  # the hair is for rounding


def grid_masks(masks: Tensor, preprocess: Preprocess, cells: int) -> Tensor:
    """bool (..., H, W) -> bool (..., M, M): the cells of which the object covers at least half.

    Of a cell that the video's edge cuts, the part inside counts. Cells that lie mostly in the padding are False; what
    they hold of the video counts to the cells before them. An object that covers no cell half keeps those that it
    covers most, so that what is there is never lost.
    """
    height, width = masks.shape[-2:]
    pixels_per_cell = preprocess.img_size / cells
    edges = []
    for length, fitted in zip((height, width), preprocess.fitted_size(height, width), strict=True):
        steps = (torch.arange(cells + 1) * pixels_per_cell).clamp(max=fitted)
        num_inside = int((steps.diff() > pixels_per_cell / 2).sum())
        steps[max(num_inside, 1) :] = fitted
        edges.append(steps * (length / fitted))
    grid = torch.zeros(*masks.shape[:-2], cells, cells, dtype=torch.bool)
    for mask, out in zip(masks.flatten(0, -3), grid.view(-1, cells, cells), strict=True):
        if mask.any():  # one by one: what is at work then stays in the processor's cache
            shares = mean_between(mask, *edges)
            out[:] = shares >= HALF
            if not out.any():
                out[:] = shares == shares.max()
    return grid


def shrink_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """bool (N, H, W) -> bool (N, *size): the pixels of which the object covers at least half."""
    if masks.shape[1:] == size:
        return masks
    edges = [torch.linspace(0, length, new + 1) for length, new in zip(masks.shape[1:], size, strict=True)]
    shrunk = torch.zeros(len(masks), *size, dtype=torch.bool)
    for mask, out in zip(masks, shrunk, strict=True):
        out[:] = mean_between(mask, *edges) >= HALF
    return shrunk


def mean_between(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean of a mask (H, W) in each rectangle between neighbouring edges: float32 (len(rows) - 1, len(columns) - 1).

    rows, columns: ascending, 0..H and 0..W in pixels, fractions too. Where two edges are one, the mean is 0.
    """
    means = torch.zeros(len(mask), len(columns) - 1)
    occupied = mask.any(1).nonzero()[:, 0]
    if len(occupied):  # most objects are in few rows
        band = slice(int(occupied[0]), int(occupied[-1]) + 1)
        means[band] = _mean_along(mask[band].float(), columns)
    return _mean_along(means.T, rows).T


def _mean_along(values: Tensor, edges: Tensor) -> Tensor:
    """(R, L) -> (R, len(edges) - 1)."""
    whole = edges.long().clamp(max=values.shape[1] - 1)
    sums = F.pad(values.cumsum(1), (1, 0))  # sums[:, i]: of the first i values
    up_to = sums[:, whole] + values[:, whole] * (edges - whole)
    return up_to.diff(dim=1) / edges.diff().clamp(min=1e-6)
