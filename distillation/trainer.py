"""One phase of distillation on the shared training loop: data, teacher and student, and what is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from distillation.cache_writer import write_cache
from distillation.config import FEATURE_LOSSES, DistillationConfig, Phase
from distillation.dataset import SA1BDistillDataset
from distillation.export import KIND, export_student
from distillation.hungarian import HungarianMatcher
from distillation.listing import scan_sa1b
from distillation.losses import DistillationLoss
from distillation.memory import fixed_gb
from distillation.model import Distiller
from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from distillation.models.pretrained import load_pretrained
from distillation.models.tokenizer import tokenize
from distillation.recipe import by_phase, loader_workers, run_keys, tags
from distillation.sources import Sources, open_sources
from distillation.teachers.build import build_teacher
from distillation.teachers.teacher import Teacher
from distillation.validation import Validator
from sam3.engine import amp, checkpoint, distributed, weights
from sam3.engine.distributed import World
from sam3.engine.files import human_bytes
from sam3.engine.loader import PictureLoader, loader_from_config, once_sampler
from sam3.engine.log import MetricLog
from sam3.engine.sampler import EpochSampler
from sam3.engine.training_run import TrainingRun

# Settings that may not change when a checkpoint is resumed: going on would mean something else.
RESUME_KEYS = (
    *("student", "image_size", "prompts", "seed", "num_train", "num_val", "teacher_mode", "bn_mode", "horizontal_flip"),
    *("matcher", "matcher_w_mask", "matcher_w_box", "matcher_w_logit", "matcher_mask_size"),
    *("teacher_score_threshold", "max_matches", "dice_eps", "presence_space", "score_weighting"),
)
EXPORT = "student_fp16.pt"
logger = logging.getLogger("sam3.distillation")


class DistillationTrainer:
    """Trains, validates or plans one phase; its files go to `<checkpoint_dir>/phase<n>`."""

    def __init__(
        self,
        config: DistillationConfig,
        phase: Phase,
        world: World,
        *,
        init: str = "",
        resume: str = "",
        max_steps: int = 0,
        saves: bool = True,
    ) -> None:
        """
        Args:
            init: checkpoint of either phase, or exported student, whose weights training starts from. Left out,
                phase 1 starts from pretrained weights and phase 2 from the newest checkpoint of phase 1.
            resume: checkpoint of this phase to go on from, or `auto`: the newest.
            max_steps: stop after so many further optimizer steps; 0 at the end of the phase.
            saves: False keeps no checkpoints.

        Raises:
            FileNotFoundError, ValueError: `init` or `resume` is not there, or of another phase.
        """
        self.config, self.phase, self.world, self.saves = config, phase, world, saves
        self.output = phase_folder(config, phase.number)
        self.resume = self._find_resume(resume)
        if init and not Path(init).is_file():
            raise FileNotFoundError(f"no weights {init} to start from; wanted a checkpoint or an exported student")
        self.init, self.max_steps = init, max_steps

    # What can be done -------------------------------------------------------------------------------------------------

    def train(self, argv: Sequence[str]) -> int:
        """Train to the end of the phase and export the student. Returns the exit code."""
        self._refuse_to_mix()
        code = self.run.train(argv)
        if self.saves and self.world.is_main:
            path = self.output / EXPORT
            export_student(self.student, path, export_meta(self.config.prompts, self.meta()))
            logger.info(f"exported {path}; try it with python scripts/predict.py --checkpoint {path}")
        distributed.barrier()  # the next phase looks for what the main process has just written
        return code

    def validate(self) -> int:
        """Validate once and print a table: the weights of `resume`, of `init`, or the newest of the phase."""
        path = self.resume or self.init or checkpoint.newest(self.output)
        if not path:
            raise ValueError(f"no checkpoint in {self.output} to validate; pass one with --resume or --init")
        self.init = str(path)  # so that nobody looks for a phase to start from
        load_weights(self.student, path)
        self.distiller.eval()
        with torch.no_grad():
            values = self._validator(MetricLog(None))(0, 0)
        logger.info(f"{path}, phase {self.phase.number}, {len(self.sources.val)} pictures")
        for name, value in values.items():
            logger.info(f"  {name:26s} {value:.5g}")
        return 0

    def dry_run(self) -> int:
        """Check everything, print the plan, write nothing."""
        self._refuse_to_mix()
        return self.run.dry_run()

    # Parts, made when they are needed, in the order in which mistakes are cheapest to find --------------------------

    @cached_property
    def keys(self) -> CfgNode:
        """The engine's, with what the run starts from."""
        start = "" if self.resume else self.init
        if not self.resume and not self.init and self.phase.number == 2:
            start = str(self._last_of_phase_1())
        done = checkpoint.load(self.resume)["step"] if self.resume else 0
        last = done + self.max_steps if self.max_steps else 0
        resume = str(self.resume or "")
        return run_keys(
            self.config, self.phase, self.output, self.world.device, init=start, resume=resume, max_steps=last
        )

    @cached_property
    def sources(self) -> Sources:
        return open_sources(self.config, self.phase, self.student.config.num_queries)

    @cached_property
    def teacher(self) -> Teacher | None:
        """None if all its outputs are cached."""
        if self.config.teacher_mode == "output_cache":
            return None
        return build_teacher(self.config, self.world.device, with_trunk=self.config.teacher_mode == "online")

    @cached_property
    def student(self) -> EfficientSAM3:
        """With random weights."""
        config = self.config
        sizes = replace(
            EfficientSAM3Config.preset(config.student),
            image_size=config.image_size,
            pixel_mean=config.student_mean,
            pixel_std=config.student_std,
            dropout=config.student_dropout,
        )
        student = EfficientSAM3(sizes)
        student.freeze_unused()
        student.set_bn_mode(config.bn_mode)
        if config.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        return student

    @cached_property
    def distiller(self) -> Distiller:
        self._check_widths()
        return build_distiller(self.config, self.phase, self.student, self.teacher).to(self.world.device)

    @cached_property
    def run(self) -> TrainingRun:
        keys = self.keys  # first of all: where it starts from
        sources, distiller = self.sources, self.distiller
        sampler = EpochSampler(
            len(sources.train), self.config.batch_size,
            rank=self.world.rank, world_size=self.world.size, seed=self.config.seed, drop_last=False,
        )  # fmt: skip
        return TrainingRun(
            keys,
            self.world,
            self.output,
            distiller,
            saved=distiller.student,
            sampler=sampler,
            make_loader=lambda: self._loader(sources.dataset(training=True), sampler),
            make_validator=self._validator,
            load_weights=lambda path: load_weights(self.student, path),
            start_from=self._start,
            meta=self.meta(),
            resume_keys=RESUME_KEYS,
            lines=self.plan_lines(),
            project="EfficientSAM3-Distillation",
            best_metric="val/total_loss",
            make_recipe=by_phase(self.phase),
            data=self.config.sa1b_dir,
            fresh="RepViT's and MobileCLIP's weights" if self.config.pretrained else "random weights",
            tensorboard_folder=str(Path(self.config.log_dir, f"phase{self.phase.number}").resolve()),
            tags=tags(self.config),
            stated=self.config.to_dict(),
            keeps_checkpoints=self.saves,
        )

    def meta(self) -> dict[str, Any]:
        """What checkpoints state."""
        return {
            "phase": self.phase.number,
            "student": self.student.config.to_meta(),
            "teacher": self.sources.teacher_meta,
        }

    def plan_lines(self) -> dict[str, str]:
        """What the plan says besides steps, rate and output."""
        config, sources = self.config, self.sources
        taken = {name: gb for name, gb in fixed_gb(self.teacher, self.student).items() if gb}
        listed = " + ".join(f"{name} {gb:.2f}" for name, gb in taken.items())
        skipped = f", {sources.train.skipped} without annotations left out" if sources.train.skipped else ""
        off = () if self.phase.with_features else FEATURE_LOSSES
        losses = {name: weight for name, weight in config.loss_weights.items() if weight and name not in off}
        return {
            "phase": f"{self.phase.number}, losses " + ", ".join(f"{name} {w:g}" for name, w in losses.items()),
            "teacher": f"{config.teacher} ({config.teacher_backend}), {config.teacher_mode}",
            "pictures": f"{len(sources.train)} train, {len(sources.val)} val in {config.sa1b_dir}{skipped}",
            "memory": f"{listed} = {sum(taken.values()):.2f} GB before activations, budget {config.memory_budget_gb:g}",
        }

    # Starting ---------------------------------------------------------------------------------------------------------

    def _find_resume(self, resume: str) -> Path | None:
        if not resume:
            return None
        path = checkpoint.resume_path(self.output, resume, auto_resume=False)
        phase = load_checkpoint(path)["meta"].get("phase")
        if phase != self.phase.number:
            raise ValueError(
                f"{path} is a checkpoint of phase {phase}, which phase {self.phase.number} cannot go on from; "
                f"start from its weights with --init {path}"
            )
        return path

    def _last_of_phase_1(self) -> Path:
        path = checkpoint.newest(phase_folder(self.config, 1))
        if path is None:
            raise FileNotFoundError(
                f"phase 2 starts from phase 1, and {phase_folder(self.config, 1)} holds no checkpoint of it; run "
                "--phase 1 first, or pass weights with --init"
            )
        return path

    def _refuse_to_mix(self) -> None:
        """A folder that holds a run is resumed from its end or left alone."""
        if not self.resume and checkpoint.listed(self.output):
            raise ValueError(
                f"{self.output} holds a run; go on with it by --resume auto, or choose another folder with --output"
            )
        if self.resume and (newest := checkpoint.newest(self.output)):
            there, here = (checkpoint.load(path)["step"] for path in (newest, self.resume))
            if there > here:  # they would win over all that is still to be written
                raise ValueError(
                    f"{self.output} holds {newest.name}, of step {there}, and {self.resume} is of step {here}; go on "
                    "with the former by --resume auto, or from the latter in another folder with --output"
                )

    def _start(self) -> None:
        """Give the student the weights that training begins with."""
        if self.keys.MODEL.PRETRAINED:
            load_weights(self.student, self.keys.MODEL.PRETRAINED)
        elif self.config.pretrained:
            load_pretrained(self.student)

    def _check_widths(self) -> None:
        """Features are compared channel by channel."""
        if self.teacher is not None and self.teacher.dim != self.student.config.dim:
            raise ValueError(
                f"the teacher {self.config.teacher} has {self.teacher.dim} channels, the {self.config.student} student "
                f"{self.student.config.dim}; the full student goes with sam3.pt, the tiny one (student=tiny) with a "
                "file of scripts/make_tiny_sam3.py"
            )

    # Loaders ----------------------------------------------------------------------------------------------------------

    def _loader(self, dataset: Any, batches: EpochSampler) -> PictureLoader:
        return loader_from_config(self.keys, dataset, batches, self.world.device)

    def _validator(self, metrics: MetricLog) -> Validator:
        dataset = self.sources.dataset(training=False)
        loader = self._loader(dataset, once_sampler(len(dataset), self.config.batch_size, self.world))
        amp_dtype = amp.resolve_amp_dtype(self.keys.AMP_ENABLE, self.keys.AMP_DTYPE, self.world.device)
        return Validator(self.distiller, loader, self.world, amp_dtype, metrics, self.config)


