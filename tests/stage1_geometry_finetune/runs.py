"""Command lines of geometry fine-tuning at the tiny preset; `tests.stage1.runs` starts them as programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage1_geometry_finetune import train_geometry_finetune
from tests.stage1.runs import ROOT, command_line

TUNE = "stage1_geometry_finetune/train_geometry_finetune.py"
CONFIGS = ROOT / "stage1_geometry_finetune/configs"


@dataclass(frozen=True)
class Inputs:
    """What a run reads. exported: output folder of Stage 1's export; start: the student's weights to begin with."""

    teacher: Path
    data: Path
    exported: Path
    start: Path

    def arguments(self, output: Path, *flags: str, cfg: Path = CONFIGS / "es_ev_s_tiny.yaml", **opts: Any) -> list[str]:
        """Of one epoch with 4 steps; `opts` are config keys with `__` for the dot, None leaves one to the file."""
        opts = {
            "MODEL__SAM3_CHECKPOINT": self.teacher,
            "MODEL__PRETRAINED": self.start,
            "DISTILL__TEACHER_EMBED_PATH": self.exported / "embeddings",
            "DISTILL__EMBEDDING_LOSS_WEIGHT": 1.5,
            "DISTILL__MASK_BCE_WEIGHT": 1.0,
            "DISTILL__MASK_DICE_WEIGHT": 1.0,
            "DISTILL__MAX_PROMPTS": 2,
            "DISTILL__PROMPT_CHUNK": 4,
            "DATA__NUM_WORKERS": 0,
            "DATA__BATCH_SIZE": 2,
            "TRAIN__EPOCHS": 1,
            "TRAIN__WARMUP_EPOCHS": 0,
            "TRAIN__BASE_LR": 5e-4,
            "TENSORBOARD": False,
            "PRINT_FREQ": 1,
            **opts,
        }
        given = {key: value for key, value in opts.items() if value is not None}
        return command_line(cfg, self.data, output, flags, given)

    def tune(self, output: Path, *flags: str, **opts: Any) -> int:
        """A training in this process: see `arguments`."""
        return train_geometry_finetune.main(self.arguments(output, *flags, **opts))
