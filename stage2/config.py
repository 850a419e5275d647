"""The keys of Stage 2, its arguments, and the keys of other programs that it refuses with a reason.

--config FILE --output_dir FOLDER [--resume PATH] [--seed N] [--dry-run] KEY VALUE ...
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable

from yacs.config import CfgNode

from sam3.engine import config as engine_config
from sam3.engine import recipe, stage_config
from sam3.engine.sav import KINDS
from sam3.model.tracker_config import MemoryConfig

ANNOTATION_STRIDE = 4  # SA-V has masks for every 4th frame
FLAGS: dict[str, engine_config.FlagAction] = {
    "--output-dir": "OUTPUT",
    "--resume": "MODEL.RESUME",
    **{flag: engine_config.SHARED_FLAGS[flag] for flag in ("--seed", "--device")},
    "--eval": {"EVAL_MODE": True},
    "--throughput": {"THROUGHPUT_MODE": True},
}
# Other names of keys.
ALIASES = {"TRAIN.BATCH_SIZE": "DATA.BATCH_SIZE"}
CHOICES = {
    **recipe.STEP_CHOICES,
    "DATA.DATASET": ("sav",),
    "DISTILL.IOU_TYPE": ("mask", "score"),
}
SHARES = (
    *("DATA.TRAIN_SPLIT", "DATA.VAL_SPLIT", "DATA.SUBSET", "DATA.TIME_REVERSAL", "DATA.SA1B_RATIO"),
    *("DISTILL.FOCAL_ALPHA", "DISTILL.PROMPTS.MASK", "DISTILL.PROMPTS.BOX", "DISTILL.PROMPTS.CLICK"),
    *("AUG.HFLIP", "AUG.GRAYSCALE"),
    *(f"AUG.{kind}.{what}" for kind in ("COLOR_JITTER", "FRAME_JITTER") for what in ("BRIGHTNESS", "CONTRAST")),
    *("AUG.COLOR_JITTER.SATURATION", "AUG.FRAME_JITTER.SATURATION"),
)
WEIGHTS = tuple(f"DISTILL.{name}_WEIGHT" for name in ("FOCAL", "DICE", "IOU", "MSE", "OCCLUSION"))

_CHECKPOINT = "it follows from MODEL.SAM3_CHECKPOINT"
_NO_BATCHNORM = "nothing that is trained here has BatchNorm"
RETIRED = {
    **recipe.STEP_RETIRED,
    "DATA.DATA_PATH": "the videos lie in DATA.SAV_ROOT",
    "DATA.NUM_SAMPLES": "set DATA.SUBSET, the share of the videos to use",
    "DATA.IMG_SIZE": _CHECKPOINT,
    "DATA.RESIZE": _CHECKPOINT,
    "DATA.MEAN": _CHECKPOINT,
    "DATA.STD": _CHECKPOINT,
    "DATA.INTERPOLATION": "pictures are always resized bilinearly with antialiasing, as SAM3 does",
    "MODEL.TYPE": "the model is SAM3's tracker with a compressed memory",
    "MODEL.BACKBONE": "the image encoder is the one of MODEL.SAM3_CHECKPOINT, frozen",
    "MODEL.OUTPUT_STRIDE": "the image encoder is the one of MODEL.SAM3_CHECKPOINT, frozen",
    "MODEL.MEMORY_ATTENTION.D_MODEL": _CHECKPOINT,
    "MODEL.MEMORY_ATTENTION.NUM_HEADS": "attention has one head, as the teacher's, which it starts from",
    "MODEL.MEMORY_ENCODER": _CHECKPOINT,
    "MODEL.TRACKER": _CHECKPOINT,
    "DISTILL.ENABLED": "Stage 2 is distillation and nothing else",
    "DISTILL.TEACHER_EMBED_PATH": "the embeddings of the frames lie in DATA.EMBEDDING_DIR",
    "DISTILL.FEATURE_LOSS": "set DISTILL.MSE_WEIGHT; 0 leaves the term out",
    "DISTILL.MASK_LOSS": "set DISTILL.FOCAL_WEIGHT, DICE_WEIGHT and IOU_WEIGHT; 0 leaves a term out",
    "DISTILL.EMBED_DIM": _CHECKPOINT,
    "DISTILL.EMBED_SIZE": _CHECKPOINT,
    "TRAIN.STEPS": "the run's length is TRAIN.MAX_STEPS",
    "TRAIN.GRAD_CLIP": "set TRAIN.CLIP_GRAD",
    "TRAIN.BACKBONE_LR": "the image encoder is frozen",
    "TRAIN.PROGRESSIVE": "clips have DATA.NUM_FRAMES frames; for longer ones start a run with MODEL.PRETRAINED",
    "TRAIN.USE_SYNC_BN": _NO_BATCHNORM,
    "TRAIN.AVERAGE_BN": _NO_BATCHNORM,
    "TRAIN.EVAL_BN_WHEN_TRAINING": _NO_BATCHNORM,
    "TRAIN.CHANNELS_LAST": "memory attention works on tokens, not on images",
    "TRAIN.COMPILE": "the number of memory tokens changes from frame to frame",
    "AUG.RANDOM_FLIP": "set AUG.HFLIP",
    "EVAL": "validation comes every TRAIN.VAL_INTERVAL steps; data sets are evaluated by stage2/evaluate_vos.py",
    "LOCAL_RANK": "it is read from torchrun's environment",
}
# Smallest values of numbers that nothing else checks before data are read or a model is built.
MINIMA = {
    **{key: least for key, least in recipe.STEP_MINIMA.items() if key not in RETIRED},
    "DATA.NUM_FRAMES": 2,
    "DATA.FRAME_SKIP": 1,
    "DATA.MAX_OBJECTS": 1,
    "DATA.NUM_VAL_SAMPLES": -1,
    "MODEL.PERCEIVER.NUM_LATENTS": 1,
    "MODEL.PERCEIVER.NUM_LATENTS_2D": 1,
    "MODEL.PERCEIVER.DEPTH": 1,
    "MODEL.PERCEIVER.DIM": 1,
    "MODEL.PERCEIVER.HEADS": 1,
    "MODEL.PERCEIVER.DIM_HEAD": 1,
    "MODEL.MEMORY_ATTENTION.NUM_LAYERS": 1,
    "MODEL.MEMORY_ATTENTION.POOL_SIZE": 1,
    "MODEL.MEMORY_ATTENTION.DIM_FEEDFORWARD": 1,
    "DISTILL.FOCAL_GAMMA": 0,
    "AUG.AFFINE.DEGREES": 0,
    "AUG.AFFINE.SHEAR": 0,
}


def stage2_defaults() -> CfgNode:
    """The shared keys that act here and this stage's own, each with its meaning."""
    c = engine_config.shared_defaults()
    recipe.step_keys(c)
    for key in RETIRED:
        engine_config.remove(c, key)
    c.SEED = 42
    _add_data(c.DATA)
    _add_model(c.MODEL)
    c.DISTILL = CfgNode()
    _add_distillation(c.DISTILL)
    c.AUG = CfgNode()
    _add_augmentation(c.AUG)

    c.TRAIN.LR = 3e-4
    c.TRAIN.MAX_STEPS = 130_000
    c.TRAIN.WARMUP_STEPS = 15_000
    c.TRAIN.WARMUP_LR = 1e-7
    c.TRAIN.MIN_LR = 1e-5
    c.TRAIN.WEIGHT_DECAY = 0.1
    c.TRAIN.CLIP_GRAD = 0.1
    # Here: follow the objects through each frame, and compress it, once more in the backward pass.
    c.TRAIN.USE_CHECKPOINT = False

    # Load the checkpoint, validate once, and end.
    c.EVAL_MODE = False
    # Time training steps on the first batch, print clips per second, and end.
    c.THROUGHPUT_MODE = False
    return c


