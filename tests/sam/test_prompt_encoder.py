"""Codes of prompts worked out by hand, and the dense code."""

from __future__ import annotations

import math

import pytest
import torch

from sam3.sam.prompt_encoder import PromptEncoder
from tests.sam.parts import DIM, GRID, SIDE, normals, prompt_encoder

R = math.sqrt(0.5)


@pytest.fixture
def encoder() -> PromptEncoder:
    """Four channels, 2 x 4 cells, 8 x 16 pixels; label k adds 10 + k to all channels, padding is 5."""
    model = PromptEncoder(4, (2, 4), (8, 16))
    with torch.no_grad():
        model.pe_layer.positional_encoding_gaussian_matrix.copy_(torch.tensor([[0.25, 0.0], [0.0, 0.25]]))
        for label, embedding in enumerate(model.point_embeddings):
            embedding.weight.fill_(10 + label)
        model.not_a_point_embed.weight.fill_(5)
        model.no_mask_embed.weight.copy_(torch.arange(4.0)[None])
    return model


def test_points_of_every_label(encoder):
    # (11.5 + 0.5) / 16 = 3/4 and (1.5 + 0.5) / 8 = 1/4: angles 2 pi * (2 * 3/4 - 1) / 4 = pi/4, and -pi/4.
    code = torch.tensor([R, -R, R, R])
    coords = torch.tensor([11.5, 1.5]).expand(1, 5, 2)
    sparse, _ = encoder((coords, torch.tensor([[0, 1, 2, 3, -1]])))
    padding = torch.full((4,), 5.0)
    wanted = torch.stack([*(code + 10 + label for label in range(4)), padding, padding])
    torch.testing.assert_close(sparse, wanted[None])


def test_a_padding_point_is_the_same_wherever_it_stands(encoder):
    sparse, _ = encoder((torch.tensor([[[3.0, 7.0]], [[0.0, 0.0]]]), torch.full((2, 1), -1)))
    assert sparse.shape == (2, 2, 4)
    assert (sparse == 5).all()


def test_labels_of_other_integer_types(encoder):
    coords = torch.tensor([[[4.0, 5.0], [6.0, 7.0]]])
    whole, _ = encoder((coords, torch.tensor([[1, 0]])))
    small, _ = encoder((coords.int(), torch.tensor([[1, 0]], dtype=torch.int32)))
    assert torch.equal(whole, small)


def test_a_box_argument_is_two_corners_without_padding(encoder):
    box = torch.tensor([[3.5, 1.5, 11.5, 5.5]])  # angles -pi/4, -pi/4 and pi/4, pi/4
    sparse, _ = encoder(boxes=box)
    wanted = torch.tensor([[-R + 12, -R + 12, R + 12, R + 12], [R + 13, R + 13, R + 13, R + 13]])
    torch.testing.assert_close(sparse, wanted[None])
    as_points, _ = encoder((box.view(1, 2, 2), torch.tensor([[2, 3]])))
    assert torch.equal(as_points[:, :2], sparse)
    assert (as_points[:, 2] == 5).all()


def test_points_come_before_the_box(encoder):
    point, box = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.5, 1.5, 11.5, 5.5]])
    both, _ = encoder((point, torch.tensor([[1]])), box)
    assert torch.equal(both[:, :1], encoder((point, torch.tensor([[1]])))[0][:, :1])
    assert torch.equal(both[:, 1:], encoder(boxes=box)[0])


def test_no_mask_is_one_vector_everywhere(encoder):
    sparse, dense = encoder(boxes=torch.zeros(3, 4))
    assert sparse.shape == (3, 2, 4)
    assert torch.equal(dense, torch.arange(4.0).view(1, 4, 1, 1).expand(3, 4, 2, 4))
    assert dense.stride(0) == 0


def test_no_prompt_and_only_a_mask(encoder):
    sparse, dense = encoder()
    assert sparse.shape == (1, 0, 4)
    assert dense.shape == (1, 4, 2, 4)
    sparse, dense = encoder(masks=torch.zeros(2, 1, 8, 16))
    assert sparse.shape == (2, 0, 4)
    assert dense.shape == (2, 4, 2, 4)


def test_a_mask_of_another_size_is_refused(encoder):
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\), wanted Bx1x8x16"):
        encoder(masks=torch.zeros(1, 1, 8, 8))


def test_dense_code_of_the_centres(encoder):
    dense = encoder.get_dense_pe()
    assert dense.shape == (1, 4, 2, 4)
    # Row 0, column 3: y = 1/4, x = 7/8, so angles -pi/4 of y and 2 pi * 3/4 / 4 of x.
    x = 3 * math.pi / 8
    wanted = torch.tensor([math.sin(x), -R, math.cos(x), R])
    torch.testing.assert_close(dense[0, :, 0, 3], wanted)


def test_dense_code_is_kept_until_the_matrix_changes(encoder):
    first = encoder.get_dense_pe()
    assert encoder.get_dense_pe() is first
    state = encoder.state_dict()
    state = {**state, "pe_layer.positional_encoding_gaussian_matrix": torch.ones(2, 2)}
    encoder.load_state_dict(state)
    second = encoder.get_dense_pe()
    assert not torch.equal(first, second)
    encoder.double()
    assert encoder.get_dense_pe().dtype == torch.float64


def test_dense_code_made_while_inferring_serves_training(encoder):
    with torch.inference_mode():
        encoder.get_dense_pe()
    scale = torch.ones(1, requires_grad=True)
    (scale * encoder.get_dense_pe()).sum().backward()
    assert scale.grad is not None


def test_the_code_stays_exact_under_autocast():
    model = prompt_encoder()
    points = normals(0)(2, 3, 2).abs() * SIDE / 4, torch.tensor([[0, 1, -1], [2, 3, -1]])
    plain = model(points)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(points)[0], plain)


def test_half_precision_weights_give_half_precision_prompts():
    model = prompt_encoder().bfloat16()
    sparse, dense = model((torch.tensor([[[200.0, 100.0]]]), torch.tensor([[1]])))
    assert sparse.dtype == dense.dtype == model.get_dense_pe().dtype == torch.bfloat16


def test_gradients_reach_coordinates_masks_and_weights():
    model = prompt_encoder()
    coords = torch.full((2, 1, 2), 50.0, requires_grad=True)
    masks = torch.zeros(2, 1, 4 * GRID, 4 * GRID, requires_grad=True)
    sparse, dense = model((coords, torch.tensor([[1], [-1]])), masks=masks)
    assert dense.shape == (2, DIM, GRID, GRID)
    (sparse.square().sum() + dense.square().sum()).backward()
    assert coords.grad[0].abs().min() > 0
    assert (coords.grad[1] == 0).all()  # a padding point stands nowhere
    assert masks.grad.abs().max() > 0
    assert model.not_a_point_embed.weight.grad is not None
    assert (model.point_embeddings[0].weight.grad == 0).all()
