"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sam3.engine.losses import (
    build_valid_mask,
    mask_bce,
    mask_dice,
    mask_focal,
    mask_targets,
    masked_cosine,
    masked_cosine_per_image,
    masked_mse,
    masked_mse_per_image,
)

MASK_LOSSES = (mask_bce, mask_dice, mask_focal)
LOG3 = math.log(3)  # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4


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
    assert masked_mse_per_image(prediction, target, mask).tolist() == pytest.approx([1, 9])
    several = prediction.repeat(1, 5, 1, 1), target.repeat(1, 5, 1, 1), mask
    assert masked_mse_per_image(*several).tolist() == pytest.approx([1, 9])
    assert masked_mse_per_image(*several, "channel_sum").tolist() == pytest.approx([5, 45])


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


@pytest.mark.parametrize(("img_size", "grid"), [(1008, 72), (1008, 288), (224, 64), (224, 16), (64, 96), (30, 7)])
def test_valid_cells_are_those_of_a_resized_plane(img_size: int, grid: int):
    """Against the resize itself, for every number of rows, then of columns."""
    # One column (row) for each h at once: column j of the plane has ones in its first j rows.
    plane = (torch.arange(img_size)[:, None] < torch.arange(img_size + 1)).float()  # (S, S + 1)
    resized = F.interpolate(plane.T[:, None], size=grid, mode="linear", antialias=False) > 0.5  # (S + 1, 1, G)
    every, full = torch.arange(img_size + 1), torch.full((img_size + 1,), img_size)
    rows = build_valid_mask(torch.stack((every, full), 1), img_size, grid)
    assert torch.equal(rows, resized[:, :, :, None].expand(-1, -1, -1, grid).float())
    columns = build_valid_mask(torch.stack((full, every), 1), img_size, grid)
    assert torch.equal(columns, resized[:, :, None].expand(-1, -1, grid, -1).float())


@pytest.mark.parametrize("size", [(1008, 671), (5, 1008), (2, 2), (333, 334), (6, 9)])
def test_valid_block_is_that_of_a_resized_picture(size: tuple[int, int]):
    """Corners too: at 3.5 pixels a cell, two edges that both count give 0.75 x 0.75 > 0.5."""
    plane = torch.zeros(1, 1, 1008, 1008)
    plane[..., : size[0], : size[1]] = 1
    wanted = F.interpolate(plane, size=(288, 288), mode="bilinear", antialias=False) > 0.5
    assert torch.equal(build_valid_mask(torch.tensor([size]), 1008, 288), wanted.float())


