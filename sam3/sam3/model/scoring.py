"""Class scores: dot product of query states with the pooled prompt.

Letters: L decoder layers, B image-prompt pairs, Q queries, N prompt tokens, C channels.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from sam3.model.model_misc import MLP

MAX_LOGIT = 12.0


class DotProductScoring(nn.Module):
    """logit = clamp(hs_proj(query) . prompt_proj(mean of prompt_mlp(prompt)) / sqrt(C), -12, 12)."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float = 0.1):
        super().__init__()
        self.prompt_mlp = MLP(dim, ffn_dim, dim, 2, residual=True, out_norm=nn.LayerNorm(dim), dropout=dropout)
        self.prompt_proj = nn.Linear(dim, dim)
        self.hs_proj = nn.Linear(dim, dim)
        self.scale = 1 / math.sqrt(dim)

    def forward(self, hs: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """hs (L, B, Q, C), prompt (B, N, C), prompt_mask (B, N) True = ignore -> logits (L, B, Q, 1)."""
        valid = (~prompt_mask)[..., None].to(prompt.dtype)  # (B, N, 1)
        pooled = (self.prompt_mlp(prompt) * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)  # (B, C)
        logits = self.hs_proj(hs) @ self.prompt_proj(pooled)[..., None]  # (L, B, Q, C) @ (B, C, 1)
        return (logits * self.scale).clamp(-MAX_LOGIT, MAX_LOGIT)
