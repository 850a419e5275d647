"""Files in the layout of the published fine-tuning checkpoints, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from tests.manifests import manifest_tensors

# Modules that the published files hold twice: below `sam3.` and under these names.
ALIASES = {
    "backbone.vision_backbone.convs.": "frozen_convs.",
    "geometry_encoder.": "geometry_encoder.",
    "transformer.": "transformer.",
    "segmentation_head.": "segmentation_head.",
}
PARTS = ("backbone.vision_backbone.trunk.", "dot_prod_scoring.", *ALIASES)


def public_tensors(student: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """1901 tensors for RV-M: `student_trunk.*` 653, `sam3.*` 839, copies of its heads 409."""
    tensors = {f"student_trunk.{key}": tensor for key, tensor in student.items()}
    for key, tensor in manifest_tensors("sam3").items():
        name = key.removeprefix("detector.")
        if name.startswith(PARTS):
            tensors[f"sam3.{name}"] = tensor
            tensors |= {name.replace(old, new, 1): tensor for old, new in ALIASES.items() if name.startswith(old)}
    return tensors


def write_public(path: Path, student: Mapping[str, Tensor]) -> None:
    """The whole file, with the yacs node that the published code saves as `config`."""
    config = CfgNode({"MODEL": {"BACKBONE": "repvit_m1_1"}, "DISTILL": {"EMBED_DIM": 1024}})
    payload = {"optimizer": {"state": {}}, "max_accuracy": 0.0, "epoch": 29, "config": config}
    torch.save({"model": public_tensors(student), **payload}, path)
