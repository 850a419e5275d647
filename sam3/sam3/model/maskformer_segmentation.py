"""Segmentation head: a pixel decoder over the feature pyramid, masks as dot products of queries with pixels.

Letters: B image-prompt pairs, I images, Q queries that get a mask, N prompt tokens, C channels, H W finest level
(4x the token grid), h w token grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.attention import Attention
from sam3.model.model_misc import MLP


class PixelDecoder(nn.Module):
    """Walks from the coarsest level to the finest: upsample (nearest), add, 3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, dim: int, num_stages: int = 3):
        super().__init__()
        # The pyramid has two finer levels, so that the last of three stages is never used; its weights are in the file.
        self.conv_layers = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(num_stages))
        self.norms = nn.ModuleList(nn.GroupNorm(8, dim) for _ in range(num_stages))

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels from fine to coarse, (I or B, C, H, W) each, the last with B -> (B, C, H, W)."""
        x = levels[-1]
        for level, conv, norm in zip(reversed(levels[:-1]), self.conv_layers, self.norms, strict=False):
            x = level + F.interpolate(x, size=level.shape[-2:], mode="nearest")
            x = F.relu(norm(conv(x)), inplace=True)
        return x


class MaskPredictor(nn.Module):
    """Query states -> vectors whose dot product with a pixel's embedding is the mask logit."""

    def __init__(self, dim: int):
        super().__init__()
        self.mask_embed = MLP(dim, dim, dim, 3)

    def forward(self, queries: Tensor, pixels: Tensor, projection: nn.Conv2d) -> Tensor:
        """queries (B, Q, C), pixels (B, C, H, W) before the 1x1 `projection` -> logits (B, Q, H, W).

        The projection is applied to the queries instead of the pixels, <e, W p + b> = <W^T e, p> + <e, b>: the same
        number without a second full-size map.
        """
        embedding = self.mask_embed(queries)
        weight = projection.weight.flatten(1)  # (C, C, 1, 1) -> (C, C)
        offset = embedding @ projection.bias  # (B, Q)
        logits = torch.baddbmm(offset[..., None], embedding @ weight, pixels.flatten(2))
        return logits.unflatten(-1, pixels.shape[-2:])


class UniversalSegmentationHead(nn.Module):
    """Prompted image tokens -> instance masks and one semantic mask."""

    def __init__(self, dim: int, num_heads: int, num_stages: int = 3):
        super().__init__()
        self.pixel_decoder = PixelDecoder(dim, num_stages)
        self.mask_predictor = MaskPredictor(dim)
        self.cross_attend_prompt = Attention(dim, num_heads)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.semantic_seg_head = nn.Conv2d(dim, 1, 1)
        self.instance_seg_head = nn.Conv2d(dim, dim, 1)

    def forward(
        self,
        backbone_fpn: list[Tensor],
        queries: Tensor,
        image_ids: Tensor,
        memory: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
    ) -> dict[str, Tensor]:
        """Masks for `queries`.

        Args:
            backbone_fpn: features of the I images, fine to coarse, (I, C, ., .) each.
            queries: (B, Q, C); image_ids: (B,) which image each pair looks at.
            memory: (B, hw, C) output of the fusion encoder; prompt: (B, N, C); prompt_mask: (B, N) True = ignore.

        Returns:
            `pred_masks` (B, Q, H, W) and `semantic_seg` (B, 1, H, W), logits.
        """
        query = self.cross_attn_norm(memory)
        memory = memory + self.cross_attend_prompt(query, prompt, prompt, key_padding_mask=prompt_mask)
        coarse = memory.transpose(1, 2).unflatten(2, backbone_fpn[-1].shape[-2:])  # (B, C, h, w)
        # One image serves all pairs by broadcasting.
        finer = [level if len(level) == 1 else level[image_ids] for level in backbone_fpn[:-1]]
        pixels = self.pixel_decoder([*finer, coarse])
        return {
            "pred_masks": self.mask_predictor(queries, pixels, self.instance_seg_head),
            "semantic_seg": self.semantic_seg_head(pixels),
        }