def _add_data(data: CfgNode) -> None:
    # Clips per process and micro-batch; TRAIN.BATCH_SIZE is another name of it.
    data.BATCH_SIZE = 4
    # sav: a folder per video with numbered frames, <video>_manual.json and <video>_auto.json.
    data.DATASET = "sav"
    data.SAV_ROOT = "data/sa-v/extracted_frames"
    # True: read what the trunk gave for each frame from EMBEDDING_DIR. False: run the trunk in the training step.
    data.USE_PRECOMPUTED = True
    # Folder that stage2/save_video_embeddings_stage2.py wrote.
    data.EMBEDDING_DIR = "output/stage2_embeddings"
    # Frames of a clip, and how far one is from the next in the video's own count: a multiple of 4, SA-V's masks.
    data.NUM_FRAMES = 8
    data.FRAME_SKIP = 4
    # At most so many objects of a clip, drawn from those that are visible in its first frame.
    data.MAX_OBJECTS = 3
    # Annotations to use: manual, auto.
    data.KINDS = list(KINDS)
    # Shares of the videos to train and validate on, drawn with SEED; a video is never in both.
    data.TRAIN_SPLIT = 0.95
    data.VAL_SPLIT = 0.05
    # At most so many videos of the val split; -1 = all, 0 = no validation.
    data.NUM_VAL_SAMPLES = 200
    # Use this share of the videos, drawn with SEED.
    data.SUBSET = 1.0
    # Share of the clips that are played backwards.
    data.TIME_REVERSAL = 0.5
    # Share of the clips that are made of still pictures of SA-1B, moved from frame to frame.
    data.SA1B_RATIO = 0.0
    data.SA1B_ROOT = "data/sa-1b"
    # False: a video without annotations or embeddings, or with damaged ones, stops training. True: it is left out,
    # counted and listed.
    data.SKIP_BAD_VIDEOS = False
    # Take 8 videos only, to try things out.
    data.DEBUG = False


