"""Every setting of the distillation, its default and its meaning: one dataclass, YAML or JSON files, and overrides."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3.engine import settings

BACKENDS = ("native", "hf", "fake")
MODES = ("online", "trunk_cache", "output_cache")
PRECISIONS = ("amp_fp16", "amp_bf16", "fp32")
TEACHER_DTYPES = ("auto", "fp32", "fp16", "bf16")
STUDENTS = ("full", "tiny")
BN_MODES = ("frozen_backbone", "train", "eval")
MATCHERS = ("hungarian", "greedy")
PRESENCE_SPACES = ("logit", "prob")
PHASES = (1, 2)
# Loss term -> the field with its weight; the order is that of tables and logs.
LOSSES = {
    name: f"{name}_weight"
    for name in (
        *("mask_loss", "box_l1_loss", "box_giou_loss", "logit_loss", "presence_loss", "semantic_seg_loss"),
        *("fpn_feature_loss", "encoder_feature_loss"),
    )
}
FEATURE_LOSSES = ("fpn_feature_loss", "encoder_feature_loss")  # of phase 1 only
DEFAULT_TEACHERS = {"native": "sam3_checkpoints/sam3.pt", "hf": "facebook/sam3", "fake": "fake"}


@dataclass(frozen=True)
class Phase:
    """Length and learning rate of one phase. warmup: optimizer steps."""

    number: int
    epochs: int
    lr: float
    warmup: int

    @property
    def with_features(self) -> bool:
        """Whether features are aligned, beside outputs."""
        return self.number == 1


@dataclass(frozen=True)
class DistillationConfig:
    """All settings; lengths in pixels, rates per optimizer step. ValueError for a value that cannot work."""

    # Data -------------------------------------------------------------------------------------------------------------
    sa1b_dir: str = "data/sa1b"  # sa_*.jpg with sa_*.json beside them, or images/ and annotations/
    num_train: int | None = None  # None: all but the validation pictures; a number drops the last of those
    num_val: int = 1000  # the last pictures by number
    val_max_images: int | None = None  # validate on the first of them only
    require_json: bool = True  # leave out pictures without annotations
    image_size: int = 1008  # side of the square that teacher and student see
    teacher_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per RGB channel, of pixels in 0..1
    teacher_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    student_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # what RepViT was trained with
    student_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    horizontal_flip: bool = False  # mirror every other training picture, for teacher and student alike; online only
    prompts: tuple[str, ...] = ("objects in the image", "all objects", "segment everything", "things and stuff")
    num_workers: int | None = None  # processes that decode pictures; None: 4 with CUDA, else 0
    pin_memory: bool = False  # page-locked batches; acts with CUDA

    # Teacher ----------------------------------------------------------------------------------------------------------
    teacher_backend: str = "native"  # native: sam3.pt or a tiny one; hf: transformers' Sam3Model; fake: random, tests
    teacher_model_name: str = "auto"  # file, folder or hub name; auto: the backend's usual one
    teacher_mode: str = "online"  # trunk_cache: the trunk's maps are read; output_cache: all it says, phase 2 only
    cache_dir: str = ""  # of the cached modes, and of --write-cache
    cache_queries: int = 100  # queries kept in an output cache, those with the best scores
    cache_mask_size: int = 144  # side of the masks in an output cache
    teacher_dtype: str = "auto"  # of its weights; auto: fp16 on CUDA and MPS, fp32 on the CPU

    # Student ----------------------------------------------------------------------------------------------------------
    student: str = "full"  # full: 100.3M parameters; tiny: the same code at small widths
    student_dropout: float = 0.1  # in its transformers
    student_pretrained: bool | None = None  # begin with RepViT's and MobileCLIP's weights; None: where there are any
    student_precision: str = "amp_fp16"  # of its matrix products; weights and losses are float32. CPU: always fp32
    gradient_checkpointing: bool = True  # compute the transformers' activations again in the backward pass
    bn_mode: str = "frozen_backbone"  # BatchNorm keeps its statistics: in RepViT | nowhere (train) | everywhere (eval)

    # Matching ---------------------------------------------------------------------------------------------------------
    matcher: str = "hungarian"
    matcher_w_mask: float = 1.0
    matcher_w_box: float = 1.0
    matcher_w_logit: float = 1.0
    matcher_mask_size: int | None = 144  # masks are compared at this side; None: the teacher's
    teacher_score_threshold: float = 0.0  # leave out teacher queries that score lower
    max_matches: int | None = None  # keep so many pairs, the cheapest

    # Losses: a weight of 0 leaves a term out --------------------------------------------------------------------------
    mask_loss_weight: float = 5.0
    box_l1_loss_weight: float = 5.0
    box_giou_loss_weight: float = 2.0
    logit_loss_weight: float = 2.0
    presence_loss_weight: float = 1.0
    semantic_seg_loss_weight: float = 2.0
    fpn_feature_loss_weight: float = 1.0
    encoder_feature_loss_weight: float = 1.0
    dice_eps: float = 1.0
    presence_space: str = "logit"  # prob: compare probabilities, whose difference is at most 1
    score_weighting: bool = False  # pairs count by the teacher's score in the mask and box terms

    # Training ---------------------------------------------------------------------------------------------------------
    phase1_epochs: int = 5
    phase1_lr: float = 1e-4
    phase1_warmup: int = 500
    phase2_epochs: int = 10
    phase2_lr: float = 5e-5
    phase2_warmup: int = 0
    batch_size: int = 1  # pictures per process and forward pass
    grad_accum_steps: int = 8  # forward passes per optimizer step
    weight_decay: float = 0.01  # none on biases, norms and embeddings
    max_grad_norm: float = 1.0
    seed: int = 0
    device: str = "auto"
    memory_budget_gb: float = 6.0
    strict_memory: bool = False  # fail above the budget, rather than warn
    empty_cache_every: int = 50  # forward passes between releases of MPS's cache; 0: never

    # Output -----------------------------------------------------------------------------------------------------------
    checkpoint_dir: str = "checkpoints/distillation"  # phase1/ and phase2/ below it
    log_dir: str = "logs/distillation"  # TensorBoard, phase1/ and phase2/ below it
    tensorboard: bool = True
    save_every_steps: int = 1000  # also saved after every epoch
    keep_last: int = 3  # checkpoints
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = settings.coerce(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    # As plain values --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists only; `from_dict` gives the same config."""
        return settings.to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> DistillationConfig:
        """ValueError for unknown keys, with the nearest known one."""
        return settings.build(cls, values, source)

    # Derived ----------------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> str:
        """The teacher's file, folder or hub name."""
        return DEFAULT_TEACHERS[self.teacher_backend] if self.teacher_model_name == "auto" else self.teacher_model_name

    @property
    def pretrained(self) -> bool:
        """Whether the student begins with downloaded weights."""
        return self.student == "full" if self.student_pretrained is None else self.student_pretrained

    @property
    def loss_weights(self) -> dict[str, float]:
        return {name: getattr(self, field) for name, field in LOSSES.items()}

    def phase(self, number: int) -> Phase:
        epochs, lr, warmup = (getattr(self, f"phase{number}_{name}") for name in ("epochs", "lr", "warmup"))
        return Phase(number, epochs, lr, warmup)

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check_choices(self) -> None:
        for name, choices in {
            "teacher_backend": BACKENDS,
            "teacher_mode": MODES,
            "teacher_dtype": TEACHER_DTYPES,
            "student": STUDENTS,
            "student_precision": PRECISIONS,
            "bn_mode": BN_MODES,
            "matcher": MATCHERS,
            "presence_space": PRESENCE_SPACES,
        }.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")

    def _check_numbers(self) -> None:
        at_least_one = (
            *("image_size", "num_val", "num_train", "val_max_images", "batch_size", "grad_accum_steps"),
            *("phase1_epochs", "phase2_epochs", "matcher_mask_size", "max_matches", "log_every_steps"),
            *("cache_queries", "cache_mask_size"),
        )
        not_negative = (
            *(*LOSSES.values(), "matcher_w_mask", "matcher_w_box", "matcher_w_logit", "teacher_score_threshold"),
            *("phase1_warmup", "phase2_warmup", "phase1_lr", "phase2_lr", "weight_decay", "max_grad_norm"),
            *("num_workers", "save_every_steps", "keep_last", "empty_cache_every", "seed", "dice_eps"),
        )
        settings.require_at_least(1, self, at_least_one)
        settings.require_at_least(0, self, not_negative)
        if not 0 <= self.student_dropout < 1:
            raise ValueError(f"student_dropout must be in 0..1, below 1; got {self.student_dropout}")
        if not self.memory_budget_gb > 0:
            raise ValueError(f"memory_budget_gb must be above 0, got {self.memory_budget_gb}")
        if sum(self.loss_weights[name] for name in LOSSES if name not in FEATURE_LOSSES) == 0:
            raise ValueError("all output losses have weight 0; phase 2 would learn nothing")
        for name in ("teacher_mean", "teacher_std", "student_mean", "student_std"):
            value = getattr(self, name)
            if len(value) != 3 or (name.endswith("std") and min(value) <= 0):
                raise ValueError(f"{name} must be three numbers, a std above 0; got {list(value)}")

    def _check_combinations(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts must be phrases, at least one; got {list(self.prompts)}")
        if self.student == "tiny" and self.student_pretrained:
            raise ValueError("there are no pretrained weights for the tiny student; leave student_pretrained out")
        if self.teacher_mode != "online":
            if not self.cache_dir:
                raise ValueError(f"teacher_mode {self.teacher_mode} needs cache_dir (--cache-dir)")
            if self.horizontal_flip:
                raise ValueError("horizontal_flip needs teacher_mode online: caches hold pictures as they are")


def load_config(path: str | Path | None, opts: Sequence[str] = (), **flags: Any) -> DistillationConfig:
    """Defaults < file (YAML or JSON) < `key=value` pairs < flags that are not None."""
    values: dict[str, Any] = {}
    if path is not None:
        values |= settings.read_mapping(path)
        settings.check_keys(DistillationConfig, values, str(path))  # its values may need what later sources say
    settings.override(values, opts)
    values |= {key: value for key, value in flags.items() if value is not None}
    return DistillationConfig.from_dict(values, "--opts" if opts else "the command line")
