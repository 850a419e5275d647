"""How a training loop runs, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sam3.engine import amp
from sam3.engine.checkpoint import Position


def divides(interval: int, step: int) -> bool:
    """Whether something that is done every `interval` steps, 0 for never, is due after `step`."""
    return interval > 0 and step % interval == 0


@dataclass(frozen=True)
class LoopSettings:
    """How to train. `from_config` reads the shared config keys; a stage may `dataclasses.replace` the rest.

    A run counts epochs, and validates and saves after each; or steps, with `epochs` 0: then `max_steps` is its length,
    and it validates and saves at intervals of steps and at the end.
    """

    epochs: int  # 0: as many as max_steps needs
    max_steps: int = 0  # stop after so many optimizer steps, if sooner; 0 sets no such limit
    accumulation: int = 1  # micro-batches per optimizer step
    step_remainder: bool = False  # step on the epoch's last batches if they are fewer than `accumulation`, or drop them
    clip_grad: float = 0.0  # largest L2 norm; 0 does not clip
    amp_dtype: torch.dtype | None = None
    max_bad_steps: int = 20  # abort after so many steps in a row with non-finite gradients
    print_freq: int = 10  # steps
    save_freq: int = 1  # epochs
    save_steps: int = 0  # steps; 0 saves at the end of epochs, or keeps no step, only
    latest_steps: int = 0  # steps between saves of ckpt_latest.pth, which is also saved at validations; counting steps
    validate_steps: int = 0  # steps; 0 validates at the end of epochs, or of the run, only
    validate_freq: int = 1  # epochs; the last one is always validated
    patience: int = 0  # end after so many validations without a better best_metric; 0 never; counting epochs
    keep_last: int = 0  # checkpoints; 0 keeps all
    best_metric: str = ""  # name among the validation's results that ckpt_best.pth follows
    best_mode: str = "min"  # min | max
    eval_bn: bool = False  # BatchNorm keeps its running statistics while training
    average_bn: bool = True  # average BatchNorm's running statistics over processes before saving and validating
    find_unused_parameters: bool = False
    unit: str = "images"  # what a sample is called in logs
    shown: Mapping[str, str] = field(default_factory=dict)  # losses in the progress line -> their names there; {}: all

    @classmethod
    def from_config(cls, config: Any, device: torch.device, **others: Any) -> LoopSettings:
        """From the keys of `config.shared_defaults`; `others` are fields that have no shared key."""
        return cls(
            epochs=config.TRAIN.EPOCHS,
            max_steps=config.TRAIN.MAX_STEPS,
            accumulation=config.TRAIN.ACCUMULATION_STEPS,
            clip_grad=config.TRAIN.CLIP_GRAD,
            amp_dtype=amp.resolve_amp_dtype(config.AMP_ENABLE, config.AMP_DTYPE, device),
            max_bad_steps=config.TRAIN.MAX_BAD_STEPS,
            print_freq=config.PRINT_FREQ,
            save_freq=config.SAVE_FREQ,
            save_steps=config.SAVE_STEPS,
            keep_last=config.KEEP_LAST,
            eval_bn=config.TRAIN.EVAL_BN_WHEN_TRAINING,
            average_bn=config.TRAIN.AVERAGE_BN,
            find_unused_parameters=config.TRAIN.FIND_UNUSED_PARAMETERS,
            **others,
        )

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulation", "print_freq", "save_freq", "validate_freq", "max_bad_steps"):
            if getattr(self, name) < 1 and not (name == "epochs" and self.counts_steps):
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        intervals = ("save_steps", "latest_steps", "validate_steps")
        not_negative = ("max_steps", *intervals, "patience", "keep_last", "clip_grad")
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode is {self.best_mode!r}; choose min or max")

    @property
    def counts_steps(self) -> bool:
        """Whether `max_steps` alone is the run's length."""
        return self.epochs == 0 and self.max_steps > 0

    def validates_after(self, step: int) -> bool:
        """Whether a validation inside an epoch is due after this step: at intervals, and as a run's last."""
        return divides(self.validate_steps, step) or (self.counts_steps and step >= self.max_steps)

    def validates_after_epoch(self, epoch: int) -> bool:
        """Whether a validation is due at the end of epoch 0, 1, ...; max_steps may make another epoch the last."""
        return epoch + 1 == self.epochs or (epoch + 1) % self.validate_freq == 0

    def is_stale(self, epochs: int, best_epoch: int | None) -> bool:
        """Whether so many finished epochs have brought nothing better than `best_epoch` for too long."""
        if not self.patience or best_epoch is None:
            return False
        return epochs - 1 - best_epoch >= self.patience * self.validate_freq

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.counts_steps:
            return self.max_steps
        total = self.epochs * steps_per_epoch
        return min(total, self.max_steps) if self.max_steps else total

    def steps_in(self, batches: int) -> int:
        """Optimizer steps that so many batches of one process make."""
        return -(-batches // self.accumulation) if self.step_remainder else batches // self.accumulation


@dataclass
class TrainResult:
    """How a run ended. validation: the last results, those of step `validated_step`; best: where and how good it was.

    step_s: mean seconds per optimizer step of this process.
    """

    position: Position
    validation: dict[str, float] = field(default_factory=dict)
    validated_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    step_s: float = 0.0

    def add_validation(self, values: Mapping[str, float], metric: str, mode: str) -> bool:
        """Take over results of the present position; whether `values[metric]` is the best so far ("": never).

        ValueError if there is no such result.
        """
        if metric and metric not in values:
            raise ValueError(f"best_metric {metric!r} is not among the validation's results: {', '.join(values)}")
        self.validation, self.validated_step = dict(values), self.position.step
        if not metric:
            return False
        before = self.best.get("value", math.inf if mode == "min" else -math.inf)
        better = values[metric] < before if mode == "min" else values[metric] > before
        if better:
            at = self.position
            self.best = {"metric": metric, "value": values[metric], "epoch": at.epoch, "step": at.step}
        return better
