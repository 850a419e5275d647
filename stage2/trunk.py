"""The image trunk that Stage 2 starts from, SAM3's or a student's: frames in, the embedding before the neck out.

Letters: `B` frames, `S` input side in pixels, `C` embedding channels, `G` side of the embedding grid.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sam3.backbones.student import StudentTrunk
from sam3.model_builder import build_sam3_image_model
from sam3.transforms import Preprocess


class FrozenTrunk(nn.Module):
    """A trunk without gradients, with the pre-processing it was trained on. shape: `(C, G, G)` of what it gives."""

    def __init__(self, trunk: nn.Module, preprocess: Preprocess, grid: int) -> None:
        super().__init__()
        self.trunk = trunk.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.shape = (trunk.channel_list[-1], grid, grid)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor, sizes: Tensor) -> Tensor:
        """frames: uint8 `(B, 3, S, S)`; sizes: `(B, 2)`, rows and columns of each frame inside its square; as
        `Preprocess.fit_into` gives them. Returns `(B, C, G, G)`."""
        return self.trunk(self.preprocess.normalise(frames, sizes))[-1]


def load_trunk(checkpoint: str | Path, image_size: int | None = None) -> FrozenTrunk:
    """The trunk of `sam3.pt`, of a tiny file in its layout, or of a merged student; float32, on the CPU.

    Its weights are mapped from the file: nothing is read before it is moved or used. image_size: what the side of its
    input must be. Raises FileNotFoundError, or ValueError for a file that does not fit.
    """
    model = build_sam3_image_model(checkpoint, device="cpu", enable_text_encoder=False, enable_segmentation=False)
    trunk, preprocess = model.backbone.vision_backbone.trunk, model.preprocess
    if image_size not in (None, preprocess.img_size):
        raise ValueError(
            f"{checkpoint} takes pictures of {preprocess.img_size} px, but --image_size is {image_size}; leave it out"
        )
    grid = trunk.model.embed_size if isinstance(trunk, StudentTrunk) else trunk.grid
    return FrozenTrunk(trunk.float(), preprocess, grid)
