"""Sine position codes: of a whole feature map, and of single coordinates.

Letters: B images, C = dim channels, H W rows and columns, m = dim / 2 channels of one axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_CACHED_MAPS = 8  # the pyramid needs three


class PositionEmbeddingSine(nn.Module):
    """Interleaved sine and cosine of y (first half of the channels) and x (second half); has no weights.

    With `tau_k = temperature ** (2 * floor(k / 2) / m)`, an angle v becomes `a(v)[k] = sin(v / tau_k)` for even k and
    `cos(v / tau_k)` for odd k.
    """

    def __init__(self, dim: int, temperature: float = 10000.0):
        super().__init__()
        if dim % 4:
            raise ValueError(f"sine positions need a width that is a multiple of 4, got {dim}")
        self.dim = dim
        self.temperature = temperature
        self._maps: dict[tuple, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Positions for the map `x` (B, C', H, W): (B, dim, H, W) in its dtype, an expanded view not to be written to.

        Rows and columns count from 1 and the last one stands at (almost) 2 pi.
        """
        height, width = x.shape[-2:]
        if torch.compiler.is_compiling():  # a traced graph must not fill the cache with its own tensors
            code = self._map(height, width, x.device, x.dtype)
        else:
            code = self._cached_map(height, width, x.device, x.dtype)
        return code.expand(x.shape[0], -1, -1, -1)

    def encode(self, v: Tensor) -> Tensor:
        """`a(2 pi v)` of coordinates `v` (...) in 0..1: (..., dim // 2) in the dtype of `v`, computed in float32."""
        return self._sine(v.float() * (2 * math.pi)).to(v.dtype)

    def _sine(self, angle: Tensor) -> Tensor:
        m = self.dim // 2
        pair = torch.arange(m // 2, dtype=torch.float32, device=angle.device)
        scaled = angle[..., None] / self.temperature ** (2 * pair / m)  # (..., m / 2)
        return torch.stack((scaled.sin(), scaled.cos()), dim=-1).flatten(-2)

    def _map(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        rows, cols = (
            self._sine(torch.arange(1, n + 1, dtype=torch.float32, device=device) / (n + 1e-6) * (2 * math.pi))
            for n in (height, width)
        )
        y = rows.to(dtype).T[:, :, None].expand(-1, -1, width)  # (m, H) -> (m, H, W)
        x = cols.to(dtype).T[:, None, :].expand(-1, height, -1)
        return torch.cat((y, x))[None]  # (1, dim, H, W)

    def _cached_map(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (height, width, device, dtype)
        if key not in self._maps:
            if len(self._maps) >= MAX_CACHED_MAPS:
                self._maps.pop(next(iter(self._maps)))
            # A tensor born under inference_mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._maps[key] = self._map(*key)
        return self._maps[key]

    def _apply(self, fn, recurse: bool = True):
        self._maps.clear()  # maps of a device the model has left
        return super()._apply(fn, recurse)


def sine_of_distance(distance: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Codes of numbers (P,): (P, dim) float32, first all sines, then all cosines of `distance / tau_k`.

    `tau_k = temperature ** (2 * floor(k / 2) / m)` for k < m = dim / 2.
    """
    index = torch.arange(dim // 2, dtype=torch.float32, device=distance.device)
    scaled = distance.float()[:, None] / temperature ** (2 * (index // 2) / (dim // 2))
    return torch.cat((scaled.sin(), scaled.cos()), dim=-1)
