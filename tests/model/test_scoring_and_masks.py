"""Scores and the segmentation head, on small hand-made inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sam3.model.maskformer_segmentation import UniversalSegmentationHead
from sam3.model.scoring import DotProductScoring

DIM, HEADS = 16, 2


@torch.no_grad()
def make_scoring() -> DotProductScoring:
    """Projections are the identity, and the prompt MLP is its LayerNorm."""
    scoring = DotProductScoring(DIM, 24).eval()
    for linear in (scoring.prompt_proj, scoring.hs_proj):
        linear.weight.copy_(torch.eye(DIM))
        linear.bias.zero_()
    scoring.prompt_mlp.layers[-1].weight.zero_()
    scoring.prompt_mlp.layers[-1].bias.zero_()
    return scoring


@torch.no_grad()
def test_score_is_the_scaled_product_with_the_mean_of_the_valid_prompt_tokens():
    scoring, hs, prompt = make_scoring(), torch.randn(2, 1, 3, DIM), torch.randn(1, 4, DIM)
    mask = torch.tensor([[False, True, False, True]])
    pooled = F.layer_norm(prompt, (DIM,))[0, [0, 2]].mean(0)
    wanted = (hs @ pooled / 4)[..., None]  # sqrt(16)
    torch.testing.assert_close(scoring(hs, prompt, mask), wanted)


@torch.no_grad()
def test_scores_are_clamped_and_an_all_padded_prompt_gives_no_nan():
    scoring, prompt = make_scoring(), torch.randn(1, 4, DIM)
    hs = 1e3 * F.layer_norm(prompt, (DIM,)).mean(1)[None, :, None]
    assert scoring(hs, prompt, torch.zeros(1, 4, dtype=torch.bool)).item() == 12.0
    assert scoring(hs, prompt, torch.ones(1, 4, dtype=torch.bool)).item() == 0.0


def make_head_inputs(images: int, pairs: int) -> dict:
    torch.manual_seed(0)
    return {
        "backbone_fpn": [torch.randn(images, DIM, side, side) for side in (16, 8, 4)],
        "queries": torch.randn(pairs, 3, DIM),
        "image_ids": torch.arange(pairs) % images,
        "memory": torch.randn(pairs, 16, DIM),
        "prompt": torch.randn(pairs, 5, DIM),
        "prompt_mask": torch.tensor([[False] * 4 + [True]]).repeat(pairs, 1),
    }


def make_head() -> UniversalSegmentationHead:
    torch.manual_seed(1)
    return UniversalSegmentationHead(DIM, HEADS).eval()


@torch.no_grad()
def test_masks_equal_the_product_with_projected_pixels():
    head, pixels, queries = make_head(), torch.randn(2, DIM, 8, 8), torch.randn(2, 3, DIM)
    wanted = torch.einsum("bqc,bchw->bqhw", head.mask_predictor.mask_embed(queries), head.instance_seg_head(pixels))
    torch.testing.assert_close(head.mask_predictor(queries, pixels, head.instance_seg_head), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pixel_decoder_uses_two_of_its_three_stages():
    decoder, levels = make_head().pixel_decoder, make_head_inputs(1, 1)["backbone_fpn"]
    x = levels[2].repeat_interleave(2, 2).repeat_interleave(2, 3) + levels[1]
    x = F.relu(decoder.norms[0](decoder.conv_layers[0](x)))
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) + levels[0]
    wanted = F.relu(decoder.norms[1](decoder.conv_layers[1](x)))
    torch.testing.assert_close(decoder(levels), wanted)


@torch.no_grad()
def test_one_image_serves_several_pairs():
    head, inputs = make_head(), make_head_inputs(1, 2)
    repeated = {**inputs, "backbone_fpn": [level.repeat(2, 1, 1, 1) for level in inputs["backbone_fpn"]]}
    repeated["image_ids"] = torch.tensor([0, 1])
    one, two = head(**inputs), head(**repeated)
    assert one["pred_masks"].shape == (2, 3, 16, 16)
    assert one["semantic_seg"].shape == (2, 1, 16, 16)
    for key, value in one.items():
        torch.testing.assert_close(value, two[key])


@torch.no_grad()
def test_pairs_look_at_their_own_image():
    head, inputs = make_head(), make_head_inputs(2, 2)
    swapped = {**inputs, "backbone_fpn": [level.flip(0) for level in inputs["backbone_fpn"]]}
    swapped["image_ids"] = torch.tensor([1, 0])
    torch.testing.assert_close(head(**swapped)["pred_masks"], head(**inputs)["pred_masks"])


@torch.no_grad()
@pytest.mark.parametrize("chosen", [[], [2], [2, 0]])
def test_each_query_has_its_mask_whatever_the_others_are(chosen: list[int]):
    head, inputs = make_head(), make_head_inputs(1, 1)
    every = head(**inputs)["pred_masks"]
    some = head(**{**inputs, "queries": inputs["queries"][:, chosen]})["pred_masks"]
    torch.testing.assert_close(some, every[:, chosen], rtol=0, atol=1e-5)
