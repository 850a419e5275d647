"""The keys of geometry fine-tuning, its flags, and the keys of other programs that it refuses with a reason."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from yacs.config import CfgNode

from sam3.engine import config as engine_config
from sam3.engine import stage_config
from sam3.engine.distributed import choose_device
from sam3.engine.losses import MSE_REDUCTIONS
from stage1_geometry_finetune.model import MASK_TARGETS
from stage1_geometry_finetune.prompts import LAYOUTS, POINT_SOURCES, build_sampling
from stage1_geometry_finetune.query_selection import RULES

FLAGS: dict[str, engine_config.FlagAction] = {
    **engine_config.SHARED_FLAGS,
    "--sam3-checkpoint": "MODEL.SAM3_CHECKPOINT",
    "--teacher-embed-path": "DISTILL.TEACHER_EMBED_PATH",
    "--eval": {"EVAL_MODE": True},
    "--throughput": {"THROUGHPUT_MODE": True},
}
CHOICES = {
    "DATA.DATASET": ("sa1b",),
    "DISTILL.MSE_REDUCTION": MSE_REDUCTIONS,
    "DISTILL.MASK_TARGET": MASK_TARGETS,
    "DISTILL.PROMPT_LAYOUT": LAYOUTS,
    "DISTILL.TEXT_PROMPT": ("visual", "none"),
    "DISTILL.POINT_SOURCE": POINT_SOURCES,
    "DISTILL.SELECT_BY": RULES,
}


def _both_kinds(c: CfgNode) -> bool:
    return c.DISTILL.USE_BOX_PROMPTS and c.DISTILL.USE_POINT_PROMPTS


def _refines(c: CfgNode) -> bool:
    return c.DISTILL.DECODE_ITERS > 1


# Keys that act under a condition: (does it hold?, what it is). Elsewhere only their default is accepted.
CONDITIONS: dict[str, tuple[Callable[[CfgNode], bool], str]] = {
    **stage_config.CONDITIONS,
    "DATA.MASK_NMS": (lambda c: c.DATA.LOAD_GT_MASK, "with DATA.LOAD_GT_MASK True"),
    "DISTILL.POINT_SOURCE": (
        lambda c: c.DATA.LOAD_GT_MASK and c.DISTILL.USE_POINT_PROMPTS,
        "with DATA.LOAD_GT_MASK and DISTILL.USE_POINT_PROMPTS True",
    ),
    "DISTILL.PROMPT_MIX": (_both_kinds, "with DISTILL.USE_BOX_PROMPTS and USE_POINT_PROMPTS True"),
    "DISTILL.PROMPT_MIX_PROB_BOX": (lambda c: c.DISTILL.PROMPT_MIX, "with DISTILL.PROMPT_MIX True"),
    "DISTILL.SELECT_BY": (lambda c: c.DISTILL.SELECT_BEST_MASK, "with DISTILL.SELECT_BEST_MASK True"),
    "DISTILL.POINTS_PER_REFINE_ITER": (
        lambda c: _refines(c) and c.DISTILL.POINTS_PER_REFINE_ITER_MAX == 0,
        "with DISTILL.DECODE_ITERS above 1 and POINTS_PER_REFINE_ITER_MAX 0",
    ),
    "DISTILL.POINTS_PER_REFINE_ITER_MAX": (_refines, "with DISTILL.DECODE_ITERS above 1"),
    "DISTILL.POINTS_PER_REFINE_ITER_MIN": (
        lambda c: c.DISTILL.POINTS_PER_REFINE_ITER_MAX > 0,
        "with DISTILL.POINTS_PER_REFINE_ITER_MAX above 0",
    ),
    "DISTILL.ITER_ON_BOX": (_refines, "with DISTILL.DECODE_ITERS above 1"),
    "DISTILL.TEACHER_MASK_THRESHOLD": (
        lambda c: _refines(c) or c.DISTILL.MASK_TARGET == "hard" or c.DISTILL.SELECT_BY == "mask_iou",
        "with DISTILL.DECODE_ITERS above 1, DISTILL.MASK_TARGET hard or DISTILL.SELECT_BY mask_iou",
    ),
}
RETIRED = {
    "DATA.INTERPOLATION": "pictures are always resized bilinearly with antialiasing, as SAM3 does",
    "DATA.PERSISTENT_WORKERS": "workers always stay alive between epochs",
    "DATA.MAX_PROMPTS_PER_IMAGE": "the number of prompts is DISTILL.MAX_PROMPTS",
    "DISTILL.NUM_EMBED": "it is always EMBED_SIZE squared",
    "DISTILL.USE_SAVED_EMBEDDINGS": "the teacher's embeddings are always those stored by Stage 1",
    "DISTILL.TEACHER_EMBED_DTYPE": "embeddings travel as they are stored and are cast on the device",
    "DISTILL.IOU_LOSS_WEIGHT": "SAM3's detector predicts no mask IoU, so there is nothing to compare",
    "DISTILL.FPN_LEVELS": "SAM3 reads three levels of its pyramid",
    "MODEL.TYPE": "the model follows from MODEL.BACKBONE",
    "TRAIN.START_EPOCH": "it follows from the checkpoint that is resumed",
    "TRAIN.LAYER_LR_DECAY": "the whole student is trained with one learning rate",
    "LOCAL_RANK": "it is read from torchrun's environment",
}


def geometry_defaults() -> CfgNode:
    """The shared keys and this stage's own, each with its meaning."""
    c = engine_config.shared_defaults()
    c.DATA.BATCH_SIZE = 4

    # sa1b: images/<split> and annotations/<split>; boxes and points come from the annotations.
    c.DATA.DATASET = "sa1b"
    # At most so many pictures of the val split; -1 = all, 0 = no validation.
    c.DATA.NUM_VAL_SAMPLES = 1000
    # Take 100 pictures only, to try things out.
    c.DATA.DEBUG = False
    # False: a picture that cannot be read, has no annotations or no embedding stops training. True: it is left out,
    # counted and listed.
    c.DATA.SKIP_BAD_IMAGES = False
    # Smallest and largest box to prompt with, in square pixels of the resized picture; None = no limit. Ignored for a
    # picture that would keep no object.
    c.DATA.FILTER_BY_AREA = [None, None]
    # Put the objects drawn of a picture in order of their boxes' areas, largest first.
    c.DATA.SORT_BY_AREA = True
    # Decode the annotated masks in training too (validation always does): for MASK_NMS, POINT_SOURCE and SELECT_BY.
    c.DATA.LOAD_GT_MASK = False
    # Move the corners of training boxes by up to a tenth of the side (one standard deviation), at most 20 pixels.
    c.DATA.BOX_JITTER = True
    # Drop an object of which more than this share is covered by larger ones.
    c.DATA.MASK_NMS = 0.8

    # Weights whose frozen heads judge the student: the file that the stored embeddings come from.
    c.MODEL.SAM3_CHECKPOINT = "sam3_checkpoints/sam3.pt"

    c.DISTILL = CfgNode()
    _add_losses(c.DISTILL)
    _add_prompts(c.DISTILL)

    c.TRAIN.EPOCHS = 50
    c.TRAIN.WARMUP_EPOCHS = 5
    c.TRAIN.BASE_LR = 1e-4
    c.TRAIN.WARMUP_LR = 1e-7
    c.TRAIN.MIN_LR = 1e-6
    c.TRAIN.SCALE_LR = False
    c.TRAIN.WEIGHT_DECAY = 0.01
    c.TRAIN.CLIP_GRAD = 1.0
    c.TRAIN.ACCUMULATION_STEPS = 4
    # Here: keep nothing of the frozen heads' activations but a chunk's masks; the backward pass computes them again.
    # Without it, every prompt keeps about 1.4 GiB at full size in float32 until the backward pass.
    c.TRAIN.USE_CHECKPOINT = True

    # Load the checkpoint, validate once, and end.
    c.EVAL_MODE = False
    # Time training steps on the first batch, print pictures per second, and end.
    c.THROUGHPUT_MODE = False
    return c


