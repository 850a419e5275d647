"""Measures of agreement between predictions, for validation and evaluation.

Letters: `B` masks, `H W` rows and columns of a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_iou(first: Tensor, second: Tensor, valid: Tensor | None = None) -> Tensor:
    """Intersection over union of bool masks `(B, H, W)`: float32 `(B,)` in 0..1; 1 where both are empty.

    valid: bool `(B, H, W)` or `(1, H, W)`, the cells that count in both; None counts all.
    """
    if valid is not None:
        first, second = first & valid, second & valid
    both = (first & second).flatten(1).sum(1).float()
    either = (first | second).flatten(1).sum(1).float()
    return torch.where(either == 0, torch.ones_like(both), both / either.clamp(min=1))
