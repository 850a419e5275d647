"""Geometric prompts (boxes, points) and the encoder that turns them into tokens.

Letters: B image-prompt pairs, Nb boxes, Np points, Ng = Np + Nb + 1 tokens (the last valid one is CLS), C channels,
H W feature grid. Boxes are (cx, cy, w, h), points (x, y), all in 0..1 of the model's square. Every mask is bool with
True = padding, and padding stands behind the valid entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from sam3.model.box_ops import box_cxcywh_to_xyxy
from sam3.model.encoder import TransformerEncoderLayer
from sam3.model.position_encoding import PositionEmbeddingSine


@dataclass
class Prompt:
    """Boxes and points of B image-prompt pairs, sequence first, as SAM3's users know it.

    Labels are 1 for "like this" and 0 for "not this"; left out, they are 1. Left out masks mean no padding. A prompt
    needs boxes or points; `Prompt.empty` is the one with none of either.
    """

    box_embeddings: Tensor | None = None  # (Nb, B, 4)
    box_mask: Tensor | None = None  # (B, Nb)
    box_labels: Tensor | None = None  # (Nb, B)
    point_embeddings: Tensor | None = None  # (Np, B, 2)
    point_mask: Tensor | None = None  # (B, Np)
    point_labels: Tensor | None = None  # (Np, B)

    def __post_init__(self) -> None:
        given = self.box_embeddings if self.box_embeddings is not None else self.point_embeddings
        if given is None:
            raise ValueError("a geometric prompt needs boxes or points; use Prompt.empty for a prompt without any")
        _, batch, device = len(given), given.shape[1], given.device
        for kind, width in (("box", 4), ("point", 2)):
            values = getattr(self, f"{kind}_embeddings")
            if values is None:
                values = torch.zeros(0, batch, width, device=device)
            if values.dim() != 3 or values.shape[1:] != (batch, width):
                raise ValueError(f"{kind} prompts have shape {tuple(values.shape)}, wanted (count, {batch}, {width})")
            labels, mask = getattr(self, f"{kind}_labels"), getattr(self, f"{kind}_mask")
            labels = torch.ones(values.shape[:2], dtype=torch.long, device=device) if labels is None else labels
            mask = torch.zeros(batch, len(values), dtype=torch.bool, device=device) if mask is None else mask
            if labels.shape != values.shape[:2] or mask.shape != (batch, len(values)):
                raise ValueError(
                    f"{len(values)} {kind} prompts for {batch} pairs go with labels {tuple(labels.shape)} and mask "
                    f"{tuple(mask.shape)}, wanted ({len(values)}, {batch}) and ({batch}, {len(values)})"
                )
            setattr(self, f"{kind}_embeddings", values)
            setattr(self, f"{kind}_labels", labels.long())
            setattr(self, f"{kind}_mask", mask)

    @classmethod
    def empty(cls, batch: int = 1, device: torch.device | str | None = None) -> Prompt:
        """A prompt without boxes and points; it encodes to the CLS token alone."""
        return cls(box_embeddings=torch.zeros(0, batch, 4, device=device))

    def append_boxes(self, boxes: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Adds boxes (n, B, 4) with labels (n, B) behind the valid ones; mask (B, n)."""
        self._append("box", boxes, labels, mask)

    def append_points(self, points: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Adds points (n, B, 2) with labels (n, B) behind the valid ones; mask (B, n)."""
        self._append("point", points, labels, mask)

    def clone(self) -> Prompt:
        """A prompt that can grow without changing this one (appending never writes into tensors)."""
        return replace(self)

    def _append(self, kind: str, values: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        added = Prompt(**{f"{kind}_embeddings": values, f"{kind}_labels": labels, f"{kind}_mask": mask})
        # Value and label travel as one row, so that they stay together.
        rows, masks = zip(*(prompt._rows(kind) for prompt in (self, added)), strict=True)
        joined, joined_mask = concat_padded(rows[0], masks[0], rows[1], masks[1])
        joined = joined.transpose(0, 1)
        setattr(self, f"{kind}_embeddings", joined[..., :-1])
        setattr(self, f"{kind}_labels", joined[..., -1].long())
        setattr(self, f"{kind}_mask", joined_mask)

    def _rows(self, kind: str) -> tuple[Tensor, Tensor]:
        values, labels = getattr(self, f"{kind}_embeddings"), getattr(self, f"{kind}_labels")
        return torch.cat((values, labels[..., None].to(values.dtype)), dim=-1).transpose(0, 1), getattr(
            self, f"{kind}_mask"
        )


def concat_padded(first: Tensor, first_mask: Tensor, second: Tensor, second_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Joins two right-padded sequences so that the padding of both ends up at the right.

    Args:
        first, second: (B, n1, D), (B, n2, D); first_mask, second_mask: (B, n1), (B, n2), True = padding.

    Returns:
        (B, n1 + n2, D) and its mask (B, n1 + n2).
    """
    batch, n1, width = first.shape
    n2 = second.shape[1]
    valid1, valid2 = ((~mask).sum(dim=1, keepdim=True) for mask in (first_mask, second_mask))  # (B, 1)
    place = torch.arange(n1 + n2, device=first.device)
    joined = torch.cat((first.to(second.dtype), second.new_zeros(batch, n2, width)), dim=1)
    index = (valid1 + place[:n2])[..., None].expand(-1, -1, width)
    return joined.scatter(1, index, second), place >= valid1 + valid2


class SequenceGeometryEncoder(nn.Module):
    """Boxes and points -> tokens that know their place, what the image shows there, and each other."""

    def __init__(
        self, dim: int, num_heads: int, ffn_dim: int, num_layers: int, roi_size: int = 7, dropout: float = 0.1
    ):
        super().__init__()
        self.label_embed = nn.Embedding(2, dim)
        self.cls_embed = nn.Embedding(1, dim)
        self.points_direct_project = nn.Linear(2, dim)
        self.points_pool_project = nn.Linear(dim, dim)
        self.points_pos_enc_project = nn.Linear(dim, dim)
        self.boxes_direct_project = nn.Linear(4, dim)
        self.boxes_pool_project = nn.Conv2d(dim, dim, roi_size)
        self.boxes_pos_enc_project = nn.Linear(dim + 2, dim)
        self.final_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.img_pre_norm = nn.LayerNorm(dim)
        self.encode = nn.ModuleList(
            TransformerEncoderLayer(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )
        self.encode_norm = nn.LayerNorm(dim)
        self.position_encoding = PositionEmbeddingSine(dim)
        self.roi_size = roi_size

    def forward(
        self, prompt: Prompt, image_tokens: Tensor, pos: Tensor, grid_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Encodes one prompt per pair.

        Args:
            prompt: of the same B.
            image_tokens, pos: (B, HW, C) image features and their positions; grid_size: (H, W).

        Returns:
            Tokens (B, Ng, C) and their mask (B, Ng).
        """
        points, boxes = prompt.point_embeddings.transpose(0, 1), prompt.box_embeddings.transpose(0, 1)
        cls = self.cls_embed.weight.expand(len(image_tokens), 1, -1)
        point_tokens = box_tokens = cls[:, :0]
        if points.shape[1] or boxes.shape[1]:
            # Only pooling sees normalised features; the attention below reads the raw ones.
            features = self.img_pre_norm(image_tokens).transpose(1, 2).unflatten(2, grid_size)  # (B, C, H, W)
            if points.shape[1]:
                point_tokens = self._encode_points(points, prompt.point_labels.T, features)
            if boxes.shape[1]:
                box_tokens = self._encode_boxes(boxes, prompt.box_labels.T, features)
        tokens, mask = concat_padded(point_tokens, prompt.point_mask, box_tokens, prompt.box_mask)
        tokens, mask = concat_padded(tokens, mask, cls, mask.new_zeros(len(cls), 1))
        tokens = self.norm(self.final_proj(tokens))
        key = image_tokens + pos
        for layer in self.encode:
            tokens = layer(tokens, key, image_tokens, padding_mask=mask)
        return self.encode_norm(tokens), mask

    def _encode_points(self, points: Tensor, labels: Tensor, features: Tensor) -> Tensor:
        """(B, Np, 2), (B, Np), (B, C, H, W) -> (B, Np, C)."""
        grid = (2 * points[:, :, None] - 1).to(features.dtype)
        pooled = F.grid_sample(features, grid, align_corners=False)[..., 0].transpose(
            1, 2
        )  # (B, C, Np, 1) -> (B, Np, C)
        place = self.position_encoding.encode(points).flatten(-2)  # x half first
        dtype = features.dtype
        token = self.points_direct_project(points.to(dtype)) + self.points_pool_project(pooled)
        return self.label_embed(labels) + (token + self.points_pos_enc_project(place.to(dtype)))

    def _encode_boxes(self, boxes: Tensor, labels: Tensor, features: Tensor) -> Tensor:
        """(B, Nb, 4), (B, Nb), (B, C, H, W) -> (B, Nb, C)."""
        batch, count = boxes.shape[:2]
        height, width = features.shape[-2:]
        x0, y0, x1, y1 = box_cxcywh_to_xyxy(boxes.float()).unbind(-1)
        corners = torch.stack((width * x0, height * y0, width * x1, height * y1), dim=-1)
        # float32 also under lower precision: cell coordinates would be rounded otherwise.
        regions = roi_align(features.float(), list(corners), self.roi_size).to(features.dtype)
        pooled = self.boxes_pool_project(regions).view(batch, count, -1)
        place = self.position_encoding.encode(boxes[..., [1, 0]]).flatten(-2)  # y half first
        place = torch.cat((place, boxes[..., [3, 2]]), dim=-1)  # then h, w as they are
        token = self.boxes_direct_project(boxes.to(features.dtype)) + pooled
        return self.label_embed(labels) + (token + self.boxes_pos_enc_project(place.to(features.dtype)))
