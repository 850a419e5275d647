"""A tiny tracker and made-up clips."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from sam3.model.necks import PassThroughTrunk, TrackerNeck
from sam3.model.sam3_video import Sam3VideoModel
from sam3.model.tracker_config import TINY_MEMORY, MemoryConfig, TrackerConfig
from sam3.tracker_builder import build_memory
from sam3.transforms import Preprocess
from scripts.make_tiny_sam3 import make_tracker
from stage2.data.batch import PRESENT, ClipBatch
from stage2.model import MemoryDistiller
from stage2.rollout import Rollout

CONFIG = TrackerConfig.preset("tiny")
WIDTH = 32  # of the made-up trunk
SIDE = 4 * CONFIG.grid


@functools.cache
def video_model() -> Sam3VideoModel:
    """Random weights; takes trunk maps. Shared: to be left as it is."""
    torch.manual_seed(0)
    neck = TrackerNeck(PassThroughTrunk(WIDTH), CONFIG.dim)
    return Sam3VideoModel(neck, make_tracker(CONFIG, seed=1), Preprocess(CONFIG.img_size, "square")).eval()


def distiller(memory: MemoryConfig = TINY_MEMORY, recompute: bool = False, **options) -> MemoryDistiller:
    """A fresh student, always with the same weights."""
    model = video_model()
    torch.manual_seed(1)
    student = build_memory(CONFIG, memory)
    student.attention.init_from_teacher(model.tracker.transformer.encoder)
    return MemoryDistiller(Rollout(model, recompute), student, **options).train()


def make_batch(kinds: Sequence[Sequence[str]], num_frames: int = 3, seed: int = 0) -> ClipBatch:
    """A clip for each of `kinds`, with an object for each entry of it; trunk maps are noise, objects are boxes."""
    generator = torch.Generator().manual_seed(seed)
    flat = [kind for clip in kinds for kind in clip]
    masks = torch.zeros(len(flat), num_frames, SIDE, SIDE, dtype=torch.bool)
    points, labels = torch.zeros(len(flat), 2, 2), torch.full((len(flat), 2), -1)
    for row, kind in enumerate(flat):
        for t in range(num_frames):
            masks[row, t, 8 + 4 * row + t : 24 + 4 * row + t, 10 + t : 30 + t] = True
        scale = CONFIG.img_size / SIDE
        if kind == "box":
            points[row] = torch.tensor([[10.0, 8 + 4 * row], [30.0, 24 + 4 * row]]) * scale
            labels[row] = torch.tensor([2, 3])
        elif kind == "click":
            points[row, 0], labels[row, 0] = torch.tensor([20.0, 16 + 4 * row]) * scale, 1
    return ClipBatch(
        keys=[f"clip{i}" for i in range(len(kinds))],
        images=None,
        sizes=torch.full((len(kinds), 2), CONFIG.img_size),
        embeddings=torch.randn(len(kinds), num_frames, WIDTH, CONFIG.grid, CONFIG.grid, generator=generator).half(),
        clip_of_object=torch.tensor([i for i, clip in enumerate(kinds) for _ in clip], dtype=torch.long),
        masks=masks,
        states=torch.full((len(flat), num_frames), PRESENT),
        kinds=flat,
        points=points,
        labels=labels,
    )


def part(batch: ClipBatch, clips: Sequence[int]) -> ClipBatch:
    """Some of the clips, with their objects."""
    rows = [row for row, clip in enumerate(batch.clip_of_object.tolist()) if clip in clips]
    return ClipBatch(
        keys=[batch.keys[i] for i in clips],
        images=None,
        sizes=batch.sizes[list(clips)],
        embeddings=batch.embeddings[list(clips)],
        clip_of_object=torch.tensor([list(clips).index(int(batch.clip_of_object[row])) for row in rows]),
        masks=batch.masks[rows],
        states=batch.states[rows],
        kinds=[batch.kinds[row] for row in rows],
        points=batch.points[rows],
        labels=batch.labels[rows],
    )
