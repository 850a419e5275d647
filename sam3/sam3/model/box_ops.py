"""Box formats and the logit of a coordinate: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

# Coordinates nearer than this to 0 or 1 count as this near, so that logits stay within +-6.91.
LOGIT_EPS = 1e-3


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> left, top, right, bottom, in the same unit."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """The inverse of `box_cxcywh_to_xyxy`."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def inverse_sigmoid(x: Tensor, eps: float = LOGIT_EPS) -> Tensor:
    """log(max(x, eps) / max(1 - x, eps)) of `x` clamped to 0..1."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
