"""The first SAM and its small descendant MobileSAM, in one class with the key names of the published files.

From "Segment Anything" (Kirillov et al., 2023) and "Faster Segment Anything: Towards Lightweight SAM for Mobile
Applications" (Zhang et al., 2023). Reading and writing the files: `sam3.sam1_files`.

Letters: B images, P prompts, k points of a prompt, S input side in pixels, G = S / 16 grid side, C = 256 channels,
K masks of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sam3.backbones.mobile_sam_vit import MobileSamViT
from sam3.backbones.sam_vit import PATCH_SIZE, SamViT
from sam3.sam.mask_decoder import DecodedMasks, MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder
from sam3.sam.transformer import TwoWayTransformer
from sam3.transforms import Preprocess

EMBED_DIM = 256
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB on 0..255
MOBILE_KEY = "image_encoder.layers.0.blocks.0.conv1.c.weight"
PATCH_KEY = "image_encoder.patch_embed.proj.weight"


@dataclass(frozen=True)
class ViTShape:
    """What sets one ViT of the family apart from the others."""

    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    image_size: int = 1024


VITS = {
    "vit_h": ViTShape(1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": ViTShape(1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": ViTShape(768, 12, 12, (2, 5, 8, 11)),
    "vit_tiny": ViTShape(192, 4, 3, (1, 3), image_size=256),  # no published model: for tests and the sample set
}
SAM1_TYPES = ("vit_h", "vit_l", "vit_b", "vit_t", "vit_tiny")  # vit_t is MobileSAM


class Sam1(nn.Module):
    """Image encoder, prompt encoder and mask decoder.

    Attributes:
        type: one of SAM1_TYPES.
        image_size: S.
        preprocess: how a picture becomes the encoder's input.
    """

    def __init__(self, type: str, image_encoder: nn.Module, image_size: int):
        super().__init__()
        grid = image_size // PATCH_SIZE
        self.type = type
        self.image_size = image_size
        self.preprocess = Preprocess(image_size, "pad", MEAN, STD)
        self.image_encoder = image_encoder
        self.prompt_encoder = PromptEncoder(EMBED_DIM, (grid, grid), (image_size, image_size))
        self.mask_decoder = MaskDecoder(
            EMBED_DIM,
            TwoWayTransformer(depth=2, dim=EMBED_DIM, heads=8, mlp_dim=2048),
            stability_threshold=None,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Normalised pictures (B, 3, S, S) -> embeddings (B, C, G, G). Raises ValueError for another size."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this {self.type} takes {self.image_size}x{self.image_size} pictures, got "
                f"{images.shape[-2]}x{images.shape[-1]}; prepare them with its `preprocess`"
            )
        return self.image_encoder(images)

    def decode(
        self,
        embedding: Tensor,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        multimask: bool,
    ) -> DecodedMasks:
        """Masks of P prompts; without points and boxes, of one empty prompt.

        Args:
            embedding: (1, C, G, G) for all prompts, or (P, C, G, G).
            points: coordinates (P, k, 2), x and y in pixels of the S x S frame, and labels (P, k): -1 padding,
                0 negative, 1 positive, 2 and 3 the corners of a box.
            boxes: (P, 4) x0 y0 x1 y1 in the same pixels.
            multimask: K = 3 masks for a prompt that leaves doubt, else K = 1.

        Returns:
            `masks` (P, K, 4G, 4G) logits and `ious` (P, K), a regression that may leave 0..1.
        """
        sparse, dense = self.prompt_encoder(points, boxes)
        return self.mask_decoder(embedding, self.prompt_encoder.get_dense_pe(), sparse, dense, multimask)


def build_sam1(type: str, image_size: int | None = None) -> Sam1:
    """A model with random weights (or none, under `torch.device("meta")`).

    image_size: pixels, a multiple of 16; None is 1024 (vit_tiny: 256). Raises ValueError for another type or size.
    """
    if type not in SAM1_TYPES:
        raise ValueError(f"no SAM-1 model of the type '{type}'; choose one of {', '.join(SAM1_TYPES)}")
    shape = VITS.get(type)
    size = image_size if image_size is not None else shape.image_size if shape else 1024
    if size < PATCH_SIZE or size % PATCH_SIZE:
        raise ValueError(f"image size {size} is not a multiple of the patch size {PATCH_SIZE}")
    if shape is None:
        return Sam1(type, MobileSamViT(EMBED_DIM), size)
    encoder = SamViT(size, shape.dim, shape.depth, shape.heads, shape.global_blocks, out_dim=EMBED_DIM)
    return Sam1(type, encoder, size)


def infer_type(tensors: Mapping[str, Tensor]) -> str:
    """Which of SAM1_TYPES the entries of a file belong to. Raises ValueError naming what was found instead."""
    if MOBILE_KEY in tensors:
        return "vit_t"
    if PATCH_KEY in tensors:
        dim = tensors[PATCH_KEY].shape[0]
        found = next((type for type, shape in VITS.items() if shape.dim == dim), None)
        if found is None:
            widths = ", ".join(f"{shape.dim} ({type})" for type, shape in VITS.items())
            raise ValueError(f"found a ViT image encoder of width {dim}; wanted {widths}")
        return found
    roots = sorted({key.split(".", 1)[0] for key in tensors})
    more = ", ..." if len(roots) > 6 else ""
    raise ValueError(
        f"found {len(tensors)} entries below {', '.join(roots[:6])}{more}, none of them of a SAM-1 image encoder; "
        f"wanted '{PATCH_KEY}' (vit_h, vit_l, vit_b) or '{MOBILE_KEY}' (vit_t)"
    )
