"""The keys of the tracker's training on generated clips, on top of the engine's, and its arguments."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from yacs.config import CfgNode

from sam3.engine import from_scratch, stage_config
from sam3.model.config import PRESETS
from stage2.data.prompts import PromptSampling
from stage2.supervised.dataset import ClipDraws
from stage2.supervised.model import TrackWeights

CHOICES = {"PHASE": ("tracker",), "MODEL.PRESET": tuple(PRESETS)}
RETIRED = {
    **from_scratch.RETIRED,
    "DATA.IMG_SIZE": "it follows from MODEL.PRESET",
    "DISTILL": "there is no teacher",
    "TRAIN.CHANNELS_LAST": "the tracker works on tokens, not on images",
}
MINIMA = {
    "DATA.NUM_CLIPS": 1,
    "DATA.MAX_OBJECTS": 1,
    "DATA.MAX_SPAN": 1,
    "DATA.TIME_REVERSAL": 0,
    "DATA.NUM_VAL_CLIPS": 1,
    "DATA.NUM_VAL_FRAMES": 2,
}


def defaults() -> CfgNode:
    """The shared keys that act here and this program's own."""
    c = from_scratch.defaults("tracker", RETIRED)
    c.MODEL.PRETRAINED = "output/tiny_sam3/image/ckpt_latest.pth"  # the image model: a checkpoint or an exported file
    c.MODEL.TRAIN_NECK = True  # train the second neck too, which the tracker and clicks use

    draws = ClipDraws()
    c.DATA.BATCH_SIZE = 2  # clips per process and micro-batch
    c.DATA.NUM_CLIPS = 3600  # of an epoch; each epoch has clips of its own
    # Of a clip in the first epoch, the second, ..., and the last number also in all that follow. 8 is the least that
    # trains the codes of all frames in memory.
    c.DATA.NUM_FRAMES = list(draws.num_frames)
    c.DATA.MAX_OBJECTS = draws.max_objects  # of a clip, drawn from those that are seen well in its first frame
    c.DATA.MAX_SPAN = draws.max_span  # a clip is a piece of a longer one, of up to so many times its frames
    c.DATA.TIME_REVERSAL = draws.reversal  # share of the clips that are played backwards
    c.DATA.PROMPTS = CfgNode({"MASK": 0.25, "BOX": 0.25, "CLICK": 0.5})  # shares of the objects; together 1
    c.DATA.NUM_VAL_CLIPS = 24
    c.DATA.NUM_VAL_FRAMES = 12  # of a clip to validate on

    c.LOSS = CfgNode({name.upper(): weight for name, weight in asdict(TrackWeights()).items()})  # see SupervisedTracker

    c.TRAIN.MAX_STEPS = 1200
    c.TRAIN.LR = 5e-4
    c.TRAIN.WARMUP_STEPS = 50
    c.TRAIN.EFFECTIVE_BATCH = 4  # one process accumulates, two share it
    c.TRAIN.VAL_INTERVAL = 400
    return c


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--cfg`, `--opts` and the flags of the table."""
    return stage_config.make_parser(description, from_scratch.FLAGS, defaults())


def load(args: argparse.Namespace) -> CfgNode:
    """Parsed arguments -> checked, frozen config. Raises ValueError for what cannot work."""
    config = from_scratch.load(args, defaults(), CHOICES, RETIRED, MINIMA)
    frames = config.DATA.NUM_FRAMES
    if not (frames and all(type(count) is int and count >= 2 for count in frames)):
        raise ValueError(f"DATA.NUM_FRAMES lists frames of a clip, each at least 2, got {frames}")
    if config.DATA.TIME_REVERSAL > 1:
        raise ValueError(f"DATA.TIME_REVERSAL is a share, at most 1, got {config.DATA.TIME_REVERSAL}")
    if not config.MODEL.PRETRAINED:
        raise ValueError(
            "MODEL.PRETRAINED is empty, but the tracker is trained on a finished image model: set it to "
            "ckpt_latest.pth of the image phase, or pass --pretrained"
        )
    prompt_sampling(config)
    track_weights(config)
    return config


def prompt_sampling(config: CfgNode) -> PromptSampling:
    """How the objects of a training clip are given. ValueError for shares that do not add up."""
    shares = config.DATA.PROMPTS
    try:
        return PromptSampling(shares.MASK, shares.BOX, shares.CLICK)
    except ValueError as error:
        raise ValueError(f"DATA.PROMPTS: {error}") from error


def clip_draws(config: CfgNode) -> ClipDraws:
    """How training clips are drawn."""
    data = config.DATA
    return ClipDraws(tuple(data.NUM_FRAMES), data.MAX_OBJECTS, data.MAX_SPAN, data.TIME_REVERSAL)


def track_weights(config: CfgNode) -> TrackWeights:
    """Of the losses."""
    return TrackWeights(**{name.lower(): weight for name, weight in config.LOSS.items()})
