"""Scenes, prompts about them and the answers, as tensors.

Letters: `I` images, `N` objects of an image (padded), `B` image-prompt pairs, `Nb Np` exemplar boxes and points of a
pair (padded), `R` click rows, `P` points of a row, `S` side of the input, `M` side of the mask grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.supervised.set_loss import Targets
from sam3.engine import batch
from sam3.engine.embeddings import EmbeddingBatch
from sam3.model.box_ops import box_xyxy_to_cxcywh
from sam3.model.geometry_encoders import Prompt

NOTHING = 255  # in place of an object's number, where a pixel shows the ground


@dataclass
class ClickRows:
    """Prompts for the click head, all with P points. image, object: long `(R,)`; points: `(R, P, 2)` pixels of the
    input; labels: long `(R, P)`, as `Sam3Tracker.predict_masks` takes them."""

    image: Tensor
    object: Tensor
    points: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.image)


@dataclass
class SceneBatch:
    """images: uint8 `(I, 3, S, S)`; masks: uint8 `(I, N, M, M)`, share of each cell that an object covers, in 255ths;
    boxes: `(I, N, 4)` xyxy in 0..1. words: long `(I, N, 3)`, place of an object's shape, colour and texture in `WORDS`,
    -1 for a plain texture and in the padding; turns: long `(I, N)`, see `outlines.turns_of`, -1 in the padding;
    instances: uint8 `(I, S, S)`, the object that each pixel shows, or NOTHING. full_masks: bool `(I, N, S, S)`, for
    evaluation, else None.
    image: long `(B,)`; kinds, phrases: B strings; wanted, doubtful: bool `(B, N)`, see `Targets`. exemplars:
    `(B, Nb, 4)` xyxy in 0..1 with exemplar_labels and exemplar_mask `(B, Nb)`, True = padding; points `(B, Np, 2)` in
    0..1 with the like.
    shown: long `(B,)`, the object that a pair's first exemplar lies on, -1 without one.
    clicks: one click; corners: the two corners of a box, both for the click head.
    """

    keys: list[str]
    images: Tensor
    masks: Tensor
    boxes: Tensor
    image: Tensor
    kinds: list[str]
    phrases: list[str]
    wanted: Tensor
    doubtful: Tensor
    exemplars: Tensor
    exemplar_labels: Tensor
    exemplar_mask: Tensor
    points: Tensor
    point_labels: Tensor
    point_mask: Tensor
    shown: Tensor
    clicks: ClickRows
    corners: ClickRows
    words: Tensor | None = None
    turns: Tensor | None = None
    instances: Tensor | None = None
    full_masks: Tensor | None = None
    embeddings: EmbeddingBatch | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> SceneBatch:
        return batch.pin(self)

    @property
    def targets(self) -> Targets:
        """Of the B pairs."""
        masks = self.masks[self.image].float() / 255
        return Targets(self.wanted, self.boxes[self.image], masks, self.doubtful)

    def prompt(self) -> Prompt:
        """Boxes and points of the B pairs; `Prompt.empty` where there are none of either."""
        if not self.exemplars.shape[1] and not self.points.shape[1]:
            return Prompt.empty(len(self.image), self.images.device)
        return Prompt(
            box_embeddings=box_xyxy_to_cxcywh(self.exemplars).transpose(0, 1),
            box_mask=self.exemplar_mask,
            box_labels=self.exemplar_labels.T,
            point_embeddings=self.points.transpose(0, 1),
            point_mask=self.point_mask,
            point_labels=self.point_labels.T,
        )


def pad_rows(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[Sequence[int]], width: int) -> tuple[Tensor, ...]:
    """Lists of vectors -> values `(B, n, width)`, labels `(B, n)` and mask `(B, n)`, True = padding, at the right."""
    count = max((len(row) for row in rows), default=0)
    values = np.zeros((len(rows), count, width), np.float32)
    marks, mask = np.ones((len(rows), count), np.int64), np.ones((len(rows), count), bool)
    for i, (row, own) in enumerate(zip(rows, labels, strict=True)):
        if len(row):
            values[i, : len(row)], marks[i, : len(row)], mask[i, : len(row)] = row, own, False
    return torch.from_numpy(values), torch.from_numpy(marks), torch.from_numpy(mask)


def coverage(masks: np.ndarray, side: int) -> Tensor:
    """bool (N, S, S) -> uint8 (N, side, side), how much of each cell's surroundings a mask covers, in 255ths.

    By the triangle filter that reaches to the next cells' middles, whose inverse is bilinear enlargement.
    """
    shares = F.interpolate(torch.from_numpy(masks)[None].float(), (side, side), mode="bilinear", antialias=True)[0]
    return (255 * shares).round().to(torch.uint8)
