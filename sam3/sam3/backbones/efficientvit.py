"""EfficientViT (convolutions and multi-scale linear attention): timm's layers under the reference checkpoints' names.

Legend: B images, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import timm
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn

from sam3.backbones.recompute import run_blocks

# What the released weights were trained with. timm's 1e-5 is of the size of the denominators it guards: with it the
# output of B0 moves by 5.5e-3 of 0.99 at 1008 pixels.
ATTENTION_EPS = 1e-15


class EfficientViT(nn.Module):
    """`(B, 3, H, W)` -> `(B, out_channels, H/32, W/32)`, sizes rounded up. `name` is timm's, e.g. `efficientvit_b0`.

    Sizes and `parts` are those of an output stride of 32; see `StudentEncoder`.

    timm's classifier is left out, the convolution in front of it too: no gradient would reach them.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        model = timm.create_model(name, num_classes=0)
        for module in model.modules():
            if isinstance(module, LiteMLA):
                module.eps = ATTENTION_EPS
        self.input_stem = _op_list(model.stem)
        self.stages = nn.ModuleList(_op_list(stage.blocks) for stage in model.stages)
        self.name = name
        self.out_channels = model.num_features
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_stem(x)
        for stage in self.stages:
            x = run_blocks(stage.op_list, x, self.grad_checkpointing)
        return x

    def parts(self) -> dict[str, list[nn.Module]]:
        """The layers by the stride of what they give; together they hold every parameter once."""
        stages = {f"stage {i} (/{4 << i})": [stage] for i, stage in enumerate(self.stages)}
        return {"stem (/2)": [self.input_stem]} | stages


def _op_list(layers: Iterable[nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(op_list=nn.Sequential(*layers)))
