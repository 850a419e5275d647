"""Losses against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sam3.engine.losses import build_valid_mask, masked_cosine, masked_cosine_per_image, masked_mse


def two_by_two() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image, two channels, 2 x 2 cells, the lower row is padding.

    Errors: cell (0,0) 3 and 4 (squares 9 + 16 = 25), cell (0,1) 1 and 0 (1), lower row huge but masked.
    """
    target = torch.tensor([[[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    prediction = target + torch.tensor([[[[3.0, 1.0], [99.0, 99.0]], [[4.0, 0.0], [99.0, 99.0]]]])
    mask = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    return prediction, target, mask


def test_masked_mse_in_both_reductions():
    prediction, target, mask = two_by_two()
    assert masked_mse(prediction, target, mask, "channel_sum").item() == pytest.approx((25 + 1) / 2)
    assert masked_mse(prediction, target, mask, "channel_mean").item() == pytest.approx((25 + 1) / 4)


def test_mse_is_a_mean_over_images_of_means_over_cells():
    prediction = torch.zeros(2, 1, 2, 2)
    target = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])
    mask = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[1.0, 0.0], [0.0, 0.0]]]])
    assert masked_mse(prediction, target, mask).item() == pytest.approx((1 + 9) / 2)


def test_masked_cosine():
    prediction, target, mask = two_by_two()
    # cell (0,0): (4,4) against (1,0) gives 1/sqrt(2); cell (0,1): (3,0) against (2,0) gives 1
    expected = 1 - (2**-0.5 + 1) / 2
    assert masked_cosine(prediction, target, mask).item() == pytest.approx(expected, abs=1e-6)
    assert masked_cosine_per_image(prediction, target, mask).tolist() == pytest.approx([1 - expected], abs=1e-6)


def test_an_image_without_valid_cells_adds_nothing():
    prediction, target, _ = two_by_two()
    empty = torch.zeros(1, 1, 2, 2)
    assert masked_mse(prediction, target, empty).item() == 0
    assert masked_cosine(prediction, target, empty).item() == 0


def test_losses_are_float32_for_half_inputs():
    prediction, target, mask = two_by_two()
    assert masked_mse(prediction.half(), target.half(), mask).dtype == torch.float32
    # 300^2 does not fit float16
    assert masked_mse(torch.full((1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)) == 90000


def test_unknown_reduction_is_named():
    with pytest.raises(ValueError, match=r"'sum' is unknown.*channel_mean, channel_sum"):
        masked_mse(*two_by_two(), "sum")


@pytest.mark.parametrize(("size", "cells"), [(0, 0), (7, 0), (8, 1), (21, 1), (22, 2), (1007, 72), (1008, 72)])
def test_valid_cells_at_1008(size: int, cells: int):
    assert cells == (size + 6) // 14
    mask = build_valid_mask(torch.tensor([[size, 1008]]), 1008, 72)
    assert mask.shape == (1, 1, 72, 72)
    assert mask[0, 0].sum().item() == cells * 72
    assert mask[0, 0, :cells].all()


def test_grid_must_divide_the_image_size():
    with pytest.raises(ValueError, match=r"img_size \(=1024\) must be a multiple of the grid \(=72\)"):
        build_valid_mask(torch.tensor([[5, 5]]), 1024, 72)
