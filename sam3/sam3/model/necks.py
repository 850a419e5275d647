"""The feature pyramid over the last trunk map.

Letters: B images, E channels of the trunk, C channels of the pyramid, G token grid side.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import Tensor, nn

from sam3.model.position_encoding import PositionEmbeddingSine


class PassThroughTrunk(nn.Module):
    """Stands where a trunk stood in a model that is given the trunk's output: one map (B, E, G, G) -> [the same].

    Has no weights; `channels` is E.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channel_list = [channels]

    def forward(self, grid: Tensor) -> list[Tensor]:
        return [grid]


class Sam3DualViTDetNeck(nn.Module):
    """Turns the trunk's one map into levels of 4, 2 and 1 times its grid, once or twice.

    Args:
        trunk: (B, 3, S, S) -> list whose last item is (B, E, G, G); `channel_list[-1]` = E.
        dim: channels C of every level.
        with_sam2_neck: a second set of convolutions for clicks and video, `sam2_convs`.
        scalp: coarsest levels left out; the checkpoint has weights for a level of half the grid that nothing uses.
    """

    def __init__(self, trunk: nn.Module, dim: int, with_sam2_neck: bool = False, scalp: int = 1):
        super().__init__()
        self.trunk = trunk
        self.position_encoding = PositionEmbeddingSine(dim)
        self.scalp = scalp
        width = trunk.channel_list[-1]
        self.convs = nn.ModuleList(_level(scale, width, dim) for scale in (4, 2, 1, 0.5))
        self.sam2_convs = copy.deepcopy(self.convs) if with_sam2_neck else None

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None, list[Tensor] | None]:
        """images (B, 3, S, S) -> levels (B, C, kG, kG), k = 4, 2, 1, their positions, and both for the second neck."""
        x = self.trunk(images)[-1]
        levels, positions = self._pyramid(x, self.convs)
        if self.sam2_convs is None:
            return levels, positions, None, None
        return levels, positions, *self._pyramid(x, self.sam2_convs)

    def _pyramid(self, x: Tensor, convs: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
        levels = [conv(x) for conv in convs[: len(convs) - self.scalp]]
        return levels, [self.position_encoding(level) for level in levels]


class TrackerNeck(nn.Module):
    """The trunk and the second neck alone, for video: named as in `Sam3DualViTDetNeck`, whose weights it takes."""

    def __init__(self, trunk: nn.Module, dim: int):
        super().__init__()
        self.trunk = trunk
        self.sam2_convs = nn.ModuleList(_level(scale, trunk.channel_list[-1], dim) for scale in (4, 2, 1, 0.5))

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, S, S) -> levels (B, C, kG, kG), k = 4, 2, 1."""
        x = self.trunk(images)[-1]
        return [conv(x) for conv in self.sam2_convs[:3]]  # the coarsest stands in the file, and nothing reads it


def _level(scale: float, width: int, dim: int) -> nn.Sequential:
    """One level, `scale` times the size of the map it gets; `width` channels in, `dim` out."""
    if scale == 4:
        layers = {
            "dconv_2x2_0": nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            "gelu": nn.GELU(),
            "dconv_2x2_1": nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        }
        width = width // 4
    elif scale == 2:
        layers = {"dconv_2x2": nn.ConvTranspose2d(width, width // 2, 2, stride=2)}
        width = width // 2
    elif scale == 1:
        layers = {}
    elif scale == 0.5:
        layers = {"maxpool_2x2": nn.MaxPool2d(2)}
    else:
        raise ValueError(f"no pyramid level of scale {scale}; there are 4, 2, 1 and 0.5")
    layers["conv_1x1"] = nn.Conv2d(width, dim, 1)
    layers["conv_3x3"] = nn.Conv2d(dim, dim, 3, padding=1)
    return nn.Sequential(OrderedDict(layers))
