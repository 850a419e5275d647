"""Fusion encoder: image tokens look at each other and at the prompt.

Letters: B image-prompt pairs, L tokens (HW image tokens in the fusion encoder), N prompt tokens, S keys, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam3.model.attention import Attention


class TransformerEncoderLayer(nn.Module):
    """Pre-norm layer: self-attention, cross-attention, feed-forward.

    The fusion encoder and the geometry encoder share it. `cross_attn_image` is the checkpoint's name: in the fusion
    encoder it attends to the prompt, in the geometry encoder to the image.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float = 0.1):
        super().__init__()
        self.self_attn = Attention(dim, num_heads, dropout)
        self.cross_attn_image = Attention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        pos: Tensor | None = None,
        padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: (B, L, C) tokens; pos: (B, L, C) positions added to the queries and keys of the self-attention.
            key, value: (B, S, C) what the cross-attention looks at.
            padding_mask: (B, L) bool, True = token that the others ignore; key_padding_mask: (B, S) likewise.

        Returns:
            (B, L, C)
        """
        h = self.norm1(x)
        h_pos = h if pos is None else h + pos
        x = x + self.dropout(self.self_attn(h_pos, h_pos, h, key_padding_mask=padding_mask))
        x = x + self.dropout(self.cross_attn_image(self.norm2(x), key, value, key_padding_mask=key_padding_mask))
        hidden = F.relu(self.linear1(self.norm3(x)), inplace=True)
        return x + self.dropout(self.linear2(self.dropout(hidden)))


class TransformerEncoderFusion(nn.Module):
    """A stack of layers without a final norm; the prompt itself is not updated."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        dropout: float = 0.1,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )
        self.activation_checkpointing = activation_checkpointing
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, pos: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """x, pos (B, HW, C) image tokens and positions, prompt (B, N, C), mask (B, N) True = ignore -> (B, HW, C)."""
        for layer in self.layers:
            inputs = (x, prompt, prompt, pos, None, prompt_mask)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x
