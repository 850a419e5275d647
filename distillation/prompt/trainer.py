"""Prompt distillation on the shared training loop: data, student, teachers or their stores, and what is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distillation.prompt.config import LOSSES, DistillationSettings, PromptDistillConfig
from distillation.prompt.dataset import PromptDataset, open_dataset
from distillation.prompt.model import PromptDistiller, freeze_unused
from distillation.prompt.recipe import BEST_METRIC, make_recipe, run_keys, tags
from distillation.prompt.store import FeatureStore, expected_of
from distillation.prompt.teachers import Teacher, build_teachers
from distillation.prompt.validation import Validator
from sam3.engine import amp, checkpoint, distributed, weights
from sam3.engine.distributed import World
from sam3.engine.loader import PictureLoader, loader_from_config, once_sampler
from sam3.engine.log import MetricLog
from sam3.engine.sampler import EpochSampler
from sam3.engine.training_run import TrainingRun
from sam3.sam.sam1 import Sam1, build_sam1
from sam3.sam1_files import load_sam1, save_sam1

KIND = "prompt distillation"
STUDENT = "student."  # of the keys in checkpoints; those of the projections begin with `objective.distill_projections.`
# Settings that may not change when a checkpoint is resumed: going on would mean something else.
RESUME_KEYS = (
    *("model.type", "model.image_size", "model.multimask_output", "freeze", "train.seed", "train.freeze_bn"),
    *("dataset.mode", "dataset.prompt_mode", "dataset.grid_points", "dataset.min_points", "dataset.max_points"),
    *("dataset.max_bbox_shift", "distillation.enable", *(f"distillation.{name}.enable" for name in LOSSES)),
    *("dataset.max_masks", "distillation.encoder_patch.projection", "distillation.prompt_embed.tap"),
    "distillation.hooks",
)
logger = logging.getLogger("sam3.distillation")


class PromptTrainer:
    """One run; its files go to `model.save_path`. max_steps: the last optimizer step; 0: that of the last epoch."""

    def __init__(self, config: PromptDistillConfig, world: World, max_steps: int = 0) -> None:
        self.config, self.world = config, world
        self.output = Path(config.model.save_path)
        self.keys = run_keys(config, max_steps)

    # What can be done -------------------------------------------------------------------------------------------------

    def train(self, argv: Sequence[str]) -> int:
        """Train to the end and write the best student in the published layout. Returns the exit code."""
        self._refuse_to_mix()
        code = self.run.train(argv)
        if self.world.is_main:
            best = self.output / checkpoint.BEST
            source = best if best.is_file() else checkpoint.newest(self.output)
            export_checkpoint(source, self.output / export_name(self.config.model.type))
        distributed.barrier()
        return code

    def validate(self) -> int:
        """Validate once: the weights of `train.resume`, else the newest of the run, else those it would start from."""
        self.config = replace(self.config, distillation=DistillationSettings())  # teachers say nothing here
        path = self.keys.MODEL.RESUME if self.keys.MODEL.RESUME not in ("", "auto") else checkpoint.newest(self.output)
        if path:
            self._load(Path(path))
        else:
            self._start()
        self.distiller.eval()
        with torch.no_grad():
            values = self._validator(MetricLog(None))(0, 0)
        found = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        logger.info(f"{path or self.config.model.checkpoint_path or 'random weights'}: {found}")
        return 0

    def dry_run(self) -> int:
        """Check everything, print the plan, write nothing."""
        self._refuse_to_mix()
        return self.run.dry_run()

    # Parts, made when they are needed, in the order in which mistakes are cheapest to find --------------------------

    @cached_property
    def student(self) -> Sam1:
        """With random weights; parts that are never trained have no gradients."""
        model = self.config.model
        student = build_sam1(model.type, model.image_size)
        freeze_unused(student)
        if not self.config.freeze.unfreeze_epoch:
            for part in self.config.freeze.parts(0):
                getattr(student, part).requires_grad_(False)
        return student

    @cached_property
    def stores(self) -> dict[str, FeatureStore] | None:
        """Teacher -> its stored features of the training pictures; None if teachers run, or none is needed."""
        config = self.config
        if not (config.distills and config.distillation.use_precomputed_features):
            return None
        split = Path(config.dataset.train_dataset).name
        found = {}
        for teacher in config.teachers:
            store = FeatureStore(config.store_folder(teacher), split)
            store.check(expected_of(config, teacher))
            found[teacher.name] = store
        return found

    @cached_property
    def dataset(self) -> PromptDataset:
        config = self.config
        dataset = open_dataset(
            config.dataset.train_dataset,
            config.dataset,
            self.student.preprocess,
            training=True,
            seed=config.train.seed,
            stores=self.stores,
            components=config.distillation.losses if self.stores else (),
        )
        for store in (self.stores or {}).values():
            _require_features(store, dataset.picture_keys, config.distillation.losses)
        return dataset

    @cached_property
    def val_dataset(self) -> PromptDataset:
        config = self.config
        return open_dataset(
            config.dataset.val_dataset, config.dataset, self.student.preprocess, training=False, seed=config.train.seed
        )

    @cached_property
    def teachers(self) -> list[Teacher]:
        """Those that run beside the student."""
        if not self.config.distills or self.stores is not None:
            return []
        found = build_teachers(
            self.config.teachers, self.config.distillation, self.world.device, self.config.model.image_size
        )
        if len(found) < len(self.config.teachers):  # optional ones are missing, as the log says: the others share
            there = {teacher.name for teacher in found}
            self.config = replace(self.config, teachers=tuple(t for t in self.config.teachers if t.name in there))
        return found

    @cached_property
    def distiller(self) -> PromptDistiller:
        teachers = self.teachers  # may change the config
        return PromptDistiller(self.student, self.config, teachers).to(self.world.device)

    @cached_property
    def run(self) -> TrainingRun:
        dataset, distiller, config = self.dataset, self.distiller, self.config
        if not self._resumes():
            self._start()
        distiller.add_projections({name: store.encoder_channels for name, store in (self.stores or {}).items()})
        distiller.to(self.world.device)
        sampler = EpochSampler(
            len(dataset), config.train.batch_size,
            rank=self.world.rank, world_size=self.world.size, seed=config.train.seed, drop_last=False,
        )  # fmt: skip
        return TrainingRun(
            self.keys,
            self.world,
            self.output,
            distiller,
            saved=distiller,
            sampler=sampler,
            make_loader=lambda: loader_from_config(self.keys, dataset, sampler, self.world.device),
            make_validator=self._validator,
            load_weights=self._load,
            start_from=None,
            meta=self.meta(),
            resume_keys=RESUME_KEYS,
            lines=self.plan_lines(),
            project="EfficientSAM3-PromptDistillation",
            best_metric=BEST_METRIC,
            best_mode="max",
            make_recipe=make_recipe(config),
            unit="samples",
            data=config.dataset.train_dataset,
            tags=tags(config, distiller),
            stated=config.to_dict(),
        )

    def meta(self) -> dict[str, Any]:
        """What checkpoints state."""
        return {
            "kind": KIND,
            "type": self.config.model.type,
            "image_size": self.config.model.image_size,
            "teachers": list(self.config.teacher_weights) if self.config.distills else [],
        }

    def plan_lines(self) -> dict[str, str]:
        """What the plan says besides steps, rate and output."""
        config, data = self.config, self.config.dataset
        kind = f"a grid of {data.grid_points} x {data.grid_points}" if data.mode == "everything" else data.prompt_mode
        lines = {
            "prompts": f"{kind}; {self.dataset.num_pictures} pictures with {self.dataset.num_masks} masks, "
            f"{self.val_dataset.num_masks} to validate on",
            "losses": "task",
        }
        if config.distills:
            weights = {name: getattr(config.distillation, name).weight for name in config.distillation.losses}
            listed = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
            lines["losses"] = f"task + {config.distillation.lambda_coef:g} x ({listed})"
            source = "features read from disk" if self.stores is not None else "run beside the student"
            lines["teachers"] = ", ".join(f"{n} {w:g}" for n, w in config.teacher_weights.items()) + f"; {source}"
        return lines

    # Starting ---------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Give the student the weights that training begins with."""
        model = self.config.model
        if not model.checkpoint_path:
            logger.warning("the student begins with random weights: model.checkpoint_path is empty")
            return
        if not Path(model.checkpoint_path).is_file():
            raise FileNotFoundError(
                f"no weights {model.checkpoint_path} for the student to start from; fetch them with "
                "python scripts/download_sam1.py, or set model.checkpoint_path"
            )
        loaded = load_sam1(model.checkpoint_path, model.type, model.image_size)
        self.student.load_state_dict(loaded.state_dict())

    def _resumes(self) -> bool:
        automatic = self.keys.TRAIN.AUTO_RESUME and checkpoint.newest(self.output) is not None
        return bool(self.keys.MODEL.RESUME) or automatic

    def _load(self, path: Path) -> None:
        """The student's weights of a checkpoint, or of a file in the published layout."""
        content = weights.load_weights(path)
        tensors = weights.strip_prefix(content.tensors, STUDENT) or content.tensors
        weights.load_strict(self.student, tensors, source=path)
        self.distiller.to(self.world.device)

    def _refuse_to_mix(self) -> None:
        if not self.config.train.resume and checkpoint.listed(self.output):
            raise ValueError(
                f"{self.output} holds a run; go on with it by --resume auto, or choose another model.save_path"
            )

    def _validator(self, metrics: MetricLog) -> Validator:
        sampler = once_sampler(len(self.val_dataset), self.config.train.batch_size, self.world)
        loader: PictureLoader = loader_from_config(self.keys, self.val_dataset, sampler, self.world.device)
        on_gpu = self.keys.AMP_ENABLE and self.world.device.type != "cpu"
        amp_dtype = amp.resolve_amp_dtype(on_gpu, self.keys.AMP_DTYPE, self.world.device)
        return Validator(self.distiller, loader, self.world, amp_dtype, metrics)


