"""What a compressed memory is trained between: SAM3's second neck and tracker, which stay as they are.

A Stage-1 student replaces the trunk and leaves these parts alone, so that a memory fits every model that has them.
"""

from __future__ import annotations

from typing import Any

from sam3.engine.weights import WeightFile, digest
from sam3.model.config import ShapeReader
from sam3.model_loading import SAM2_NECK, build_trunk, detector_tensors, tracker_tensors
from sam3.tracker_builder import COMPRESSED_MEMORY, DENSE_MEMORY

SIZES = ("dim", "mem_dim", "grid")


def tracker_meta(file: WeightFile) -> dict[str, Any]:
    """What `meta.tracker` of a Stage-2 checkpoint says of the SAM3 file it was trained with; a base must say the same.

    dim: channels of the feature map; mem_dim: of a memory token; grid: cells per side of the map; sha256: digest of the
    second neck and of the tracker without its memory attention. Raises ValueError for a file that lacks one of them.
    """
    detector, tracker = detector_tensors(file.tensors, file.path), tracker_tensors(file.tensors, file.path)
    neck = {f"detector.{key}": tensor for key, tensor in detector.items() if key.startswith(SAM2_NECK)}
    frozen = {
        f"tracker.{key}": tensor
        for key, tensor in tracker.items()
        if not key.startswith((DENSE_MEMORY, *COMPRESSED_MEMORY))
    }
    if not (neck and frozen):
        missing = "tracker (tracker.*)" if neck else f"second neck (detector.{SAM2_NECK}*)"
        raise ValueError(f"{file.path} has no {missing}, which video needs; give the full sam3.pt, or one made of it")
    try:
        shape = ShapeReader(tracker)
        dim, mem_dim = shape("no_mem_embed")[-1], shape("maskmem_tpos_enc")[-1]
        _, img_size, patch_size = build_trunk(file, detector)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    return {"dim": dim, "mem_dim": mem_dim, "grid": img_size // patch_size, "sha256": digest(neck | frozen)}
