"""Pure functions from tensors to losses; all are computed in float32, whatever comes in.

Letters: `B` images, `C` channels, `H W` rows and columns of the embedding grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MSE_REDUCTIONS = ("channel_mean", "channel_sum")


def build_valid_mask(sizes: Tensor, img_size: int, grid: int) -> Tensor:
    """Which cells of the grid look at the picture rather than at the padding.

    sizes: `(B, 2)` integer rows and columns of each picture inside its `img_size` square.
    Returns float `(B, 1, grid, grid)`, ones in a top-left block, zeros elsewhere.

    A cell is valid if a mask of ones over the picture, resized bilinearly to the grid, exceeds 0.5 there. At the
    cell's centre that holds for `(h + (p - 1) // 2) // p` rows with `p = img_size / grid` pixels a cell: for
    1008 -> 72 this is `(h + 6) // 14`.
    """
    if img_size % grid:
        raise ValueError(f"img_size (={img_size}) must be a multiple of the grid (={grid})")
    cell = img_size // grid
    valid = (sizes.to(torch.int64) + (cell - 1) // 2) // cell  # (B, 2)
    steps = torch.arange(grid, device=sizes.device)
    rows = steps < valid[:, :1]  # (B, grid)
    columns = steps < valid[:, 1:]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1).float()


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor, reduction: str = "channel_mean") -> Tensor:
    """Squared error over the valid cells of each image, then the mean over images: a scalar.

    prediction, target: `(B, C, H, W)`; mask: `(B, 1, H, W)` of zeros and ones.
    `channel_mean`: sum over C, H, W of (p - t)^2 m / (C max(1, sum m)), a true mean per element.
    `channel_sum`: the same without the C below, C times as large.
    """
    if reduction not in MSE_REDUCTIONS:
        raise ValueError(f"MSE reduction {reduction!r} is unknown; choose one of {', '.join(MSE_REDUCTIONS)}")
    error = (prediction.float() - target.float()).square().sum(1, keepdim=True)  # (B, 1, H, W)
    if reduction == "channel_mean":
        error = error / prediction.shape[1]
    return _mean_over_valid(error, mask).mean()


def masked_cosine(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """One minus the cosine of the channel vectors, over the valid cells of each image, then over images: a scalar."""
    return (1 - masked_cosine_per_image(prediction, target, mask)).mean()


def masked_cosine_per_image(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine similarity of the channel vectors over the valid cells: `(B,)` in -1..1; 1 where nothing is valid."""
    distance = 1 - F.cosine_similarity(prediction.float(), target.float(), dim=1, eps=1e-8).unsqueeze(1)
    return 1 - _mean_over_valid(distance, mask)


def _mean_over_valid(values: Tensor, mask: Tensor) -> Tensor:
    """values, mask: `(B, 1, H, W)` -> `(B,)`: sum of values where the mask is one, over the number of ones."""
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
