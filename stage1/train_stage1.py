"""Stage 1, step 2: a light encoder learns to give the teacher's embeddings.

    torchrun --nproc_per_node 8 stage1/train_stage1.py --cfg stage1/configs/es_rv_m.yaml --data-path data/sa-1b

Plain `python` trains with one process. The same command goes on after an interruption, at the very step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from sam3.engine import amp
from sam3.engine.cli import run_main
from sam3.engine.distributed import World
from sam3.engine.image_list import ImageList
from sam3.engine.loader import PictureLoader, loader_from_config, once_sampler, train_sampler
from sam3.engine.log import MetricLog
from sam3.engine.sampler import EpochSampler
from sam3.engine.stage_config import build_preprocess, teacher_meta
from sam3.engine.training_run import TrainingRun, place, run_stage
from sam3.pretrained import load_student_weights
from stage1 import config as stage1_config
from stage1.data.sources import Sources, open_sources
from stage1.model import EncoderDistiller, build_distiller, build_teacher
from stage1.validation import Validator

# A checkpoint of another run is refused if one of these differs: going on would mean something else.
RESUME_KEYS = (
    *("MODEL.BACKBONE", "DISTILL.NO_RAND", "DISTILL.MSE_REDUCTION", "DISTILL.PIXEL_WISE", "DISTILL.COSINE"),
    *("DATA.DATASET", "TRAIN.OPTIMIZER.NAME", "SEED"),
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(argv, stage1_config.make_parser(__doc__), load_config, build_run)


def load_config(args: argparse.Namespace) -> CfgNode:
    """The config of a training; ValueError for a teacher's."""
    config = stage1_config.load(args)
    if config.DISTILL.SAVE_TEACHER_EMBED:
        raise ValueError(
            f"{args.cfg} has DISTILL.SAVE_TEACHER_EMBED True, so it is a teacher's config for the export; "
            f"train with one of stage1/configs/es_*.yaml"
        )
    stage1_config.refuse_idle_keys(config)
    return config


def build_run(config: CfgNode, world: World, output: Path, dry_run: bool) -> TrainingRun:
    """Data, then model: the order in which mistakes are cheapest to find. Nothing is written, dry run or not."""
    teacher = None
    if config.DISTILL.TEACHER == "online":
        teacher = teacher_meta(config.DISTILL.TEACHER_CHECKPOINT, "DISTILL.TEACHER_CHECKPOINT")
    sources = open_sources(config, teacher)
    sampler = train_sampler(config, len(sources.train), world)
    distiller = prepare_distiller(config, world)
    preprocess = build_preprocess(config)

    def make_loader(images: ImageList, batches: EpochSampler) -> PictureLoader:
        return loader_from_config(config, sources.dataset(images, config), batches, world.device)

    def make_validator(metrics: MetricLog) -> Validator:
        loader = make_loader(sources.val, once_sampler(len(sources.val), config.DATA.BATCH_SIZE, world))
        amp_dtype = amp.resolve_amp_dtype(config.AMP_ENABLE, config.AMP_DTYPE, world.device)
        return Validator(distiller, loader, world, amp_dtype, metrics)

    def load_weights(path: str | Path) -> None:
        load_student_weights(distiller.student, path, preprocess)

    return TrainingRun(
        config,
        world,
        output,
        distiller,
        saved=distiller.student,
        sampler=sampler,
        make_loader=lambda: make_loader(sources.train, sampler),
        make_validator=None if sources.val is None else make_validator,
        load_weights=load_weights,
        start_from=(lambda: load_weights(config.MODEL.PRETRAINED)) if config.MODEL.PRETRAINED else None,
        meta={
            "backbone": config.MODEL.BACKBONE,
            "embed_dim": config.DISTILL.EMBED_DIM,
            "embed_size": config.DISTILL.EMBED_SIZE,
            "output_stride": config.MODEL.OUTPUT_STRIDE,
            "preprocess": preprocess.to_meta(),
            "teacher": sources.teacher_meta,
        },
        resume_keys=RESUME_KEYS,
        lines=plan_lines(config, sources),
        project="EfficientSAM3-Stage1",
        best_metric="val/mse",
    )


def prepare_distiller(config: CfgNode, world: World) -> EncoderDistiller:
    """The student with random weights, and its teacher if that runs along."""
    teacher = None
    if config.DISTILL.TEACHER == "online":
        teacher = build_teacher(config, config.DISTILL.TEACHER_CHECKPOINT, world.device)
    distiller = build_distiller(config, teacher)
    return place(distiller, distiller.student, config, world.device)


def plan_lines(config: CfgNode, sources: Sources) -> dict[str, str]:
    """What the plan says besides steps, rate and output."""
    val = 0 if sources.val is None else len(sources.val)
    return {
        "teacher": sources.describe(),
        "pictures": f"{len(sources.train)} train, {val} val in {config.DATA.DATA_PATH}",
    }


if __name__ == "__main__":
    run_main(main)
