"""Small teachers, students and data for trainings of seconds, and command lines of the programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from sam3.sam.sam1 import build_sam1
from sam3.sam1_files import save_sam1
from scripts import train_prompt_distill

PROGRAM = "scripts/train_prompt_distill.py"
SIDE = 128  # pixels, 8 x 8 cells
LOSSES = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")


def write_models(folder: Path) -> None:
    """`vit.pt`, a ViT-shaped teacher, and `mobile.pt`, MobileSAM's layout, both random; model files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, type) in enumerate((("vit", "vit_tiny"), ("mobile", "vit_t"))):
        torch.manual_seed(seed)
        save_sam1(build_sam1(type, SIDE), folder / f"{name}.pt")
        model = {"type": type, "image_size": SIDE, "checkpoint": str(folder / f"{name}.pt")}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": model}))


def settings(models: Path, data: Path, output: Path, **changed: Any) -> dict[str, Any]:
    """A training with all four losses from two teachers, 0.7 and 0.3; `changed` are dotted keys, `__` for the dot."""
    values: dict[str, Any] = {
        "distillation": {"enable": True, **{name: {"enable": True} for name in LOSSES}},
        "teachers": [
            {"name": "SAM-H", "weight": 0.7, "cfg": str(models / "vit.yaml")},
            {"name": "MobileSAM_orig", "weight": 0.3, "cfg": str(models / "mobile.yaml")},
        ],
        "dataset": {
            "train_dataset": str(data / "train"),
            "val_dataset": str(data / "val"),
            "num_workers": 0,
            "grid_points": 3,
        },
        "model": {"checkpoint_path": str(models / "mobile.pt"), "image_size": SIDE, "save_path": str(output)},
        "train": {
            "epochs": 1, "batch_size": 2, "lr": 1e-3, "warmup_step": 1, "log_every": 1, "device": "cpu",
            "tensorboard": False,
        },
    }  # fmt: skip
    for key, value in changed.items():
        inner = values
        *parents, last = key.split("__")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return values


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values) if path.suffix == ".yaml" else json.dumps(values))
    return path


def train(values: dict[str, Any], *flags: str) -> int:
    """The program in this process. Returns its exit code."""
    output = Path(values["model"]["save_path"])
    config = write_config(output.parent / f"{output.name}.yaml", values)
    return train_prompt_distill.main(["--config", str(config), *flags])
