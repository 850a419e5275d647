"""Stage 1, step 2: a light encoder learns to give the teacher's embeddings.

    torchrun --nproc_per_node 8 stage1/train_stage1.py --cfg stage1/configs/es_rv_m.yaml --data-path data/sa-1b

Plain `python` trains with one process. The same command goes on after an interruption, at the very step.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from sam3.engine import amp, checkpoint, distributed, log, optim
from sam3.engine.batch import to_device
from sam3.engine.cli import run_main
from sam3.engine.config import dump_config, to_dict
from sam3.engine.distributed import World
from sam3.engine.environment import write_env
from sam3.engine.files import free_bytes, human_bytes, require_free_space, sha256
from sam3.engine.image_list import ImageList
from sam3.engine.locks import FileLock
from sam3.engine.loop import LoopSettings, train
from sam3.engine.rng import seed_everything
from sam3.engine.sampler import EpochSampler
from sam3.pretrained import load_student_weights
from stage1 import config as stage1_config
from stage1.data.loader import build_loader
from stage1.data.sources import open_sources
from stage1.dry_run import repeated, seconds_per_iteration
from stage1.model import EncoderDistiller, build_distiller, build_teacher
from stage1.validation import Validator

# A checkpoint of another run is refused if one of these differs: going on would mean something else.
RESUME_KEYS = (
    *("MODEL.BACKBONE", "DISTILL.NO_RAND", "DISTILL.MSE_REDUCTION", "DISTILL.PIXEL_WISE", "DISTILL.COSINE"),
    *("DATA.DATASET", "TRAIN.OPTIMIZER.NAME", "SEED"),
)
BEST_METRIC = "val/mse"
logger = logging.getLogger("sam3.stage1")


def make_parser() -> argparse.ArgumentParser:
    parser = stage1_config.make_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    config = stage1_config.load(args)
    if config.DISTILL.SAVE_TEACHER_EMBED:
        raise ValueError(
            f"{args.cfg} has DISTILL.SAVE_TEACHER_EMBED True, so it is a teacher's config for the export; "
            f"train with one of stage1/configs/es_*.yaml"
        )
    stage1_config.refuse_idle_keys(config)
    with distributed.start(config.DEVICE) as world:
        output = stage1_config.output_folder(config)
        log.setup(None if args.dry_run else output, world.rank)
        seed_everything(config.SEED + world.rank, config.DETERMINISTIC)
        run = Stage1Run(config, world, output)
        if config.THROUGHPUT_MODE:
            return run.throughput()
        if args.dry_run:
            return run.dry_run()
        if config.EVAL_MODE:
            return run.evaluate()
        return run.train(sys.argv[1:] if argv is None else argv)


class Stage1Run:
    """Data, model and optimizer of one run, built in the order in which mistakes are cheapest to find."""

    def __init__(self, config: CfgNode, world: World, output: Path) -> None:
        self.config, self.world, self.output = config, world, output
        teacher_meta = distributed.broadcast_object(_online_teacher_meta(config) if world.is_main else None)
        self.sources = open_sources(config, teacher_meta)
        self.sampler = EpochSampler(
            len(self.sources.train),
            config.DATA.BATCH_SIZE,
            rank=world.rank,
            world_size=distributed.planned_world_size(),  # more than one process in a launcher's dry run
            seed=config.SEED,
        )
        self.distiller = self._build_distiller()
        self.settings = LoopSettings.from_config(
            config, world.device, best_metric=BEST_METRIC if self.sources.val is not None else ""
        )
        self.steps_per_epoch = self.settings.steps_in(self.sampler.batches_per_epoch())
        self.meta = {
            "backbone": config.MODEL.BACKBONE,
            "embed_dim": config.DISTILL.EMBED_DIM,
            "embed_size": config.DISTILL.EMBED_SIZE,
            "preprocess": stage1_config.build_preprocess(config).to_meta(),
            "teacher": self.sources.teacher_meta,
        }

    def _build_distiller(self) -> EncoderDistiller:
        config, teacher = self.config, None
        if config.DISTILL.TEACHER == "online":
            teacher = build_teacher(config, config.DISTILL.TEACHER_CHECKPOINT, self.world.device)
        distiller = build_distiller(config, teacher).to(self.world.device)
        if config.MODEL.PRETRAINED:
            load_student_weights(distiller.student, config.MODEL.PRETRAINED)
        if config.TRAIN.CHANNELS_LAST:
            distiller = distiller.to(memory_format=torch.channels_last)
        if config.TRAIN.USE_SYNC_BN:
            distiller = distributed.sync_batchnorm(distiller, self.world.device)
        if config.TRAIN.COMPILE:
            distiller.student.compile()
        return distiller

    def _loader(self, images: ImageList, sampler: EpochSampler):
        data = self.config.DATA
        dataset = self.sources.dataset(images, self.config)
        return build_loader(
            dataset, sampler, data.NUM_WORKERS, self.world.device, data.PIN_MEMORY, data.PREFETCH_FACTOR
        )

    def _validator(self, metrics: log.MetricLog) -> Validator | None:
        """Validation over the val split, or None without one."""
        if self.sources.val is None:
            return None
        sampler = EpochSampler(
            len(self.sources.val),
            self.config.DATA.BATCH_SIZE,
            rank=self.world.rank,
            world_size=self.world.size,
            shuffle=False,
            drop_last=False,
            padding=False,
        )
        loader = self._loader(self.sources.val, sampler)
        return Validator(self.distiller, loader, self.world, self.settings.amp_dtype, metrics)

    def _lr_scale(self) -> float:
        config = self.config
        if not config.TRAIN.SCALE_LR:
            return 1.0
        processes = distributed.planned_world_size()
        return optim.lr_scale(config.DATA.BATCH_SIZE, processes, config.TRAIN.ACCUMULATION_STEPS)

    def train(self, argv: Sequence[str]) -> int:
        """Train to the end; the main process keeps other runs out of the output folder meanwhile."""
        if not self.world.is_main:
            return self._train(argv)
        with FileLock(self.output / ".train.lock", f"training in {self.output}"):
            return self._train(argv)

    def _train(self, argv: Sequence[str]) -> int:
        config = self.config
        path = distributed.broadcast_object(
            checkpoint.resume_path(self.output, config.MODEL.RESUME, config.TRAIN.AUTO_RESUME)
            if self.world.is_main
            else None
        )
        resume = self._load_resume(path) if path else None
        if self.world.is_main:  # only now: a refused run leaves the files of the one whose folder this is
            dump_config(config, self.output / "config.json")
            write_env(self.output / "env.json", argv)
        self._describe()
        with log.MetricLog(
            self.output,
            enabled=self.world.is_main,
            tensorboard=config.TENSORBOARD,
            wandb_project="EfficientSAM3-Stage1" if config.USE_WANDB else None,
            run_name=f"{config.MODEL.NAME}-{config.TAG}",
            config=to_dict(config),
            resume_step=checkpoint.position_of(resume).step + 1 if resume else 0,
        ) as metrics:
            result = train(
                self.distiller,
                self._loader(self.sources.train, self.sampler),
                self.sampler,
                optim.optimizer_from_config(config, self.distiller),
                optim.schedule_from_config(config, self.steps_per_epoch, self._lr_scale()),
                self.settings,
                world=self.world,
                output=self.output,
                saved=self.distiller.student,
                config=to_dict(config),
                meta=self.meta,
                validate=self._validator(metrics),
                metrics=metrics,
                resume=resume,
            )
        logger.info(f"finished {result.position.epoch} epochs, {result.position.step} steps; see {self.output}")
        return 0

    def _load_resume(self, path: Path) -> Mapping[str, Any]:
        resume = checkpoint.load(path)
        checkpoint.check_fits(resume, path, meta=self.meta, config=to_dict(self.config), config_keys=RESUME_KEYS)
        return resume

    def evaluate(self) -> int:
        """Validate the weights of MODEL.RESUME or MODEL.PRETRAINED, or the newest in OUTPUT, once."""
        if self.sources.val is None:
            raise ValueError(f"there is no val split in {self.config.DATA.DATA_PATH} to evaluate on")
        named = self.config.MODEL.RESUME or self.config.MODEL.PRETRAINED
        path = Path(named) if named not in ("", "auto") else checkpoint.newest(self.output)
        if path is None:
            raise ValueError(f"no checkpoint in {self.output} to evaluate; pass one with --resume or --pretrained")
        load_student_weights(self.distiller.student, path)
        self.distiller.eval()
        values = self._validator(log.MetricLog(None))(0, 0)
        logger.info(f"{path}: " + ", ".join(f"{k} {v:.5g}" for k, v in values.items()))
        return 0

    def throughput(self) -> int:
        """Time training steps on the first batch, without loading more and without saving anything."""
        loader = self._loader(self.sources.train, self.sampler)
        batch = next(repeated(loader), None)
        if batch is None:
            raise ValueError(f"no picture in {self.config.DATA.DATA_PATH} can be read")
        seconds = seconds_per_iteration(repeated([batch]), self._trial_step(), self.world.device)
        rate = self.world.size * len(batch) / seconds
        logger.info(
            f"{rate:.4g} images/s: {1000 * seconds:.1f} ms for {len(batch)} images on {self.world.size} processes"
        )
        return 0

    def dry_run(self) -> int:
        """Print the plan: pictures, steps, learning rate, disk, and the time from a few timed steps."""
        config = self.config
        self._describe()
        count, size = self._checkpoints()
        missing = max(0, count - len(checkpoint.listed(self.output)))
        require_free_space(self.output, missing * size, f"an output of {count} checkpoints")
        loader = self._loader(self.sources.train, self.sampler)
        seconds = seconds_per_iteration(repeated(loader), self._trial_step(), self.world.device)
        micro_batches = self.steps_per_epoch * config.TRAIN.ACCUMULATION_STEPS * config.TRAIN.EPOCHS
        if config.TRAIN.MAX_STEPS:
            micro_batches = min(micro_batches, config.TRAIN.MAX_STEPS * config.TRAIN.ACCUMULATION_STEPS)
        logger.info(f"time         {log.duration(seconds * micro_batches)}, {1000 * seconds:.0f} ms a batch")
        return 0

    def _trial_step(self):
        """Forward and backward of one batch; no weight changes."""

        def step(batch: Any) -> None:
            self.distiller.train()
            with amp.autocast(self.world.device, self.settings.amp_dtype):
                losses = self.distiller(to_device(batch, self.world.device))
            losses["total"].backward()
            self.distiller.zero_grad(set_to_none=True)

        return step

    def _checkpoints(self) -> tuple[int, int]:
        """How many the run keeps, and about how many bytes each takes: weights and two moments of each."""
        kept = self.config.KEEP_LAST or -(-self.config.TRAIN.EPOCHS // self.config.SAVE_FREQ)
        return kept, 3 * 4 * sum(p.numel() for p in self.distiller.student.parameters())

    def _describe(self) -> None:
        config, processes = self.config, distributed.planned_world_size()
        student = self.distiller.student
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        effective = config.DATA.BATCH_SIZE * processes * config.TRAIN.ACCUMULATION_STEPS
        kept, checkpoint_bytes = self._checkpoints()
        lr = config.TRAIN.BASE_LR * self._lr_scale()
        val = 0 if self.sources.val is None else len(self.sources.val)
        logger.info(
            f"student      {config.MODEL.NAME} ({config.MODEL.BACKBONE}), {trained:,} parameters trained, 0 frozen"
        )
        logger.info(f"teacher      {self.sources.describe()}")
        logger.info(f"pictures     {len(self.sources.train)} train, {val} val in {config.DATA.DATA_PATH}")
        logger.info(
            f"steps        {self.steps_per_epoch} an epoch, {config.TRAIN.EPOCHS} epochs, effective batch {effective}"
            f" = {config.DATA.BATCH_SIZE} x {processes} processes x {config.TRAIN.ACCUMULATION_STEPS} accumulated"
        )
        logger.info(f"rate         {lr:.3g} at its highest, {config.TRAIN.LR_SCHEDULER.NAME}")
        logger.info(
            f"output       {self.output}: about {human_bytes(checkpoint_bytes * kept)} for {kept} checkpoints, "
            f"{human_bytes(free_bytes(self.output))} free"
        )
        logger.info(f"device       {self.world.device}, autocast {self.settings.amp_dtype or 'off'}")


def _online_teacher_meta(config: CfgNode) -> dict[str, str] | None:
    """Name and digest of the online teacher's file; None if embeddings are stored."""
    if config.DISTILL.TEACHER != "online":
        return None
    path = Path(config.DISTILL.TEACHER_CHECKPOINT)
    if not path.is_file():
        raise FileNotFoundError(
            f"no teacher checkpoint {path}; fetch it with python scripts/download_sam3.py, or set "
            f"DISTILL.TEACHER_CHECKPOINT"
        )
    return {"name": path.name, "sha256": sha256(path)}


if __name__ == "__main__":
    run_main(main)
