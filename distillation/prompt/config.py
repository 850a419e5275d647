"""Every setting of prompt distillation, its default and its meaning; the user's `distillation` and `teachers` blocks.

Weights of losses are factors; lengths are pixels of the original picture; rates are per optimizer step.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from distillation.prompt.hooks import COMPONENTS
from sam3.engine import settings

LOSSES = (*COMPONENTS, "dense_mask_logits")  # the order is that of tables and logs
LOSS_PARTS = ("mse", "cos", "kl", "focal")
Sam1Type = Literal["vit_h", "vit_l", "vit_b", "vit_t", "vit_tiny"]


# What the losses compare ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderPatch:
    """The image encoder's features, cell by cell. weight: the document's w_enc."""

    enable: bool = False
    weight: float = 1.0
    w_l2: float = 1.0
    w_cos: float = 1.0
    projection: Literal["auto", "learned", "neck", "none"] = "auto"  # of the teacher's channels to the student's
    cos_mode: Literal["pixel", "flat"] = "pixel"  # one cosine a cell, or one a picture


@dataclass(frozen=True)
class PromptEmbed:
    """The image embedding inside the mask decoder. weight: w_pe."""

    enable: bool = False
    weight: float = 1.0
    w_mse: float = 0.7
    w_cos: float = 0.3
    tap: Literal["input_keys", "output_keys"] = "input_keys"  # before, or after the first block has seen the prompt
    cos_mode: Literal["pixel", "flat"] = "pixel"
    mse_reduction: Literal["mean", "sum_channels"] = "mean"


@dataclass(frozen=True)
class MaskToken:
    """The four mask tokens as distributions over their channels. weight: w_tok."""

    enable: bool = False
    weight: float = 1.0
    w_kl: float = 1.0
    temperature: float = 0.5
    tau_squared: bool = False  # multiply by the temperature's square
    reduction: Literal["token_mean", "batchmean"] = "token_mean"  # batchmean adds the tokens up


@dataclass(frozen=True)
class DenseMasks:
    """The masks' low-resolution logits. weight: w_dense."""

    enable: bool = False
    weight: float = 1.0
    w_kl: float = 0.6
    w_focal: float = 0.4
    gamma: float = 2.0
    kl_form: Literal["bernoulli", "positive"] = "bernoulli"  # positive: without the background's term
    focal_form: Literal["symmetric", "positive"] = "symmetric"
    mask_select: Literal["teacher_best", "independent_best", "all"] = "teacher_best"  # with multimask_output
    valid_only: bool = False  # leave the padding out


@dataclass(frozen=True)
class Hooks:
    """Hook strings of the student, component -> `path[@tap]`; those left out are the documented ones."""

    student: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_components(self.student, "distillation.hooks.student")


@dataclass(frozen=True)
class DistillationSettings:
    """The block `distillation`."""

    enable: bool = False
    lambda_coef: float = 1.0  # factor on all distillation losses together
    use_precomputed_features: bool = False  # read what scripts/extract_teacher_features.py wrote; load no teacher
    precomputed_root: str = "precomputed"
    normalize_teacher_weights: bool = False
    encoder_patch: EncoderPatch = field(default_factory=EncoderPatch)
    prompt_embed: PromptEmbed = field(default_factory=PromptEmbed)
    decoder_mask_token: MaskToken = field(default_factory=MaskToken)
    dense_mask_logits: DenseMasks = field(default_factory=DenseMasks)
    hooks: Hooks = field(default_factory=Hooks)

    def __post_init__(self) -> None:
        settings.require_at_least(0, self, ["lambda_coef"], "distillation.")
        for name in LOSSES:
            loss = getattr(self, name)
            numbers = [f.name for f in fields(loss) if isinstance(getattr(loss, f.name), float)]
            settings.require_at_least(0, loss, numbers, f"distillation.{name}.")
        if self.decoder_mask_token.temperature == 0:
            raise ValueError("distillation.decoder_mask_token.temperature must be above 0")

    @property
    def losses(self) -> tuple[str, ...]:
        """Those that are switched on; none if distillation is switched off."""
        return tuple(name for name in LOSSES if self.enable and getattr(self, name).enable)


@dataclass(frozen=True)
class TeacherSettings:
    """One entry of the list `teachers`."""

    name: str = ""  # a label: in logs, in checkpoints, and of the folder with its features
    weight: float | None = None  # None: 1 / number of teachers
    checkpoint: str = ""  # "": the one that `cfg` names
    cfg: str | None = None  # model file, such as configs/sam_vith.yaml
    type: Sam1Type | None = None  # None: from `cfg`, else from the checkpoint
    backend: Literal["native", "transformers", "segment_anything"] = "native"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # auto: fp16 on a GPU, fp32 on the CPU
    hooks: dict[str, str] = field(default_factory=dict)
    precomputed_dir: str | None = None  # None: <precomputed_root>/<name>
    optional: bool = False  # a missing checkpoint, though not a missing store, leaves it out, with a warning

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(
                f"teachers[].name is {self.name!r}; wanted letters, digits, - and _, for it names folders and logs"
            )
        if self.name in LOSS_PARTS:
            raise ValueError(f"teachers[].name {self.name!r} is the name of a part of a loss; choose another")
        settings.require_at_least(0, self, ["weight"], f"teachers[{self.name}].")
        _check_components(self.hooks, f"teachers[{self.name}].hooks")


