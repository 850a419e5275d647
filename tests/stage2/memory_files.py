"""Files that Stage 2's converter reads, and its call."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sam3.engine import checkpoint
from sam3.engine.checkpoint import Position
from sam3.engine.files import sha256
from sam3.engine.weights import load_weights
from sam3.model.tracker_config import TINY_MEMORY, MemoryConfig
from sam3.transforms import Preprocess
from stage2.convert_memory_weights_stage2 import main
from stage2.frozen_parts import tracker_meta
from tests.stage2.clips import CONFIG, distiller

SQUARE = Preprocess(CONFIG.img_size, "square").to_meta()


def write_checkpoint(path: Path, sam3: Path, config: MemoryConfig = TINY_MEMORY, model=None, **meta) -> Path:
    """As Stage 2's training writes it; entries of `meta` that are None are left out."""
    stated = {
        "memory": config.to_meta(),
        "teacher": {"name": sam3.name, "sha256": sha256(sam3)},
        "preprocess": SQUARE,
        "tracker": tracker_meta(load_weights(sam3)),
    }
    stated = {key: value for key, value in (stated | meta).items() if value is not None}
    model = distiller(config).state_dict() if model is None else model
    payload = checkpoint.pack(
        model, Position(2, 500, 0), epoch_complete=False, optimizer={"state": {0: torch.ones(3)}}, meta=stated
    )
    return checkpoint.save(path.parent, payload, path.name)


def write_inputs(folder: Path, teacher_file: Path) -> Path:
    """A SAM3 and a Stage-2 checkpoint; returns the folder."""
    shutil.copy(teacher_file, folder / "sam3.pt")
    write_checkpoint(folder / "ckpt_best.pth", folder / "sam3.pt")
    return folder


def convert(folder: Path, *flags: str, base: str = "sam3.pt", output: str = "merged.pt") -> int:
    paths = ["--stage2_weights", folder / "ckpt_best.pth", "--sam3_weights", folder / base]
    return main([*map(str, paths), "--output_path", str(folder / output), *flags])
