"""Multi-head attention with the state-dict keys of `nn.MultiheadAttention`, on fused kernels.

Letters: B batch, L query tokens, S key tokens, C channels, h heads, d = C / h channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Batch-first multi-head attention through `F.scaled_dot_product_attention`."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention width {dim} is not a multiple of its {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attends from `q` to `k`, and returns the projected mix of `v`.

        Args:
            q: (B, L, C); k, v: (B, S, C). Passing one tensor in several places saves projections.
            key_padding_mask: (B, S) bool, True = ignore this key.
            attn_mask: float added to the scaled scores, broadcastable to (B, h, L, S).
            causal: token i sees tokens 0..i; not together with the masks.

        Returns:
            (B, L, C)
        """
        assert not causal or (key_padding_mask is None and attn_mask is None), "causal excludes other masks"
        q, k, v = (self._split_heads(x) for x in self._project(q, k, v))
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_join_masks(key_padding_mask, attn_mask, q.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, h, L, d) -> (B, L, C)

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one GEMM for each distinct input."""
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, self.in_proj_weight.shape[1]
        if q is k and k is v:
            return F.linear(q, weight, bias).chunk(3, dim=-1)
        if q is k:
            q, k = F.linear(q, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, dim=-1)
            return q, k, F.linear(v, weight[2 * dim :], bias[2 * dim :])
        q = F.linear(q, weight[:dim], bias[:dim])
        if k is v:
            return q, *F.linear(k, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        k = F.linear(k, weight[dim : 2 * dim], bias[dim : 2 * dim])
        return q, k, F.linear(v, weight[2 * dim :], bias[2 * dim :])

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, h, L, d)


def _join_masks(key_padding_mask: Tensor | None, attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Gives SDPA its one mask: bool with True = attend, or float to add."""
    if key_padding_mask is None:
        return None if attn_mask is None else attn_mask.to(dtype)
    keep = ~key_padding_mask[:, None, None, :]  # (B, 1, 1, S)
    if attn_mask is None:
        return keep
    return attn_mask.to(dtype).masked_fill(~keep, float("-inf"))
