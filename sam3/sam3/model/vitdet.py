"""The image trunk of SAM3: a plain ViT with windowed and global attention and rotary positions.

Letters: B images, S input side in pixels, G = S / patch token grid side, w window side in tokens, n windows per image,
N = n * w * w tokens of an image (with padding), L tokens of one attention sequence, C channels, h heads, d = C / h.

Tokens travel window by window, as (B, N, C), through all blocks: only attention mixes tokens, and it does not care
about their order as long as the rotary angles follow. So windows are cut once and joined once, not in every block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from sam3.model.rope import rotate_pairs

SLICE_TOKENS = 1152  # so that activations stay in the cache of a CPU; the MLP alone (1024 - 4736) runs 15% faster


class ViT(nn.Module):
    """Image trunk; weights carry the names of `...vision_backbone.trunk.` in sam3.pt.

    Args:
        img_size: side of the square input, pixels; fixed by the rotary tables.
        pretrain_img_size: side the absolute positions were learnt at; they are tiled over the grid.
        window_size: tokens per side of a window; `global_blocks` attend over the whole grid instead.
        drop_path: rate of the last block; the others grow towards it linearly.
        grad_checkpointing: recompute each block in the backward pass of a training step.
    """

    def __init__(
        self,
        img_size: int = 1008,
        patch_size: int = 14,
        pretrain_img_size: int = 336,
        dim: int = 1024,
        depth: int = 32,
        heads: int = 16,
        mlp_dim: int = 4736,
        window_size: int = 24,
        global_blocks: Sequence[int] = (7, 15, 23, 31),
        drop_path: float = 0.1,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        for name, size in (("img_size", img_size), ("pretrain_img_size", pretrain_img_size)):
            if size % patch_size:
                raise ValueError(f"{name} {size} is not a multiple of the patch size {patch_size}")
        if not global_blocks or max(global_blocks) >= depth:
            raise ValueError(f"global blocks {tuple(global_blocks)} must name blocks 0..{depth - 1}, at least one")
        self.img_size, self.patch_size, self.window_size = img_size, patch_size, window_size
        self.grid = img_size // patch_size
        self.last_block = max(global_blocks)  # its output is the embedding
        self.channel_list = [dim]
        self.grad_checkpointing = grad_checkpointing

        self.patch_embed = PatchEmbed(dim, patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, (pretrain_img_size // patch_size) ** 2 + 1, dim))
        self.ln_pre = nn.LayerNorm(dim, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                mlp_dim,
                side=self.grid if i in global_blocks else window_size,
                whole_image=i in global_blocks,
                rotary_scale=window_size / self.grid if i in global_blocks else 1.0,
                drop_path=drop_path * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, S, S) normalised. Returns a list of one embedding (B, C, G, G).

        Raises:
            ValueError: the picture has another size than the model.
        """
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"this trunk takes {self.img_size}x{self.img_size} pictures (grid {self.grid}x{self.grid}), "
                f"got {images.shape[-2]}x{images.shape[-1]}; resize them or build the model with that img_size"
            )
        x = self.patch_embed(images)  # (B, G, G, C)
        x = self.ln_pre(x + self._positions())
        x = self._cut(x).reshape(x.shape[0], -1, x.shape[-1])  # (B, N, C)
        real = self._real_tokens(x.device)
        for block in self.blocks[: self.last_block + 1]:
            table = torch.view_as_real(block.attn.freqs_cis)  # (L, d / 2, 2)
            if block.whole_image:
                table = self._cut(table.reshape(1, self.grid, self.grid, -1)).reshape(-1, *table.shape[1:])
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, table, real, use_reentrant=False)
            else:
                x = block(x, table, real)
        return [self._join(x).permute(0, 3, 1, 2)]

    def _positions(self) -> Tensor:
        """Learnt positions tiled (not resized) over the grid: (1, G, G, C); entry 0 belongs to a class token."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        learnt = self.pos_embed[:, 1:].unflatten(1, (side, side))
        times = -(-self.grid // side)
        return learnt.tile(1, times, times, 1)[:, : self.grid, : self.grid]

    def _cut(self, x: Tensor) -> Tensor:
        """(B, G, G, C) -> windows row by row, zero-padded at the right and bottom: (B * n, w * w, C)."""
        pad = -self.grid % self.window_size
        return to_windows(F.pad(x, (0, 0, 0, pad, 0, pad)) if pad else x, self.window_size)

    def _join(self, x: Tensor) -> Tensor:
        """The way back: (B, N, C) -> (B, G, G, C)."""
        side = self.grid + -self.grid % self.window_size
        return from_windows(x, self.window_size, side)[:, : self.grid, : self.grid]

    def _real_tokens(self, device: torch.device) -> Tensor | None:
        """(N,) bool in the order of the tokens, False = padding; None where the windows fit the grid."""
        if self.grid % self.window_size == 0:
            return None
        return self._cut(torch.ones(1, self.grid, self.grid, 1, device=device)).flatten() > 0


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)  # (B, C, G, G) -> (B, G, G, C)


class Block(nn.Module):
    """Pre-norm transformer block; attention covers windows of `side` x `side` tokens, or one grid of that side."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        side: int,
        whole_image: bool,
        rotary_scale: float,
        drop_path: float,
    ):
        super().__init__()
        self.whole_image = whole_image
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = RotaryAttention(dim, heads, side, rotary_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, mlp_dim)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor, table: Tensor, real: Tensor | None) -> Tensor:
        """x: (B, N, C) window by window; table: (L, d / 2, 2); real: (N,) bool, False = padding, or None."""
        h = self.norm1(x)
        if self.whole_image:
            h = in_slices(lambda part: self.attn(part, table, real), h, SLICE_TOKENS)
        else:
            if real is not None:
                h = h * real[:, None]  # padding is zero here, and windows attend to it
            windows = h.reshape(-1, *table.shape[:1], h.shape[-1])  # (B * n, L, C)
            h = in_slices(lambda part: self.attn(part, table), windows, SLICE_TOKENS)
        x = x + self.drop_path(h.view_as(x))
        h = in_slices(lambda part: self.mlp(self.norm2(part)), x.flatten(0, 1), SLICE_TOKENS)
        return x + self.drop_path(h.view_as(x))


