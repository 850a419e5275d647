"""Layer norm over the channels of a channels-first map.

Letters: B maps, C channels, H W rows and columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """`nn.LayerNorm` over C for maps (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape; the result lies channels last in memory."""
        channels_last = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        normal = F.layer_norm(channels_last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normal.permute(0, 3, 1, 2)