def _add_model(model: CfgNode) -> None:
    model.NAME = "EfficientSAM3-Memory"
    # The teacher, and every part of the student that stays as it is: sam3.pt, or a merged Stage-1 model.
    model.SAM3_CHECKPOINT = "sam3_checkpoints/sam3.pt"
    # True: a frame's memory map becomes NUM_LATENTS + NUM_LATENTS_2D tokens. False: the map itself is pooled.
    model.PERCEIVER = CfgNode()
    model.PERCEIVER.ENABLED = True
    model.PERCEIVER.NUM_LATENTS = 256  # each sees the whole map
    model.PERCEIVER.NUM_LATENTS_2D = 256  # each sees its own window; a square number
    model.PERCEIVER.DEPTH = 2  # layers
    model.PERCEIVER.DIM = 256  # width; projected from and to the memory's channels unless equal to them
    model.PERCEIVER.HEADS = 4
    model.PERCEIVER.DIM_HEAD = 64
    model.PERCEIVER.USE_SELF_ATTN = True  # latents look at each other after the map
    model.MEMORY_ATTENTION = CfgNode()
    model.MEMORY_ATTENTION.NUM_LAYERS = 2  # they start from the teacher's first and last
    model.MEMORY_ATTENTION.POOL_SIZE = 2  # side of the squares of memory tokens that are averaged; 1 averages none
    model.MEMORY_ATTENTION.DIM_FEEDFORWARD = 2048  # as the teacher's, to start from its layers
    model.MEMORY_ATTENTION.DROPOUT = 0.0


def _add_distillation(distill: CfgNode) -> None:
    # Loss = FOCAL_WEIGHT focal + DICE_WEIGHT dice + IOU_WEIGHT IoU + MSE_WEIGHT MSE + OCCLUSION_WEIGHT occlusion.
    distill.FOCAL_WEIGHT = 20.0
    distill.DICE_WEIGHT = 1.0
    distill.IOU_WEIGHT = 1.0
    distill.MSE_WEIGHT = 1.0  # between the maps that student and teacher give after looking into their memories
    distill.OCCLUSION_WEIGHT = 0.0  # cross-entropy of the score that says whether the object is in the frame
    distill.FOCAL_ALPHA = 0.25
    distill.FOCAL_GAMMA = 2.0
    # mask: 1 - IoU of the predicted probabilities with the mask. score: |predicted IoU - IoU of the predicted mask|.
    distill.IOU_TYPE = "mask"
    # False: the teacher tracks by the masks that it predicts itself. True: it remembers the student's masks,
    # uncompressed, which is cheaper and compares the memories alone.
    distill.SHARE_MEMORY = False
    # How the first frame's object is given: shares of masks, boxes and clicks; together 1.
    distill.PROMPTS = CfgNode()
    distill.PROMPTS.MASK = 0.5
    distill.PROMPTS.BOX = 0.25
    distill.PROMPTS.CLICK = 0.25


