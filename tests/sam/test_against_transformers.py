"""Prompt encoder and mask decoder against those of transformers with the same weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from tests.sam.parts import DIM, GRID, OPTIONS, SIDE, decoder_inputs, mask_decoder, normals, prompt_encoder

pytest.importorskip("transformers")
from transformers import (
    Sam3TrackerMaskDecoderConfig,
    Sam3TrackerPromptEncoderConfig,
    SamConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
)
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerMaskDecoder, Sam3TrackerPromptEncoder

# Part of our key -> part of theirs, applied in this order.
SHARED_NAMES = (
    (r"^pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"^mask_downscaling\.0", "mask_embed.conv1"),
    (r"^mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"^mask_downscaling\.3", "mask_embed.conv2"),
    (r"^mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"^mask_downscaling\.6", "mask_embed.conv3"),
    (r"\bnorm(\d|_final_attn)", r"layer_norm\1"),
    (r"^output_upscaling\.0", "upscale_conv1"),
    (r"^output_upscaling\.1", "upscale_layer_norm"),
    (r"^output_upscaling\.3", "upscale_conv2"),
    (r"(mlps\.\d|head)\.layers\.0", r"\1.proj_in"),
    (r"(mlps\.\d|head)\.layers\.2", r"\1.proj_out"),
    (r"(mlps\.\d|head)\.layers\.1", r"\1.layers.0"),
)
FIRST_NAMES = ((r"^point_embeddings", "point_embed"),)
TRACKER_NAMES = ((r"out_proj", "o_proj"), (r"mlp\.lin1", "mlp.proj_in"), (r"mlp\.lin2", "mlp.proj_out"))


def their_state(ours: nn.Module, names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    state = {}
    for key, value in ours.state_dict().items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    return state


def tracker_encoder(ours: nn.Module) -> nn.Module:
    config = Sam3TrackerPromptEncoderConfig(hidden_size=DIM, image_size=SIDE, patch_size=SIDE // GRID)
    state = their_state(ours, SHARED_NAMES)
    points = [state.pop(f"point_embeddings.{label}.weight") for label in range(4)]
    theirs = Sam3TrackerPromptEncoder(config)
    theirs.load_state_dict({**state, "point_embed.weight": torch.cat(points)})
    return theirs.eval()


def first_encoder(ours: nn.Module) -> nn.Module:
    sizes = SamPromptEncoderConfig(
        hidden_size=DIM,
        image_size=SIDE,
        patch_size=SIDE // GRID,
        image_embedding_size=GRID,
    )
    config = SamConfig(prompt_encoder_config=sizes.to_dict(), vision_config={"num_pos_feats": DIM // 2})
    theirs = SamPromptEncoder(config)
    theirs.load_state_dict(their_state(ours, SHARED_NAMES + FIRST_NAMES))
    return theirs.eval()


def tracker_decoder(ours: nn.Module, **options) -> nn.Module:
    config = Sam3TrackerMaskDecoderConfig(hidden_size=DIM, mlp_dim=2 * DIM, iou_head_hidden_dim=DIM, **options)
    theirs = Sam3TrackerMaskDecoder(config)
    theirs.load_state_dict(their_state(ours, SHARED_NAMES + TRACKER_NAMES))
    return theirs.eval()


def first_decoder(ours: nn.Module) -> nn.Module:
    # Their default epsilon is not that of the published model.
    config = SamMaskDecoderConfig(hidden_size=DIM, mlp_dim=2 * DIM, iou_head_hidden_dim=DIM, layer_norm_eps=1e-5)
    theirs = SamMaskDecoder(config)
    theirs.load_state_dict(their_state(ours, SHARED_NAMES))
    return theirs.eval()


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-5, rtol=1e-5)


def prompts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points (4, 3, 2), labels (4, 3), boxes (4, 4) in pixels and mask logits (4, 1, 64, 64)."""
    normal = normals(seed)
    places = normal(4, 3, 2).sigmoid() * SIDE
    boxes = (normal(4, 2, 2).sigmoid() * SIDE).sort(dim=1).values.flatten(1)
    labels = torch.tensor([[1, 0, 1], [0, -1, -1], [2, 3, 1], [1, 1, -1]])
    return places, labels, boxes, 5 * normal(4, 1, 4 * GRID, 4 * GRID)


