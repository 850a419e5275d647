"""The Stage-1 students: nine backbones, the head that leads to the teacher's embedding, and how to tell them apart.

Legend: B images, S image side in pixels, Cb channels of the backbone, C channels and G side of the embedding grid.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.backbones.efficientvit import EfficientViT
from sam3.backbones.repvit import RepViT
from sam3.backbones.tiny_vit import TinyViT

BACKBONE_PREFIX = "backbone.model."
HEAD_PREFIX = "head."
OUTPUT_STRIDE = 32  # pixels per cell of a backbone's map, where nothing else is stated
OUTPUT_STRIDES = (OUTPUT_STRIDE, OUTPUT_STRIDE // 2)


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the table of students."""

    stem: str  # of its files: es_rv_m.yaml, es_rv_m.tsv
    display_name: str  # of the student
    architecture: str  # of the backbone, as people write it
    family: type[nn.Module]


BACKBONES: dict[str, BackboneSpec] = {
    "efficientvit_b0": BackboneSpec("es_ev_s", "ES-EV-S", "EfficientViT-B0", EfficientViT),
    "efficientvit_b1": BackboneSpec("es_ev_m", "ES-EV-M", "EfficientViT-B1", EfficientViT),
    "efficientvit_b2": BackboneSpec("es_ev_l", "ES-EV-L", "EfficientViT-B2", EfficientViT),
    "repvit_m0_9": BackboneSpec("es_rv_s", "ES-RV-S", "RepViT-M0.9", RepViT),
    "repvit_m1_1": BackboneSpec("es_rv_m", "ES-RV-M", "RepViT-M1.1", RepViT),
    "repvit_m2_3": BackboneSpec("es_rv_l", "ES-RV-L", "RepViT-M2.3", RepViT),
    "tiny_vit_5m": BackboneSpec("es_tv_s", "ES-TV-S", "TinyViT-5M", TinyViT),
    "tiny_vit_11m": BackboneSpec("es_tv_m", "ES-TV-M", "TinyViT-11M", TinyViT),
    "tiny_vit_21m": BackboneSpec("es_tv_l", "ES-TV-L", "TinyViT-21M", TinyViT),
}


