"""Memory attention over compressed memory: grids of memory tokens are averaged in squares before it.

Letters: B objects, L = grid x grid tokens of the current frame, N tokens of a memory frame, K <= N of them after
pooling, M memory tokens in all, p side of the squares that are averaged, C channels, D memory channels.
Source: EfficientTAM, Xiong et al. 2024 (arXiv:2411.18933).

Why a bias: a key that is the mean of n equal keys stands for n terms of the softmax, `n exp(q k / s) = exp(q k / s +
ln n)`, so ln n joins its scaled score (ln 4 for squares of 2 x 2). This is exact where a square's keys are equal, and a
lower bound of their sum otherwise (Jensen). It weighs pooled tokens against those that are not: latents, pointers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.memory_attention import POSITION_WEIGHT, MemoryAttention
from sam3.model.rope import RotationTable, axial_angles, grid_centres, grid_table, rotation_table

MAX_CACHED = 64  # a video needs one bias for each number of memory frames and pointers


@dataclass(frozen=True)
class TokenGroup:
    """Tokens of a memory frame that are treated alike.

    A group with `grid` covers the frame with grid x grid tokens, row by row: squares of p x p are averaged (where p
    does not divide the grid, the last row and column of squares are cut), and keys turn by their places. Without `grid`
    it is a set without places: p has no effect, nothing turns.
    """

    count: int
    grid: int | None = None

    def __post_init__(self):
        if self.count < 1 or (self.grid is not None and self.grid**2 != self.count):
            raise ValueError(f"a group has at least one token, and a grid of g has g * g; got {self}")

    def pooled_count(self, p: int) -> int:
        """Tokens after pooling."""
        return self.count if self.grid is None else math.ceil(self.grid / p) ** 2

    def pool(self, tokens: Tensor, p: int) -> Tensor:
        """(B, count, D) -> (B, pooled count, D)."""
        if self.grid is None or p == 1:
            return tokens
        image = tokens.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)  # (B, D, g, g)
        pooled = F.avg_pool2d(image, p, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2)

    def sizes(self, p: int) -> Tensor:
        """How many tokens each pooled token is the mean of: (pooled count,) float32."""
        if self.grid is None:
            return torch.ones(self.count)
        sides = (self.grid - torch.arange(0, self.grid, p)).clamp(max=p)
        return torch.outer(sides, sides).flatten().float()

    def angles(self, p: int, grid: int, dim: int) -> Tensor:
        """Rotary angles (pooled count, dim // 2) of the mean places of the squares, on a frame of `grid` cells a side.

        Turning at the centre is turning before pooling, but for the length that means of turned vectors lose.
        """
        if self.grid is None:
            return torch.zeros(self.count, dim // 2)
        centres = F.avg_pool1d(grid_centres(self.grid, grid)[None], p, ceil_mode=True, count_include_pad=False)[0]
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        return axial_angles(columns.flatten(), rows.flatten(), dim)


class EfficientMemoryAttention(MemoryAttention):
    """Layers of SAM3's memory attention, fewer of them, over compressed memory frames.

    Two layers of the full size have 2,961,408 parameters in 54 tensors, named as in `MemoryAttention`.

    Args:
        layout: groups of tokens of a memory frame, in their order, before pooling.
        pool_size: p; 1 pools nothing.
        dim, mem_dim, ffn_dim, num_layers, grid, dropout: of `MemoryAttention`.
    """

    def __init__(
        self,
        dim: int,
        mem_dim: int,
        ffn_dim: int,
        num_layers: int,
        grid: int,
        layout: Sequence[TokenGroup],
        pool_size: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__(dim, mem_dim, ffn_dim, num_layers, grid, dropout)
        if pool_size < 1:
            raise ValueError(f"the pool size is at least 1 (no pooling), got {pool_size}")
        self.layout = tuple(layout)
        self.pool_size = pool_size
        self._cache: dict[tuple, Any] = {}

    @property
    def tokens_per_frame(self) -> int:
        """K: tokens of a memory frame after pooling."""
        return sum(group.pooled_count(self.pool_size) for group in self.layout)

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens of one frame, or their positions, before the bank keeps them: (B, N, D) -> (B, K, D); linear.

        Means and projections commute, so that nothing is lost by pooling once here and not in every layer.
        """
        groups = zip(self.layout, tokens.split([group.count for group in self.layout], dim=1), strict=True)
        return torch.cat([group.pool(part, self.pool_size) for group, part in groups], dim=1)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        num_frames: int,
        num_pointer_tokens: int = 0,
    ) -> Tensor:
        """Conditions the current frame on the memory.

        Args:
            x: (B, L, C) tokens, row by row; position: (L, C) their sine positions.
            memory: (B, M, D) frames of K pooled tokens one after the other, then the pointer tokens.
            memory_position: (1 or B, M, D) positions in space and time, added to the keys and not to the values.
            num_frames: frames in the memory; num_pointer_tokens: tokens after them, so M = num_frames * K + this.

        Returns:
            (B, L, C)
        """
        wanted = num_frames * self.tokens_per_frame + num_pointer_tokens
        assert memory.shape[1] == wanted, f"{memory.shape[1]} memory tokens, wanted {wanted}"
        assert x.shape[1] == self.grid**2, f"{x.shape[1]} tokens where the grid of {self.grid} has {self.grid**2}"
        table = grid_table(self.grid, x.shape[2], device=x.device)
        key_table = self._cached(self._key_table, x.shape[2], x.device)
        bias = self._cached(self._bias, num_frames, num_pointer_tokens, x.device)
        memory = memory.to(x.dtype)
        keys = memory + memory_position.to(x.dtype)
        x = x + POSITION_WEIGHT * position.to(x.dtype)
        for layer in self.layers:
            x = layer(x, keys, memory, table, key_table, num_pointer_tokens, bias)
        return self.norm(x)

    def _key_table(self, dim: int, device: torch.device) -> RotationTable:
        """Table of the K tokens of a frame."""
        angles = torch.cat([group.angles(self.pool_size, self.grid, dim) for group in self.layout])
        cos, sin = rotation_table(angles)
        return cos.to(device), sin.to(device)

    def _bias(self, num_frames: int, num_pointer_tokens: int, device: torch.device) -> Tensor | None:
        """ln n of every memory token, (1, 1, 1, M); None without pooling.

        A float mask of one row costs nothing in the CPU's fused kernel. The other exact form, one more channel in
        queries and keys, is slower there, and its head of more than 256 channels is too wide for flash attention.
        """
        if self.pool_size == 1:
            return None
        frame = torch.cat([group.sizes(self.pool_size) for group in self.layout]).log()
        bias = torch.cat((frame.repeat(num_frames), torch.zeros(num_pointer_tokens)))
        return bias[None, None, None].to(device)  # with fewer dimensions the fused kernel would not take it

    def _cached(self, build: Callable[..., Any], *arguments) -> Any:
        if torch.compiler.is_compiling():  # a traced graph must not fill the cache with its own tensors
            return build(*arguments)
        key = (build.__name__, *arguments)
        if key not in self._cache:
            if len(self._cache) >= MAX_CACHED:
                self._cache.pop(next(iter(self._cache)))
            # A tensor born under inference_mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = build(*arguments)
        return self._cache[key]

    def _apply(self, fn, recurse: bool = True):
        self._cache.clear()  # tables of a device the model has left
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def init_from_teacher(self, teacher: MemoryAttention, layers: Sequence[int] | None = None) -> None:
        """Copies the teacher's final norm and as many of its layers as this has.

        Args:
            teacher: SAM3's memory attention, of the same widths.
            layers: numbers of its layers, from 0 (or, from its end, -1); by default spread evenly from the first to the
                last, which for two is the first and the last.

        Raises ValueError for a wrong number of layers, or layers of other widths.
        """
        if layers is None:
            steps = max(1, len(self.layers) - 1)
            layers = [i * (len(teacher.layers) - 1) // steps for i in range(len(self.layers))]
        if len(layers) != len(self.layers):
            raise ValueError(f"{len(layers)} teacher layers {tuple(layers)} for the {len(self.layers)} of the student")
        if not all(-len(teacher.layers) <= number < len(teacher.layers) for number in layers):
            raise ValueError(f"teacher layers {tuple(layers)}, but it has {len(teacher.layers)}")
        own, theirs = ({k: tuple(v.shape) for k, v in m.layers[0].state_dict().items()} for m in (self, teacher))
        if own != theirs:
            name = next(name for name in own if own[name] != theirs.get(name))
            raise ValueError(
                f"the teacher's memory attention has {name} of {theirs.get(name)}, the student's is {own[name]}; give "
                "the student the teacher's widths, or do not start from it"
            )
        for layer, number in zip(self.layers, layers, strict=True):
            layer.load_state_dict(teacher.layers[number].state_dict())
        self.norm.load_state_dict(teacher.norm.state_dict())
