"""Decoder: object queries and a presence token read the prompt and the image, and refine boxes layer by layer.

Letters: B image-prompt pairs, Q queries, T = 1 + Q tokens (presence token first), N prompt tokens, H W feature grid,
C channels, h heads, L layers. Boxes are (cx, cy, w, h) in 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam3.model.attention import Attention
from sam3.model.box_ops import box_cxcywh_to_xyxy, inverse_sigmoid
from sam3.model.model_misc import MLP
from sam3.model.position_encoding import PositionEmbeddingSine


@dataclass
class DecoderOutput:
    """What the decoder returns; in train mode Q counts the one-to-one queries, then the one-to-many ones."""

    hs: Tensor  # (L, B, Q, C) normalised query states after each layer
    references: Tensor  # (L, B, Q, 4) boxes that went into each layer
    boxes: Tensor  # (L, B, Q, 4) boxes that came out of each layer
    presence_logits: Tensor  # (L, B, 1) is the prompted thing in the picture at all
    presence: Tensor  # (B, 1, C) last state of the presence token


class TransformerDecoderLayer(nn.Module):
    """Post-norm layer: self-attention, prompt, image (with a box bias), feed-forward."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float = 0.1):
        super().__init__()
        self.self_attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.ca_text = Attention(dim, num_heads, dropout)
        self.catext_norm = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        num_self: int,
    ) -> Tensor:
        """One layer.

        Args:
            x, pos: (B, T, C) presence token and queries, and their positions (zero for the presence token).
            prompt: (B, N, C); prompt_mask: (B, N) bool, True = ignore.
            key, value: (B, HW, C) image tokens with and without positions.
            bias: (B, h, T, HW) added to the scores of the image attention.
            num_self: the first tokens, which attend to each other; the rest (one-to-many queries) skip that step.

        Returns:
            (B, T, C)
        """
        first = x[:, :num_self]
        q = first + pos[:, :num_self]
        first = first + self.dropout(self.self_attn(q, q, first))
        x = self.norm2(torch.cat((first, x[:, num_self:]), dim=1) if num_self < x.shape[1] else first)
        x = self.catext_norm(x + self.dropout(self.ca_text(x + pos, prompt, prompt, key_padding_mask=prompt_mask)))
        x = self.norm1(x + self.dropout(self.cross_attn(x + pos, key, value, attn_mask=bias)))
        return self.norm3(x + self.dropout(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        # SAM3 keeps this one step out of autocast, in the precision of its weights.
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.relu(self.linear1(x.to(self.linear1.weight.dtype)), inplace=True)
            return self.linear2(self.dropout(hidden))


class TransformerDecoder(nn.Module):
    """Layers, learned queries and reference boxes, box refinement, presence head, box-relative position bias (RPB)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        num_queries: int,
        dropout: float = 0.1,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.reference_points = nn.Embedding(num_queries, 4)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.boxRPB_embed_x = MLP(2, dim, num_heads, 2)
        self.boxRPB_embed_y = MLP(2, dim, num_heads, 2)
        self.presence_token = nn.Embedding(1, dim)
        self.presence_token_head = MLP(dim, dim, 1, 3)
        self.presence_token_out_norm = nn.LayerNorm(dim)
        self.position_encoding = PositionEmbeddingSine(dim)
        self.num_queries = num_queries
        self.activation_checkpointing = activation_checkpointing
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not any(
                part in name for part in ("bbox_embed", "query_embed", "reference_points")
            ):
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)  # a fresh model answers with its reference boxes
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def forward(
        self, memory: Tensor, pos: Tensor, prompt: Tensor, prompt_mask: Tensor, grid_size: tuple[int, int]
    ) -> DecoderOutput:
        """Runs all layers.

        In train mode the queries appear twice: once one-to-one, once one-to-many without self-attention.

        Args:
            memory, pos: (B, HW, C) output of the fusion encoder and the positions of its tokens.
            prompt: (B, N, C); prompt_mask: (B, N) bool, True = ignore.
            grid_size: (H, W).
        """
        batch, copies = memory.shape[0], 2 if self.training else 1
        queries = self.query_embed.weight.repeat(copies, 1).expand(batch, -1, -1)
        # Boxes stay float32 in any precision: bfloat16 would place them on a grid of 1/256 of the picture.
        reference = self.reference_points.weight.float().sigmoid().repeat(copies, 1).expand(batch, -1, -1)
        x = torch.cat((self.presence_token.weight.expand(batch, 1, -1), queries), dim=1)
        key, used = memory + pos, reference
        hs, references, boxes, presence_logits = [], [], [], []
        for layer in self.layers:
            query_pos = self.ref_point_head(self._encode_boxes(used).to(memory.dtype))
            inputs = (x, _prepend_zeros(query_pos, dim=1), prompt, prompt_mask, key, memory)
            inputs = (*inputs, self.box_bias(used, grid_size, memory.dtype), 1 + self.num_queries)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
            hs.append(self.norm(x[:, 1:]))
            delta = self.bbox_embed(hs[-1]).float()
            references.append(reference)
            # In training each box also teaches the layer before it (through `reference`), and no layer further back.
            boxes.append((delta + inverse_sigmoid(reference)).sigmoid())
            reference = (delta + inverse_sigmoid(used)).sigmoid()
            used = reference.detach()
            presence_logits.append(self.presence_token_head(self.presence_token_out_norm(x[:, 0])))
        stacks = (torch.stack(stack) for stack in (hs, references, boxes, presence_logits))
        return DecoderOutput(*stacks, presence=x[:, :1])

    def _encode_boxes(self, boxes: Tensor) -> Tensor:
        """(B, Q, 4) -> sine codes (B, Q, 2 C), in the order cy, cx, w, h."""
        cx, cy, w, h = boxes.unbind(-1)
        return self.position_encoding.encode(torch.stack((cy, cx, w, h), dim=-1)).flatten(-2)

    def box_bias(self, boxes: Tensor, grid_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Attention bias (B, h, 1 + Q, HW) from the place of each cell relative to each box; row 0 (presence) is zero.

        With g(d) = sign(d) log2(|8 d| + 1) / log2(8) of the distances d from a cell's left (top) edge to the box's two
        sides, bias = MLP_y(g(dy)) of the row + MLP_x(g(dx)) of the column.
        """
        x0, y0, x1, y1 = box_cxcywh_to_xyxy(boxes).unbind(-1)
        height, width = grid_size
        by = self.boxRPB_embed_y(_log_distances(height, y0, y1).to(dtype))  # (B, Q, H, h)
        bx = self.boxRPB_embed_x(_log_distances(width, x0, x1).to(dtype))  # (B, Q, W, h)
        by = _prepend_zeros(by, dim=1).permute(0, 3, 1, 2)  # (B, h, 1 + Q, H)
        bx = _prepend_zeros(bx, dim=1).permute(0, 3, 1, 2)
        # Contiguous factors make the sum contiguous: (B, h, 1 + Q, H, W), flattened without a copy.
        return (by.contiguous()[..., :, None] + bx.contiguous()[..., None, :]).flatten(-2)


def _log_distances(cells: int, low: Tensor, high: Tensor) -> Tensor:
    """Signed log distances from `cells` cell edges to both sides (B, Q) of each box: (B, Q, cells, 2)."""
    edges = torch.arange(cells, dtype=low.dtype, device=low.device) / cells
    scaled = 8 * (edges[:, None] - torch.stack((low, high), dim=-1)[:, :, None])
    return scaled.sign() * torch.log2(scaled.abs() + 1) / math.log2(8)


def _prepend_zeros(x: Tensor, dim: int) -> Tensor:
    """Puts the presence token's zero row in front of the queries' rows."""
    return torch.cat((torch.zeros_like(x.narrow(dim, 0, 1)), x), dim=dim)