def one_row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prompt row with two masks of 2 x 2 pixels, the lower row is padding.

    p is 3/4, 1/4 in the first mask and 1/2, 1/2 in the second; t is 1, 1/2 and 0, 1.
    """
    logits = torch.tensor([[[[LOG3, -LOG3], [7.0, -9.0]], [[0.0, 0.0], [50.0, 3.0]]]])
    targets = torch.tensor([[[[1.0, 0.5], [1.0, 0.2]], [[0.0, 1.0], [0.0, 1.0]]]])
    valid = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    return logits, targets, valid


def test_mask_bce_of_each_mask():
    log = math.log
    first = -(log(3 / 4) + 0.5 * log(1 / 4) + 0.5 * log(3 / 4)) / 2
    torch.testing.assert_close(mask_bce(*one_row()), torch.tensor([[first, log(2)]]))


def test_mask_dice_of_each_mask():
    # sum(p t) = 3/4 + 1/8 and 1/2; sum p = 1 and 1; sum t = 3/2 and 1
    expected = torch.tensor([[1 - (2 * 7 / 8 + 1) / (1 + 1.5 + 1), 1 - (2 * 0.5 + 1) / (1 + 1 + 1)]])
    torch.testing.assert_close(mask_dice(*one_row()), expected)


def test_mask_focal_of_each_mask():
    log = math.log
    # First mask: q = 3/4, a = 1/4; q = 1/2, a = 1/2. Second: q = 1/2 with a = 3/4 and a = 1/4.
    soft = -0.5 * log(1 / 4) - 0.5 * log(3 / 4)
    first = (0.25 * (1 / 4) ** 2 * -log(3 / 4) + 0.5 * (1 / 2) ** 2 * soft) / 2
    second = (0.75 + 0.25) * (1 / 2) ** 2 * log(2) / 2
    torch.testing.assert_close(mask_focal(*one_row()), torch.tensor([[first, second]]))


def test_mask_targets():
    teacher = torch.tensor([[[[2 * LOG3, -2 * LOG3], [0.0, 0.1]]]], requires_grad=True)
    soft = mask_targets(teacher, temperature=2.0)
    torch.testing.assert_close(soft[0, 0, 0], torch.tensor([0.75, 0.25]))
    assert not soft.requires_grad
    assert teacher[0, 0, 0, 0].item() == pytest.approx(2 * LOG3)  # left as it was
    assert mask_targets(teacher, hard=True).tolist() == [[[[1, 0], [0, 1]]]]
    assert mask_targets(teacher, hard=True, threshold=0.1).tolist() == [[[[1, 0], [0, 0]]]]
    for hard in (False, True):
        assert mask_targets(teacher.bfloat16(), hard=hard).dtype == torch.float32


def test_a_student_equal_to_its_teacher():
    """Soft targets leave the entropy in BCE and something above 0 in dice."""
    logits = torch.linspace(-4, 4, 2 * 3 * 25).view(2, 3, 5, 5)
    p = torch.sigmoid(logits)
    valid = torch.ones(2, 1, 5, 5)
    targets = mask_targets(logits)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean((2, 3))
    torch.testing.assert_close(mask_bce(logits, targets, valid), entropy)
    dice = 1 - (2 * p.square().sum((2, 3)) + 1) / (2 * p.sum((2, 3)) + 1)
    torch.testing.assert_close(mask_dice(logits, targets, valid), dice)


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_padding_and_other_masks_do_not_matter(loss):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 6, 6), torch.rand(3, 4, 6, 6)
    valid = build_valid_mask(torch.tensor([[6, 3], [2, 6], [6, 6]]), 6, 6)
    logits.requires_grad_()
    values = loss(logits, targets, valid)
    assert values.shape == (3, 4)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert (gradient * (1 - valid) == 0).all()
    padded = torch.where(valid.bool(), logits, 1e4), torch.where(valid.bool(), targets, 1.0)
    torch.testing.assert_close(loss(*padded, valid), values, rtol=1e-6, atol=0)
    # The second row alone, cut to its picture; and one mask of it
    alone = loss(logits[1:2, :, :2], targets[1:2, :, :2], valid[1:2, :, :2])
    torch.testing.assert_close(alone, values[1:2])
    torch.testing.assert_close(loss(logits[1:2, 3:], targets[1:2, 3:], valid[1:2]), values[1:2, 3:])


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_extreme_logits_have_finite_gradients(loss):
    logits = torch.tensor([[[[100.0, -100.0, 100.0, -100.0, 100.0, -100.0]]]], requires_grad=True)
    targets = torch.tensor([[[[1.0, 1.0, 0.0, 0.0, 0.5, 0.5]]]])
    value = loss(logits, targets, torch.ones(1, 1, 1, 6))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_a_mask_without_valid_pixels_adds_nothing(loss):
    logits = torch.tensor([[[[100.0, -3.0]]]], requires_grad=True)
    value = loss(logits, torch.rand(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    value.sum().backward()
    assert value.tolist() == [[0]]
    assert logits.grad.tolist() == [[[[0, 0]]]]


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_mask_losses_are_float32_at_any_precision(loss):
    """288 x 288 pixels are more than float16 can count; autocast changes nothing."""
    logits = torch.randn(1, 1, 288, 288, generator=torch.Generator().manual_seed(0)).half()
    targets, valid = mask_targets(-logits), torch.ones(1, 1, 288, 288)
    expected = loss(logits.float(), targets, valid)
    assert loss(logits, targets, valid.half()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(logits, targets, valid.half()), expected)
    assert torch.equal(loss(logits, targets, valid.bool()), expected)


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_masks_of_other_rows_are_not_broadcast(loss):
    logits, targets, valid = one_row()
    with pytest.raises(AssertionError, match=r"targets \(1, 1, 2, 2\) for logits \(1, 2, 2, 2\)"):
        loss(logits, targets[:, :1], valid)
    with pytest.raises(AssertionError, match=r"valid is \(1, 2, 2, 2\), wanted \(1, 1, 2, 2\)"):
        loss(logits, targets, valid.expand(1, 2, 2, 2))
