"""The keys of the tracker's training on generated clips, on top of the engine's, and its arguments."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from yacs.config import CfgNode

from sam3.engine import config as engine_config
from sam3.engine import recipe, stage_config
from sam3.model.config import PRESETS
from stage2.data.prompts import PromptSampling
from stage2.supervised.dataset import ClipDraws
from stage2.supervised.model import TrackWeights

FLAGS: dict[str, engine_config.FlagAction] = {
    "--phase": "PHASE",
    "--output": "OUTPUT",
    "--pretrained": "MODEL.PRETRAINED",
    "--resume": ("MODEL.RESUME", "auto"),
    "--max-steps": "TRAIN.MAX_STEPS",
    "--batch-size": "DATA.BATCH_SIZE",
    "--seed": "SEED",
    "--device": "DEVICE",
    "--eval": {"EVAL_MODE": True},
    "--throughput": {"THROUGHPUT_MODE": True},
}
CHOICES = {**recipe.STEP_CHOICES, "PHASE": ("tracker",), "MODEL.PRESET": tuple(PRESETS)}
_MADE = "frames are made as the model takes them"
_SMALL = "nothing here has BatchNorm"
RETIRED = {
    **recipe.STEP_RETIRED,
    "DATA.DATA_PATH": "clips are made on the fly",
    "DATA.NUM_SAMPLES": "clips are made on the fly; the run's length is TRAIN.MAX_STEPS",
    "DATA.IMG_SIZE": "it follows from MODEL.PRESET",
    "DATA.RESIZE": _MADE,
    "DATA.MEAN": _MADE,
    "DATA.STD": _MADE,
    "MODEL.BACKBONE": "the model is SAM3 itself",
    "TRAIN.USE_CHECKPOINT": "the model is small",
    "TRAIN.USE_SYNC_BN": _SMALL,
    "TRAIN.AVERAGE_BN": _SMALL,
    "TRAIN.EVAL_BN_WHEN_TRAINING": _SMALL,
    "TRAIN.COMPILE": "the number of memory tokens changes from frame to frame",
    "DISTILL": "there is no teacher",
}
MINIMA = {
    **{key: least for key, least in recipe.STEP_MINIMA.items() if key not in RETIRED and not key.startswith("DISTILL")},
    "DATA.NUM_CLIPS": 1,
    "DATA.MAX_OBJECTS": 1,
    "DATA.MAX_SPAN": 1,
    "DATA.TIME_REVERSAL": 0,
    "DATA.NUM_VAL_CLIPS": 1,
    "DATA.NUM_VAL_FRAMES": 2,
}


def defaults() -> CfgNode:
    """The shared keys that act here and this program's own."""
    c = engine_config.shared_defaults()
    recipe.step_keys(c)
    for key in RETIRED:
        engine_config.remove(c, key)
    c.PHASE = "tracker"
    c.OUTPUT = "output/tiny_sam3/tracker"
    c.SEED = 1

    c.MODEL.NAME = "sam3_tiny"
    c.MODEL.PRESET = "tiny"  # sizes of the model, a row of sam3.model.config.PRESETS
    c.MODEL.PRETRAINED = "output/tiny_sam3/image/ckpt_latest.pth"  # the image model: a checkpoint or an exported file
    c.MODEL.TRAIN_NECK = True  # train the second neck too, which the tracker and clicks use

    draws = ClipDraws()
    c.DATA.BATCH_SIZE = 2  # clips per process and step
    c.DATA.NUM_CLIPS = 3600  # of an epoch; each epoch has clips of its own
    # Of a clip in the first epoch, the second, ..., and the last number also in all that follow. 8 is the least that
    # trains the codes of all frames in memory.
    c.DATA.NUM_FRAMES = list(draws.num_frames)
    c.DATA.MAX_OBJECTS = draws.max_objects  # of a clip, drawn from those that are seen well in its first frame
    c.DATA.MAX_SPAN = draws.max_span  # a clip is a piece of a longer one, of up to so many times its frames
    c.DATA.PHOTOS = ""  # folder of photos that lie behind the objects of some clips; empty: the bundled ones
    c.DATA.TIME_REVERSAL = draws.reversal  # share of the clips that are played backwards
    c.DATA.PROMPTS = CfgNode({"MASK": 0.25, "BOX": 0.25, "CLICK": 0.5})  # shares of the objects; together 1
    c.DATA.NUM_VAL_CLIPS = 24
    c.DATA.NUM_VAL_FRAMES = 12  # of a clip to validate on
    c.DATA.NUM_WORKERS = 0  # making clips takes little of a step's time; on two cores, two processes train instead

    c.LOSS = CfgNode({name.upper(): weight for name, weight in asdict(TrackWeights()).items()})  # see SupervisedTracker

    c.TRAIN.MAX_STEPS = 1200
    c.TRAIN.LR = 5e-4
    c.TRAIN.WARMUP_STEPS = 50
    c.TRAIN.MIN_LR = 1e-6
    c.TRAIN.WEIGHT_DECAY = 0.01
    c.TRAIN.CLIP_GRAD = 1.0
    c.TRAIN.EFFECTIVE_BATCH = 4  # one process accumulates, two share it
    c.TRAIN.AMP = False
    c.TRAIN.LOG_INTERVAL = 20
    c.TRAIN.LATEST_INTERVAL = 100
    c.TRAIN.SAVE_INTERVAL = 0
    c.TRAIN.VAL_INTERVAL = 400
    c.TRAIN.FIND_UNUSED_PARAMETERS = True  # which prompts there are differs from batch to batch

    c.EVAL_MODE = False  # load the checkpoint, validate once, and end
    c.THROUGHPUT_MODE = False  # time training steps on the first batch, and end
    return c


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--cfg`, `--opts` and the flags of the table."""
    return stage_config.make_parser(description, FLAGS, defaults())


def load(args: argparse.Namespace) -> CfgNode:
    """Parsed arguments -> checked, frozen config. Raises ValueError for what cannot work."""
    stage_config.check_local_rank(args)
    config = engine_config.load_config(
        defaults(),
        args.cfg,
        opts=args.opts,
        flag_values=engine_config.flag_values_from(args, FLAGS),
        retired=RETIRED,
        choices=CHOICES,
    )
    stage_config.check_minima(config, MINIMA)
    recipe.check_steps(config)
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
