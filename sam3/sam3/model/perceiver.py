"""Perceiver resampler: compresses the memory map of a frame into a fixed number of latent tokens.

Letters: B objects, D memory channels, h w rows and columns of the memory map, S source tokens, n latents that one
source feeds, N latents of a frame, g x g of them 2-D, C width of the latents, d channels of a head, I = heads x d.
Sources: Perceiver resampler, Alayrac et al. 2022 (arXiv:2204.14198); global and 2-D latents, EdgeTAM, Zhou et al. 2025
(arXiv:2501.07256).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.efficient_memory_attention import TokenGroup
from sam3.model.position_encoding import PositionEmbeddingSine

# Sizes with which the weights of EdgeTAM's `spatial_perceiver` load strictly (44 tensors, 230,784 parameters).
EDGETAM = {"mem_dim": 64, "dim": 64, "depth": 2, "heads": 1, "dim_head": 64, "num_latents": 256, "num_latents_2d": 256}


class LatentAttention(nn.Module):
    """Base of both attentions of a layer: projections without bias, keys and values in one matrix."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def attend(self, queries: Tensor, source: Tensor, position: Tensor | None = None) -> Tensor:
        """queries (B, n, C), source (B, S, C), position (1|B, S, I) added to keys and values -> (B, n, C)."""
        q = self.to_q(queries)
        k, v = self.to_kv(source).chunk(2, dim=-1)
        if position is not None:
            position = position.to(k.dtype)
            k, v = k + position, v + position
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, ., d)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(LatentAttention):
    """Latents look at the source; both are normalised first."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__(dim, heads, dim_head)
        self.norm_x = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)

    def forward(self, latents: Tensor, x: Tensor, position: Tensor | None) -> Tensor:
        return self.attend(self.norm_latents(latents), self.norm_x(x), position)


class SelfAttention(LatentAttention):
    """Latents look at each other."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__(dim, heads, dim_head)
        self.norm = nn.LayerNorm(dim)

    def forward(self, latents: Tensor) -> Tensor:
        latents = self.norm(latents)
        return self.attend(latents, latents)


class PerceiverLayer(nn.Module):
    """Residual cross-attention, feed-forward, self-attention, feed-forward, each normalised at its entry."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int, use_self_attn: bool):
        super().__init__()
        self.attn = CrossAttention(dim, heads, dim_head)
        self.ff = feed_forward(dim, ff_mult)
        self.self_attn = SelfAttention(dim, heads, dim_head) if use_self_attn else None
        self.self_ff = feed_forward(dim, ff_mult) if use_self_attn else None

    def forward(self, latents: Tensor, x: Tensor, position: Tensor | None) -> Tensor:
        """latents (B, n, C), x (B, S, C), position (1|B, S, I) or None -> latents (B, n, C)."""
        latents = latents + self.attn(latents, x, position)
        latents = latents + self.ff(latents)
        if self.self_attn is not None:
            latents = latents + self.self_attn(latents)
            latents = latents + self.self_ff(latents)
        return latents


def feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, mult * dim, bias=False), nn.GELU(), nn.Linear(mult * dim, dim, bias=False)
    )


class PerceiverResampler(nn.Module):
    """Learned latents that gather what they need from a set of tokens of any length.

    Args:
        dim: C, width of the tokens and the latents; heads, dim_head: of every attention, I = heads * dim_head.
        depth: layers; ff_mult: hidden width of a feed-forward over C.
        num_latents: tokens that come out.
        use_self_attn: False leaves out the second half of every layer (self-attention and its feed-forward).
    """

    def __init__(
        self,
        dim: int = 256,
        depth: int = 2,
        heads: int = 4,
        dim_head: int = 64,
        num_latents: int = 256,
        ff_mult: int = 4,
        use_self_attn: bool = True,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(PerceiverLayer(dim, heads, dim_head, ff_mult, use_self_attn) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """x (B, S, C), position (1|B, S, I) added to the projected keys and values -> (B, num_latents, C)."""
        return self.resample(self.latents.expand(len(x), -1, -1), x, position)

    def no_weight_decay(self) -> list[str]:
        """The latents, which are tokens: pulling them towards 0 would make them alike."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    def resample(self, latents: Tensor, x: Tensor, position: Tensor | None = None) -> Tensor:
        """As `forward`, for `latents` (B, n, C) that the caller brings."""
        for layer in self.layers:
            latents = layer(latents, x, position)
        return self.norm(latents)


