"""Masks of the student: SAM3's pixel decoder and mask predictor, without its look at the prompt.

Letters: B pictures, Q queries, C channels, H W finest level, h w coarsest level. Source: MaskFormer, Cheng et al. 2021
(arXiv:2107.06278).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillation.models.vision import NUM_LEVELS
from sam3.model.maskformer_segmentation import MaskPredictor, PixelDecoder


class MaskDecoder(nn.Module):
    """Feature pyramid, encoded tokens and query states -> a mask per query, and one of all that is meant."""

    def __init__(self, dim: int):
        super().__init__()
        self.pixel_decoder = PixelDecoder(dim)
        self.mask_predictor = MaskPredictor(dim)
        self.instance_seg_head = nn.Conv2d(dim, dim, 1)
        self.semantic_seg_head = nn.Conv2d(dim, 1, 1)

    def forward(self, levels: Sequence[Tensor], memory: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the masks.

        Args:
            levels: (B, C, ., .) each, fine to coarse; only the shape of the last counts, `memory` takes its place.
            memory: (B, hw, C) output of the encoder; queries: (B, Q, C).

        Returns:
            (B, Q, H, W) and (B, 1, H, W), in the precision of the weights, whatever autocast says: sums of C products
            of unbounded numbers are no work for half precision.
        """
        coarse = memory.transpose(1, 2).unflatten(2, levels[-1].shape[-2:])  # (B, C, h, w)
        pixels = self.pixel_decoder([*levels[:-1], coarse])
        dtype = self.semantic_seg_head.weight.dtype
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.to(dtype)
            masks = self.mask_predictor(queries.to(dtype), pixels, self.instance_seg_head)
            return masks, self.semantic_seg_head(pixels)

    def unused_modules(self) -> list[nn.Module]:
        """What `forward` never runs: a pyramid of three levels has two steps."""
        decoder, steps = self.pixel_decoder, NUM_LEVELS - 1
        return [*decoder.conv_layers[steps:], *decoder.norms[steps:]]