def export_name(type: str) -> str:
    """File name of an exported student."""
    return "mobile_sam.pt" if type == "vit_t" else f"sam_{type}.pt"


def export_checkpoint(source: str | Path, target: str | Path | None = None) -> None:
    """Write a training checkpoint's student in the published layout. ValueError for a checkpoint of another kind.

    target: None is `export_name` in the current folder.
    """
    payload = checkpoint.load(source)
    meta = payload["meta"]
    if meta.get("kind") != KIND:
        raise ValueError(
            f"{source} is a checkpoint of another training (its meta has {', '.join(meta) or 'nothing'}); wanted one "
            "that scripts/train_prompt_distill.py wrote"
        )
    student = build_sam1(meta["type"], meta["image_size"])
    weights.load_strict(student, weights.strip_prefix(payload["model"], STUDENT), source=source)
    target = Path(target or export_name(meta["type"]))
    save_sam1(student, target)
    logger.info(f"exported {target}, a {meta['type']} of {source}")


def _require_features(store: FeatureStore, keys: Sequence[str], losses: Sequence[str]) -> None:
    """FileNotFoundError before the first step, rather than in the middle of an epoch."""
    failed = store.failed()
    if missing := [key for key in store.missing(keys, losses) if key not in failed]:
        raise FileNotFoundError(
            f"{store.root} lacks features of {len(missing)} of {len(keys)} training pictures: "
            f"{weights.list_names(missing)}. Write them with scripts/extract_teacher_features.py, whose command "
            "goes on where it stopped, or switch the loss off whose file is missing: distillation.<loss>.enable false"
        )