def phase_folder(config: DistillationConfig, phase: int) -> Path:
    """Where a phase's checkpoints, log and metrics lie."""
    return Path(config.checkpoint_dir) / f"phase{phase}"


def build_distiller(
    config: DistillationConfig, phase: Phase, student: EfficientSAM3, teacher: Teacher | None
) -> Distiller:
    """Student and teacher with the matching and the losses of the config."""
    matcher = HungarianMatcher(
        config.matcher_w_mask,
        config.matcher_w_box,
        config.matcher_w_logit,
        mask_size=config.matcher_mask_size,
        teacher_score_threshold=config.teacher_score_threshold,
        max_matches=config.max_matches,
        method=config.matcher,
    )
    loss = DistillationLoss(config.loss_weights, config.dice_eps, config.presence_space, config.score_weighting)
    tokens = tokenize(config.prompts, student.config.context_length)
    return Distiller(
        student,
        teacher,
        matcher,
        loss,
        phase,
        SA1BDistillDataset.teacher_preprocess(config),
        tokens,
        config.empty_cache_every,
    )


def write_teacher_cache(config: DistillationConfig, kind: str, world: World) -> int:
    """Store what the teacher gives for all pictures, `trunk` or `outputs`. Returns the exit code; see `write_cache`."""
    pictures = scan_sa1b(config.sa1b_dir, config.require_json)
    dataset = SA1BDistillDataset(pictures, config, training=False)
    teacher = build_teacher(config, world.device)
    queries = EfficientSAM3Config.preset(config.student).num_queries
    workers = loader_workers(config, world.device)
    return write_cache(kind, config, teacher, dataset, world, min_queries=queries, num_workers=workers)