class RotaryAttention(nn.Module):
    """Self-attention over `side` x `side` tokens, whose queries and keys are turned by their position."""

    def __init__(self, dim: int, heads: int, side: int, rotary_scale: float):
        super().__init__()
        if dim % (4 * heads):
            raise ValueError(f"ViT width {dim} over {heads} heads: each head needs a multiple of 4 channels")
        self.heads, self.side, self.rotary_scale = heads, side, rotary_scale
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("freqs_cis", self._table())

    def forward(self, x: Tensor, table: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x: (B, L, C); table: (L, d / 2, 2) cosine and sine in the tokens' order; key_mask: (L,), False = ignore."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, L, d)
        mask = None if key_mask is None else key_mask[None, None, None]
        q, k = (rotate_pairs(x, table.unbind(-1)) for x in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v.contiguous(), attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (B, h, L, d) -> (B, L, C)

    def rescale(self, rotary_scale: float) -> None:
        """Another scale of the positions; the table follows."""
        self.rotary_scale = rotary_scale
        self.register_buffer("freqs_cis", self._table().to(self.qkv.weight.device))

    def _table(self) -> Tensor:
        return rotary_table(self.side, self.qkv.in_features // self.heads, self.rotary_scale)

    def _apply(self, fn, recurse: bool = True):
        """Moves the table along but keeps it complex64, of which `.to(bfloat16)` would drop the imaginary part."""
        table = self._buffers.pop("freqs_cis")
        super()._apply(fn, recurse)
        if table.is_meta and not self.qkv.weight.is_meta:
            table = self._table()  # `to_empty` leaves only the shapes
        self.register_buffer("freqs_cis", table.to(self.qkv.weight.device))
        return self


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def rotary_table(side: int, head_dim: int, scale: float = 1.0, theta: float = 10000.0) -> Tensor:
    """Unit complex numbers (side * side, head_dim / 2): the first half of the angles grows with x, the second with y.

    Tokens are row-major; their coordinates are whole numbers from 0, times `scale`.
    """
    freqs = theta ** -(torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    step = torch.arange(side, dtype=torch.float32) * scale
    angles = torch.outer(step, freqs)  # (side, head_dim / 4)
    x, y = angles[None, :, :].expand(side, -1, -1), angles[:, None, :].expand(-1, side, -1)
    angles = torch.cat((x, y), dim=-1).flatten(0, 1)
    return torch.polar(torch.ones_like(angles), angles)


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cuts (B, H, W, C) into windows, row by row: (B * n, w * w, C)."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, rows, w, columns, w, C)
    return x.transpose(2, 3).reshape(-1, window * window, x.shape[-1])


def from_windows(x: Tensor, window: int, side: int) -> Tensor:
    """Joins what `to_windows` has cut from a square: any shape of B * n * w * w tokens -> (B, side, side, C)."""
    per_side = side // window
    x = x.reshape(-1, per_side, per_side, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, side, side, x.shape[-1])


def in_slices(function: Callable[[Tensor], Tensor], x: Tensor, tokens: int) -> Tensor:
    """`function(x)`, about `tokens` tokens at a time where that is faster; rows along dimension 0 must not interact."""
    rows = max(1, tokens // (x.shape[1] if x.ndim == 3 else 1))
    if x.device.type != "cpu" or len(x) <= rows or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    return torch.cat([function(part) for part in x.split(rows)])


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