def _check_components(hooks: Mapping[str, str], path: str) -> None:
    for component in hooks:
        if component not in COMPONENTS:
            raise ValueError(f"{path} has the unknown component {component!r}; choose one of {', '.join(COMPONENTS)}")


# Data, model and training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetSettings:
    """Pictures, their masks, and the prompts that are drawn from these."""

    train_dataset: str = "./datasets/train"
    val_dataset: str = "./datasets/val"
    layout: Literal["auto", "folder", "sa1b", "coco"] = "auto"
    image_subdir_name: str = "image"  # of the folder layout
    mask_subdir_name: str = "mask"
    mode: Literal["single", "everything"] = "single"  # one prompt for one mask, or a grid for all masks of a picture
    prompt_mode: Literal["point", "box", "mixed"] = "mixed"
    grid_points: int = 32  # points per side
    min_points: int = 1
    max_points: int = 3
    max_masks: int | None = None  # of a picture, the first ones; None: all
    max_bbox_shift: int = 20  # a box's sides move outwards by up to so much
    num_workers: int = 4

    def __post_init__(self) -> None:
        settings.require_at_least(1, self, ["grid_points", "min_points", "max_points", "max_masks"], "dataset.")
        settings.require_at_least(0, self, ["max_bbox_shift", "num_workers"], "dataset.")
        if self.max_points < self.min_points:
            raise ValueError(f"dataset.max_points {self.max_points} is below dataset.min_points {self.min_points}")


@dataclass(frozen=True)
class EverythingSettings:
    """How a grid of prompts is trained."""

    match_iou_threshold: float = 0.3  # a candidate and a mask that overlap less are no pair
    max_points_train: int | None = None  # a random part of the grid in each step; None: all of it
    points_per_batch: int = 64  # prompts that pass the decoder together

    def __post_init__(self) -> None:
        settings.require_at_least(1, self, ["max_points_train", "points_per_batch"], "everything.")
        settings.require_at_least(0, self, ["match_iou_threshold"], "everything.")


@dataclass(frozen=True)
class ModelSettings:
    """The student, and where the run's files go."""

    type: Sam1Type = "vit_t"
    checkpoint_path: str = "./weights/mobile_sam.pt"  # "": random weights
    image_size: int = 1024
    multimask_output: bool = False
    save_path: str = "./logs"

    def __post_init__(self) -> None:
        if self.image_size < 64 or self.image_size % 64:
            raise ValueError(f"model.image_size must be a multiple of 64, got {self.image_size}")


@dataclass(frozen=True)
class LossWeights:
    """Of the parts of the task loss; cls: whether a grid prompt meets an object, in everything mode."""

    bce: float = 1.0
    focal: float = 1.0
    dice: float = 1.0
    iou: float = 1.0
    cls: float = 0.0

    def __post_init__(self) -> None:
        settings.require_at_least(0, self, [f.name for f in fields(self)], "train.loss_weights.")


@dataclass(frozen=True)
class TrainSettings:
    """Length, rates and saving."""

    epochs: int = 100
    lr: float = 1e-5  # of prompt encoder, mask decoder and projections
    encoder_lr_scale: float = 0.1  # the image encoder's rate is lr times this
    batch_size: int = 2  # samples per process and forward pass
    gradient_accumulation: int = 1
    warmup_step: int = 250
    min_lr_ratio: float = 0.0  # the rate at the end, as a part of lr
    weight_decay: float = 1e-4
    clip_grad: float = 1.0
    bf16: bool = True  # matrix products on a GPU; the CPU always computes in float32
    freeze_bn: bool = True  # BatchNorm keeps its statistics
    val_freq: int = 1  # epochs
    early_stop_patience: int = 20  # validations without a better val/iou; 0 never stops early
    resume: bool | str = False  # true: the newest checkpoint in save_path; or a path
    loss_weights: LossWeights = field(default_factory=LossWeights)
    seed: int = 0
    device: str = "auto"
    log_every: int = 10  # steps
    save_every: int = 0  # steps between checkpoints, besides one after every epoch; 0: none
    keep_last: int = 3  # checkpoints
    tensorboard: bool = True

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "batch_size", "gradient_accumulation", "val_freq", "log_every")
        not_negative = (
            *("lr", "encoder_lr_scale", "warmup_step", "min_lr_ratio", "weight_decay", "clip_grad"),
            *("early_stop_patience", "save_every", "keep_last", "seed"),
        )
        settings.require_at_least(1, self, at_least_one, "train.")
        settings.require_at_least(0, self, not_negative, "train.")


