"""Decoder of the student: SAM3's own layers and heads, run for the last layer's answers alone.

Its encoder needs no file: it is SAM3's fusion encoder with half the layers.

Letters: B pictures, Q queries (100), T = 1 + Q tokens (presence token first), N prompt tokens, H W grid, C channels.
Boxes are (cx, cy, w, h) in 0..1. Source: box refinement and detached references, Deformable DETR, Zhu et al. 2021
(arXiv:2010.04159); logarithmic box bias, Lin et al. 2023 (arXiv:2308.01904).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sam3.model.box_ops import inverse_sigmoid
from sam3.model.decoder import TransformerDecoder

MAX_PRESENCE_LOGIT = 10.0


@dataclass
class Decoded:
    """What the last layer says."""

    queries: Tensor  # (B, Q, C) normalised states
    boxes: Tensor  # (B, Q, 4) float32
    presence_logits: Tensor  # (B, 1) float32 in -10..10


class SlimDecoder(TransformerDecoder):
    """SAM3's decoder without its second copy of the queries in training, and with references that carry no gradient
    from one layer to the one before it."""

    def forward(
        self, memory: Tensor, pos: Tensor, prompt: Tensor, prompt_mask: Tensor, grid_size: tuple[int, int]
    ) -> Decoded:
        """Runs all layers.

        Args:
            memory, pos: (B, HW, C) output of the encoder and the positions of its tokens.
            prompt: (B, N, C); prompt_mask: (B, N) bool, True = ignore.
            grid_size: (H, W).
        """
        batch = memory.shape[0]
        tokens = torch.cat((self.presence_token.weight, self.query_embed.weight))
        x = tokens.expand(batch, -1, -1)
        # Boxes stay float32 in any precision. The learned ones are taught by the first layer, which reads them.
        reference = self.reference_points.weight.float().sigmoid().expand(batch, -1, -1)
        key = memory + pos
        for layer in self.layers:
            query_pos = self.ref_point_head(self._encode_boxes(reference).to(memory.dtype))
            inputs = (x, F.pad(query_pos, (0, 0, 1, 0)), prompt, prompt_mask, key, memory)
            inputs = (*inputs, self.box_bias(reference, grid_size, memory.dtype), len(tokens))
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
            queries = self.norm(x[:, 1:])
            boxes = (self.bbox_embed(queries).float() + inverse_sigmoid(reference)).sigmoid()
            reference = boxes.detach()
        presence = self.presence_token_head(self.presence_token_out_norm(x[:, 0])).float()
        return Decoded(queries, boxes, presence.clamp(-MAX_PRESENCE_LOGIT, MAX_PRESENCE_LOGIT))
