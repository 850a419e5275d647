"""Geometry fine-tuning: a Stage-1 student learns to give embeddings that work behind SAM3's boxes and points.

    torchrun --nproc_per_node 8 stage1_geometry_finetune/train_geometry_finetune.py \
      --cfg stage1_geometry_finetune/configs/es_rv_m.yaml --pretrained output/efficient_sam3_repvit_m.pt

Plain `python` trains with one process. The same command goes on after an interruption, at the very step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from sam3.backbones.student import build_student
from sam3.engine import amp
from sam3.engine.cli import run_main
from sam3.engine.config import leaf_keys
from sam3.engine.distributed import World
from sam3.engine.loader import loader_from_config, once_sampler, train_sampler
from sam3.engine.log import MetricLog
from sam3.engine.stage_config import build_preprocess, teacher_meta
from sam3.engine.training_run import TrainingRun, place, run_stage
from sam3.model_builder import build_sam3_heads
from sam3.pretrained import load_student_weights
from stage1_geometry_finetune import config as geometry_config
from stage1_geometry_finetune.frozen_path import FrozenPath, visual_text_features
from stage1_geometry_finetune.model import GeometryDistiller, parameter_table
from stage1_geometry_finetune.sources import Sources, open_sources
from stage1_geometry_finetune.validation import Validator

# A checkpoint of another run is refused if one of these differs: going on would mean something else.
PLACES = ("DISTILL.TEACHER_EMBED_PATH", "DISTILL.VERIFY_CRC", "DISTILL.PROMPT_CHUNK")  # where and how, not what
RESUME_KEYS = (
    *("MODEL.BACKBONE", "TRAIN.OPTIMIZER.NAME", "SEED"),
    *("DATA.BOX_JITTER", "DATA.FILTER_BY_AREA", "DATA.MASK_NMS", "DATA.LOAD_GT_MASK"),
    *(
        key
        for key in leaf_keys(geometry_config.geometry_defaults())
        if key.startswith("DISTILL.") and key not in PLACES
    ),
)
logger = logging.getLogger("sam3.geometry")


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(argv, geometry_config.make_parser(__doc__), geometry_config.load, build_run)


def build_run(config: CfgNode, world: World, output: Path, dry_run: bool) -> TrainingRun:
    """Data, then model: the order in which mistakes are cheapest to find."""
    sources = open_sources(config)
    teacher = teacher_meta(config.MODEL.SAM3_CHECKPOINT, "MODEL.SAM3_CHECKPOINT")
    check_teacher(sources.teacher_meta, teacher, config)
    sampler = train_sampler(config, len(sources.train), world)
    distiller = build_distiller(config, world, teacher["sha256"], output, dry_run)
    preprocess = build_preprocess(config)

    def load_weights(path: str | Path) -> None:
        load_student_weights(distiller.student_trunk, path, preprocess)

    def make_validator(metrics: MetricLog) -> Validator:
        batches = once_sampler(len(sources.val), config.DATA.BATCH_SIZE, world)
        loader = loader_from_config(config, sources.val_dataset(config), batches, world.device)
        amp_dtype = amp.resolve_amp_dtype(config.AMP_ENABLE, config.AMP_DTYPE, world.device)
        return Validator(distiller, loader, world, amp_dtype, metrics)

    return TrainingRun(
        config,
        world,
        output,
        distiller,
        saved=distiller,
        sampler=sampler,
        make_loader=lambda: loader_from_config(config, sources.train_dataset(config), sampler, world.device),
        make_validator=None if sources.val is None else make_validator,
        load_weights=load_weights,
        start_from=lambda: load_start(config.MODEL.PRETRAINED, load_weights),
        meta={
            "backbone": config.MODEL.BACKBONE,
            "embed_dim": config.DISTILL.EMBED_DIM,
            "embed_size": config.DISTILL.EMBED_SIZE,
            "output_stride": config.MODEL.OUTPUT_STRIDE,
            "preprocess": preprocess.to_meta(),
            "teacher": teacher,
        },
        resume_keys=RESUME_KEYS,
        lines=plan_lines(config, sources, distiller),
        project="EfficientSAM3-GeometryFinetune",
        best_metric="val/mask_iou",
        best_mode="max",
        left_out=sources.left_out,
    )


def check_teacher(stored: Mapping[str, Any], found: Mapping[str, Any], config: CfgNode) -> None:
    """The heads must belong to the trunk whose embeddings are stored."""
    wanted = stored.get("sha256")
    if wanted is None:
        logger.warning(
            f"{config.DISTILL.TEACHER_EMBED_PATH} does not say which SAM3 file it was made from; that it was "
            f"{config.MODEL.SAM3_CHECKPOINT} is taken for granted"
        )
    elif wanted != found["sha256"]:
        raise ValueError(
            f"the embeddings in {config.DISTILL.TEACHER_EMBED_PATH} come from {stored.get('name')} with SHA-256 "
            f"{wanted}, but {config.MODEL.SAM3_CHECKPOINT} has {found['sha256']}; pass that file with "
            "--sam3-checkpoint, or embeddings of this one with --teacher-embed-path"
        )


def load_start(path: str, load_weights: Callable[[str], object]) -> None:
    """Give the student Stage 1's weights; FileNotFoundError if they are not there, a warning if none are named."""
    if not path:
        logger.warning("MODEL.PRETRAINED is empty: the student starts from random weights, not from Stage 1's")
    elif not Path(path).is_file():
        raise FileNotFoundError(
            f"no weights {path} to start from; make them with stage1/train_stage1.py (and "
            "stage1/convert_stage1_weights.py), or pass another checkpoint or merged model with --pretrained"
        )
    else:
        load_weights(path)