@dataclass(frozen=True)
class FreezeSettings:
    """Parts that are not trained; gradients still pass through them."""

    freeze_image_encoder: bool = False
    freeze_prompt_encoder: bool = False
    freeze_mask_decoder: bool = False
    unfreeze_epoch: int = 0  # from this epoch on they are trained; 0: never

    def __post_init__(self) -> None:
        settings.require_at_least(0, self, ["unfreeze_epoch"], "freeze.")

    def parts(self, epoch: int) -> tuple[str, ...]:
        """Children of the model that are frozen in an epoch."""
        if self.unfreeze_epoch and epoch >= self.unfreeze_epoch:
            return ()
        parts = ("image_encoder", "prompt_encoder", "mask_decoder")
        return tuple(part for part in parts if getattr(self, f"freeze_{part}"))


@dataclass(frozen=True)
class Stage:
    """What is different in epochs start_epoch, ..., end_epoch - 1."""

    name: str
    start_epoch: int
    end_epoch: int
    distillation: bool = True
    lambda_coef: float | None = None
    loss_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.start_epoch < self.end_epoch:
            raise ValueError(
                f"stage_schedule {self.name!r} goes from epoch {self.start_epoch} to {self.end_epoch} (exclusive); "
                "wanted 0 <= start_epoch < end_epoch"
            )
        settings.require_at_least(0, self, ["lambda_coef"], f"stage_schedule[{self.name}].")
        settings.build(LossWeights, self.loss_weights, f"stage_schedule {self.name!r}", "loss_weights.")


@dataclass(frozen=True)
class PromptDistillConfig:
    """All settings. ValueError for what cannot work together."""

    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    teachers: tuple[TeacherSettings, ...] = ()
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    everything: EverythingSettings = field(default_factory=EverythingSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    stage_schedule: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        embed = self.distillation.prompt_embed
        if self.dataset.mode == "everything" and embed.enable and embed.tap == "output_keys":
            raise ValueError(
                "distillation.prompt_embed.tap output_keys gives a map for each prompt of the grid, too many to keep; "
                "in dataset.mode everything use input_keys, which is one a picture"
            )
        names = [teacher.name for teacher in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"teachers need different names, got {', '.join(twice)} more than once")
        if self.distills and not self.teachers:
            raise ValueError("distillation.enable is true, but there are no teachers; list them under `teachers`")
        ordered = sorted(self.stage_schedule, key=lambda stage: stage.start_epoch)
        for first, second in itertools.pairwise(ordered):
            if second.start_epoch < first.end_epoch:
                raise ValueError(f"stage_schedule: {first.name!r} and {second.name!r} share epochs")
        terms = [f.name for f in fields(LossWeights) if f.name != "cls" or self.dataset.mode == "everything"]
        if not any(getattr(self.train.loss_weights, name) for name in terms) and not self.distills:
            raise ValueError("train.loss_weights are all 0 and distillation is off; nothing would be learnt")

    @property
    def distills(self) -> bool:
        """Whether any teacher is needed in any epoch."""
        if not self.distillation.losses:
            return False
        return any(self.at(epoch).lambda_coef > 0 for epoch in self._different_epochs())

    def _different_epochs(self) -> list[int]:
        edges = {0, *(e for stage in self.stage_schedule for e in (stage.start_epoch, stage.end_epoch))}
        return sorted(epoch for epoch in edges if epoch < self.train.epochs)

    def at(self, epoch: int) -> EpochSettings:
        """Weights of the losses in an epoch: those of the stage it lies in, else the base values."""
        weights, distils, coefficient = self.train.loss_weights, True, self.distillation.lambda_coef
        for stage in self.stage_schedule:
            if stage.start_epoch <= epoch < stage.end_epoch:
                weights, distils = replace(weights, **stage.loss_weights), stage.distillation
                coefficient = coefficient if stage.lambda_coef is None else stage.lambda_coef
        return EpochSettings(weights, coefficient if distils and self.distillation.losses else 0.0)

    @property
    def teacher_weights(self) -> dict[str, float]:
        """Name -> weight, as the losses use it."""
        given = {t.name: 1 / len(self.teachers) if t.weight is None else t.weight for t in self.teachers}
        if self.distillation.normalize_teacher_weights:
            total = sum(given.values()) or 1.0
            return {name: weight / total for name, weight in given.items()}
        return given

    def store_folder(self, teacher: TeacherSettings) -> Path:
        """Where a teacher's features lie."""
        return Path(teacher.precomputed_dir or Path(self.distillation.precomputed_root, teacher.name))

    def to_dict(self) -> dict[str, Any]:
        """Mappings, lists, numbers and strings only; `from_dict` gives the same config."""
        return settings.to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> PromptDistillConfig:
        """ValueError for unknown keys, with the nearest known one."""
        return settings.build(cls, values, source)


@dataclass(frozen=True)
class EpochSettings:
    """What holds in one epoch. lambda_coef 0: no teacher is asked."""

    loss_weights: LossWeights
    lambda_coef: float


def load_config(path: str | Path, opts: Sequence[str] = ()) -> PromptDistillConfig:
    """Defaults < file (YAML, JSON or JSONC) < pairs such as `train.lr=1e-4` or `teachers.0.weight=0.5`."""
    values = settings.read_mapping(path)
    settings.override(values, opts)
    return PromptDistillConfig.from_dict(values, f"{path} with --opts" if opts else str(path))
