"""One run of a training stage: train, evaluate once, time steps, or show the plan.

A stage builds its data and its model and describes them in a `TrainingRun`; the program around it is `run_stage`:

    def main(argv=None):
        return run_stage(argv, config.make_parser(__doc__), config.load, build_run)
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from sam3.engine import amp, checkpoint, distributed, log
from sam3.engine.batch import to_device
from sam3.engine.config import dump_config, to_dict
from sam3.engine.distributed import World
from sam3.engine.dry_run import repeated, seconds_per_iteration
from sam3.engine.environment import write_env
from sam3.engine.files import free_bytes, human_bytes, require_free_space, write_text
from sam3.engine.loader import PictureLoader
from sam3.engine.locks import FileLock
from sam3.engine.loop import Validate, train
from sam3.engine.loop_settings import LoopSettings
from sam3.engine.recipe import MakeRecipe, Recipe, by_epochs
from sam3.engine.rng import seed_everything
from sam3.engine.sampler import EpochSampler
from sam3.engine.stage_config import output_folder

LEFT_OUT = "left_out.txt"
logger = logging.getLogger("sam3.run")


def run_stage(
    argv: Sequence[str] | None,
    parser: argparse.ArgumentParser,
    load_config: Callable[[argparse.Namespace], CfgNode],
    build: Callable[[CfgNode, World, Path, bool], TrainingRun],
    log_file: str = "log_rank0.txt",
) -> int:
    """The main program of a stage: arguments -> config -> processes, log and seed -> run. Returns the exit code.

    load_config: parsed arguments -> checked config. build(config, world, output, dry_run): data and model of the run;
    in a dry run it must write nothing either. log_file: the main process's, in the output folder.
    """
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args)
    with distributed.start(config.DEVICE) as world:
        output = output_folder(config)
        log.setup(None if args.dry_run else output, world.rank, log_file)
        seed_everything(config.SEED + world.rank, config.DETERMINISTIC)
        run = build(config, world, output, args.dry_run)
        if config.THROUGHPUT_MODE:
            return run.throughput()
        if args.dry_run:
            return run.dry_run()
        if config.EVAL_MODE:
            return run.evaluate()
        return run.train(sys.argv[1:] if argv is None else argv)


def place(distiller: nn.Module, student: nn.Module, config: CfgNode, device: torch.device) -> nn.Module:
    """The distiller on `device` as the TRAIN keys want it; `student` is the part that TRAIN.COMPILE compiles."""
    distiller = distiller.to(device)
    if config.TRAIN.CHANNELS_LAST:
        distiller = distiller.to(memory_format=torch.channels_last)
    if config.TRAIN.USE_SYNC_BN:
        distiller = distributed.sync_batchnorm(distiller, device)
    if config.TRAIN.COMPILE:
        student.compile()
    return distiller


@dataclass
class TrainingRun:
    """What a stage says about a run, and what can be done with it.

    distiller: on `world.device`; `forward(batch)` gives losses, `total` among them. saved: the part of it that is
    trained and that checkpoints hold. make_loader(): batches of the train pictures, those of `sampler`.
    make_validator(metrics): the callable that the loop calls after each epoch; None without a val split. best_metric,
    best_mode: which of its results ckpt_best.pth follows ("": none), and whether `min` or `max` is best.
    load_weights(path): puts the weights of a file into the student, for EVAL_MODE. start_from(): puts in those that
    training begins with, MODEL.PRETRAINED; called first of all, unless a checkpoint is resumed.
    meta: what checkpoints state; one with another meta, or another value of a config key among `resume_keys`, is not
    resumed. lines: the stage's part of the plan, name -> text; they replace lines of the same name. project: name at
    wandb. config_name: file that the config is written to, `.json` or `.yaml`. left_out: reason -> keys of the pictures
    that are known to take no part; left_out.txt lists them. Those that turn out to be unusable when they are loaded
    stand in the log only.
    make_recipe: `by_epochs` or `by_steps`. unit: what a sample is called, in the plural. data: where the samples lie,
    DATA.DATA_PATH if empty. fresh: what the student starts from without MODEL.PRETRAINED. tensorboard_folder: see
    `MetricLog`. tags: see `MetricLog`. stated: the settings as the user states them, for files and checkpoints, where
    `config` is derived from those. keeps_checkpoints: False for a run that only tries things out.
    """

    config: CfgNode
    world: World
    output: Path
    distiller: nn.Module
    saved: nn.Module
    sampler: EpochSampler
    make_loader: Callable[[], PictureLoader]
    make_validator: Callable[[log.MetricLog], Validate] | None
    load_weights: Callable[[Path], object]
    start_from: Callable[[], object] | None
    meta: Mapping[str, Any]
    resume_keys: Sequence[str]
    lines: Mapping[str, str]
    project: str
    best_metric: str = ""
    best_mode: str = "min"
    config_name: str = "config.json"
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    make_recipe: MakeRecipe = by_epochs
    unit: str = "images"
    data: str = ""
    fresh: str = "random weights"
    tensorboard_folder: str = ""
    tags: log.Tags = field(default_factory=dict)
    stated: Mapping[str, Any] | None = None
    keeps_checkpoints: bool = True

    def __post_init__(self) -> None:
        self.stated = self.stated or to_dict(self.config)
        self.data = self.data or self.config.DATA.DATA_PATH

    @cached_property
    def recipe(self) -> Recipe:
        return self.make_recipe(self.config, self.sampler, self.world.device)

    @cached_property
    def settings(self) -> LoopSettings:
        best = self.best_metric if self.make_validator else ""
        return replace(self.recipe.settings, best_metric=best, best_mode=self.best_mode, unit=self.unit)

    @property
    def steps_per_epoch(self) -> int:
        return self.settings.steps_in(self.sampler.batches_per_epoch())

    # Training ---------------------------------------------------------------------------------------------------------

    def train(self, argv: Sequence[str]) -> int:
        """Train to the end; the main process keeps other runs out of the output folder meanwhile."""
        if not self.world.is_main:
            return self._train(argv)
        self.output.mkdir(parents=True, exist_ok=True)
        with FileLock(self.output / ".train.lock", f"training in {self.output}"):
            return self._train(argv)

    def _train(self, argv: Sequence[str]) -> int:
        config = self.config
        path, resume = self._start()
        if self.world.is_main:  # only now: a refused run leaves the files of the one whose folder this is
            dump_config(self.stated, self.output / self.config_name)
            write_env(self.output / "env.json", argv)
            self._list_left_out()
        self._describe(path)
        with log.MetricLog(
            self.output,
            enabled=self.world.is_main,
            tensorboard=config.TENSORBOARD,
            tensorboard_folder=self.tensorboard_folder,
            wandb_project=self.project if config.USE_WANDB else None,
            run_name=f"{config.MODEL.NAME}-{config.TAG}",
            config=self.stated,
            tags=self.tags,
            resume_step=checkpoint.position_of(resume).step + 1 if resume else 0,
        ) as metrics:
            result = train(
                self.distiller,
                self.make_loader(),
                self.sampler,
                self.recipe.make_optimizer(self.distiller),
                self.recipe.lr_at,
                self.settings,
                world=self.world,
                output=self.output if self.keeps_checkpoints else None,
                saved=self.saved,
                config=self.stated,
                meta=self.meta,
                validate=self.make_validator(metrics) if self.make_validator else None,
                metrics=metrics,
                resume=resume,
            )
        logger.info(f"finished {result.position.epoch} epochs, {result.position.step} steps; see {self.output}")
        return 0

    def _list_left_out(self) -> None:
        path = self.output / LEFT_OUT
        if self.left_out:
            lines = [f"{key}\t{reason}\n" for reason, keys in self.left_out.items() for key in keys]
            write_text(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)  # of a run before the data set was completed

    def _start(self) -> tuple[Path | None, Mapping[str, Any] | None]:
        """Path and contents of the checkpoint to go on from; without one the student gets the weights to start from.

        ValueError if it is another run's.
        """
        config, path = self.config, None
        if self.world.is_main:
            path = checkpoint.resume_path(self.output, config.MODEL.RESUME, config.TRAIN.AUTO_RESUME)
        path = distributed.broadcast_object(path)
        if path is None:
            if self.start_from is not None:
                self.start_from()
            return None, None
        resume = checkpoint.load(path)
        way_out = "set TRAIN.AUTO_RESUME False" if config.TRAIN.AUTO_RESUME else "leave --resume out"
        checkpoint.check_fits(
            resume, path, meta=self.meta, config=self.stated, config_keys=self.resume_keys, way_out=way_out
        )
        return path, resume

    # Other things to do -----------------------------------------------------------------------------------------------

    def evaluate(self) -> int:
        """Validate once: the weights of MODEL.RESUME, else the newest in OUTPUT, else those of MODEL.PRETRAINED."""
        if self.make_validator is None:
            raise ValueError(f"there is no val split in {self.data} to evaluate on")
        path = self._find_evaluated()
        self.load_weights(path)
        self.distiller.eval()
        values = self.make_validator(log.MetricLog(None))(0, 0)
        logger.info(f"{path}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))
        return 0

    def _find_evaluated(self) -> Path:
        resume, pretrained = self.config.MODEL.RESUME, self.config.MODEL.PRETRAINED
        if resume not in ("", "auto"):
            return Path(resume)
        path = checkpoint.newest(self.output)
        if path is None and (resume == "auto" or not pretrained):
            raise ValueError(f"no checkpoint in {self.output} to evaluate; pass one with --resume or --pretrained")
        if path is None:
            return Path(pretrained)
        if pretrained:
            logger.info(f"evaluating {path}, not {pretrained}; --resume {pretrained} evaluates the latter")
        return path

    def throughput(self) -> int:
        """Time training steps on the first batch, without loading more and without saving anything."""
        self._start()
        batch = next(repeated(self.make_loader()), None)
        if batch is None:
            raise ValueError(f"none of the {self.unit} in {self.data} can be read")
        seconds = seconds_per_iteration(repeated([batch]), self._trial_step, self.world.device)
        rate = self.world.size * len(batch) / seconds
        logger.info(
            f"{rate:.4g} {self.unit}/s: {1000 * seconds:.1f} ms for {len(batch)} {self.unit} on {self.world.size} "
            "processes"
        )
        return 0

    def dry_run(self) -> int:
        """Print the plan: pictures, steps, learning rate, disk, and the time from a few timed steps."""
        self._describe(self._start()[0], written=False)
        count, size = self._checkpoints()
        missing = max(0, count - len(checkpoint.listed(self.output)))
        require_free_space(self.output, missing * size, f"an output of {count} checkpoints")
        seconds = seconds_per_iteration(repeated(self.make_loader()), self._trial_step, self.world.device)
        total = seconds * self.settings.total_steps(self.steps_per_epoch) * self.settings.accumulation
        logger.info(_line("time", f"{log.duration(total)}, {1000 * seconds:.0f} ms a batch"))
        return 0

    def _trial_step(self, batch: Any) -> None:
        """Forward and backward of one batch; no weight changes."""
        self.distiller.train()
        with amp.autocast(self.world.device, self.settings.amp_dtype):
            losses = self.distiller(to_device(batch, self.world.device))
        losses["total"].backward()
        self.distiller.zero_grad(set_to_none=True)

    # The plan ---------------------------------------------------------------------------------------------------------

    def _checkpoints(self) -> tuple[int, int]:
        """How many the run keeps, and about how many bytes each takes: weights and two moments of each."""
        settings = self.settings
        if settings.counts_steps:
            kept = settings.max_steps // settings.save_steps if settings.save_steps else 0
            kept = min(kept, settings.keep_last or kept) + 2  # the latest and the best
        else:
            kept = settings.keep_last or -(-settings.epochs // settings.save_freq)
        return kept, 3 * 4 * sum(p.numel() for p in self.saved.parameters())

    def _describe(self, resumed: Path | None, written: bool = True) -> None:
        """Log the plan. resumed: the checkpoint that the run goes on from. written: False if it leaves no files."""
        config, settings = self.config, self.settings
        processes, batch = distributed.planned_world_size(), self.sampler.batch_size
        trained = sum(p.numel() for p in self.saved.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in self.saved.parameters() if not p.requires_grad)
        backbone = f" ({config.MODEL.BACKBONE})" if config.MODEL.get("BACKBONE") else ""
        length = f"{settings.max_steps} in all" if settings.counts_steps else f"{settings.epochs} epochs"
        kept, checkpoint_bytes = self._checkpoints()
        plan = {
            "student": f"{config.MODEL.NAME}{backbone}, {trained:,} parameters trained, {frozen:,} frozen",
            "start": f"{resumed}, resumed" if resumed else config.MODEL.PRETRAINED or self.fresh,
            **self.lines,
            **self._left_out_line(written),
            "steps": f"{self.steps_per_epoch} an epoch, {length}, effective batch "
            f"{batch * processes * settings.accumulation} = {batch} x {processes} processes x {settings.accumulation} "
            "accumulated",
            "rate": f"{self.recipe.peak_lr:.3g} at its highest, {config.TRAIN.LR_SCHEDULER.NAME}",
            "output": f"{self.output}: about {human_bytes(checkpoint_bytes * kept)} for {kept} checkpoints, "
            f"{human_bytes(free_bytes(self.output))} free",
            "device": f"{self.world.device}, autocast {settings.amp_dtype or 'off'}",
        }
        for name, text in plan.items():
            logger.info(_line(name, text))

    def _left_out_line(self, written: bool) -> dict[str, str]:
        if not self.left_out:
            return {}
        counts = ", ".join(f"{len(keys)} ({reason})" for reason, keys in self.left_out.items())
        return {"left out": f"{counts}; see {LEFT_OUT} in the output" if written else counts}


def _line(name: str, text: str) -> str:
    return f"{name:<12} {text}"
