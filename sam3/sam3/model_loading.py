"""What all builders of models share: reading a file's tensors and sizes, and handing them to a module.

Weights are memory-mapped and handed to a model that was built without any, so that loading needs no second copy of
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3.backbones.student import StudentTrunk, build_student, recognise_student, stated_stride
from sam3.engine.weights import WeightFile, list_names, load_strict, normalise_sam3_keys, strip_prefix
from sam3.model.config import TRUNK, Sam3Config, vit_sizes
from sam3.model.vitdet import ViT
from sam3.transforms import Preprocess

STUDENT = f"{TRUNK}model."
SAM2_NECK = "backbone.vision_backbone.sam2_convs."
DEFAULT_EMBED_SIZE = 72  # of merged checkpoints whose meta does not say


def released_checkpoint() -> Path:
    """sam3.pt in the usual folder; what lies there was verified when it was fetched."""
    path = Path("sam3_checkpoints/sam3.pt")
    if not path.is_file():
        from sam3.engine import hub  # its client is for those who ask for it

        hub.download_sam3(path.parent)
    return path


def has_student(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a student stands in the trunk's place; keys are those after `detector.`."""
    return any(key.startswith(STUDENT) for key in tensors)


def build_trunk(file: WeightFile, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, int, int]:
    """The trunk that the file's tensors (keys after `detector.`) ask for, without its weights, image and patch size.

    A ViT is on the meta device; a student is not: it has computed buffers.
    """
    if not has_student(tensors):
        sizes = vit_sizes(tensors)
        with torch.device("meta"):
            return build_vit(sizes), sizes["img_size"], sizes["patch_size"]
    name, embed_dim = recognise_student(tensors, STUDENT)
    embed_size = int(file.meta.get("embed_size", DEFAULT_EMBED_SIZE))
    preprocess = read_preprocess(file)
    img_size = preprocess.img_size if preprocess else Sam3Config.img_size
    student = build_student(name, embed_dim, embed_size, output_stride=stated_stride(file.meta))
    return StudentTrunk(student), img_size, img_size // embed_size


def detector_tensors(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The image model's tensors, without `detector.`; keys that are neither of it nor of the tracker are refused."""
    return strip_prefix(_sam3_tensors(tensors, source), "detector.")


def tracker_tensors(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The tracker's tensors, without `tracker.`; keys that are neither of it nor of the image model are refused."""
    return strip_prefix(_sam3_tensors(tensors, source), "tracker.")


def _sam3_tensors(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    tensors = normalise_sam3_keys(tensors, source)
    foreign = [key for key in tensors if not key.startswith(("detector.", "tracker."))]
    if foreign:
        raise ValueError(
            f"{source} has {len(foreign)} keys below neither 'detector.' nor 'tracker.': {list_names(foreign)}; "
            "wanted the layout of sam3.pt"
        )
    return tensors


def require_second_neck(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """ValueError where the image model's tensors (keys after `detector.`) lack what video and clicks see with."""
    if not any(key.startswith(SAM2_NECK) for key in tensors):
        raise ValueError(
            f"{source} lacks the second neck ({SAM2_NECK}*), which video and clicks need; wanted the full sam3.pt"
        )


def read_preprocess(file: WeightFile) -> Preprocess | None:
    """As the file states it; None if it does not."""
    if "preprocess" not in file.meta:
        return None
    try:
        return Preprocess.from_meta(file.meta["preprocess"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file.path}: {error}; merge or train the student again with this version") from error


def build_vit(sizes: Mapping[str, Any]) -> ViT:
    if sizes["vit_dim"] is None:
        raise ValueError("these sizes are of a model with a student trunk; pass the trunk, or sizes with a ViT")
    return ViT(
        img_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        pretrain_img_size=sizes["pretrain_img_size"],
        dim=sizes["vit_dim"],
        depth=sizes["vit_depth"],
        heads=sizes["vit_heads"],
        mlp_dim=sizes["vit_mlp_dim"],
        window_size=sizes["window_size"],
        global_blocks=sizes["global_blocks"],
    )


def take_over(module: nn.Module, tensors: Mapping[str, Tensor], source: Path, unused: Sequence[str] = ()) -> None:
    """Lets a module that was built on the meta device have a file's tensors; those below `unused` may be left."""
    load_strict(module, tensors, source=source, allowed_unexpected=unused)
    unset = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not unset, f"without values after loading: {list_names(unset)}; register such buffers as persistent"