def _add_augmentation(aug: CfgNode) -> None:
    # True: change the pictures of a clip. Needs DATA.USE_PRECOMPUTED False: embeddings are of the pictures as they are.
    aug.ENABLED = False
    # The same for all frames of a clip, and for its masks: share of clips that are mirrored; most degrees of rotation
    # and shear to either side.
    aug.HFLIP = 0.5
    aug.AFFINE = CfgNode()
    aug.AFFINE.DEGREES = 25.0
    aug.AFFINE.SHEAR = 20.0
    # Factors of 1 - x to 1 + x: for all frames of a clip alike, then for each frame by itself.
    aug.COLOR_JITTER = CfgNode()
    aug.COLOR_JITTER.BRIGHTNESS = 0.1
    aug.COLOR_JITTER.CONTRAST = 0.03
    aug.COLOR_JITTER.SATURATION = 0.03
    aug.FRAME_JITTER = CfgNode()
    aug.FRAME_JITTER.BRIGHTNESS = 0.1
    aug.FRAME_JITTER.CONTRAST = 0.05
    aug.FRAME_JITTER.SATURATION = 0.05
    # Share of clips without colour.
    aug.GRAYSCALE = 0.05


def _frames(c: CfgNode) -> bool:
    return not c.DATA.USE_PRECOMPUTED


def _weighted(name: str) -> tuple[Callable[[CfgNode], bool], str]:
    return (lambda c: c.DISTILL[name] > 0), f"with DISTILL.{name} above 0"


