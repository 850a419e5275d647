"""How a training loop runs, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sam3.engine import amp
from sam3.engine.checkpoint import Position


@dataclass(frozen=True)
class LoopSettings:
    """How to train. `from_config` reads the shared config keys; a stage may `dataclasses.replace` the rest."""

    epochs: int
    max_steps: int = 0  # stop after so many optimizer steps, if sooner; 0 sets no such limit
    accumulation: int = 1  # micro-batches per optimizer step
    step_remainder: bool = False  # step on the epoch's last batches if they are fewer than `accumulation`, or drop them
    clip_grad: float = 0.0  # largest L2 norm; 0 does not clip
    amp_dtype: torch.dtype | None = None
    max_bad_steps: int = 20  # abort after so many steps in a row with non-finite gradients
    print_freq: int = 10  # steps
    save_freq: int = 1  # epochs
    save_steps: int = 0  # steps; 0 saves at the end of epochs only
    validate_steps: int = 0  # steps; 0 validates at the end of epochs only
    keep_last: int = 0  # checkpoints; 0 keeps all
    best_metric: str = ""  # name among the validation's results that ckpt_best.pth follows
    best_mode: str = "min"  # min | max
    eval_bn: bool = False  # BatchNorm keeps its running statistics while training
    average_bn: bool = True  # average BatchNorm's running statistics over processes before saving and validating
    find_unused_parameters: bool = False
    unit: str = "images"  # what a sample is called in logs

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
        for name in ("epochs", "accumulation", "print_freq", "save_freq", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "save_steps", "validate_steps", "keep_last", "clip_grad"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode is {self.best_mode!r}; choose min or max")

    def steps_in(self, batches: int) -> int:
        """Optimizer steps that so many batches of one process make."""
        return -(-batches // self.accumulation) if self.step_remainder else batches // self.accumulation


@dataclass
class TrainResult:
    """How a run ended. validation: the last results. step_s: mean seconds per optimizer step of this process."""

    position: Position
    validation: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    step_s: float = 0.0
