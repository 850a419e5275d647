"""Brings a teacher's patch features to the width of the student's.

Letters: `B` pictures, `C'` channels of the teacher, `C` of the student, `H W` rows and columns.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

PROJECTIONS = ("auto", "learned", "neck", "none")
COLLAPSED = 1e-3  # a channel that varies less than this teaches nothing

logger = logging.getLogger("sam3.distillation")


class Projection(nn.Conv2d):
    """A 1x1 convolution `(B, C', H, W) -> (B, C, H, W)` in float32, under autocast too."""

    def __init__(self, teacher_channels: int, student_channels: int, bias: bool) -> None:
        super().__init__(teacher_channels, student_channels, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def make_projection(
    kind: str, teacher_channels: int, student_channels: int, neck_weight: Tensor | None = None
) -> nn.Module:
    """What a teacher's patch features go through before they are compared.

    `none`: nothing, so the widths have to be equal. `auto`: nothing if they are, else `learned`. `learned`: a trainable
    convolution that starts as the teacher's own neck if that fits, else by Kaiming. `neck`: the teacher's own neck,
    frozen; nothing if the widths are equal, as the features then are past it.

    neck_weight: `(C, C', 1, 1)`, the first convolution of the teacher's neck; None if there is none.
    ValueError for another kind, and for widths or weights that do not fit.
    """
    if kind not in PROJECTIONS:
        raise ValueError(f"projection {kind!r} is unknown; choose one of {', '.join(PROJECTIONS)}")
    if teacher_channels == student_channels and kind != "learned":
        return nn.Identity()
    widths = f"the teacher's patch features have {teacher_channels} channels, the student's {student_channels}"
    if kind == "none":
        raise ValueError(f"{widths}: projection 'none' needs equal widths; choose auto, learned or neck")
    shape = (student_channels, teacher_channels, 1, 1)
    fits = neck_weight is not None and tuple(neck_weight.shape) == shape
    if kind == "neck" and not fits:
        found = "there is none" if neck_weight is None else f"it is {tuple(neck_weight.shape)}"
        raise ValueError(f"{widths}: projection 'neck' needs a weight {shape} of its neck, but {found}; choose learned")
    projection = Projection(teacher_channels, student_channels, bias=kind != "neck")
    with torch.no_grad():
        if fits:
            projection.weight.copy_(neck_weight)
        else:
            nn.init.kaiming_normal_(projection.weight, nonlinearity="linear")
        if projection.bias is not None:
            projection.bias.zero_()
    return projection.requires_grad_(kind == "learned" or kind == "auto")


def least_spread(target: Tensor) -> Tensor:
    """Standard deviation over pictures and cells of the channel that varies least: a scalar, on the target's device.

    target: `(B, C, H, W)`. Below `COLLAPSED` a learned projection has made the target easy, not the student good.
    """
    return target.detach().float().std((0, 2, 3), correction=0).min()


def warn_if_collapsed(teacher: str, spread: float) -> bool:
    """Log a warning if `least_spread` has fallen below `COLLAPSED`; whether it has. For the time of logging."""
    collapsed = spread < COLLAPSED
    if collapsed:
        logger.warning(
            "the projected patch features of teacher %s hardly vary: least standard deviation of a channel %.1e, below "
            "%.0e; the learned projection has collapsed. Try projection: neck, or a lower weight of encoder_patch",
            teacher,
            spread,
            COLLAPSED,
        )
    return collapsed
