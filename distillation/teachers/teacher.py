"""What all teachers have in common: a frozen model that gives the common outputs.

Letters: `B` pictures, `S` side of the square they fill, `P` prompts, `Q` queries, `C` channels of features,
`E G` channels and side of the trunk's grid, `h w` rows and columns of a mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sam3.engine.distributed import choose_device

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRESENCE_LIMIT = 10.0  # of presence logits, on either side


class Teacher(nn.Module, ABC):
    """Frozen, in eval mode whatever `.train()` says, without gradients and outside autocast: its weights' type decides.

    image_size: S. dim: C. num_queries: Q. trunk_shape: `(E, G, G)`, what a trunk cache holds of a picture.
    meta: plain values that say which teacher this is: backend, name, sha256 of its weights, and trunk_shape.

    A subclass calls `freeze` when it is built, and gives `run_trunk` and `run_heads`.
    """

    def __init__(self, image_size: int, dim: int, num_queries: int, meta: Mapping[str, Any]) -> None:
        super().__init__()
        self.image_size, self.dim, self.num_queries = image_size, dim, num_queries
        self.meta = dict(meta)
        self.trunk_shape: tuple[int, int, int] = tuple(meta["trunk_shape"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def freeze(self) -> None:
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever the module around it does: in training SAM3 doubles its queries."""
        return super().train(False)

    def forward(self, images: Tensor, prompt_index: Tensor, features: bool) -> dict[str, Any]:
        """Normalised pictures `(B, 3, S, S)` and for each the place of its prompt, int64 `(B,)` ->

        pred_masks `(B, Q, h, w)`, semantic_seg `(B, 1, h, w)`, pred_logits `(B, Q)`, presence_logits `(B, 1)`: logits,
        the last within +-PRESENCE_LIMIT. pred_boxes `(B, Q, 4)`: xyxy in 0..1 of the square, not clipped to it.
        With `features` also fpn_features: 3 maps `(B, C, kG, kG)`, k = 4, 2, 1; encoder_output `(B, G G, C)`, row by
        row; encoder_hw: (G, G). In the types that the model computes them in.
        """
        return self.forward_from_trunk(self.embed(images), prompt_index, features)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """What the trunk makes of normalised pictures `(B, 3, S, S)`: `(B, E, G, G)`."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pictures for this teacher are (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}"
            )
        with _no_autocast(images.device):
            return self.run_trunk(images.to(self.dtype))

    @torch.no_grad()
    def forward_from_trunk(self, maps: Tensor, prompt_index: Tensor, features: bool) -> dict[str, Any]:
        """`forward` from what `embed` gave, or a cache of it, in any type."""
        if tuple(maps.shape[1:]) != self.trunk_shape:
            raise ValueError(f"this teacher's trunk gives (B, *{self.trunk_shape}), got {tuple(maps.shape)}")
        with _no_autocast(maps.device):
            return self.run_heads(maps.to(self.dtype), prompt_index, features)

    @abstractmethod
    def run_trunk(self, images: Tensor) -> Tensor:
        """`embed`, given the weights' type. Not there in a teacher that was built without its trunk."""

    @abstractmethod
    def run_heads(self, maps: Tensor, prompt_index: Tensor, features: bool) -> dict[str, Any]:
        """`forward_from_trunk`, given the weights' type."""


def place(dtype: str, device: str | torch.device) -> tuple[torch.device, torch.dtype]:
    """The device, and what `teacher_dtype` means there: `auto` is fp16, on the CPU fp32."""
    device = choose_device(device)
    if dtype == "auto":
        dtype = "fp16" if device.type in ("cuda", "mps") else "fp32"
    return device, DTYPES[dtype]


def _no_autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
