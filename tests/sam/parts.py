"""SAM parts of any size, filled with reproducible weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder
from sam3.sam.transformer import TwoWayTransformer
from tests.parity.fill import fill_

DIM, GRID, SIDE = 64, 16, 224  # the tiny preset
OPTIONS = {"high_res_features": True, "iou_sigmoid": True, "object_scores": True}  # what the tracker turns on


def prompt_encoder(dim: int = DIM, grid: int = GRID, side: int = SIDE) -> PromptEncoder:
    return filled(PromptEncoder(dim, (grid, grid), (side, side)))


def mask_decoder(dim: int = DIM, **options) -> MaskDecoder:
    transformer = TwoWayTransformer(2, dim, 8, 2 * dim)
    return filled(MaskDecoder(dim, transformer, iou_head_hidden_dim=dim, **options))


def filled(module: nn.Module) -> nn.Module:
    fill_(module.state_dict(), "sam.")
    return module.eval()


def decoder_inputs(batch: int, images: int, seed: int = 0) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """Arguments of `MaskDecoder.forward` (with high-resolution maps), the dense prompt as without a mask."""
    normal = normals(seed)
    return {
        "image_embeddings": normal(images, DIM, GRID, GRID),
        "image_pe": normal(1, DIM, GRID, GRID),
        "sparse": normal(batch, 3, DIM),
        "dense": normal(1, DIM, 1, 1).expand(batch, -1, GRID, GRID),
        "high_res": (
            normal(images, DIM // 8, 4 * GRID, 4 * GRID),
            normal(images, DIM // 4, 2 * GRID, 2 * GRID),
        ),
    }


def normals(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)
