"""The image encoder of MobileSAM: TinyViT-5M whose last step down keeps its resolution, and SAM's neck.

From "Faster Segment Anything: Towards Lightweight SAM for Mobile Applications" (Zhang et al., 2023). Weights carry the
names of the published file below `image_encoder.`.
"""

from __future__ import annotations

from torch import Tensor, nn

from sam3.backbones.sam_vit import make_neck
from sam3.backbones.tiny_vit import TinyViT

IMAGENET_CLASSES = 1000


class MobileSamViT(nn.Module):
    """`(B, 3, S, S)` -> `(B, 256, S/16, S/16)` for any S that is a multiple of 16.

    `norm_head` and `head`, the classifier that TinyViT was trained with, are in the published file and lead nowhere.
    Set `grad_checkpointing` to recompute each block in the backward pass.
    """

    def __init__(self, out_dim: int = 256) -> None:
        super().__init__()
        trunk = TinyViT("tiny_vit_5m")
        self.patch_embed, self.layers = trunk.patch_embed, trunk.layers
        self.layers[2].downsample.conv2.c.stride = (1, 1)
        self.norm_head = nn.LayerNorm(trunk.out_channels)
        self.head = nn.Linear(trunk.out_channels, IMAGENET_CLASSES)
        self.neck = make_neck(trunk.out_channels, out_dim)
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x, self.grad_checkpointing)
        return self.neck(x)

    def no_weight_decay(self) -> set[str]:
        """The tables of attention biases: 2-D, yet biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}