def export_checkpoint(source: str, target: Path) -> int:
    """Write a training checkpoint's student as a file for inference, in half precision. Returns the exit code."""
    payload = load_checkpoint(source)
    student = EfficientSAM3(EfficientSAM3Config.from_meta(payload["meta"]["student"]))
    load_weights(student, source)
    export_student(student, target, export_meta(payload["config"]["prompts"], payload["meta"]))
    print(f"{target}: {human_bytes(target.stat().st_size)}")
    return 0


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint of this training; ValueError for a file of another kind."""
    if Path(path).is_file() and weights.load_weights(path).meta.get("kind") == KIND:
        raise ValueError(f"{path} is an exported student, not a checkpoint; training starts from it with --init {path}")
    payload = checkpoint.load(path)
    if not {"phase", "student", "teacher"} <= payload["meta"].keys():
        raise ValueError(
            f"{path} is a checkpoint of another training (its meta has {', '.join(payload['meta']) or 'nothing'}); "
            "wanted one that train_distill.py wrote"
        )
    return payload


def export_meta(prompts: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported file states beside its sizes. prompts: those it was taught; meta: of the checkpoint."""
    return {"phase": meta["phase"], "prompts": list(prompts), "teacher": meta["teacher"]}


def load_weights(student: EfficientSAM3, path: str | Path) -> None:
    """Put the weights of a training checkpoint or an exported student into `student`, strictly."""
    weights.load_strict(student, weights.load_weights(path).tensors, source=path)