def build_distiller(
    config: CfgNode, world: World, teacher_sha256: str, output: Path, dry_run: bool
) -> GeometryDistiller:
    """The student, with random weights, before SAM3's frozen heads."""
    distill, checkpoint = config.DISTILL, config.MODEL.SAM3_CHECKPOINT
    student = build_student(
        config.MODEL.BACKBONE, distill.EMBED_DIM, distill.EMBED_SIZE, output_stride=config.MODEL.OUTPUT_STRIDE
    )
    heads = build_sam3_heads(checkpoint, world.device)
    text = None
    if distill.TEXT_PROMPT == "visual":
        text = visual_text_features(checkpoint, teacher_sha256, output, store=not dry_run)
    distiller = GeometryDistiller(
        student,
        FrozenPath(heads, text),
        build_preprocess(config),
        embedding_weight=distill.EMBEDDING_LOSS_WEIGHT,
        bce_weight=distill.MASK_BCE_WEIGHT,
        dice_weight=distill.MASK_DICE_WEIGHT,
        focal_weight=distill.MASK_FOCAL_WEIGHT,
        mse_reduction=distill.MSE_REDUCTION,
        mask_target=distill.MASK_TARGET,
        temperature=distill.TEMPERATURE,
        layout=distill.PROMPT_LAYOUT,
        select_best_mask=distill.SELECT_BEST_MASK,
        select_by=distill.SELECT_BY,
        iter_on_box=distill.ITER_ON_BOX,
        mask_threshold=distill.TEACHER_MASK_THRESHOLD,
        chunk=distill.PROMPT_CHUNK,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        channels_last=config.TRAIN.CHANNELS_LAST,
    )
    return place(distiller, student, config, world.device)


def plan_lines(config: CfgNode, sources: Sources, distiller: GeometryDistiller) -> dict[str, str]:
    """What the plan says besides steps, rate and output."""
    val = 0 if sources.val is None else len(sources.val)
    sizes = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in parameter_table(distiller).items())
    return {
        "teacher": sources.describe(),
        "heads": f"{config.MODEL.SAM3_CHECKPOINT}, frozen",
        "parameters": sizes,
        "pictures": f"{len(sources.train)} train, {val} val in {config.DATA.DATA_PATH}",
    }


if __name__ == "__main__":
    run_main(main)
