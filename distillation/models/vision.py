"""Vision tower of the student: RepViT, and one adapter per stage that leads to the width of the transformers.

Letters: B pictures, C channels (256), S side of the input, H W rows and columns of a level.
Source: RepViT, Wang et al. 2024 (arXiv:2307.09283), by timm.
"""

from __future__ import annotations

from collections.abc import Sequence

import timm
from timm.models import reparameterize_model
from torch import Tensor, nn

from sam3.backbones.recompute import run_blocks

BACKBONE = "repvit_m2_3"
NUM_LEVELS = 3  # of the backbone's four; the teacher leaves out its coarsest level as well


class VisionEncoder(nn.Module):
    """`(B, 3, S, S)` -> three maps `(B, C, H, W)` of stride 4, 8 and 16, fine to coarse, sides rounded up.

    The backbone's fourth stage and its adapter exist, so that published weights fit, and are never run.

    Args:
        dim: C.
        backbone_dims, backbone_depth: channels and blocks of the four stages; None for those of RepViT-M2.3.
        final_relu: end the adapters with a ReLU. The teacher's maps are signed, so that it makes them unreachable.
    """

    def __init__(
        self,
        dim: int,
        backbone_dims: Sequence[int] | None = None,
        backbone_depth: Sequence[int] | None = None,
        final_relu: bool = False,
    ):
        super().__init__()
        given = {"embed_dim": backbone_dims, "depth": backbone_depth}
        sizes = {name: tuple(value) for name, value in given.items() if value is not None}
        self.backbone = timm.create_model(BACKBONE, pretrained=False, features_only=True, **sizes)
        self.adapters = nn.ModuleList(_adapter(c, dim, final_relu) for c in self.backbone.feature_info.channels())
        self.fused = False
        self.activation_checkpointing = False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        recompute = self.activation_checkpointing and self.training
        stem, *stages = self.backbone.values()
        x, levels = run_blocks([stem], images, recompute), []
        for stage, adapter in zip(stages[:NUM_LEVELS], list(self.adapters)[:NUM_LEVELS], strict=True):
            x = run_blocks([stage.downsample, *stage.blocks], x, recompute)
            levels.append(run_blocks([adapter], x, recompute))
        return tuple(levels)

    def unused_modules(self) -> list[nn.Module]:
        """What `forward` never runs."""
        _, *stages = self.backbone.values()
        return [*stages[NUM_LEVELS:], *self.adapters[NUM_LEVELS:]]

    def fuse(self) -> None:
        """Turn the backbone into its form for inference, in place: branches and BatchNorms become plain convolutions.

        Outputs stay those of eval mode; there is no way back.
        """
        if not self.fused:
            reparameterize_model(self.backbone, inplace=True)
            self.fused = True


def _adapter(in_dim: int, dim: int, final_relu: bool) -> nn.Sequential:
    layers = [
        nn.Conv2d(in_dim, dim, 1, bias=False),
        nn.BatchNorm2d(dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        nn.BatchNorm2d(dim),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if final_relu else []))
