"""Stage 2: a compressed memory learns to stand in for the dense one of SAM3's tracker.

    python stage2/train_memory_stage2.py --config stage2/configs/efficient_memory.yaml \
      --output_dir output/stage2_memory \
      DATA.SAV_ROOT data/sa-v/extracted_frames DATA.EMBEDDING_DIR output/stage2_embeddings

torchrun starts it on several GPUs or machines. The same command goes on after an interruption, at the very step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from yacs.config import CfgNode

from sam3.engine import amp
from sam3.engine.cli import run_main
from sam3.engine.config import leaf_keys
from sam3.engine.distributed import World
from sam3.engine.loader import loader_from_config, once_sampler, train_sampler
from sam3.engine.log import MetricLog
from sam3.engine.recipe import by_steps
from sam3.engine.stage_config import teacher_meta
from sam3.engine.training_run import TrainingRun, run_stage
from sam3.engine.weights import load_strict, load_weights
from sam3.model.sam3_video import Sam3VideoModel
from sam3.tracker_builder import build_memory, build_video_model
from stage2 import config as stage2_config
from stage2.data.sources import Sources, open_sources
from stage2.frozen_parts import tracker_meta
from stage2.model import MemoryDistiller
from stage2.rollout import Rollout
from stage2.validation import Validator

LOG_FILE = "train.log"
# A checkpoint of another run is refused if one of these differs: going on would mean something else.
PLACES = ("DATA.SAV_ROOT", "DATA.SA1B_ROOT", "DATA.EMBEDDING_DIR", "DATA.NUM_WORKERS", "DATA.PREFETCH_FACTOR")
WHERE_AND_HOW = (
    *(*PLACES, "DATA.PIN_MEMORY", "DATA.BATCH_SIZE", "DATA.NUM_VAL_SAMPLES", "DATA.VAL_SPLIT"),
    "DATA.SKIP_BAD_VIDEOS",  # what a run that met a damaged video is told to set
)
RESUME_KEYS = (
    *("TRAIN.OPTIMIZER.NAME", "SEED"),
    *(
        key
        for key in leaf_keys(stage2_config.stage2_defaults())
        if key.startswith(("DATA.", "DISTILL.", "AUG.")) and key not in WHERE_AND_HOW
    ),
)
logger = logging.getLogger("sam3.stage2")


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(argv, stage2_config.make_parser(__doc__), stage2_config.load, build_run, LOG_FILE)


def build_run(config: CfgNode, world: World, output: Path, dry_run: bool) -> TrainingRun:
    """Data, then model: the order in which mistakes are cheapest to find."""
    teacher = teacher_meta(config.MODEL.SAM3_CHECKPOINT, "MODEL.SAM3_CHECKPOINT")
    frozen = tracker_meta(load_weights(config.MODEL.SAM3_CHECKPOINT))
    model = build_teacher(config, world)
    grid = model.tracker.config.grid
    shape = (model.neck.trunk.channel_list[-1], grid, grid)
    sources = open_sources(config, model.preprocess, shape, teacher, config.DATA.SKIP_BAD_VIDEOS)
    train_dataset = sources.train_dataset(config)
    sampler = train_sampler(config, len(train_dataset), world)
    distiller = build_distiller(config, model, world)
    memory = stage2_config.memory_config(config).to_meta()

    def make_validator(metrics: MetricLog) -> Validator:
        dataset = sources.val_dataset(config)
        batches = once_sampler(len(dataset), config.DATA.BATCH_SIZE, world)
        loader = loader_from_config(config, dataset, batches, world.device)
        amp_dtype = amp.resolve_amp_dtype(config.TRAIN.AMP, config.AMP_DTYPE, world.device)
        return Validator(distiller, loader, world, amp_dtype, metrics)

    def start_from() -> None:
        load_memory(distiller, config.MODEL.PRETRAINED, {"memory": memory})

    return TrainingRun(
        config,
        world,
        output,
        distiller,
        saved=distiller,
        sampler=sampler,
        make_loader=lambda: loader_from_config(config, train_dataset, sampler, world.device),
        make_validator=make_validator if sources.val else None,
        load_weights=lambda path: load_memory(distiller, path, {"memory": memory, "tracker": frozen}),
        start_from=start_from if config.MODEL.PRETRAINED else None,
        meta={
            "memory": memory,
            "tracker": frozen,
            "preprocess": model.preprocess.to_meta(),
            "teacher": teacher,
        },
        resume_keys=RESUME_KEYS,
        lines=plan_lines(config, sources, distiller),
        project="EfficientSAM3-Stage2",
        best_metric="val/jf",
        best_mode="max",
        config_name="config.yaml",
        left_out=sources.left_out,
        make_recipe=by_steps,
        unit="clips",
        data=config.DATA.SAV_ROOT,
        fresh="layers of the teacher's" + (", a random Perceiver" if config.MODEL.PERCEIVER.ENABLED else ""),
        tensorboard_folder="tensorboard",
    )


def build_teacher(config: CfgNode, world: World) -> Sam3VideoModel:
    """SAM3's video model, frozen; without its trunk where embeddings are read."""
    path = config.MODEL.SAM3_CHECKPOINT
    model = build_video_model(path, world.device, with_trunk=not config.DATA.USE_PRECOMPUTED)
    if model.tracker.config.memory is not None:
        raise ValueError(
            f"{path} has a compressed memory already, so it is no teacher; set MODEL.SAM3_CHECKPOINT to sam3.pt or to "
            "a merged Stage-1 model"
        )
    return model.float().requires_grad_(False)


