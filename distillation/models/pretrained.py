"""Published weights for the student's two towers: RepViT's through timm, MobileCLIP's through open_clip."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

import timm
from torch import Tensor

from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from distillation.models.vision import BACKBONE
from sam3.engine.weights import load_strict

log = logging.getLogger("sam3.distillation")

BACKBONE_WEIGHTS = f"{BACKBONE}.dist_300e_in1k"  # ImageNet-1k
TEXT_MODEL, TEXT_WEIGHTS = "MobileCLIP-S1", "datacompdr"
BACKBONE_SIZES = ("backbone_dims", "backbone_depth")
TEXT_SIZES = ("text_width", "text_heads", "text_layers", "context_length", "vocab_size")


def load_pretrained(student: EfficientSAM3, backbone: bool = True, text: bool = True) -> None:
    """Fetch (or take from the hub's cache) the weights of the towers asked for, and copy them strictly.

    Nothing is copied unless everything arrived. Raises ConnectionError where something does not arrive, ValueError for
    a student whose towers have other sizes or are fused.
    """
    _check(student, [*(BACKBONE_SIZES if backbone else ()), *(TEXT_SIZES if text else ())])
    backbone_tensors = _fetch_backbone() if backbone else None
    text_tensors = _fetch_text() if text else None
    if backbone_tensors is not None:
        load_strict(student.vision.backbone, backbone_tensors, source=BACKBONE_WEIGHTS)
    if text_tensors is not None:
        load_strict(student.text.tower, text_tensors, source=f"{TEXT_MODEL} {TEXT_WEIGHTS}")


def _check(student: EfficientSAM3, names: list[str]) -> None:
    full = EfficientSAM3Config.preset("full")
    wrong = [
        f"{name} {getattr(student.config, name)}"
        for name in names
        if getattr(student.config, name) != getattr(full, name)
    ]
    if wrong:
        raise ValueError(
            f"there are no published weights for a student with {', '.join(wrong)}; set student_pretrained=False"
        )
    if student.vision.fused:
        raise ValueError("published weights fit no fused student; load them before it is fused for export")


def _fetch_backbone() -> dict[str, Tensor]:
    # The classifier is fetched whole: timm loads one strictly, but a features_only model with gaps.
    with _explained(BACKBONE_WEIGHTS):
        tensors = timm.create_model(BACKBONE_WEIGHTS, pretrained=True).state_dict()
    return {re.sub(r"^stages\.", "stages_", key): t for key, t in tensors.items() if not key.startswith("head.")}


def _fetch_text() -> dict[str, Tensor]:
    import open_clip  # takes seconds

    with _explained(f"{TEXT_MODEL} {TEXT_WEIGHTS}"):
        tensors = open_clip.create_model(TEXT_MODEL, pretrained=TEXT_WEIGHTS).text.state_dict()
    return {key: tensor for key, tensor in tensors.items() if key != "text_projection"}


@contextlib.contextmanager
def _explained(weights: str) -> Iterator[None]:
    log.info("fetching the student's %s", weights)
    try:
        yield
    except Exception as error:  # hub clients, timm and open_clip raise many types for what is always a failed download
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ConnectionError(
            f"could not fetch {weights} from the hub ({type(error).__name__}: {first_line}); connect this machine, "
            "or begin with random weights: student_pretrained=False"
        ) from error
