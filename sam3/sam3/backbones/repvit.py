"""RepViT, a convolutional backbone: timm's layers under the names of the reference checkpoints.

Legend: B images, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import timm
from torch import Tensor, nn

from sam3.backbones.recompute import run_blocks


class RepViT(nn.Module):
    """`(B, 3, H, W)` -> `(B, out_channels, H/32, W/32)`, sizes rounded up; see `StudentEncoder` for its output stride.

    One flat list `features`: the stem, then blocks of a token mixer and a channel mixer, as the checkpoints have it.
    `name` is timm's, for example `repvit_m1_1`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        model = timm.create_model(name, num_classes=0)
        features = [nn.Sequential(model.stem.conv1, model.stem.act1, model.stem.conv2)]
        starts = [1]
        for stage in model.stages:
            down = stage.downsample
            if not isinstance(down, nn.Identity):
                features.append(
                    _mixer_block(down.pre_block.token_mixer, nn.Identity(), mlp=down.pre_block.channel_mixer)
                )
                starts.append(len(features))
                features.append(
                    _mixer_block(down.spatial_downsample, nn.Identity(), down.channel_downsample, mlp=down.ffn)
                )
            features += [_mixer_block(block.token_mixer, block.se, mlp=block.channel_mixer) for block in stage.blocks]
        self.features = nn.ModuleList(features)
        self.name = name
        self.out_channels = model.num_features
        self.grad_checkpointing = False
        self._starts = starts

    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(self.features, x, self.grad_checkpointing)

    def parts(self) -> dict[str, list[nn.Module]]:
        """The layers by the stride of what they give; together they hold every parameter once."""
        ends = [*self._starts[1:], len(self.features)]
        spans = zip(self._starts, ends, strict=True)
        return {"stem (/4)": [self.features[0]]} | {
            f"stage {i} (/{4 << i})": list(self.features[start:end]) for i, (start, end) in enumerate(spans)
        }


class _Residual(nn.Module):
    """`x + m(x)`."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.m = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


def _mixer_block(*token_mixer: nn.Module, mlp: nn.Module) -> nn.Sequential:
    """`token_mixer` one after the other, then timm's `mlp` with a shortcut around it."""
    return nn.Sequential(
        OrderedDict(
            token_mixer=nn.Sequential(*token_mixer),
            channel_mixer=_Residual([mlp.conv1, mlp.act, mlp.conv2]),
        )
    )
