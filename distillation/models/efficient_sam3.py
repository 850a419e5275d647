"""The slim student: everything that SAM3 says about a picture and a phrase, from 100.3 million parameters.

Letters: B pictures, Q queries (100), C channels (256), S side of the input (1008), L tokens of a phrase (77),
N = H W tokens of the coarsest level (63 x 63).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distillation.config import BN_MODES
from distillation.models.detr import SlimDecoder
from distillation.models.mask_decoder import MaskDecoder
from distillation.models.positions import PixelPositions
from distillation.models.resampler import PerceiverResampler
from distillation.models.text import TextEncoder
from distillation.models.tokenizer import CONTEXT_LENGTH, padding_of
from distillation.models.vision import VisionEncoder
from sam3.model.box_ops import box_cxcywh_to_xyxy
from sam3.model.encoder import TransformerEncoderFusion
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.scoring import DotProductScoring
from sam3.transforms import Preprocess


@dataclass(frozen=True)
class EfficientSAM3Config:
    """Sizes of the student; the defaults are those of the full one."""

    image_size: int = 1008  # side of the square input, pixels
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # per RGB channel, of pixels in 0..1
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    # vision
    backbone_dims: tuple[int, ...] | None = None  # channels of RepViT's four stages; None: those of M2.3
    backbone_depth: tuple[int, ...] | None = None  # blocks of its stages
    fpn_final_relu: bool = False  # True: maps without negative numbers
    pos_normalize: bool = True  # positions run to 2 pi on any grid, as the teacher's; False: they count cells
    # text
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = 49408
    # transformers and heads
    dim: int = 256
    heads: int = 8
    ffn_dim: int = 1024
    encoder_layers: int = 3
    decoder_layers: int = 3
    num_queries: int = 100
    dropout: float = 0.1
    num_latents: int = 64  # of the resampler
    resampler_layers: int = 2

    @classmethod
    def preset(cls, name: str) -> EfficientSAM3Config:
        """`full`, or `tiny` (the same code at small widths). ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"unknown student {name!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @property
    def preprocess(self) -> Preprocess:
        """How a picture becomes the input."""
        mean, std = (tuple(255 * value for value in values) for values in (self.pixel_mean, self.pixel_std))
        return Preprocess(self.image_size, "square", mean, std)

    def to_meta(self) -> dict[str, Any]:
        """Numbers, lists and None, for a file's meta; `from_meta` gives the same config."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> EfficientSAM3Config:
        """ValueError if a field is missing or unknown."""
        wanted = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(meta, Mapping) or set(meta) != wanted:
            found = sorted(set(meta) ^ wanted) if isinstance(meta, Mapping) else type(meta).__name__
            raise ValueError(f"the sizes of the student are not those of this version, which differ in {found}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta.items()})


PRESETS = {
    "full": EfficientSAM3Config(),
    "tiny": EfficientSAM3Config(
        image_size=224,
        backbone_dims=(16, 24, 32, 48),
        backbone_depth=(1, 1, 2, 1),
        text_width=32,
        text_heads=2,
        text_layers=2,
        dim=64,
        ffn_dim=128,
        encoder_layers=2,
        num_queries=10,
        num_latents=8,
        resampler_layers=1,
    ),
}


class EfficientSAM3(nn.Module):
    """RepViT, MobileCLIP's text tower and slim SAM3 heads, with random weights.

    BatchNorm follows `set_bn_mode`, "frozen_backbone" from the start.
    """

    def __init__(self, config: EfficientSAM3Config):
        super().__init__()
        c = config
        self.config = config
        self.vision = VisionEncoder(c.dim, c.backbone_dims, c.backbone_depth, c.fpn_final_relu)
        self.text = TextEncoder(c.dim, c.text_width, c.text_heads, c.text_layers, c.context_length, c.vocab_size)
        self.positions = PositionEmbeddingSine(c.dim) if c.pos_normalize else PixelPositions(c.dim)
        self.encoder = TransformerEncoderFusion(c.dim, c.heads, c.ffn_dim, c.encoder_layers, c.dropout)
        self.decoder = SlimDecoder(c.dim, c.heads, c.ffn_dim, c.decoder_layers, c.num_queries, c.dropout)
        self.scoring = DotProductScoring(c.dim, c.ffn_dim, c.dropout)
        self.mask_decoder = MaskDecoder(c.dim)
        self.perceiver_resampler = PerceiverResampler(c.dim, c.heads, c.ffn_dim, c.resampler_layers, c.num_latents)
        self.bn_mode = "frozen_backbone"

    @property
    def preprocess(self) -> Preprocess:
        """How a picture becomes `pixel_values`."""
        return self.config.preprocess

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.decoder.query_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the pictures that go in."""
        return self.decoder.query_embed.weight.dtype

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_padding_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Pictures, each with a phrase -> what is meant by the phrase.

        Args:
            pixel_values: (B, 3, S, S) as `preprocess` normalises it.
            input_ids: (B, L) long, from `distillation.models.tokenizer`.
            text_padding_mask: (B, L) bool, True = ignore; None: what follows the first end token.

        Returns:
            `pred_masks` (B, Q, S/4, S/4) logits; `pred_boxes` (B, Q, 4) xyxy in 0..1 of the square, from a centre and
            a size in 0..1, so that a box may stand out of it; `pred_logits` (B, Q) in -12..12; `presence_logits`
            (B, 1) in -10..10; `semantic_seg` (B, 1, S/4, S/4) logits. All float32, under autocast too.

        Raises:
            ValueError: shapes that are none of these, such as the teacher's tokens.
        """
        outputs = self.forward_with_intermediates(pixel_values, input_ids, text_padding_mask)
        return {name: value for name, value in outputs.items() if name not in INTERMEDIATES}

    def forward_with_intermediates(
        self, pixel_values: Tensor, input_ids: Tensor, text_padding_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """As `forward`, with what the features are aligned on.

        `fpn_features`: three maps (B, C, S/4, S/4), S/8, S/16, fine to coarse; `encoder_output` (B, N, C) in row-major
        order of `encoder_hw` = (H, W). Features come in the precision in which they were computed.
        """
        self._check_inputs(pixel_values, input_ids, text_padding_mask)
        padding = padding_of(input_ids) if text_padding_mask is None else text_padding_mask
        levels = self.encode_image(pixel_values)
        found = self.ground(levels, self.encode_text(input_ids), padding)
        masks, semantic = self.mask_decoder(levels, found["encoder_output"], found.pop("queries"))
        return {**found, "pred_masks": masks, "semantic_seg": semantic, "fpn_features": levels}

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, S, S) -> `fpn_features`, which serve any number of phrases."""
        return self.vision(pixel_values)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, C), which serves any number of pictures."""
        return self.text(input_ids)

    def ground(self, levels: tuple[Tensor, ...], prompt: Tensor, padding: Tensor) -> dict[str, Any]:
        """Look for a phrase in encoded pictures: all outputs but the masks.

        Args:
            levels, prompt: of `encode_image` and `encode_text`; padding: (B, L) bool, True = ignore.

        Returns:
            Boxes, logits, presence and the encoder's output as `forward_with_intermediates` names them, and `queries`
            (B, Q, C); `mask_decoder` makes masks of any of those.
        """
        # The sums over layers stay in the precision of the weights, also where autocast made the map of half.
        coarse = levels[-1].to(self.dtype)
        pos = _as_tokens(self.positions(coarse))
        memory = self.encoder(_as_tokens(coarse), pos, prompt, padding)
        decoded = self.decoder(memory, pos, prompt, padding, coarse.shape[-2:])
        return {
            "pred_boxes": box_cxcywh_to_xyxy(decoded.boxes),
            "pred_logits": self.scoring(decoded.queries, prompt, padding)[..., 0].float(),
            "presence_logits": decoded.presence_logits,
            "encoder_output": memory,
            "encoder_hw": tuple(coarse.shape[-2:]),
            "queries": decoded.queries,
        }

    def _check_inputs(self, pixel_values: Tensor, input_ids: Tensor, padding: Tensor | None) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}; wanted (B, 3, S, S)")
        wanted = (len(pixel_values), self.config.context_length)
        if input_ids.shape != wanted:
            raise ValueError(
                f"input_ids are {tuple(input_ids.shape)}; this student reads {wanted}, from its own tokenizer "
                "(distillation.models.tokenizer.tokenize), not the teacher's"
            )
        if padding is not None and padding.shape != wanted:
            raise ValueError(f"text_padding_mask is {tuple(padding.shape)}; wanted {wanted}, as the ids")

    # For training ---------------------------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self, enable: bool = True) -> None:
        """Compute what is inside the blocks of RepViT, the adapters and the layers of encoder and decoder again in the
        backward pass, rather than keep it."""
        self.vision.activation_checkpointing = enable
        self.encoder.activation_checkpointing = enable
        self.decoder.activation_checkpointing = enable

    def set_bn_mode(self, mode: str) -> None:
        """Whether BatchNorm uses and updates the statistics of the batch while training; `.train()` keeps to it.

        "train": everywhere; "frozen_backbone": in the adapters only; "eval": nowhere. Its scales and offsets are
        trained in any mode. ValueError for another word.
        """
        if mode not in BN_MODES:
            raise ValueError(f"bn_mode is {mode!r}; choose one of {', '.join(BN_MODES)}")
        self.bn_mode = mode
        self.train(self.training)

    def train(self, mode: bool = True) -> EfficientSAM3:
        super().train(mode)
        if mode and self.bn_mode != "train":
            frozen = self.vision.backbone if self.bn_mode == "frozen_backbone" else self
            for module in frozen.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze_unused(self) -> int:
        """Take `requires_grad` from all parameters that no output depends on; returns how many numbers they hold.

        Weight decay would shrink them, and distributed training would wait for their gradients.
        """
        modules = [*self.vision.unused_modules(), *self.mask_decoder.unused_modules(), self.perceiver_resampler]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(False)
        return sum(parameter.numel() for parameter in parameters)

    def no_weight_decay(self) -> set[str]:
        """Names of tables with two dimensions, whose rows are no directions: embeddings, queries and positions."""
        return {
            "text.tower.token_embedding.weight",
            "text.tower.positional_embedding",
            "decoder.query_embed.weight",
            "decoder.reference_points.weight",
            "decoder.presence_token.weight",
            "perceiver_resampler.latents",
        }


INTERMEDIATES = ("fpn_features", "encoder_output", "encoder_hw")


def _as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H W, C)
