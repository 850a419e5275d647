"""transformers' SAM with the weights of one of ours."""

from __future__ import annotations

import re

import pytest
from torch import Tensor

from sam3.backbones.sam_vit import SamViT
from sam3.sam.sam1 import VITS, Sam1

pytest.importorskip("transformers")
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from tests.sam.test_against_transformers import FIRST_NAMES, SHARED_NAMES

# Part of our key below `image_encoder.` -> part of theirs below `vision_encoder.`
VISION_NAMES = (
    (r"^patch_embed\.proj", "patch_embed.projection"),
    (r"^blocks\.(\d+)\.norm", r"layers.\1.layer_norm"),
    (r"^blocks", "layers"),
    (r"^neck\.0", "neck.conv1"),
    (r"^neck\.1", "neck.layer_norm1"),
    (r"^neck\.2", "neck.conv2"),
    (r"^neck\.3", "neck.layer_norm2"),
)


def renamed(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    result = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def vision_config(encoder: SamViT, heads: int, global_blocks: tuple[int, ...], window_size: int) -> SamVisionConfig:
    dim = encoder.pos_embed.shape[-1]
    return SamVisionConfig(
        hidden_size=dim,
        mlp_dim=4 * dim,
        output_channels=256,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=heads,
        image_size=encoder.img_size,
        window_size=window_size,
        global_attn_indexes=list(global_blocks),
        num_pos_feats=128,
        attn_implementation="eager",
    )


def vision_encoder(encoder: SamViT, heads: int, global_blocks: tuple[int, ...], window_size: int) -> SamVisionEncoder:
    theirs = SamVisionEncoder(vision_config(encoder, heads, global_blocks, window_size))
    theirs.load_state_dict(renamed(encoder.state_dict(), VISION_NAMES))
    return theirs.eval()


def whole_model(ours: Sam1) -> SamModel:
    """Their model for a ViT-shaped one of ours."""
    shape, grid = VITS[ours.type], ours.image_size // 16
    prompts = SamPromptEncoderConfig(image_size=ours.image_size, patch_size=16, image_embedding_size=grid)
    decoder = SamMaskDecoderConfig(layer_norm_eps=1e-5)  # their default epsilon is not that of the published model
    vision = vision_config(ours.image_encoder, shape.heads, shape.global_blocks, window_size=14)
    theirs = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    parts = {
        "vision_encoder": renamed(ours.image_encoder.state_dict(), VISION_NAMES),
        "prompt_encoder": renamed(ours.prompt_encoder.state_dict(), SHARED_NAMES + FIRST_NAMES),
        "mask_decoder": renamed(ours.mask_decoder.state_dict(), SHARED_NAMES),
    }
    state = {f"{part}.{key}": value for part, entries in parts.items() for key, value in entries.items()}
    matrix = state["prompt_encoder.shared_embedding.positional_embedding"]
    theirs.load_state_dict({**state, "shared_image_embedding.positional_embedding": matrix})
    return theirs.eval()
