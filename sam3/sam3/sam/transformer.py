"""Tokens and an image that read each other: the transformer inside the mask decoder.

From "Segment Anything" (Kirillov et al., 2023), appendix A.

Letters: B prompts, n images (1 shared by all prompts, or B), L tokens of a prompt, S = h * w image tokens, C channels.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectedAttention(nn.Module):
    """Multi-head attention inside a width of `dim / downsample_rate`, with linears for q, k, v and the output."""

    def __init__(self, dim: int, heads: int, downsample_rate: int = 1):
        super().__init__()
        inner = dim // downsample_rate
        if dim % downsample_rate or inner % heads:
            raise ValueError(f"attention width {dim} / {downsample_rate} is not a multiple of its {heads} heads")
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1|B, L, C), k and v (1|B, S, C) -> (B, L, C); a batch of 1 is projected once and shared by the others."""
        batch = q.shape[0] if k.shape[0] == 1 else k.shape[0]
        q, k, v = (self._heads(x, batch) for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, batch: int) -> Tensor:
        # (1|B, L, C') -> (B, heads, L, d)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).expand(batch, -1, -1, -1)


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, pass an MLP, then the image attends to the tokens."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, attention_downsample_rate: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = ProjectedAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = ProjectedAttention(dim, heads, attention_downsample_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(lin1=nn.Linear(dim, mlp_dim), act=nn.ReLU(), lin2=nn.Linear(mlp_dim, dim)),
        )
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = ProjectedAttention(dim, heads, attention_downsample_rate)

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens are the queries (and query_pe) (B, L, C), the image is the keys (n, S, C) with key_pe (1|n, S, C).

        Returns the new queries (B, L, C) and keys (B, S, C). The transformer passes all four by name, so that a
        forward pre-hook with `with_kwargs` can tell them apart.
        """
        if self.first:  # the tokens still are their own position codes: nothing to add, and no residual
            queries = self.self_attn(queries, queries, queries)
        else:
            placed = queries + query_pe
            queries = queries + self.self_attn(placed, placed, queries)
        queries = self.norm1(queries)
        placed_keys = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, placed_keys, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(placed_keys, queries + query_pe, queries))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks and a last look of the tokens at the image.

    Args:
        dim: C, also the width of the self-attention.
        heads: heads of every attention.
        mlp_dim: hidden width of the MLP of a block.
        attention_downsample_rate: the attentions between tokens and image work in `dim / attention_downsample_rate`.
    """

    def __init__(self, depth: int, dim: int, heads: int, mlp_dim: int, attention_downsample_rate: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(dim, heads, mlp_dim, attention_downsample_rate, first=i == 0) for i in range(depth)
        )
        self.final_attn_token_to_image = ProjectedAttention(dim, heads, attention_downsample_rate)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image (n, S, C), image_pe (1|n, S, C), tokens (B, L, C) -> tokens (B, L, C), image (B, S, C)."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(queries=tokens, keys=image, query_pe=token_pe, key_pe=image_pe)
        seen = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + seen), image
