"""The student as one file for inference: written in half precision, read back as a model that is ready to run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from sam3.engine.distributed import choose_device
from sam3.engine.weights import WeightFile, load_strict, load_weights, save_weights

KIND = "distilled_student"
# Running means and variances: a variance may be beyond what float16 can hold, and all of them are 0.3% of the file.
STATISTICS = ("running_mean", "running_var")


def export_student(
    student: EfficientSAM3, path: str | Path, meta: Mapping[str, Any], half: bool = True, *, fuse: bool = False
) -> None:
    """Write the student's weights to `path`, .pt or .safetensors; the student stays as it is.

    Args:
        meta: plain values to keep beside kind, sizes and pre-processing, such as the prompts.
        half: float16 weights (201 MB for the full student), else float32.
        fuse: write RepViT in its form for inference, which is faster and cannot be trained on.

    Raises:
        ValueError: a weight is not finite, or not in float16; another suffix. OSError: the disk.
    """
    if fuse and not student.vision.fused:
        student = copy.deepcopy(student)
        student.vision.fuse()
    own = {
        "kind": KIND,
        "student": student.config.to_meta(),
        "preprocess": student.preprocess.to_meta(),
        "fused": student.vision.fused,
    }
    assert not own.keys() & meta.keys(), f"{sorted(own.keys() & meta.keys())} are the exporter's to say"
    tensors = {name: _exported(name, tensor, half) for name, tensor in student.state_dict().items()}
    save_weights(path, tensors, {**meta, **own})


def load_student(path: str | Path, device: str | torch.device = "auto") -> EfficientSAM3:
    """The student of an exported file, in eval mode and float32; fused if the file's is.

    Raises FileNotFoundError; ValueError for a file that is damaged or holds no such student.
    """
    device = choose_device(device)
    file = load_weights(path)
    config = _read_config(file)
    with torch.device("meta"):
        student = EfficientSAM3(config)
        if file.meta["fused"]:
            student.vision.fuse()
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in file.tensors.items()}
    load_strict(student, tensors, source=path)
    return student.to(device).eval()


def is_student_file(path: str | Path) -> bool:
    """Whether a weight file was written by `export_student`. FileNotFoundError or ValueError if it cannot be read."""
    return load_weights(path).meta.get("kind") == KIND


def read_student_meta(path: str | Path) -> dict[str, Any]:
    """All that an exported file says beside its weights; raises as `load_student`."""
    file = load_weights(path)
    _read_config(file)
    return file.meta


def _exported(name: str, tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor
    result = tensor.half() if half and not name.endswith(STATISTICS) else tensor.float()
    if not torch.isfinite(result).all():
        largest = tensor.float().abs().max().item()
        hint = "export it with half=False" if torch.isfinite(tensor).all() else "take an earlier checkpoint"
        raise ValueError(f"{name} has values that the file cannot hold (up to {largest:g}); {hint}")
    return result


def _read_config(file: WeightFile) -> EfficientSAM3Config:
    meta = file.meta
    if meta.get("kind") != KIND or not isinstance(meta.get("fused"), bool):
        raise ValueError(
            f"{file.path} is no exported student (its meta says kind {meta.get('kind')!r}, wanted {KIND!r}); "
            "python train_distill.py writes one at the end of a training"
        )
    try:
        config = EfficientSAM3Config.from_meta(meta.get("student"))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}; export it again") from error
    if meta.get("preprocess") != config.preprocess.to_meta():
        raise ValueError(f"{file.path} contradicts itself about the pre-processing of pictures; export it again")
    return config
