"""The keys of SAM3's training from scratch, on top of the engine's, and its arguments."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from yacs.config import CfgNode

from distillation.supervised.scene_prompts import TRAINING_MIX
from distillation.supervised.set_loss import SetWeights
from sam3.engine import from_scratch, stage_config
from sam3.model.config import PRESETS, Sam3Config

CHOICES = {"PHASE": ("words", "closeup", "image"), "MODEL.PRESET": tuple(PRESETS)}
MINIMA = {
    "DATA.PROMPTS": 1,
    "DATA.CLICKS": 0,
    "DATA.CLICK_EVERY": 1,
    "DATA.NUM_SCENES": 0,
    "DATA.NUM_VAL_SCENES": 1,
    "TRAIN.NAMED_LR": 0,
    "LOSS.ABSENT_SCORE": 0,
    "LOSS.COPIES": 1,
    "LOSS.CLICK_WEIGHT": 0,
    "LOSS.MASK_SHARE": 0,
    "LOSS.WORD_WEIGHT": 0,
    "LOSS.OUTLINE_WEIGHT": 0,
}


def defaults() -> CfgNode:
    """The shared keys that act here and this program's own."""
    c = from_scratch.defaults("image", from_scratch.RETIRED)
    c.DATA.BATCH_SIZE = 8  # scenes per process and micro-batch
    c.DATA.IMG_SIZE = 224  # side of the scenes, px; below the preset's, down to half, objects are larger for that
    c.DATA.NUM_SCENES = 0  # different ones, kept in memory, shown turned and mirrored; 0: all are
    c.DATA.PROMPTS = 2  # phrases or exemplars asked about each scene
    c.DATA.MIX = CfgNode(dict(TRAINING_MIX))  # shares of the prompts: text, absent, box, point, ...
    c.DATA.CLICKS = 3  # clicks and boxes for the click head, of each scene that has them
    c.DATA.CLICK_EVERY = 2  # one scene in so many has clicks
    c.DATA.NUM_VAL_SCENES = 200

    c.LOSS = CfgNode(asdict(SetWeights()))  # weights of the terms, see SetWeights
    c.LOSS.COPIES = 4  # matches of each object among the one-to-many queries
    c.LOSS.FOCAL_ALPHA = 0.5  # weight of hits in the scores' focal loss; above one half, more is found and more wrong
    c.LOSS.ABSENT_SCORE = 0.0  # how much scores learn from absent things; 0 leaves these to the presence token
    c.LOSS.CLICK_WEIGHT = 1.0  # of all terms of the click head; 0 trains none
    c.LOSS.WORD_WEIGHT = 0.0  # of the loss that teaches single words; 0: phrases alone teach them
    c.LOSS.OUTLINE_WEIGHT = 0.0  # beside it, of how objects are turned, where they are and where they end
    c.LOSS.MASK_SHARE = 0.5  # share of the prompts that learn masks in a step

    c.TRAIN.MAX_STEPS = 5000
    c.TRAIN.LR = 1e-3
    c.TRAIN.NAMED_LR = 1.0  # learning rate of what words reach (trunk and text), times LR; for phases that go on
    c.TRAIN.WARMUP_STEPS = 100
    c.TRAIN.EFFECTIVE_BATCH = 16  # one process accumulates, two share it
    c.TRAIN.VAL_INTERVAL = 500
    c.TRAIN.CHANNELS_LAST = True
    return c


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--cfg`, `--opts` and the flags of the table."""
    return stage_config.make_parser(description, from_scratch.FLAGS, defaults())


def load(args: argparse.Namespace) -> CfgNode:
    """Parsed arguments -> checked, frozen config. Raises ValueError for what cannot work."""
    config = from_scratch.load(args, defaults(), CHOICES, from_scratch.RETIRED, MINIMA)
    _check_size(config)
    set_weights(config)
    if min(config.DATA.MIX.values()) < 0 or not any(config.DATA.MIX.values()):
        raise ValueError(f"DATA.MIX wants shares from 0, at least one above it, got {dict(config.DATA.MIX)}")
    if not 0 < config.LOSS.FOCAL_ALPHA < 1:
        raise ValueError(f"LOSS.FOCAL_ALPHA lies between 0 and 1, got {config.LOSS.FOCAL_ALPHA}")
    if config.LOSS.OUTLINE_WEIGHT and not config.LOSS.WORD_WEIGHT:
        raise ValueError("LOSS.OUTLINE_WEIGHT goes with words; set LOSS.WORD_WEIGHT too")
    if config.PHASE == "words" and not config.LOSS.WORD_WEIGHT:
        raise ValueError("the phase words learns nothing with LOSS.WORD_WEIGHT 0")
    if not 0 < config.LOSS.MASK_SHARE <= 1:
        raise ValueError(f"LOSS.MASK_SHARE is a share above 0 and up to 1, got {config.LOSS.MASK_SHARE}")
    return config


def _check_size(config: CfgNode) -> None:
    """ValueError for a size at which tokens would not tile a scene, or not see objects as large as usual."""
    size, usual = config.DATA.IMG_SIZE, Sam3Config.preset(config.MODEL.PRESET)
    if not usual.img_size / 2 <= size <= usual.img_size or size % usual.patch_size:
        raise ValueError(
            f"DATA.IMG_SIZE is {size}, but scenes are drawn at {usual.img_size // 2} to {usual.img_size} px, in "
            f"multiples of {usual.patch_size} (MODEL.PRESET {config.MODEL.PRESET})"
        )


def set_weights(config: CfgNode) -> SetWeights:
    """Of the detector's terms."""
    return SetWeights.from_mapping({name: config.LOSS[name] for name in asdict(SetWeights())})
