"""How a tracker keeps what it saw of an object in a frame, and how it reads it again: densely, or compressed.

Both kinds of memory have the same three methods, so that the tracker, its training and its bank know one.

Letters: B objects, G side of the feature map, L = G * G its cells, C its channels, D memory channels, N memory tokens
of a frame, M memory tokens read at once, F frames among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sam3.model.position_encoding import PositionEmbeddingSine


@dataclass
class GatheredMemory:
    """What one frame reads: F frames' tokens, oldest conditioning frame first, then the object pointers'.

    tokens: (B, M, D). positions: (1, M, D), added to the keys only. num_pointer_tokens: how many of the M, at the end.
    """

    tokens: Tensor
    positions: Tensor
    num_frames: int
    num_pointer_tokens: int


class DenseMemory:
    """SAM3's own: one token for each cell of the map."""

    def __init__(self, attention: nn.Module, mem_dim: int, grid: int):
        self.attention = attention
        self.sine = PositionEmbeddingSine(mem_dim)
        self.grid = grid

    def compress(self, memory_map: Tensor) -> Tensor:
        """(B, D, G, G) -> (B, L, D), a view."""
        return memory_map.flatten(2).mT

    def positions(self, like: Tensor) -> Tensor:
        """Codes of a frame's tokens: (L, D), of the dtype and on the device of `like`."""
        return self.sine(like.new_empty(1, 1, self.grid, self.grid))[0].flatten(1).T

    def attend(self, x: Tensor, position: Tensor, memory: GatheredMemory) -> Tensor:
        """x (B, L, C) with codes (L, C) -> what it is after looking at the memory, (B, L, C)."""
        return self.attention(x, position, memory.tokens, memory.positions, memory.num_pointer_tokens)


class CompressedMemory:
    """A frame as latents of a Perceiver, or as its map, pooled before it is kept.

    Pooling is linear, and what comes after it in attention reads the pooled tokens only, so that doing it once when a
    frame is stored gives the same as doing it at every reading.
    """

    def __init__(self, attention: nn.Module, perceiver: nn.Module | None, mem_dim: int, grid: int):
        self.attention = attention
        self.perceiver = perceiver
        self.sine = PositionEmbeddingSine(mem_dim)
        self.grid = grid

    def compress(self, memory_map: Tensor) -> Tensor:
        """(B, D, G, G) -> (B, N, D)."""
        tokens = memory_map.flatten(2).mT if self.perceiver is None else self.perceiver(memory_map)[0]
        return self.attention.pool(tokens)

    def positions(self, like: Tensor) -> Tensor:
        """Codes of a frame's tokens: (N, D), of the dtype and on the device of `like`."""
        frame = like.new_empty(1, 1, self.grid, self.grid)
        codes = self.sine(frame).flatten(2).mT if self.perceiver is None else self.perceiver.positions(frame)
        return self.attention.pool(codes)[0]

    def attend(self, x: Tensor, position: Tensor, memory: GatheredMemory) -> Tensor:
        """x (B, L, C) with codes (L, C) -> what it is after looking at the memory, (B, L, C)."""
        return self.attention(
            x, position, memory.tokens, memory.positions, memory.num_frames, memory.num_pointer_tokens
        )
