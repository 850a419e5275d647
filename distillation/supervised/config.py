"""The keys of SAM3's training from scratch, on top of the engine's, and its arguments."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from yacs.config import CfgNode

from distillation.supervised.scene_prompts import TRAINING_MIX
from distillation.supervised.set_loss import SetWeights
from sam3.engine import config as engine_config
from sam3.engine import recipe, stage_config
from sam3.model.config import PRESETS

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
CHOICES = {**recipe.STEP_CHOICES, "PHASE": ("words", "closeup", "image"), "MODEL.PRESET": tuple(PRESETS)}
_MADE = "the pictures are made as the model takes them"
RETIRED = {
    **recipe.STEP_RETIRED,
    "DATA.DATA_PATH": "scenes are made on the fly",
    "DATA.NUM_SAMPLES": "scenes are made on the fly; the run's length is TRAIN.MAX_STEPS",
    "DATA.RESIZE": _MADE,
    "DATA.MEAN": _MADE,
    "DATA.STD": _MADE,
    "MODEL.BACKBONE": "the model is SAM3 itself",
    "TRAIN.USE_CHECKPOINT": "the model is small",
    "TRAIN.USE_SYNC_BN": "nothing here has BatchNorm",
    "TRAIN.AVERAGE_BN": "nothing here has BatchNorm",
    "TRAIN.EVAL_BN_WHEN_TRAINING": "nothing here has BatchNorm",
    "TRAIN.COMPILE": "shapes differ from batch to batch",
}
MINIMA = {
    **recipe.STEP_MINIMA,
    "DATA.IMG_SIZE": 1,
    "DATA.PROMPTS": 1,
    "DATA.CLICKS": 0,
    "DATA.CLICK_EVERY": 1,
    "DATA.NUM_VAL_SCENES": 1,
    "LOSS.ABSENT_SCORE": 0,
    "LOSS.COPIES": 1,
    "LOSS.CLICK_WEIGHT": 0,
    "LOSS.MASK_SHARE": 0,
    "LOSS.WORD_WEIGHT": 0,
    "LOSS.OUTLINE_WEIGHT": 0,
    "DATA.NUM_SCENES": 0,
}
MINIMA = {key: least for key, least in MINIMA.items() if not key.startswith("DISTILL.")}


def defaults() -> CfgNode:
    """The shared keys that act here and this program's own."""
    c = engine_config.shared_defaults()
    recipe.step_keys(c)
    for key in RETIRED:
        engine_config.remove(c, key)
    c.PHASE = "image"  # words: trunk and words alone | closeup, image: detector and click head
    c.OUTPUT = "output/tiny_sam3/image"
    c.SEED = 1

    c.MODEL.NAME = "sam3_tiny"
    c.MODEL.PRESET = "tiny"  # sizes of the model, a row of sam3.model.config.PRESETS

    c.DATA.BATCH_SIZE = 8  # scenes per process and step
    c.DATA.IMG_SIZE = 224  # side of the scenes, px; below the preset's, objects are larger for that
    c.DATA.NUM_SCENES = 0  # different ones, kept in memory and shown in quarter turns; 0: all are
    c.DATA.PHOTOS = ""  # folder of photos that lie behind the objects of some scenes; empty: the bundled ones
    c.DATA.PROMPTS = 2  # phrases or exemplars asked about each scene
    c.DATA.MIX = CfgNode(dict(TRAINING_MIX))  # shares of the prompts: text, absent, box, point, ...
    c.DATA.CLICKS = 3  # clicks and boxes for the click head, of each scene that has them
    c.DATA.CLICK_EVERY = 2  # one scene in so many has clicks
    c.DATA.NUM_VAL_SCENES = 200
    c.DATA.NUM_WORKERS = 0  # making scenes takes a tenth of a step's time; on two cores, two processes train instead

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
    c.TRAIN.WARMUP_STEPS = 100
    c.TRAIN.MIN_LR = 1e-6
    c.TRAIN.WEIGHT_DECAY = 0.01
    c.TRAIN.CLIP_GRAD = 1.0
    c.TRAIN.EFFECTIVE_BATCH = 16  # one process accumulates, two share it
    c.TRAIN.AMP = False
    c.TRAIN.LOG_INTERVAL = 20
    c.TRAIN.LATEST_INTERVAL = 100
    c.TRAIN.SAVE_INTERVAL = 0
    c.TRAIN.VAL_INTERVAL = 500
    c.TRAIN.FIND_UNUSED_PARAMETERS = True  # which prompts there are differs from batch to batch
    c.TRAIN.CHANNELS_LAST = True

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


def set_weights(config: CfgNode) -> SetWeights:
    """Of the detector's terms."""
    return SetWeights.from_mapping({name: config.LOSS[name] for name in asdict(SetWeights())})
