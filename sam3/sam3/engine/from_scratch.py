"""What the phases of a training from scratch share, whose data are made on the fly: flags, keys, checks, and how their
runs are described to `sam3.engine.training_run`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from sam3.engine import config as engine_config
from sam3.engine import recipe, stage_config
from sam3.engine.recipe import by_steps

FLAGS: dict[str, engine_config.FlagAction] = {
    "--phase": "PHASE",
    **{
        flag: engine_config.SHARED_FLAGS[flag]
        for flag in ("--output", "--pretrained", "--resume", "--max-steps", "--batch-size", "--seed", "--device")
    },
    "--eval": {"EVAL_MODE": True},
    "--throughput": {"THROUGHPUT_MODE": True},
}
_MADE = "pictures are made as the model takes them"
_NORMS = "nothing here has BatchNorm"
RETIRED = {
    **recipe.STEP_RETIRED,
    "DATA.DATA_PATH": "scenes and clips are made on the fly",
    "DATA.NUM_SAMPLES": "scenes and clips are made on the fly; the run's length is TRAIN.MAX_STEPS",
    "DATA.RESIZE": _MADE,
    "DATA.MEAN": _MADE,
    "DATA.STD": _MADE,
    "MODEL.BACKBONE": "the model is SAM3 itself",
    "MODEL.OUTPUT_STRIDE": "the model is SAM3 itself",
    "TRAIN.USE_CHECKPOINT": "the model is small",
    "TRAIN.USE_SYNC_BN": _NORMS,
    "TRAIN.AVERAGE_BN": _NORMS,
    "TRAIN.EVAL_BN_WHEN_TRAINING": _NORMS,
    "TRAIN.COMPILE": "shapes differ from batch to batch",
}
# Of `TrainingRun`.
RUN: dict[str, Any] = {
    "project": "EfficientSAM3-Tiny",
    "best_metric": "val/target",
    "best_mode": "max",
    "config_name": "config.yaml",
    "make_recipe": by_steps,
    "tensorboard_folder": "tensorboard",
}
OUTSIDE = ("outlines.",)  # weights in the checkpoints that are no part of a SAM3


def defaults(phase: str, retired: Mapping[str, str]) -> CfgNode:
    """The engine's keys that act here, with the values that all phases share."""
    c = engine_config.shared_defaults()
    recipe.step_keys(c)
    for key in retired:
        engine_config.remove(c, key)
    c.PHASE = phase
    c.OUTPUT = f"output/tiny_sam3/{phase}"
    c.SEED = 1
    c.MODEL.NAME = "sam3_tiny"
    c.MODEL.PRESET = "tiny"  # sizes of the model, a row of sam3.model.config.PRESETS
    c.DATA.PHOTOS = ""  # folder of photos that lie behind the objects of some pictures; empty: the bundled ones
    c.DATA.NUM_WORKERS = 0  # making pictures takes little of a step's time; on two cores, two processes train instead
    c.TRAIN.MIN_LR = 1e-6
    c.TRAIN.WEIGHT_DECAY = 0.01
    c.TRAIN.CLIP_GRAD = 1.0
    c.TRAIN.AMP = False
    c.TRAIN.LOG_INTERVAL = 20
    c.TRAIN.LATEST_INTERVAL = 100
    c.TRAIN.SAVE_INTERVAL = 0
    c.TRAIN.FIND_UNUSED_PARAMETERS = True  # which prompts there are differs from batch to batch
    c.EVAL_MODE = False  # load the checkpoint, validate once, and end
    c.THROUGHPUT_MODE = False  # time training steps on the first batch, and end
    return c


def load(
    args: argparse.Namespace,
    own: CfgNode,
    choices: Mapping[str, tuple[str, ...]],
    retired: Mapping[str, str],
    minima: Mapping[str, float],
) -> CfgNode:
    """Parsed arguments -> frozen config; own: the defaults; choices, minima: of the phase's own keys. Raises ValueError
    for what cannot work."""
    choices = {**recipe.STEP_CHOICES, **choices}
    config = stage_config.load(args, own, FLAGS, retired=retired, choices=choices)
    stage_config.refuse_idle_keys(config, own, recipe.STEP_CONDITIONS)
    steps = {key: least for key, least in recipe.STEP_MINIMA.items() if _kept(key, retired)}
    stage_config.check_minima(config, {**steps, **minima})
    recipe.check_steps(config)
    return config


def _kept(key: str, retired: Mapping[str, str]) -> bool:
    return key not in retired and not key.startswith("DISTILL.")