def build_distiller(config: CfgNode, model: Sam3VideoModel, world: World) -> MemoryDistiller:
    """The student's memory before the frozen tracker; its attention starts from the teacher's layers."""
    distill = config.DISTILL
    memory = build_memory(model.tracker.config, stage2_config.memory_config(config))
    memory.attention.init_from_teacher(model.tracker.transformer.encoder)
    distiller = MemoryDistiller(
        Rollout(model, recompute=config.TRAIN.USE_CHECKPOINT),
        memory,
        focal_weight=distill.FOCAL_WEIGHT,
        dice_weight=distill.DICE_WEIGHT,
        iou_weight=distill.IOU_WEIGHT,
        mse_weight=distill.MSE_WEIGHT,
        occlusion_weight=distill.OCCLUSION_WEIGHT,
        iou_type=distill.IOU_TYPE,
        share_memory=distill.SHARE_MEMORY,
        focal_alpha=distill.FOCAL_ALPHA,
        focal_gamma=distill.FOCAL_GAMMA,
    )
    return distiller.to(world.device)


def load_memory(distiller: MemoryDistiller, path: str | Path, expect: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the student the weights of a Stage-2 checkpoint.

    Raises ValueError for a file of something else, and for one whose meta states other values than `expect` does: heads
    and pooling leave no trace in the weights. Dropout may differ.
    """
    file = load_weights(path)
    other = [
        f"{part}.{name} is {file.meta[part].get(name)!r} there and {value!r} here"
        for part, values in expect.items()
        for name, value in values.items()
        if part in file.meta and file.meta[part].get(name) != value and name != "dropout"
    ]
    if other:
        raise ValueError(
            f"{path} holds a memory of another kind: {'; '.join(other)}; set the MODEL keys as its config.yaml has them"
        )
    load_strict(distiller, file.tensors, source=path)


def plan_lines(config: CfgNode, sources: Sources, distiller: MemoryDistiller) -> dict[str, str]:
    """What the plan says besides steps, rate and output."""
    model = distiller.rollout.model
    frozen, dense = count_parameters(model), count_parameters(model.tracker.transformer.encoder)
    counts = {name: count_parameters(child) for name, child in distiller.named_children()}
    return {
        "teacher": f"{config.MODEL.SAM3_CHECKPOINT}, {frozen:,} parameters frozen, {dense:,} of them memory attention",
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "videos": f"{len(sources.train)} train, {len(sources.val)} val in {config.DATA.SAV_ROOT}, clips of "
        f"{config.DATA.NUM_FRAMES} frames, {config.DATA.FRAME_SKIP} apart",
        "frames": sources.describe(),
    }


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    run_main(main)