def _add_losses(distill: CfgNode) -> None:
    """Embeddings, and what is compared."""
    # Channels and side of the teacher's grid; must match the stored embeddings.
    distill.EMBED_DIM = 1024
    distill.EMBED_SIZE = 72
    # Folder that Stage 1 wrote.
    distill.TEACHER_EMBED_PATH = "output/stage1_teacher/embeddings"
    # Check the CRC of every record that is read.
    distill.VERIFY_CRC = False
    # Loss = EMBEDDING_LOSS_WEIGHT MSE + MASK_BCE_WEIGHT BCE + MASK_DICE_WEIGHT dice + MASK_FOCAL_WEIGHT focal.
    distill.EMBEDDING_LOSS_WEIGHT = 1.5  # with MSE_REDUCTION channel_sum: 0.0015
    distill.MASK_BCE_WEIGHT = 1.0
    distill.MASK_DICE_WEIGHT = 1.0
    distill.MASK_FOCAL_WEIGHT = 0.0
    # channel_mean: MSE per element. channel_sum: per pixel, EMBED_DIM times as large (the public code's scale).
    distill.MSE_REDUCTION = "channel_mean"
    # What the student's mask is compared with. soft: the teacher's probabilities. hard: where its logit is above
    # TEACHER_MASK_THRESHOLD.
    distill.MASK_TARGET = "soft"
    # Divides the mask logits of teacher and student in the losses.
    distill.TEMPERATURE = 1.0
    # True: compare the mask of one query, the best by SELECT_BY; False: the masks of all queries.
    distill.SELECT_BEST_MASK = True
    # score: the teacher's highest score. box_iou, mask_iou: the teacher's box or mask nearest to the annotated one.
    distill.SELECT_BY = "score"


