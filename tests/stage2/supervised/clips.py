"""Small models and clips for the tests of the tracker's training."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sam3.engine.training_run import run_stage
from sam3.transforms import Preprocess
from stage2.data.prompts import PromptSampling
from stage2.supervised import config as supervised_config
from stage2.supervised import run
from stage2.supervised.dataset import ClipDraws, SceneClipBatch, SceneClips
from stage2.supervised.model import SupervisedTracker

SIDE = 224
CELLS = 64
PREPROCESS = Preprocess(SIDE, "square")


def clips(num_frames: int = 2, seed: int = 1, max_objects: int = 3, **draws: Any) -> SceneClips:
    sampling = ClipDraws((num_frames,), max_objects, **draws)
    return SceneClips(1000, PREPROCESS, CELLS, sampling, PromptSampling(0, 0, 1), seed)


@functools.cache
def clip(num_frames: int = 2) -> SceneClipBatch:
    """One with three objects; to be left as it is."""
    return next(batch for i in range(100) if len((batch := clips(num_frames).load([i])).kinds) == 3)


def prompted(batch: SceneClipBatch, kinds: list[str]) -> SceneClipBatch:
    """The batch with other prompts; boxes are the whole picture."""
    points, labels = batch.points.clone(), batch.labels.clone()
    for row, kind in enumerate(kinds):
        if kind == "box":
            points[row], labels[row] = torch.tensor([[0.0, 0.0], [SIDE - 1.0, SIDE - 1.0]]), torch.tensor([2, 3])
    return replace(batch, kinds=kinds, points=points, labels=labels)


def tracker(weights: Path, *flags: str) -> SupervisedTracker:
    arguments = supervised_config.make_parser("").parse_args(["--cfg", str(weights.parent / "c.yaml"), *flags])
    model = run.build_model(supervised_config.load(arguments))
    run.take_image_model(model, weights)
    return model


def train(weights: Path, output: Path, *flags: str, **opts: Any) -> int:
    """A run of clips with 2 frames in the first epoch, which is 2 steps, and with 3 from then on."""
    opts = {
        "DATA__NUM_CLIPS": 2,
        "DATA__BATCH_SIZE": 1,
        "DATA__MAX_OBJECTS": 2,
        "DATA__NUM_FRAMES": [2, 3],
        "DATA__NUM_VAL_CLIPS": 1,
        "DATA__NUM_VAL_FRAMES": 2,
        "TRAIN__MAX_STEPS": 3,
        "TRAIN__WARMUP_STEPS": 1,
        "TRAIN__LOG_INTERVAL": 1,
        "TRAIN__VAL_INTERVAL": 0,
        "TENSORBOARD": False,
        "DEVICE": "cpu",
        **opts,
    }
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in opts.items()]
    places = ["--cfg", str(weights.parent / "c.yaml"), "--pretrained", str(weights), "--output", str(output)]
    parser = supervised_config.make_parser("")
    return run_stage([*places, *flags, "--opts", *pairs], parser, supervised_config.load, run.build_run)
