"""Stage 1's own config keys, its flags, and the keys of other programs that it refuses with a reason."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from yacs.config import CfgNode

from sam3.engine import config as engine_config
from sam3.engine import stage_config
from sam3.engine.losses import MSE_REDUCTIONS
from stage1.data.augmentation import Augmentation

FLAGS: dict[str, engine_config.FlagAction] = {
    **engine_config.SHARED_FLAGS,
    "--eval": {"EVAL_MODE": True},
    "--throughput": {"THROUGHPUT_MODE": True},
}
# The exporter trains nothing: flags that could not act there are unknown to it.
EXPORT_FLAGS = {
    flag: FLAGS[flag]
    for flag in (
        *("--batch-size", "--data-path", "--resume", "--disable-amp", "--only-cpu", "--device", "--output", "--tag"),
        "--seed",
    )
}
CHOICES = {
    "DATA.DATASET": ("sa1b", "coco", "lvis", "cocofied_lvis", "folder"),
    "DISTILL.TEACHER": ("stored", "online"),
    "DISTILL.STORE_DTYPE": ("float16", "int8"),
    "DISTILL.MSE_REDUCTION": MSE_REDUCTIONS,
}

# Keys that act under a condition: (does it hold?, what it is). Elsewhere only their default is accepted.
CONDITIONS: stage_config.Conditions = {
    **stage_config.CONDITIONS,
    "DATA.VAL_FRACTION": (lambda c: c.DATA.DATASET == "folder", "with DATA.DATASET folder"),
    "DISTILL.STORE_DTYPE": (lambda c: c.DISTILL.SAVE_TEACHER_EMBED, "in the export; in training the store states it"),
    "DISTILL.TEACHER_CHECKPOINT": (lambda c: c.DISTILL.TEACHER == "online", "with DISTILL.TEACHER online"),
    "DISTILL.VERIFY_CRC": (lambda c: c.DISTILL.TEACHER == "stored", "with DISTILL.TEACHER stored"),
}
# Keys and groups of keys that the export does not use.
TRAINING_ONLY = (
    *("TRAIN", "MODEL.BACKBONE", "MODEL.OUTPUT_STRIDE", "MODEL.PRETRAINED"),
    *("DISTILL.TEACHER", "DISTILL.TEACHER_CHECKPOINT", "DISTILL.VERIFY_CRC", "DISTILL.PIXEL_WISE", "DISTILL.COSINE"),
    *("DISTILL.MSE_REDUCTION", "EVAL_MODE", "THROUGHPUT_MODE"),
    *("SAVE_FREQ", "SAVE_STEPS", "KEEP_LAST", "PRINT_FREQ", "DETERMINISTIC", "TENSORBOARD", "USE_WANDB"),
)
# What a teacher's config file states of them all the same.
EXPORT_CONSTANTS = {"MODEL.BACKBONE": "vit_h", "TRAIN.EPOCHS": 1}

_GEOMETRY = "it shapes prompts, which Stage 1 does not use; it belongs to stage1_geometry_finetune"
RETIRED = {
    "DATA.INTERPOLATION": "pictures are always resized bilinearly with antialiasing, as SAM3 does",
    "DATA.FILTER_BY_AREA": _GEOMETRY,
    "DATA.SORT_BY_AREA": _GEOMETRY,
    "DATA.LOAD_GT_MASK": _GEOMETRY,
    "DATA.BOX_JITTER": _GEOMETRY,
    "DATA.MASK_NMS": _GEOMETRY,
    "DISTILL.MAX_ALLOWED_PROMPTS": _GEOMETRY,
    "DISTILL.NUM_EMBED": "it is always EMBED_SIZE squared",
    "DISTILL.ENABLED": "Stage 1 is distillation and nothing else",
    "DISTILL.ENCODER_ONLY": "Stage 1 trains the encoder and nothing else",
    "DISTILL.CHANNEL_WISE": "this loss does not exist in Stage 1; the terms are PIXEL_WISE (MSE) and COSINE",
    "DISTILL.CORRELATION": "this loss does not exist in Stage 1; the terms are PIXEL_WISE (MSE) and COSINE",
    "MODEL.TYPE": "the model follows from MODEL.BACKBONE",
    "TRAIN.START_EPOCH": "it follows from the checkpoint that is resumed",
    "TRAIN.LAYER_LR_DECAY": "students are trained from scratch with one learning rate",
    "LOCAL_RANK": "it is read from torchrun's environment",
}


def stage1_defaults() -> CfgNode:
    """The shared keys and Stage 1's own, each with its meaning."""
    c = engine_config.shared_defaults()

    # Where pictures come from: sa1b (images/<split>, annotations/<split>), coco, lvis, cocofied_lvis (their JSON and
    # images in trainval/), folder (any folder of pictures, searched through; a share of them becomes the val split).
    c.DATA.DATASET = "sa1b"
    # Share of a `folder` that serves as val split, chosen by a hash of the name.
    c.DATA.VAL_FRACTION = 0.1
    # At most so many pictures of the val split, exported and validated on; -1 = all, 0 = no validation.
    c.DATA.NUM_VAL_SAMPLES = 1000
    # Take 100 pictures only, to try things out.
    c.DATA.DEBUG = False
    # False: a picture that cannot be read stops training, and the export ends with exit code 1 and a list.
    # True: such pictures are left out, counted and listed.
    c.DATA.SKIP_BAD_IMAGES = False

    # Channels and side of the teacher's grid; must match the teacher and the stored embeddings.
    c.DISTILL = CfgNode()
    c.DISTILL.EMBED_DIM = 1024
    c.DISTILL.EMBED_SIZE = 72
    # stored: read the embeddings from TEACHER_EMBED_PATH. online: compute them in the training step.
    c.DISTILL.TEACHER = "stored"
    # Folder of the embedding store; empty = <OUTPUT>/embeddings when exporting.
    c.DISTILL.TEACHER_EMBED_PATH = "output/stage1_teacher/embeddings"
    # sam3.pt for TEACHER: online. (The exporter takes MODEL.RESUME, as the teacher's file has it.)
    c.DISTILL.TEACHER_CHECKPOINT = "sam3_checkpoints/sam3.pt"
    # True in the teacher's config only: this run writes embeddings.
    c.DISTILL.SAVE_TEACHER_EMBED = False
    # float16, or int8 with one float32 scale per channel (half the disk).
    c.DISTILL.STORE_DTYPE = "float16"
    # Check the CRC of every record that training reads (about 10 ms per record).
    c.DISTILL.VERIFY_CRC = False
    # True: pictures as they are. False: flip and colour jitter drawn from the seed stored with each record, so that
    # teacher and student see the same pixels; must be the same in export and training.
    c.DISTILL.NO_RAND = True
    # Weights of the two loss terms.
    c.DISTILL.PIXEL_WISE = 1.0
    c.DISTILL.COSINE = 1.0
    # channel_mean: MSE per element. channel_sum: per pixel, EMBED_DIM times as large (the public code's scale).
    c.DISTILL.MSE_REDUCTION = "channel_mean"

    # Load the checkpoint, validate once, and end.
    c.EVAL_MODE = False
    # Time training steps on the first batch, print pictures per second, and end.
    c.THROUGHPUT_MODE = False
    return c