def _add_prompts(distill: CfgNode) -> None:
    """What is asked of the heads, and how often."""
    # What an object is prompted with: its box, its point, or both at once.
    distill.USE_BOX_PROMPTS = True
    distill.USE_POINT_PROMPTS = True
    # Draw for each prompt whether it is a box or a point instead of giving both; PROB_BOX is the share of boxes.
    distill.PROMPT_MIX = False
    distill.PROMPT_MIX_PROB_BOX = 0.5
    # annotation: the annotated point. mask: any pixel of the annotated mask.
    distill.POINT_SOURCE = "annotation"
    # At most so many objects of a picture, drawn anew in every epoch.
    distill.MAX_PROMPTS = 16
    # True: the same objects, jitter and points in every epoch.
    distill.NO_RAND = False
    # per_object: each object is a prompt of its own. per_image: all objects together are one prompt, as the public code
    # has it, though SAM3 takes several boxes for examples of one thing.
    distill.PROMPT_LAYOUT = "per_object"
    # visual: the phrase that SAM3 itself puts beside boxes and points. none: no text at all, as the public code has it.
    distill.TEXT_PROMPT = "visual"
    # Passes through the decoder; after each but the last, points are added where student and teacher disagree.
    distill.DECODE_ITERS = 1
    # Points added a time: a fixed number or, if MAX is above 0, a whole number drawn from MIN to MAX.
    distill.POINTS_PER_REFINE_ITER = 0
    distill.POINTS_PER_REFINE_ITER_MIN = 1
    distill.POINTS_PER_REFINE_ITER_MAX = 0
    # False: prompts that are a box alone get one pass only.
    distill.ITER_ON_BOX = True
    # Mask logit above which a mask counts as object: in hard targets, between two passes, for SELECT_BY mask_iou.
    # Validation then measures masks at this threshold too.
    distill.TEACHER_MASK_THRESHOLD = 0.0
    # Prompts that go through the frozen heads at once: more is faster and takes more memory.
    distill.PROMPT_CHUNK = 4


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--cfg`, `--opts` and the flags of the table."""
    return stage_config.make_parser(description, FLAGS, geometry_defaults())


def load(args: argparse.Namespace) -> CfgNode:
    """Parsed arguments -> checked, frozen config. Raises ValueError for what cannot work."""
    defaults = geometry_defaults()
    config = stage_config.load(args, defaults, FLAGS, retired=RETIRED, choices=CHOICES)
    stage_config.refuse_idle_keys(config, defaults, CONDITIONS)
    stage_config.check_numbers(config)
    _check_numbers(config)
    _check_prompts(config)
    if config.DETERMINISTIC and choose_device(config.DEVICE).type != "cpu":
        raise ValueError(
            "DETERMINISTIC cannot hold here on an accelerator: the gradients of sampling points and pooling boxes from "
            "features sum in any order; leave --deterministic out, or train with --device cpu"
        )
    return config


def _check_numbers(config: CfgNode) -> None:
    distill = config.DISTILL
    names = ("EMBEDDING_LOSS_WEIGHT", "MASK_BCE_WEIGHT", "MASK_DICE_WEIGHT", "MASK_FOCAL_WEIGHT")
    weights = {f"DISTILL.{name}": distill[name] for name in names}
    if not (min(weights.values()) >= 0 and 0 < sum(weights.values()) < math.inf):  # so that NaN is refused too
        listed = ", ".join(f"{name} {value}" for name, value in weights.items())
        raise ValueError(f"loss weights must be finite, not negative, and not all 0: {listed}")
    if distill.PROMPT_CHUNK < 1:
        raise ValueError(f"DISTILL.PROMPT_CHUNK must be at least 1, got {distill.PROMPT_CHUNK}")
    if not distill.TEMPERATURE > 0:
        raise ValueError(f"DISTILL.TEMPERATURE divides logits and must be above 0, got {distill.TEMPERATURE}")


def _check_prompts(config: CfgNode) -> None:
    distill = config.DISTILL
    sampling = build_sampling(config)  # refuses what cannot be drawn
    if distill.SELECT_BY != "score" and distill.PROMPT_LAYOUT == "per_image":
        raise ValueError(
            f"DISTILL.SELECT_BY {distill.SELECT_BY} needs one object a prompt; set DISTILL.PROMPT_LAYOUT per_object"
        )
    if distill.SELECT_BY == "mask_iou" and not config.DATA.LOAD_GT_MASK:
        raise ValueError("DISTILL.SELECT_BY mask_iou needs the annotated masks; set DATA.LOAD_GT_MASK True")
    if sampling.decode_iters > 1 and sampling.refine_shape == (0, 0):
        raise ValueError(
            f"DISTILL.DECODE_ITERS is {distill.DECODE_ITERS}, but no points are added between the passes; set "
            "DISTILL.POINTS_PER_REFINE_ITER or POINTS_PER_REFINE_ITER_MAX"
        )