def _conditions(defaults: CfgNode) -> stage_config.Conditions:
    """Keys that act under a condition: (does it hold?, what it is). Elsewhere only their default is accepted."""
    perceiver = (lambda c: c.MODEL.PERCEIVER.ENABLED, "with MODEL.PERCEIVER.ENABLED True")
    augments = (lambda c: c.AUG.ENABLED, "with AUG.ENABLED True")
    of_groups = {
        key: condition
        for key in engine_config.leaf_keys(defaults)
        for group, condition in (("MODEL.PERCEIVER.", perceiver), ("AUG.", augments))
        if key.startswith(group) and not key.endswith(".ENABLED")
    }
    return {
        **recipe.STEP_CONDITIONS,
        **of_groups,
        "AUG.ENABLED": (_frames, "with DATA.USE_PRECOMPUTED False, because embeddings are of the pictures as they are"),
        "DATA.SA1B_RATIO": (_frames, "with DATA.USE_PRECOMPUTED False, because still pictures have no embeddings"),
        "DISTILL.FOCAL_ALPHA": _weighted("FOCAL_WEIGHT"),
        "DISTILL.FOCAL_GAMMA": _weighted("FOCAL_WEIGHT"),
        "DISTILL.IOU_TYPE": _weighted("IOU_WEIGHT"),
        "DISTILL.SHARE_MEMORY": _weighted("MSE_WEIGHT"),
    }


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--config`, the flags of the table and KEY VALUE pairs after them."""
    return stage_config.make_parser(description, FLAGS, stage2_defaults(), trailing=True)


def load(args: argparse.Namespace) -> CfgNode:
    """Parsed arguments -> checked, frozen config. Raises ValueError for what cannot work."""
    defaults = stage2_defaults()
    rules = {"retired": RETIRED, "choices": CHOICES, "aliases": ALIASES, "opts_name": "the command line"}
    config = stage_config.load(args, defaults, FLAGS, **rules)
    stage_config.refuse_idle_keys(config, defaults, _conditions(defaults))
    stage_config.check_minima(config, MINIMA)
    recipe.check_steps(config)
    _check_data(config.DATA)
    _check_shares(config)
    _check_losses(config)
    side = math.isqrt(config.MODEL.PERCEIVER.NUM_LATENTS_2D)
    if side**2 != config.MODEL.PERCEIVER.NUM_LATENTS_2D:
        raise ValueError(
            f"MODEL.PERCEIVER.NUM_LATENTS_2D must be a square number, {side**2} or {(side + 1) ** 2}, got "
            f"{config.MODEL.PERCEIVER.NUM_LATENTS_2D}"
        )
    return config


def memory_config(config: CfgNode) -> MemoryConfig:
    """The student's memory."""
    perceiver, attention = config.MODEL.PERCEIVER, config.MODEL.MEMORY_ATTENTION
    return MemoryConfig(
        perceiver=perceiver.ENABLED,
        num_latents=perceiver.NUM_LATENTS,
        num_latents_2d=perceiver.NUM_LATENTS_2D,
        perceiver_depth=perceiver.DEPTH,
        perceiver_dim=perceiver.DIM,
        perceiver_heads=perceiver.HEADS,
        perceiver_dim_head=perceiver.DIM_HEAD,
        perceiver_self_attention=perceiver.USE_SELF_ATTN,
        num_layers=attention.NUM_LAYERS,
        ffn_dim=attention.DIM_FEEDFORWARD,
        pool_size=attention.POOL_SIZE,
        dropout=attention.DROPOUT,
    )


def _check_data(data: CfgNode) -> None:
    if data.FRAME_SKIP % ANNOTATION_STRIDE:
        raise ValueError(
            f"DATA.FRAME_SKIP must be a multiple of {ANNOTATION_STRIDE}, because SA-V has masks for every "
            f"{ANNOTATION_STRIDE}th frame, got {data.FRAME_SKIP}"
        )
    if data.USE_PRECOMPUTED and not data.EMBEDDING_DIR:
        raise ValueError(
            "DATA.EMBEDDING_DIR is empty: set it to the folder that stage2/save_video_embeddings_stage2.py wrote, or "
            "set DATA.USE_PRECOMPUTED False"
        )
    if tuple(data.KINDS) not in [*itertools.permutations(KINDS, 1), *itertools.permutations(KINDS, 2)]:
        raise ValueError(f"DATA.KINDS is {data.KINDS!r}; choose one or both of {', '.join(KINDS)}")
    if not (data.TRAIN_SPLIT > 0 and data.TRAIN_SPLIT + data.VAL_SPLIT <= 1 + 1e-9):
        raise ValueError(
            f"DATA.TRAIN_SPLIT (={data.TRAIN_SPLIT}) must be above 0, and with DATA.VAL_SPLIT (={data.VAL_SPLIT}) at "
            "most 1"
        )
    if data.SUBSET <= 0:
        raise ValueError(f"DATA.SUBSET is the share of the videos to use, above 0, got {data.SUBSET}")


def _check_shares(config: CfgNode) -> None:
    for key in SHARES:
        if not 0 <= (value := engine_config.get(config, key)) <= 1:  # so that NaN is refused too
            raise ValueError(f"{key} is a share in 0..1, got {value}")
    prompts = config.DISTILL.PROMPTS
    if abs(sum(prompts.values()) - 1) > 1e-6:
        listed = ", ".join(f"{name} {share}" for name, share in prompts.items())
        raise ValueError(f"the shares of DISTILL.PROMPTS must add up to 1: {listed}")
    dropout = config.MODEL.MEMORY_ATTENTION.DROPOUT
    if not 0 <= dropout < 1:
        raise ValueError(f"MODEL.MEMORY_ATTENTION.DROPOUT is a share in 0..1, below 1, got {dropout}")


def _check_losses(config: CfgNode) -> None:
    weights = {key: engine_config.get(config, key) for key in WEIGHTS}
    if not (min(weights.values()) >= 0 and 0 < sum(weights.values()) < math.inf):  # so that NaN is refused too
        listed = ", ".join(f"{key} {value}" for key, value in weights.items())
        raise ValueError(f"loss weights must be finite, not negative, and not all 0: {listed}")
