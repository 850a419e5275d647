"""What converters ask of the models: which student stands in a file, and whether the model takes a merged one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sam3.backbones.student import describe, recognise_student
from sam3.engine.merge import LANGUAGE, VISION
from sam3.engine.weights import WeightFile, normalise_sam3_keys
from sam3.model.tracker_config import MemoryConfig
from sam3.model_builder import build_efficientsam3_image_model


def identify_student(source: WeightFile, tensors: Mapping[str, Tensor], prefix: str = "") -> tuple[str, int]:
    """`recognise_student` for tensors that came from `source`: the backbone's name and the width of the embedding.

    Raises ValueError naming the file: no student or a damaged one, or another than the file's meta states.
    """
    try:
        backbone, embed_dim = recognise_student(tensors, prefix)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error
    stated = source.meta.get("backbone", backbone)
    if stated != backbone:
        raise ValueError(
            f"{source.path} says that it is a '{stated}', but its weights are those of {describe(backbone)}; "
            "take the file as it was first written"
        )
    return backbone, embed_dim


def describe_memory(memory: MemoryConfig) -> str:
    """A compressed memory in one phrase."""
    kept = "the whole map"
    if memory.perceiver:
        kept = (
            f"{memory.num_latents} + {memory.num_latents_2d} latents by a Perceiver of {memory.perceiver_depth} layers"
        )
    pooled = ""
    if memory.pool_size > 1:
        pooled = f", {'2-D ones ' if memory.perceiver else ''}pooled {memory.pool_size}x{memory.pool_size}"
    return f"{kept}{pooled}, read by {memory.num_layers} layers of attention"


def load_into_model(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Build the model from `path`, which holds `tensors`, as users will, with every part that the file has.

    The builder loads the file strictly and raises ValueError if it cannot.
    """
    keys = normalise_sam3_keys(tensors, path)

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    second_neck = has(f"{VISION}.sam2_convs.")
    build_efficientsam3_image_model(
        checkpoint_path=path,
        device="cpu",
        enable_text_encoder=has(f"{LANGUAGE}."),
        enable_segmentation=has("detector.segmentation_head."),
        with_sam2_neck=second_neck,
        enable_inst_interactivity=second_neck and has("tracker."),
    )
