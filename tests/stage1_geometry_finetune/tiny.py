"""Batches, students and frozen heads of the tiny preset, without files of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sam3.engine.embeddings import EmbeddingBatch
from sam3.model.config import Sam3Config
from sam3.model.necks import PassThroughTrunk
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model
from sam3.transforms import Preprocess
from scripts.make_tiny_sam3 import make_model
from stage1_geometry_finetune.data import GeometryBatch
from stage1_geometry_finetune.frozen_path import FrozenPath
from stage1_geometry_finetune.model import GeometryDistiller

CHANNELS, GRID, MASK, QUERIES = 96, 16, 64, 20  # of the tiny preset: 224 pixels, 14 a cell
PREPROCESS = Preprocess(img_size=224, resize="pad")


@cache
def whole_model() -> Sam3Image:
    """A tiny SAM3, with its text encoder; not to be changed."""
    return make_model(Sam3Config.preset("tiny"), seed=0)


@cache
def frozen_path(text: bool = True) -> FrozenPath:
    """The heads of `whole_model`; not to be changed."""
    source = whole_model()
    heads = assemble_image_model(Sam3Config.preset("tiny"), PassThroughTrunk(CHANNELS), enable_text_encoder=False)
    heads.load_state_dict({key: source.state_dict()[key] for key in heads.state_dict()})
    if not text:
        return FrozenPath(heads)
    with torch.no_grad():
        features = source.backbone.forward_text(["visual"])
    return FrozenPath(heads, {name: features[name] for name in ("language_features", "language_mask")})


class PatchStudent(nn.Module):
    """One convolution from pixels to the grid: the same in train and eval mode, whatever else is in the batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Conv2d(3, CHANNELS, 14, stride=14)
            self.head = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class GridStudent(nn.Module):
    """Answers with a grid of its own `(B, C, G, G)`, whatever the pictures."""

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.grid = nn.Parameter(grid.clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.grid


def distiller(student: nn.Module | None = None, text: bool = True, **options) -> GeometryDistiller:
    """`options` are those of `GeometryDistiller`."""
    return GeometryDistiller(student or PatchStudent(), frozen_path(text), PREPROCESS, **options)


def make_batch(
    kinds: Sequence[Sequence[str]], iterations: int = 1, num_points: int = 1, masks: bool = False, seed: int = 0
) -> GeometryBatch:
    """Random pictures with boxes, points in their middle and teacher grids; `kinds` per image and object.

    What belongs to image i follows from `seed` and i alone. Pictures fill 224 x (224 - 28 i) pixels, modulo 4.
    """
    count, longest = len(kinds), max((len(each) for each in kinds), default=0)
    images = torch.zeros(count, 3, 224, 224, dtype=torch.uint8)
    sizes = torch.zeros(count, 2, dtype=torch.int64)
    boxes, targets = torch.zeros(2, count, longest, 4)
    data = torch.zeros(count, CHANNELS, GRID, GRID, dtype=torch.float16)
    uniforms = torch.zeros(count, longest, iterations - 1, num_points)
    gt_masks = torch.zeros(count, longest, MASK, MASK, dtype=torch.bool)
    for i, each in enumerate(kinds):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        sizes[i] = torch.tensor([224, 224 - 28 * (i % 4)])
        images[i] = torch.randint(0, 256, (3, 224, 224), generator=generator)
        data[i] = torch.randn(data.shape[1:], generator=generator)
        for j in range(len(each)):
            corner, side = 0.4 * torch.rand(2, generator=generator), 0.1 + 0.2 * torch.rand(2, generator=generator)
            targets[i, j] = torch.cat((corner, corner + side))
            boxes[i, j] = targets[i, j] + 0.02 * torch.rand(4, generator=generator)
            uniforms[i, j] = torch.rand(uniforms.shape[2:], generator=generator)
            x0, y0, x1, y1 = (targets[i, j] * MASK).round().int().tolist()
            gt_masks[i, j, y0:y1, x0:x1] = True
    valid = torch.arange(longest) < torch.tensor([len(each) for each in kinds])[:, None]
    refined = iterations > 1 and num_points > 0
    return GeometryBatch(
        images=images,
        sizes=sizes,
        keys=[f"sa_{seed}_{i}" for i in range(count)],
        boxes=boxes,
        targets=targets,
        points=(targets[..., :2] + targets[..., 2:]) / 2,
        point_labels=valid.long(),
        prompt_mask=~valid,
        kinds=[list(each) for each in kinds],
        refine_uniforms=uniforms if refined else None,
        refine_counts=torch.full(uniforms.shape[:3], num_points).where(valid[..., None], 0) if refined else None,
        gt_masks=gt_masks if masks else None,
        embeddings=EmbeddingBatch(data, torch.zeros(count, dtype=torch.int64)),
    )


def part(batch: GeometryBatch, images: Sequence[int]) -> GeometryBatch:
    """Some images of a batch, with no more columns than they need."""
    rows = list(images)
    longest = max((len(batch.kinds[i]) for i in rows), default=0)
    values = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            value = value[rows] if name in ("images", "sizes") else value[rows][:, :longest]
        elif name in ("keys", "kinds"):
            value = [value[i] for i in rows]
        values[name] = value
    embeddings = EmbeddingBatch(batch.embeddings.data[rows], batch.embeddings.seeds[rows])
    return GeometryBatch(**{**values, "embeddings": embeddings})
