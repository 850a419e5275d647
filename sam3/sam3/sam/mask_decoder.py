"""Masks, their quality and their tokens from an image embedding and encoded prompts.

From "Segment Anything" (Kirillov et al., 2023), appendix A; the high-resolution maps and object scores come from
"SAM 2: Segment Anything in Images and Videos" (Ravi et al., 2024).

Letters: B prompts, n images (1 shared by all prompts, or B), C channels, h w rows and columns of the image embedding,
N tokens of a prompt, M = num_multimask_outputs + 1 masks in all, K masks returned (M - 1 or 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sam3.model.layer_norm import LayerNorm2d
from sam3.model.model_misc import MLP


@dataclass(frozen=True)
class DecodedMasks:
    """What the decoder says about B prompts.

    Attributes:
        masks: (B, K, 4h, 4w) logits.
        ious: (B, K) predicted IoU of each mask; in 0..1 with `iou_sigmoid`.
        tokens: (B, K, C) the output tokens behind the masks.
        object_logits: (B, 1), above 0 where the object is visible; None without `object_scores`.
    """

    masks: Tensor
    ious: Tensor
    tokens: Tensor
    object_logits: Tensor | None


class MaskDecoder(nn.Module):
    """The decoder of SAM, and with its options that of the trackers that followed.

    Mask 0 is meant for prompts that leave no doubt, masks 1 and up for the readings of a doubtful one.

    Args:
        dim: C, a multiple of 8.
        transformer: maps image (n, h*w, C), its positions and tokens (B, N, C) to new tokens and image (B, h*w, C).
        num_multimask_outputs: M - 1.
        iou_head_depth: linears of the head that predicts the IoU.
        iou_head_hidden_dim: its hidden width.
        high_res_features: adds maps of 4x and 2x the embedding's resolution while upscaling (`conv_s0` and `conv_s1`
            bring them to C/8 and C/4 channels; the caller applies these once per image).
        iou_sigmoid: squashes the predicted IoU to 0..1.
        object_scores: adds a token that tells whether the object is visible.
        stability_threshold: a single mask less stable than this gives way, in eval mode, to the best of the others;
            None keeps mask 0 always, as the first SAM does.
        stability_delta: shift of the logits that a stable mask survives.
    """

    def __init__(
        self,
        dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        high_res_features: bool = False,
        iou_sigmoid: bool = False,
        object_scores: bool = False,
        stability_threshold: float | None = 0.98,
        stability_delta: float = 0.05,
    ):
        super().__init__()
        if dim % 8:
            raise ValueError(f"the mask decoder needs a width that is a multiple of 8, got {dim}")
        num_masks = num_multimask_outputs + 1
        self.iou_sigmoid = iou_sigmoid
        self.stability_threshold = stability_threshold
        self.stability_delta = stability_delta
        self.transformer = transformer
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_masks, dim)
        self.obj_score_token = nn.Embedding(1, dim) if object_scores else None
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.conv_s0 = nn.Conv2d(dim, dim // 8, 1) if high_res_features else None
        self.conv_s1 = nn.Conv2d(dim, dim // 4, 1) if high_res_features else None
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, 3) for _ in range(num_masks))
        self.iou_prediction_head = MLP(dim, iou_head_hidden_dim, num_masks, iou_head_depth)
        self.pred_obj_score_head = MLP(dim, dim, 1, 3) if object_scores else None

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask_output: bool,
        high_res: tuple[Tensor, Tensor] | None = None,
    ) -> DecodedMasks:
        """Decodes all masks and keeps those asked for.

        Args:
            image_embeddings: (n, C, h, w).
            image_pe: (1, C, h, w) position codes of the cells.
            sparse: (B, N, C) and dense: (B, C, h, w), the encoded prompts.
            multimask_output: True keeps masks 1 and up. False keeps one: mask 0, or in eval mode, where mask 0 is not
                stable, the mask of the best predicted IoU among the others (the token stays that of mask 0).
            high_res: maps (n, C/8, 4h, 4w) and (n, C/4, 2h, 2w); given exactly if the decoder has `high_res_features`.
        """
        every = self.forward_all(image_embeddings, image_pe, sparse, dense, high_res)
        if multimask_output:
            return DecodedMasks(every.masks[:, 1:], every.ious[:, 1:], every.tokens[:, 1:], every.object_logits)
        masks, ious = every.masks[:, :1], every.ious[:, :1]
        if not self.training and self.stability_threshold is not None:
            masks, ious = self._most_certain(every.masks, every.ious)
        return DecodedMasks(masks, ious, every.tokens[:, :1], every.object_logits)

    def forward_all(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        high_res: tuple[Tensor, Tensor] | None = None,
    ) -> DecodedMasks:
        """As `forward`, with all M masks in their order and nothing selected."""
        assert (high_res is None) == (self.conv_s0 is None), "high-resolution maps go with high_res_features"
        if dense.stride(0) == 0:  # one dense prompt, expanded: with one image, the prompts share the sum too
            dense = dense[:1]
        source = image_embeddings + dense  # (n, C, h, w)
        image = source.flatten(2).transpose(1, 2).contiguous()  # (n, h*w, C)
        tokens = torch.cat((self._own_tokens().expand(sparse.shape[0], -1, -1), sparse), dim=1)
        tokens, image = self.transformer(image, image_pe.flatten(2).transpose(1, 2), tokens)

        if self.obj_score_token is None:
            object_logits = None
        else:
            object_logits, tokens = self.pred_obj_score_head(tokens[:, 0]), tokens[:, 1:]
        ious = self.iou_prediction_head(tokens[:, 0])
        mask_tokens = tokens[:, 1 : 1 + len(self.output_hypernetworks_mlps)]  # (B, M, C)
        maps = self._upscale(image.transpose(1, 2).unflatten(2, source.shape[-2:]), high_res)
        return DecodedMasks(
            masks=self._draw(mask_tokens, maps),
            ious=ious.sigmoid() if self.iou_sigmoid else ious,
            tokens=mask_tokens,
            object_logits=object_logits,
        )

    def _own_tokens(self) -> Tensor:
        """(1, 1 + M or 2 + M, C): object score, IoU, masks."""
        embeddings = (self.obj_score_token, self.iou_token, self.mask_tokens)
        return torch.cat([embedding.weight for embedding in embeddings if embedding is not None])[None]

    def _upscale(self, image: Tensor, high_res: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, C, h, w) -> (B, C/8, 4h, 4w)."""
        if high_res is None:
            return self.output_upscaling(image)
        double, norm, act, quadruple, last_act = self.output_upscaling
        fine, middle = high_res
        return last_act(quadruple(act(norm(double(image) + middle))) + fine)

    def _draw(self, mask_tokens: Tensor, maps: Tensor) -> Tensor:
        """Each mask is the product of the maps (B, C/8, 4h, 4w) with the vector its token (of (B, M, C)) turns into."""
        networks = self.output_hypernetworks_mlps
        vectors = torch.stack([mlp(token) for mlp, token in zip(networks, mask_tokens.unbind(1), strict=True)], dim=1)
        return (vectors @ maps.flatten(2)).unflatten(2, maps.shape[-2:])  # (B, M, C/8) x (B, C/8, 16hw)

    def _most_certain(self, masks: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
        """Mask 0 where it is stable, else the one of the best IoU among the others: (B, 1, 4h, 4w) and (B, 1)."""
        single = masks[:, 0].flatten(1)
        inner = (single > self.stability_delta).sum(1)
        outer = (single > -self.stability_delta).sum(1)
        stability = torch.where(outer > 0, inner / outer, 1.0)  # an empty mask is stable
        picked = torch.where(stability >= self.stability_threshold, 0, 1 + ious[:, 1:].argmax(dim=1))
        rows = torch.arange(len(picked), device=picked.device)
        return masks[rows, picked][:, None], ious[rows, picked][:, None]
