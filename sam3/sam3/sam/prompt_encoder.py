"""Points, boxes and masks as embeddings for the mask decoder.

From "Segment Anything" (Kirillov et al., 2023), appendix A; the position code is that of "Fourier Features Let Networks
Learn High Frequency Functions in Low Dimensional Domains" (Tancik et al., 2020).

Letters: B prompts, P points of a prompt, C channels, h w rows and columns of the image embedding, H W of the picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.layer_norm import LayerNorm2d

PADDING, NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = range(-1, 4)  # labels of a point
MASK_SCALE = 4  # a mask prompt has so many rows for each row of the image embedding


class RandomFourierPosition(nn.Module):
    """Sines and cosines of random (but stored) mixtures of x and y."""

    def __init__(self, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"Fourier positions need an even width, got {dim}")
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """Places (..., 2), x first, in 0..1 -> (..., dim) float32."""
        across, down = self.positional_encoding_gaussian_matrix.float()
        x, y = (2 * xy.float() - 1).unbind(-1)
        # Written without a matrix product, which autocast would run in half precision.
        angle = 2 * math.pi * (x[..., None] * across + y[..., None] * down)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class PromptEncoder(nn.Module):
    """Encodes prompts, and tells the position code of every cell of the image embedding.

    Args:
        embed_dim: C.
        image_embedding_size: (h, w).
        input_image_size: (H, W) pixels, the frame in which points and boxes are given.
        mask_in_chans: width before the last convolution of the mask branch.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int = 16,
    ):
        super().__init__()
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        self.mask_input_size = tuple(MASK_SCALE * side for side in image_embedding_size)
        self.pe_layer = RandomFourierPosition(embed_dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, 2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, 2, stride=2),
            LayerNorm2d(mask_in_chans),
            nn.GELU(),
            nn.Conv2d(mask_in_chans, embed_dim, 1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)
        self._dense_pe: tuple[Tensor, int | None, Tensor] | None = None

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encodes B prompts; with none of the three it is one empty prompt.

        Args:
            points: coordinates (B, P, 2), x and y in pixels of the H x W frame, and labels (B, P): -1 padding,
                0 negative, 1 positive, 2 and 3 the top left and bottom right corners of a box. Other labels are not
                looked for (that would wait for the GPU).
            boxes: (B, 4) x0 y0 x1 y1 in the same pixels. Without boxes, points get one padding point more.
            masks: (B, 1, 4h, 4w) logits.

        Returns:
            sparse (B, n, C), n = P + 1 for points, 2 for boxes, P + 2 for both, 0 for neither.
            dense (B, C, h, w); without masks an expanded view of one vector, not to be written to.

        Raises:
            ValueError: masks of another size.
        """
        batch = next((x.shape[0] for x in (points and points[0], boxes, masks) if x is not None), 1)
        if points is None and boxes is None:
            sparse = self.no_mask_embed.weight.new_empty(batch, 0, self.no_mask_embed.embedding_dim)
        else:
            sparse = self._encode_points(*_join_points(points, boxes))
        return sparse, self._encode_masks(masks, batch)

    def get_dense_pe(self) -> Tensor:
        """Position codes of the centres of the cells: (1, C, h, w), kept until the random matrix changes."""
        if torch.compiler.is_compiling():  # a traced graph must not keep its own tensors
            return self._make_dense_pe()
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        version = None if matrix.is_inference() else matrix._version
        if self._dense_pe is None or self._dense_pe[0] is not matrix or self._dense_pe[1] != version:
            # A tensor born under inference_mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._dense_pe = matrix, version, self._make_dense_pe()
        return self._dense_pe[2]

    def _make_dense_pe(self) -> Tensor:
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        rows, columns = (
            (torch.arange(n, dtype=torch.float32, device=matrix.device) + 0.5) / n for n in self.image_embedding_size
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        code = self.pe_layer(torch.stack((x, y), dim=-1))  # (h, w, C)
        return code.to(matrix.dtype).permute(2, 0, 1)[None]

    def _encode_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """(B, P, 2), (B, P) -> (B, P, C) in the dtype of the weights."""
        rows, columns = self.input_image_size
        x, y = (coords.float() + 0.5).unbind(-1)  # a pixel stands for its centre
        code = self.pe_layer(torch.stack((x / columns, y / rows), dim=-1))
        kinds = torch.cat([embedding.weight for embedding in (self.not_a_point_embed, *self.point_embeddings)])
        code = code.masked_fill((labels == PADDING)[..., None], 0)
        return code.to(kinds.dtype) + F.embedding(labels.long() - PADDING, kinds)

    def _encode_masks(self, masks: Tensor | None, batch: int) -> Tensor:
        if masks is None:
            return self.no_mask_embed.weight[:, :, None, None].expand(batch, -1, *self.image_embedding_size)
        if tuple(masks.shape[1:]) != (1, *self.mask_input_size):
            wanted = "x".join(map(str, (1, *self.mask_input_size)))
            raise ValueError(f"mask prompts have shape {tuple(masks.shape)}, wanted Bx{wanted}: resize them first")
        return self.mask_downscaling(masks)


def _join_points(points: tuple[Tensor, Tensor] | None, boxes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Points, then the corners of the box or else one padding point: coordinates (B, P', 2) and labels (B, P')."""
    if boxes is None:
        coords, labels = points
        return F.pad(coords, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=PADDING)
    corners = boxes.unflatten(-1, (2, 2))  # (B, 2, 2)
    kinds = torch.arange(BOX_TOP_LEFT, BOX_BOTTOM_RIGHT + 1, device=boxes.device).expand(boxes.shape[0], -1)
    if points is None:
        return corners, kinds
    return torch.cat((points[0], corners), dim=1), torch.cat((points[1], kinds), dim=1)
