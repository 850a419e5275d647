"""Memory encoder: the features of a frame and an object's mask become the map that the tracker remembers.

Letters: B objects, G cells per side of the feature map, C channels, D memory channels.
Sources: Ravi et al. 2024, SAM 2 (arXiv:2408.00714); the fuser's blocks are ConvNeXt's, Liu et al. 2022
(arXiv:2201.03545).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.layer_norm import LayerNorm2d

MASK_CHANNELS = (1, 4, 16, 64, 256)  # of the mask, halved in size between two of them
MASK_STRIDE = 2 ** (len(MASK_CHANNELS) - 1)  # pixels of the mask per cell of the feature map


class MaskDownSampler(nn.Module):
    """Four strided convolutions, each with norm and GELU, and a 1x1 convolution to `dim` channels."""

    def __init__(self, dim: int):
        super().__init__()
        layers: list[nn.Module] = []
        for in_channels, out_channels in pairwise(MASK_CHANNELS):
            layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), LayerNorm2d(out_channels)]
            layers.append(nn.GELU())
        self.encoder = nn.Sequential(*layers, nn.Conv2d(MASK_CHANNELS[-1], dim, 1))

    def forward(self, masks: Tensor) -> Tensor:
        """(B, 1, 16 G, 16 G) -> (B, C, G, G)."""
        return self.encoder(masks)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, norm, a pointwise MLP four times as wide, scaled and added to the input."""

    def __init__(self, dim: int, initial_scale: float = 1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), initial_scale))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # channels last from here
        h = self.gamma * self.pwconv2(F.gelu(self.pwconv1(h)))
        return x + h.permute(0, 3, 1, 2)


class Fuser(nn.Module):
    """A row of blocks."""

    def __init__(self, dim: int, num_layers: int):
        super().__init__()
        self.layers = nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.layers(x)


class MemoryEncoder(nn.Module):
    """Projected features + downsampled mask, fused by ConvNeXt blocks and projected to the memory's channels.

    Args:
        dim: channels of the features; mem_dim: channels of the memory; num_layers: blocks of the fuser.
    """

    def __init__(self, dim: int, mem_dim: int, num_layers: int = 2):
        super().__init__()
        self.mask_downsampler = MaskDownSampler(dim)
        self.pix_feat_proj = nn.Conv2d(dim, dim, 1)
        self.fuser = Fuser(dim, num_layers)
        self.out_proj = nn.Conv2d(dim, mem_dim, 1)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Encodes one frame.

        Args:
            features: (1 or B, C, G, G), of one frame for all objects or of one frame each, without memory in them.
            masks: (B, 1, 16 G, 16 G) scaled to -10 (not the object) .. 10 (the object).

        Returns:
            (B, D, G, G)
        """
        return self.out_proj(self.fuser(self.pix_feat_proj(features) + self.mask_downsampler(masks)))
