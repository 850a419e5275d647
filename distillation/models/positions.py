"""Sine positions that count cells, the alternative to SAM3's, which run to 2 pi on a grid of any size.

Letters: C = dim channels, H W rows and columns, m = C / 2 channels of one axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam3.model.position_encoding import PositionEmbeddingSine


class PixelPositions(PositionEmbeddingSine):
    """As `PositionEmbeddingSine`, with angles 1, 2, 3, ... radians for the rows and the columns."""

    def _map(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        count = torch.arange(1, max(height, width) + 1, dtype=torch.float32, device=device)
        codes = self._sine(count).to(dtype).T  # (m, max(H, W))
        y = codes[:, :height, None].expand(-1, -1, width)
        x = codes[:, None, :width].expand(-1, height, -1)
        return torch.cat((y, x))[None]  # (1, C, H, W)
