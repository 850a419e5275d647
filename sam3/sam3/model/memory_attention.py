"""Memory attention: the tokens of the current frame look at each other and at what the tracker remembers.

Letters: B objects, L = grid x grid tokens of the current frame, M memory tokens, N spatial tokens of a memory frame, C
channels, D memory channels.
Source: Ravi et al. 2024, SAM 2 (arXiv:2408.00714).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.rope import RotationTable, grid_table, rotate_pairs

POSITION_WEIGHT = 0.1  # of the current frame's positions, which enter once, at the input


class RoPEAttention(nn.Module):
    """Attention of one head with rotary positions, through `F.scaled_dot_product_attention`.

    Args:
        dim: channels of queries, output and the head; kv_dim: channels of keys and values (default `dim`).
        dropout: of the attention weights, in training.
    """

    def __init__(self, dim: int, kv_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        kv_dim = kv_dim or dim
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(kv_dim, dim)
        self.v_proj = nn.Linear(kv_dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = dropout

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_table: RotationTable,
        key_table: RotationTable,
        num_plain_keys: int = 0,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attends from `q` to `k` and returns the projected mix of `v`.

        Args:
            q: (B, L, C); k, v: (B, M, D). Only queries and keys turn.
            query_table: of the L queries; key_table: of the N keys of one frame. The keys are whole frames in a row,
                then `num_plain_keys` keys that do not turn.
            bias: float added to the scaled scores, broadcastable to (B, 1, L, M).

        Returns:
            (B, L, C)
        """
        q = rotate_pairs(self.q_proj(q), query_table)
        k = rotate_frames(self.k_proj(k), key_table, num_plain_keys)
        mixed = F.scaled_dot_product_attention(
            q[:, None],
            k[:, None],
            self.v_proj(v)[:, None],
            attn_mask=None if bias is None else bias.to(q.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(mixed[:, 0])


def rotate_frames(k: Tensor, table: RotationTable, num_plain: int = 0) -> Tensor:
    """Turns (B, r N + num_plain, C) keys: each of the r frames by the table of N tokens, the last `num_plain` not."""
    tokens = table[0].shape[0]
    count = k.shape[1] - num_plain
    assert count >= 0 and count % tokens == 0, f"{count} keys are not whole frames of {tokens} tokens"
    turned = rotate_pairs(k[:, :count].unflatten(1, (count // tokens, tokens)), table).flatten(1, 2)  # (B, r N, C)
    return torch.cat((turned, k[:, count:]), dim=1) if num_plain else turned


class MemoryAttentionLayer(nn.Module):
    """Pre-norm layer: self-attention, cross-attention to the memory, feed-forward with ReLU."""

    def __init__(self, dim: int, mem_dim: int, ffn_dim: int, dropout: float = 0.1):
        super().__init__()
        self.self_attn = RoPEAttention(dim, dropout=dropout)
        self.cross_attn_image = RoPEAttention(dim, mem_dim, dropout)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        table: RotationTable,
        key_table: RotationTable,
        num_plain_keys: int = 0,
        bias: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: (B, L, C), with their `table`.
            keys: (B, M, D) memory with positions; values: (B, M, D) memory without. The other arguments are those of
                `RoPEAttention` for the cross-attention.

        Returns:
            (B, L, C)
        """
        h = self.norm1(x)
        x = x + self.dropout(self.self_attn(h, h, h, table, table))
        h = self.cross_attn_image(self.norm2(x), keys, values, table, key_table, num_plain_keys, bias)
        x = x + self.dropout(h)
        hidden = F.relu(self.linear1(self.norm3(x)), inplace=True)
        return x + self.dropout(self.linear2(self.dropout(hidden)))


class MemoryAttention(nn.Module):
    """`num_layers` layers and a final norm; every memory frame has the grid of the current one.

    Args:
        grid: tokens of a side of the map.
        dropout: of attention weights, residual branches and the feed-forward's inner activations.
    """

    def __init__(self, dim: int, mem_dim: int, ffn_dim: int, num_layers: int, grid: int, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.ModuleList(MemoryAttentionLayer(dim, mem_dim, ffn_dim, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.grid = grid
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor, num_pointer_tokens: int = 0
    ) -> Tensor:
        """Conditions the current frame on the memory.

        Args:
            x: (B, L, C) tokens, row by row; position: (L, C) their sine positions.
            memory: (B, M, D) whole frames of L tokens one after the other, then the pointer tokens.
            memory_position: (1 or B, M, D) positions in space and time, added to the keys and not to the values.
            num_pointer_tokens: how many tokens at the end of the memory have no place in the frame.

        Returns:
            (B, L, C)
        """
        tokens = self.grid**2
        assert x.shape[1] == tokens, f"{x.shape[1]} tokens where the grid of {self.grid} has {tokens}"
        table = grid_table(self.grid, x.shape[2], device=x.device)
        memory = memory.to(x.dtype)
        keys = memory + memory_position.to(x.dtype)
        x = x + POSITION_WEIGHT * position.to(x.dtype)
        for layer in self.layers:
            x = layer(x, keys, memory, table, table, num_pointer_tokens)
        return self.norm(x)