class StudentEncoder(nn.Module):
    """Backbone, head, bilinear resize: `(B, 3, S, S)` -> `(B, embed_dim, embed_size, embed_size)`.

    Args:
        backbone: gives (B, Cb, H, W); has `out_channels` (= Cb) and `name` (its key in `BACKBONES`).
        embed_dim: channels of the teacher's embedding.
        embed_size: side of the teacher's grid; the head's map (32x32 at 1008 pixels, 63x63 with an output stride of
            16) is resized to it.
        output_stride: 16 leaves out the backbone's last halving (as DeepLab does, Chen et al. 2017, but without its
            dilation: to be trained like this): same shapes of weights, a map twice as fine, for small pictures whose
            objects would be lost between the cells.

    The state dict has the names of the released checkpoints: `backbone.model.*` and `head.*`.
    """

    def __init__(
        self, backbone: nn.Module, embed_dim: int, embed_size: int, output_stride: int = OUTPUT_STRIDE
    ) -> None:
        super().__init__()
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride is {output_stride}; wanted one of {OUTPUT_STRIDES}")
        self.embed_dim = embed_dim
        self.embed_size = embed_size
        self.output_stride = output_stride
        if output_stride < OUTPUT_STRIDE:
            _keep_size_in_last_stage(backbone)
        self.backbone = nn.Sequential(OrderedDict(model=backbone))
        self.head = nn.Sequential(
            nn.Conv2d(backbone.out_channels, embed_dim, 1, bias=False),
            nn.BatchNorm2d(embed_dim),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(self.backbone(images))
        size = (self.embed_size, self.embed_size)
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: compute the inside of the backbone's blocks again in the backward pass."""
        self.backbone.model.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that weight decay should leave alone."""
        backbone = self.backbone.model
        names = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
        return {BACKBONE_PREFIX + name for name in names}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args) -> None:
        # Called by load_state_dict of this module or of one around it, before the children take their tensors.
        check_student(state_dict, self.backbone.model.name, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class StudentTrunk(nn.Module):
    """A student in the place of the teacher's trunk: the neck reads `channel_list` and the last map of the output."""

    def __init__(self, student: StudentEncoder) -> None:
        super().__init__()
        self.model = student
        self.channel_list = [student.embed_dim]

    def forward(self, images: Tensor) -> list[Tensor]:
        """`images`: (B, 3, S, S) -> one map (B, C, G, G)."""
        return [self.model(images)]


def build_student(
    backbone_name: str,
    embed_dim: int = 1024,
    embed_size: int = 72,
    drop_path: float | None = None,
    output_stride: int = OUTPUT_STRIDE,
) -> StudentEncoder:
    """A student with random weights, on the device of the surrounding `torch.device` context.

    `backbone_name` is a key of `BACKBONES`; `drop_path` None means the family's own stochastic depth.
    Raises ValueError for an unknown name or stride, and for a `drop_path` above 0 in a family without one.
    """
    return StudentEncoder(_build_backbone(backbone_name, drop_path), embed_dim, embed_size, output_stride)


def untrained_student(student: StudentEncoder) -> StudentEncoder:
    """The same student as training finds it, with the weights of one fixed seed, on the CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        name, stride = student.backbone.model.name, student.output_stride
        return build_student(name, student.embed_dim, student.embed_size, output_stride=stride)


def stated_stride(meta: Mapping[str, Any]) -> int:
    """The output stride by a file's meta; files from before there was a choice do not say it."""
    return int(meta.get("output_stride", OUTPUT_STRIDE))


def recognise_student(tensors: Mapping[str, Tensor], prefix: str = "") -> tuple[str, int]:
    """Which student's weights stand under `prefix`: its key in `BACKBONES`, and its `embed_dim`.

    Names and shapes of the backbone must be those of exactly one student; otherwise ValueError says what is
    different from the nearest one, or which students are mixed.
    """
    found = _shapes(tensors, prefix + BACKBONE_PREFIX)
    if not found:
        raise ValueError(
            f"no student under the prefix '{prefix}': no key starts with '{prefix}{BACKBONE_PREFIX}', "
            f"the {len(tensors)} keys are like {', '.join(repr(k) for k in list(tensors)[:3]) or '(none)'}"
        )
    name = _student_of(found)
    if name is None:
        contained = [name for name in BACKBONES if _backbone_shapes(name).items() <= found.items()]
        if len(contained) > 1:
            raise ValueError(f"the weights under '{prefix}' mix students: {' and '.join(map(describe, contained))}")
        nearest = min(BACKBONES, key=lambda name: len(_backbone_shapes(name).items() ^ found.items()))
        raise ValueError(_difference(nearest, found, prefix + BACKBONE_PREFIX))
    last = f"{prefix}{HEAD_PREFIX}3.weight"
    if last not in tensors:
        raise ValueError(f"the weights of {describe(name)} have no head: '{last}' is missing")
    return name, tensors[last].shape[0]


def check_student(tensors: Mapping[str, Tensor], backbone_name: str, prefix: str = "") -> None:
    """Raise ValueError naming both students if the tensors under `prefix` are another student's than `backbone_name`.

    Anything else that does not fit is left to strict loading, which lists it.
    """
    found = _shapes(tensors, prefix + BACKBONE_PREFIX)
    if not found or found == _backbone_shapes(backbone_name):
        return
    other = _student_of(found)
    if other is not None:
        raise ValueError(
            f"these are the weights of {describe(other)}, but the student is {describe(backbone_name)}; "
            "choose the backbone that the checkpoint was trained with"
        )


def describe(backbone_name: str) -> str:
    """For messages: `ES-RV-M (repvit_m1_1)`."""
    return f"{BACKBONES[backbone_name].display_name} ({backbone_name})"


def _build_backbone(backbone_name: str, drop_path: float | None) -> nn.Module:
    if backbone_name not in BACKBONES:
        raise ValueError(f"unknown backbone '{backbone_name}'; there are {', '.join(BACKBONES)}")
    family = BACKBONES[backbone_name].family
    if family is TinyViT:
        return TinyViT(backbone_name, drop_path)
    if drop_path:
        raise ValueError(
            f"drop_path is {drop_path}, but {describe(backbone_name)} has no stochastic depth; set it to 0"
        )
    return family(backbone_name)


def _keep_size_in_last_stage(backbone: nn.Module) -> None:
    last = list(backbone.parts().values())[-1]
    for module in (module for part in last for module in part.modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)


@functools.cache
def _backbone_shapes(backbone_name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a backbone, in order."""
    with torch.device("meta"):
        return _shapes(_build_backbone(backbone_name, None).state_dict())


def _student_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The student whose backbone has exactly these tensors; building the others to compare with would take seconds."""
    return next((name for name in BACKBONES if _backbone_shapes(name) == shapes), None)


def _shapes(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {key[len(prefix) :]: tuple(t.shape) for key, t in tensors.items() if key.startswith(prefix)}


def _difference(backbone_name: str, found: Mapping[str, tuple[int, ...]], prefix: str) -> str:
    """One line: what keeps the tensors `found` from being this backbone's."""
    wanted = _backbone_shapes(backbone_name)
    differences = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [key for key in wanted if key in found and found[key] != wanted[key]],
    }
    listed = [f"{len(keys)} {what} (first: '{prefix}{keys[0]}')" for what, keys in differences.items() if keys]
    return f"the weights fit no student; nearest is {describe(backbone_name)}, but of its tensors " + ", ".join(listed)
