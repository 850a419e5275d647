"""Perceiver resampler: compresses a map of any size into a fixed number of tokens.

It belongs to the student, for a memory of video frames, but has no part in images.

Letters: B pictures, N tokens of a map, M latents (64), C channels.
Source: Alayrac et al. 2022 (arXiv:2204.14198).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam3.model.attention import Attention


class ResamplerLayer(nn.Module):
    """Pre-norm cross-attention from the latents to the tokens, then a feed-forward."""

    def __init__(self, dim: int, heads: int, ffn_dim: int):
        super().__init__()
        self.norm_latents = nn.LayerNorm(dim)
        self.norm_tokens = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, heads)
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """latents (B, M, C), tokens (B, N, C) -> (B, M, C)."""
        source = self.norm_tokens(tokens)
        latents = latents + self.cross_attn(self.norm_latents(latents), source, source)
        return latents + self.ffn(latents)


class PerceiverResampler(nn.Module):
    """(B, N, C) -> (B, M, C); the order of the tokens does not matter."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, num_layers: int, num_latents: int):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, dim))
        self.layers = nn.ModuleList(ResamplerLayer(dim, heads, ffn_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.latents, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, tokens)
        return self.norm(latents)