class EfficientSpatialPerceiver(PerceiverResampler):
    """Compresses a memory map into global latents, which see all of it, and 2-D latents, which see a window each.

    Both kinds go through the same layers and the same norm and never look at each other. The 2-D latents form a square
    of g x g; the map is cut into as many windows, after a bilinear resize where its sides are no multiples of g (72 x
    72 becomes 64 x 64: 16 x 16 windows of 4 x 4). Global latents get the position of every token of the full map, 2-D
    latents none inside their window. Positions are sine codes of width I, which is the memory's own code where I = D.

    Parameters at the default sizes: 3,282,432, and 16,640 + 16,448 in the linears D -> C and C -> D, which exist only
    where C differs from D. With the sizes `EDGETAM`: 230,784 in 44 tensors that bear EdgeTAM's names.

    Args:
        mem_dim: D, channels of the memory map and of the tokens returned; a multiple of 4.
        num_latents: global latents; num_latents_2d: g * g.
        dim, depth, heads, dim_head, ff_mult, use_self_attn: of `PerceiverResampler`; I must be a multiple of 4.
    """

    def __init__(
        self,
        mem_dim: int = 64,
        dim: int = 256,
        depth: int = 2,
        heads: int = 4,
        dim_head: int = 64,
        num_latents: int = 256,
        num_latents_2d: int = 256,
        ff_mult: int = 4,
        use_self_attn: bool = True,
    ):
        super().__init__(dim, depth, heads, dim_head, num_latents, ff_mult, use_self_attn)
        self.side = math.isqrt(num_latents_2d)
        if num_latents_2d < 1 or self.side**2 != num_latents_2d:
            raise ValueError(f"2-D latents fill a square grid: wanted 1, 4, 9, ..., 256, ..., got {num_latents_2d}")
        self.latents_2d = nn.Parameter(torch.randn(num_latents_2d, dim))
        self.input_proj = nn.Linear(mem_dim, dim) if dim != mem_dim else nn.Identity()
        self.output_proj = nn.Linear(dim, mem_dim) if dim != mem_dim else nn.Identity()
        self.source_code = PositionEmbeddingSine(heads * dim_head)
        self.token_code = PositionEmbeddingSine(mem_dim)

    @property
    def layout(self) -> tuple[TokenGroup, TokenGroup]:
        """The tokens of a frame, for `EfficientMemoryAttention`."""
        return TokenGroup(len(self.latents)), TokenGroup(len(self.latents_2d), self.side)

    def forward(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses the memory of one frame.

        Args:
            memory: (B, D, h, w)

        Returns:
            tokens (B, N, D), N = num_latents + g * g: global latents first, then the 2-D latents row by row;
            positions (1, N, D), the same for every frame: zeros, then the sine code of a g x g grid.
        """
        code = self.source_code(memory[:1])
        everything = super().forward(self.input_proj(to_tokens(memory)), to_tokens(code))  # (B, num_latents, C)
        tokens = self.output_proj(torch.cat((everything, self._resample_windows(memory)), dim=1))
        return tokens, self.positions(memory)

    def positions(self, memory: Tensor) -> Tensor:
        """Positions (1, N, D) of the tokens, on the device and in the dtype of `memory`."""
        code = to_tokens(self.token_code(memory.new_empty(1, 1, self.side, self.side)))
        return F.pad(code, (0, 0, len(self.latents), 0))  # zeros before it

    def _resample_windows(self, memory: Tensor) -> Tensor:
        """One latent for each window: (B, D, h, w) -> (B, g * g, C)."""
        size = tuple(nearest_multiple(cells, self.side) for cells in memory.shape[-2:])
        if size != memory.shape[-2:]:
            memory = F.interpolate(memory, size=size, mode="bilinear", align_corners=False)
        windows = memory.unflatten(3, (self.side, -1)).unflatten(2, (self.side, -1))  # (B, D, g, h/g, g, w/g)
        windows = windows.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)  # (B g g, h/g w/g, D)
        latents = self.latents_2d.expand(len(memory), -1, -1).flatten(0, 1)[:, None]  # (B g g, 1, C)
        return self.resample(latents, self.input_proj(windows)).view(len(memory), self.side**2, -1)


def nearest_multiple(cells: int, side: int) -> int:
    """The positive multiple of `side` nearest to `cells`, the smaller of two (72 and 16 give 64)."""
    return side * max(1, math.ceil(cells / side - 0.5))


def to_tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)
