"""What is selected, what prompts share, and where gradients go."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from sam3.sam.mask_decoder import DecodedMasks, MaskDecoder
from tests.sam.parts import DIM, GRID, OPTIONS, decoder_inputs, mask_decoder, normals


def select(decoder: MaskDecoder, every: DecodedMasks, multimask: bool) -> DecodedMasks:
    with mock.patch.object(decoder, "forward_all", return_value=every):
        return decoder(None, None, None, None, multimask_output=multimask)


@pytest.fixture
def every() -> DecodedMasks:
    """Masks of 10 x 10 for four prompts; mask k > 0 is k everywhere. Of the pixels of mask 0 above -0.05,

    0: all 100 are above 0.05; 1: 40 of 80, so unstable; 2: there are none; 3: 49 of 50, which is just stable.
    """
    masks = torch.arange(4.0).view(1, 4, 1, 1).repeat(4, 1, 10, 10)
    single = torch.full((4, 100), -1.0)
    single[0] = 1
    single[1, :80], single[1, :40] = 0.04, 0.06
    single[3, :50], single[3, :49] = 0.0, 0.06
    masks[:, 0] = single.view(4, 10, 10)
    ious = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.2, 0.7, 0.4], [0.1, 0.8, 0.3, 0.4], [0.1, 0.8, 0.3, 0.4]])
    return DecodedMasks(masks, ious, torch.arange(4.0).view(1, 4, 1).repeat(4, 1, DIM), torch.zeros(4, 1))


def test_multimask_keeps_all_but_the_first(every):
    for decoder in (mask_decoder(), mask_decoder().train()):
        out = select(decoder, every, multimask=True)
        assert torch.equal(out.masks, every.masks[:, 1:])
        assert torch.equal(out.ious, every.ious[:, 1:])
        assert torch.equal(out.tokens, every.tokens[:, 1:])
        assert out.object_logits is every.object_logits


def test_an_unstable_single_mask_gives_way_to_the_best_other(every):
    out = select(mask_decoder(), every, multimask=False)
    assert torch.equal(out.masks[[0, 2, 3]], every.masks[[0, 2, 3], :1])
    assert (out.masks[1] == 2).all()
    assert torch.equal(out.ious, torch.tensor([[0.1], [0.7], [0.1], [0.1]]))
    assert (out.tokens == 0).all()
    assert out.tokens.shape == (4, 1, DIM)


@pytest.mark.parametrize("decoder", [mask_decoder().train(), mask_decoder(stability_threshold=None)])
def test_training_and_the_first_sam_keep_mask_0(decoder, every):
    out = select(decoder, every, multimask=False)
    assert torch.equal(out.masks, every.masks[:, :1])
    assert torch.equal(out.ious, every.ious[:, :1])
    assert torch.equal(out.tokens, every.tokens[:, :1])


@torch.no_grad()
def test_shapes_and_ranges():
    inputs = decoder_inputs(batch=3, images=1)
    out = mask_decoder(**OPTIONS).forward_all(**inputs)
    assert out.masks.shape == (3, 4, 4 * GRID, 4 * GRID)
    assert out.ious.shape == (3, 4)
    assert out.ious.min() >= 0
    assert out.ious.max() <= 1
    assert out.tokens.shape == (3, 4, DIM)
    assert out.object_logits.shape == (3, 1)
    del inputs["high_res"]
    assert mask_decoder().forward_all(**inputs).object_logits is None


@torch.no_grad()
def test_no_objects_give_no_masks():
    out = mask_decoder(**OPTIONS)(**decoder_inputs(batch=0, images=1), multimask_output=False)
    assert out.masks.shape == (0, 1, 4 * GRID, 4 * GRID)
    assert out.object_logits.shape == (0, 1)


@torch.no_grad()
def test_one_image_for_all_prompts_is_as_a_copy_for_each():
    decoder = mask_decoder(**OPTIONS)
    shared = decoder_inputs(batch=3, images=1)
    batches = []
    attention = decoder.transformer.layers[0].cross_attn_token_to_image
    attention.k_proj.register_forward_hook(lambda module, args, out: batches.append(out.shape[0]))
    together = decoder.forward_all(**shared)
    copies = {
        **shared,
        "image_embeddings": shared["image_embeddings"].repeat(3, 1, 1, 1),
        "dense": shared["dense"].contiguous(),
        "high_res": tuple(x.repeat(3, 1, 1, 1) for x in shared["high_res"]),
    }
    apart = decoder.forward_all(**copies)
    assert batches == [1, 3]  # the shared image is projected once
    for name in ("masks", "ious", "tokens", "object_logits"):
        torch.testing.assert_close(getattr(together, name), getattr(apart, name), atol=1e-5, rtol=1e-5)


def test_gradients_pass_frozen_weights_and_add_up_over_prompts():
    decoder = mask_decoder(**OPTIONS).requires_grad_(False)
    inputs = decoder_inputs(batch=2, images=1)
    target = normals(5)(2, 4, 4 * GRID, 4 * GRID)

    def gradients(rows: slice) -> list[torch.Tensor]:
        leaves = [inputs["image_embeddings"], *inputs["high_res"]]
        leaves = [x.clone().requires_grad_() for x in leaves]
        prompts = {"sparse": inputs["sparse"][rows], "dense": inputs["dense"][rows]}
        out = decoder.forward_all(leaves[0], inputs["image_pe"], **prompts, high_res=tuple(leaves[1:]))
        loss = (out.masks * target[rows]).mean(dim=(2, 3)).sum() + out.ious.sum() + out.object_logits.sum()
        loss.backward()
        return [leaf.grad for leaf in leaves]

    both, first, second = gradients(slice(0, 2)), gradients(slice(0, 1)), gradients(slice(1, 2))
    for total, one, other in zip(both, first, second, strict=True):
        assert total.abs().max() > 0
        torch.testing.assert_close(total, one + other, atol=1e-5, rtol=1e-4)


def test_high_resolution_maps_go_with_the_option():
    inputs = decoder_inputs(batch=1, images=1)
    with pytest.raises(AssertionError, match="high_res_features"):
        mask_decoder()(**inputs, multimask_output=True)
    del inputs["high_res"]
    with pytest.raises(AssertionError, match="high_res_features"):
        mask_decoder(**OPTIONS)(**inputs, multimask_output=True)
