"""Command lines of Stage 2 at the tiny preset; `tests.stage1.runs` starts them as programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data import extract_sav_frames, make_sample_sav
from stage2 import save_video_embeddings_stage2, train_memory_stage2
from stage2.config import stage2_defaults
from tests.stage1.runs import ROOT

TRAIN = "stage2/train_memory_stage2.py"
TINY = ROOT / "stage2/configs/efficient_memory_tiny.yaml"


@dataclass(frozen=True)
class Inputs:
    """What a run reads: SAM3, extracted frames of videos, and their embeddings."""

    teacher: Path
    frames: Path
    embeddings: Path

    def arguments(self, output: Path, *flags: str, cfg: Path = TINY, **opts: Any) -> list[str]:
        """Of 4 steps of a clip with 3 frames and 2 objects, which is an epoch.

        `opts` are config keys with `__` for the dot; None leaves one to the file.
        """
        opts = {
            "DATA__SAV_ROOT": self.frames,
            "DATA__EMBEDDING_DIR": self.embeddings,
            "MODEL__SAM3_CHECKPOINT": self.teacher,
            "DATA__NUM_WORKERS": 0,
            "DATA__NUM_FRAMES": 3,
            "DATA__BATCH_SIZE": 1,
            "MODEL__PERCEIVER__NUM_LATENTS_2D": 16,
            "MODEL__MEMORY_ATTENTION__POOL_SIZE": 2,
            "DISTILL__MSE_WEIGHT": 5.0,  # what a random teacher draws has nothing to do with the true masks
            "DISTILL__FOCAL_WEIGHT": 1.0,
            "DISTILL__DICE_WEIGHT": 0.1,
            "DISTILL__IOU_WEIGHT": 0.1,
            "TRAIN__EFFECTIVE_BATCH": 1,
            "TRAIN__MAX_STEPS": 4,
            "TRAIN__LR": 1e-3,
            "TRAIN__WARMUP_STEPS": 1,
            "TRAIN__LOG_INTERVAL": 1,
            "TRAIN__VAL_INTERVAL": 0,
            "TENSORBOARD": False,
            **opts,
        }
        pairs = [
            str(word) for key, value in opts.items() if value is not None for word in (key.replace("__", "."), value)
        ]
        return ["--config", str(cfg), "--output_dir", str(output), *flags, *pairs]

    def train(self, output: Path, *flags: str, **opts: Any) -> int:
        """A training in this process: see `arguments`."""
        return train_memory_stage2.main(self.arguments(output, *flags, **opts))


def make_frames(folder: Path, num_videos: int = 5, num_frames: int = 14, objects: int = 2, seed: int = 0) -> Path:
    """Small videos, drawn and extracted below `folder`; returns the folder of frames."""
    counts = ["--num-train", num_videos, "--num-val", 0, "--num-frames", num_frames, "--objects", objects]
    drawn = ["--output", folder / "sav", *counts, "--width", 96, "--height", 64, "--seed", seed, "--workers", 1]
    assert make_sample_sav.main(list(map(str, drawn))) == 0
    frames = folder / "extracted_frames"
    paths = ["--source_dir", str(folder / "sav/sav_train"), "--output_dir", str(frames)]
    assert extract_sav_frames.main([*paths, "--workers", "1"]) == 0
    return frames


def embed(teacher: Path, frames: Path, output: Path, *flags: str) -> Path:
    """Embeddings of all annotated frames, every fourth; returns `output`."""
    paths = ["--data_dir", str(frames), "--output_dir", str(output), "--checkpoint", str(teacher)]
    others = ["--frame_stride", "4", "--num_workers", "0", "--device", "cpu", *flags]
    assert save_video_embeddings_stage2.main([*paths, *others]) == 0
    return output


def write_config(place: Path, **train: int) -> None:
    """The config that the document names, below `place`, of the tiny size; `train` are keys of TRAIN."""
    data = stage2_defaults().DATA
    paths = {"SAV_ROOT": data.SAV_ROOT, "EMBEDDING_DIR": data.EMBEDDING_DIR}
    config = {
        "BASE": [str(TINY)],
        "DATA": {"NUM_WORKERS": 0, "NUM_FRAMES": 2, "BATCH_SIZE": 1, **paths},
        "MODEL": {"SAM3_CHECKPOINT": "sam3_checkpoints/sam3.pt"},
        "TRAIN": {"EFFECTIVE_BATCH": 1, "WARMUP_STEPS": 1, "LOG_INTERVAL": 1, "VAL_INTERVAL": 0, **train},
    }
    path = place / "stage2/configs/efficient_memory.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