def make_parser(description: str, flags: Mapping[str, engine_config.FlagAction] = FLAGS) -> argparse.ArgumentParser:
    """A parser with `--cfg`, `--opts` and the flags of a table."""
    return stage_config.make_parser(description, flags, stage1_defaults())


def load(args: argparse.Namespace, flags: Mapping[str, engine_config.FlagAction] = FLAGS) -> CfgNode:
    """Parsed arguments -> checked, frozen config. Raises ValueError for what cannot work."""
    config = stage_config.load(args, stage1_defaults(), flags, retired=RETIRED, choices=CHOICES)
    weights = (config.DISTILL.PIXEL_WISE, config.DISTILL.COSINE)
    if min(weights) < 0 or sum(weights) == 0:
        raise ValueError(
            f"DISTILL.PIXEL_WISE (={config.DISTILL.PIXEL_WISE}) and DISTILL.COSINE (={config.DISTILL.COSINE}) are "
            f"loss weights: none may be negative, and not both 0"
        )
    stage_config.check_numbers(config)
    return config


def refuse_idle_keys(config: CfgNode) -> None:
    """ValueError for a key that is set but cannot act in this run, which SAVE_TEACHER_EMBED makes an export."""
    export = config.DISTILL.SAVE_TEACHER_EMBED
    stage_config.refuse_idle_keys(
        config,
        stage1_defaults(),
        CONDITIONS,
        unused=dict.fromkeys(TRAINING_ONLY, "acts in training only") if export else {},
        constants=EXPORT_CONSTANTS if export else {},
    )


def build_augmentation(config: CfgNode) -> Augmentation | None:
    """What teacher and student see of a picture besides its pixels; None with DISTILL.NO_RAND."""
    return None if config.DISTILL.NO_RAND else Augmentation()


def embedding_folder(config: CfgNode, output: Path | None = None) -> Path:
    """Folder of the embedding store; when exporting (`output` given), an empty key means `<output>/embeddings`."""
    path = config.DISTILL.TEACHER_EMBED_PATH
    if path:
        return Path(path)
    if output is None:
        raise ValueError("DISTILL.TEACHER_EMBED_PATH is empty: set it to the folder the teacher pass wrote")
    return output / "embeddings"
