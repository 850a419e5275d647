"""Files of the first SAM and of MobileSAM: the published layout, a flat state dict, read and written strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sam3.backbones.sam_vit import PATCH_SIZE
from sam3.engine.weights import load_strict, load_weights, save_weights
from sam3.sam.sam1 import Sam1, build_sam1, infer_type

POSITION_KEY = "image_encoder.pos_embed"


def load_sam1(path: str | Path, type: str | None = None, image_size: int | None = None) -> Sam1:
    """The model of a file, float32, on the CPU, in eval mode; its weights stay mapped until they are touched.

    Args:
        type: what the file must hold; None takes what it holds.
        image_size: pixels. A ViT's is in its file and must agree; None takes it from there, and 1024 for MobileSAM.

    Raises:
        FileNotFoundError.
        ValueError: another type or image size, another model's file, keys that are missing, unexpected or misshapen.
    """
    tensors = load_weights(path).tensors
    try:
        found = infer_type(tensors)
    except ValueError as error:
        raise ValueError(f"{path} is no file of a SAM-1 model: {error}") from error
    if type is not None and found != type:
        raise ValueError(f"{path} holds a {found}, but a {type} was asked for; give its file, or the type {found}")
    with torch.device("meta"):
        model = build_sam1(found, _image_size(tensors, image_size, path))
    load_strict(model, _float32(tensors), source=path)
    return model.eval()


def _image_size(tensors: Mapping[str, Tensor], wanted: int | None, path: str | Path) -> int | None:
    """What the position table of a ViT is made for; without one, what is wanted."""
    if POSITION_KEY not in tensors or tensors[POSITION_KEY].ndim != 4:
        return wanted
    stated = tensors[POSITION_KEY].shape[1] * PATCH_SIZE
    if wanted not in (None, stated):
        raise ValueError(
            f"{path} is made for pictures of {stated} pixels (its position table says so), but image size {wanted} was "
            f"asked for; set it to {stated}"
        )
    return stated


def save_sam1(model: Sam1, path: str | Path) -> None:
    """Write the flat float32 state dict that the published files hold (`.pt` or `.pth`), whole or not at all."""
    save_weights(path, _float32(model.state_dict()), entry=None)


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
