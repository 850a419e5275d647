"""The image encoder of the first SAM: a plain ViT, in windows and over the whole picture, with relative positions.

From "Segment Anything" (Kirillov et al., 2023); the relative positions are those of "MViTv2" (Li et al., 2022) without
its pooling. Weights carry the names of the published files below `image_encoder.`.

Letters: B images (or windows), S input side in pixels, G = S / 16 grid side, w side of a window or of the grid in
tokens, L = w * w tokens that see each other, C channels, h heads, d = C / h.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.backbones.recompute import run_blocks
from sam3.model.layer_norm import LayerNorm2d
from sam3.model.vitdet import from_windows, to_windows

PATCH_SIZE = 16


class SamViT(nn.Module):
    """Pictures to embeddings of 1/16 their side.

    Args:
        img_size: S, a multiple of 16; fixed by the position tables.
        dim: C.
        global_blocks: the blocks that attend over the whole grid; the others do so in windows.
        window_size: tokens per side of a window. The grid is zero-padded to whole windows, and windows attend to the
            padding as they do to tokens.
        out_dim: channels of the embedding.
        grad_checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self,
        img_size: int,
        dim: int,
        depth: int,
        heads: int,
        global_blocks: Sequence[int],
        window_size: int = 14,
        out_dim: int = 256,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        if img_size < 1 or img_size % PATCH_SIZE:
            raise ValueError(f"img_size {img_size} is not a multiple of the patch size {PATCH_SIZE}")
        self.img_size = img_size
        self.grad_checkpointing = grad_checkpointing
        grid = img_size // PATCH_SIZE
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE)))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, side=grid if i in global_blocks else window_size, windowed=i not in global_blocks)
            for i in range(depth)
        )
        self.neck = make_neck(dim, out_dim)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S) normalised -> (B, out_dim, G, G)."""
        x = self.patch_embed(images).permute(0, 2, 3, 1) + self.pos_embed  # (B, G, G, C)
        x = run_blocks(self.blocks, x, self.grad_checkpointing)
        return self.neck(x.permute(0, 3, 1, 2))

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if "pos_embed" in name or "rel_pos" in name}


def make_neck(dim: int, out_dim: int) -> nn.Sequential:
    """(B, dim, G, G) -> (B, out_dim, G, G); every image encoder of the family ends in one."""
    return nn.Sequential(
        nn.Conv2d(dim, out_dim, 1, bias=False),
        LayerNorm2d(out_dim),
        nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
        LayerNorm2d(out_dim),
    )


class Block(nn.Module):
    """Pre-norm transformer block; attention covers windows of `side` x `side` tokens, or one grid of that side."""

    def __init__(self, dim: int, heads: int, side: int, windowed: bool):
        super().__init__()
        self.window_size = side if windowed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelativeAttention(dim, heads, side)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(lin1=nn.Linear(dim, 4 * dim), act=nn.GELU(), lin2=nn.Linear(4 * dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, G, C) -> (B, G, G, C)."""
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        if self.window_size is None:
            return self.attn(x.flatten(1, 2)).view_as(x)
        grid = x.shape[1]
        pad = -grid % self.window_size
        padded = F.pad(x, (0, 0, 0, pad, 0, pad)) if pad else x
        windows = self.attn(to_windows(padded, self.window_size))  # (B * n, L, C)
        return from_windows(windows, self.window_size, grid + pad)[:, :grid, :grid]


class RelativeAttention(nn.Module):
    """Self-attention over `side` x `side` tokens with a bias of two addends, for the rows and the columns between
    query and key: each is the product of the query with a learnt vector of that distance."""

    def __init__(self, dim: int, heads: int, side: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"ViT width {dim} is not a multiple of its {heads} heads")
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C).

        The biases enter as further channels: those of the query hold its bias for each row and each column of keys,
        those of the key say, by a one, which are its own. So no (L, L) matrix is stored, forward or backward, and the
        fused kernels that take no bias apply.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, L, d)
        depth = q.shape[-1]
        spare = -(depth + 2 * self.side) % 8  # fused kernels want rows of a multiple of 16 bytes
        biases = self._biases(q)
        queries = torch.cat((q * depth**-0.5, *biases, q.new_zeros(*q.shape[:-1], spare)), dim=-1)
        places = F.pad(self._places(q), (0, spare)).expand(*k.shape[:2], -1, -1)
        keys = torch.cat((k, places), dim=-1)
        values = F.pad(v, (0, keys.shape[-1] - depth))  # and equally wide values
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :depth]
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (B, h, L, d) -> (B, L, C)

    def _biases(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The bias of each query for every row and every column of keys: twice (B, h, L, w)."""
        step = torch.arange(self.side, device=q.device)
        distance = step[:, None] - step[None, :] + self.side - 1  # (w, w), 0 = the key is farthest ahead
        rows, columns = F.embedding(distance, self.rel_pos_h), F.embedding(distance, self.rel_pos_w)  # (w, w, d)
        grid = q.unflatten(2, (self.side, self.side))  # (B, h, w, w, d)
        by_row = torch.einsum("bhyxd,ykd->bhyxk", grid, rows.to(q.dtype))
        by_column = torch.einsum("bhyxd,xkd->bhyxk", grid, columns.to(q.dtype))
        return by_row.flatten(2, 3), by_column.flatten(2, 3)

    def _places(self, like: Tensor) -> Tensor:
        """Ones in the row and the column of each token: (L, 2 w)."""
        one_hot = torch.eye(self.side, dtype=like.dtype, device=like.device)
        return torch.cat((one_hot.repeat_interleave(self.side, 0), one_hot.repeat(self.side, 1)), dim=-1)