@torch.no_grad()
def test_prompt_encoder_of_the_tracker():
    ours = prompt_encoder()
    theirs = tracker_encoder(ours)
    coords, labels, boxes, masks = prompts()
    sparse, dense = ours((coords, labels), masks=masks)
    their_sparse, their_dense = theirs(coords[None], labels[None], None, masks)
    assert_near(sparse, their_sparse)
    assert_near(dense, their_dense)
    # Theirs pads after the box, as ours does when the corners are given as points.
    corners = boxes.unflatten(1, (2, 2)), torch.tensor([[2, 3]]).expand(4, -1)
    assert_near(ours(corners)[0], theirs(None, None, boxes[None], None)[0])


@torch.no_grad()
def test_prompt_encoder_of_the_first_sam():
    ours = prompt_encoder()
    theirs = first_encoder(ours)
    coords, labels, boxes, masks = prompts()
    labels = labels.clamp(max=1)  # corners are no point labels there
    sparse, dense = ours((coords, labels), masks=masks)
    their_sparse, their_dense = theirs(coords[None], labels[None], None, masks)
    assert_near(sparse, their_sparse)
    assert_near(dense, their_dense)
    assert_near(ours(boxes=boxes)[0], theirs(None, None, boxes[None], None)[0])
    both, dense = ours((coords, labels), boxes)
    their_both, their_dense = theirs(coords[None], labels[None], boxes[None], None)
    assert_near(both, their_both)
    assert_near(dense[:1], their_dense)


@torch.no_grad()
def test_position_code():
    ours = prompt_encoder()
    centres = (torch.arange(GRID) + 0.5) / GRID
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    for theirs in (tracker_encoder(ours), first_encoder(ours)):
        code = theirs.shared_embedding(torch.stack((x, y), dim=-1))
        assert_near(ours.get_dense_pe(), code.permute(2, 0, 1)[None])


def spread(inputs: dict, seed: int = 1) -> dict:
    """The inputs with another dense prompt for each prompt."""
    return {**inputs, "dense": normals(seed)(*inputs["dense"].shape)}


def their_arguments(inputs: dict, multimask: bool) -> dict:
    """One image with all its prompts; they take one dense prompt for each image."""
    arguments = {
        "image_embeddings": inputs["image_embeddings"],
        "image_positional_embeddings": inputs["image_pe"],
        "sparse_prompt_embeddings": inputs["sparse"][None],
        "dense_prompt_embeddings": inputs["dense"][: len(inputs["image_embeddings"])],
        "multimask_output": multimask,
    }
    return {**arguments, "high_resolution_features": list(inputs["high_res"])} if "high_res" in inputs else arguments


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("threshold", [0.98, 0.91, 0.0])  # none, one or all of the prompts are stable
def test_mask_decoder_of_the_tracker(multimask: bool, threshold: float):
    ours = mask_decoder(**OPTIONS, stability_threshold=threshold)
    theirs = tracker_decoder(ours, dynamic_multimask_stability_thresh=threshold)
    inputs = decoder_inputs(batch=4, images=1)
    out = ours(**inputs, multimask_output=multimask)
    masks, ious, tokens, object_logits = theirs(**their_arguments(inputs, multimask))
    assert_near(out.masks, masks)
    assert_near(out.ious, ious)
    assert_near(out.tokens, tokens)
    assert_near(out.object_logits, object_logits)


@torch.no_grad()
def test_mask_decoder_of_the_tracker_with_an_image_for_each_prompt():
    ours = mask_decoder(**OPTIONS)
    theirs = tracker_decoder(ours)
    inputs = spread(decoder_inputs(batch=3, images=3))
    out = ours(**inputs, multimask_output=True)
    arguments = their_arguments(inputs, True)
    arguments["sparse_prompt_embeddings"] = inputs["sparse"][:, None]
    arguments["image_positional_embeddings"] = inputs["image_pe"].repeat(3, 1, 1, 1)
    masks, ious, tokens, object_logits = theirs(**arguments)
    assert_near(out.masks, masks)
    assert_near(out.ious, ious)
    assert_near(out.tokens, tokens)
    assert_near(out.object_logits, object_logits)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
def test_mask_decoder_of_the_first_sam(multimask: bool):
    ours = mask_decoder(stability_threshold=None)
    theirs = first_decoder(ours)
    inputs = decoder_inputs(batch=4, images=1)
    del inputs["high_res"]
    out = ours(**inputs, multimask_output=multimask)
    masks, ious = theirs(**their_arguments(inputs, multimask))[:2]
    assert_near(out.masks, masks)
    assert_near(out.ious, ious)
    assert out.object_logits is None
