"""Prompts of the first frame, and masks over the cells of the square: by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3.engine.losses import build_valid_mask
from sam3.transforms import Preprocess
from stage2.data.mask_grid import grid_masks, mean_between, shrink_masks
from stage2.data.prompts import PromptSampling, box_of, draw_prompts, move_corners, pixel_of, to_square

SQUARE = Preprocess(img_size=80, resize="square")
PAD = Preprocess(img_size=80, resize="pad")


def rectangle(height: int, width: int, top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def prompts(shape: torch.Tensor, preprocess: Preprocess, count: int = 400, **shares):
    masks = shape.expand(count, -1, -1)
    return draw_prompts(masks, preprocess, PromptSampling(**shares), np.random.default_rng(0))


# Prompts --------------------------------------------------------------------------------------------------------------


def test_kinds_come_in_their_shares_and_labels_say_which():
    drawn = prompts(rectangle(40, 40, 4, 4, 20, 30), SQUARE, 2000)
    counts = {kind: drawn.kinds.count(kind) / 2000 for kind in ("mask", "box", "click")}
    assert counts == pytest.approx({"mask": 0.5, "box": 0.25, "click": 0.25}, abs=0.03)
    wanted = {"mask": [-1, -1], "box": [2, 3], "click": [1, -1]}
    assert drawn.labels.tolist() == [wanted[kind] for kind in drawn.kinds]
    masked = torch.tensor([kind == "mask" for kind in drawn.kinds])
    assert not drawn.points[masked].any() and drawn.points.dtype == torch.float32
    assert set(prompts(rectangle(9, 9, 1, 1, 5, 5), SQUARE, mask=0.0, box=0.0, click=1.0).kinds) == {"click"}
    assert set(prompts(rectangle(9, 9, 1, 1, 5, 5), SQUARE, mask=0.0, box=1.0, click=0.0).kinds) == {"box"}


def test_clicks_are_uniform_over_the_object_in_pixels_of_the_square():
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[2, 3], mask[7, 10], mask[7, 11], mask[19, 39] = True, True, True, True
    drawn = prompts(mask, SQUARE, 2000, mask=0.0, box=0.0, click=1.0)
    found, counts = np.unique(drawn.points[:, 0].numpy(), axis=0, return_counts=True)
    # 80 / 40 = 2 columns and 80 / 20 = 4 rows of the square to a pixel; centre of pixel x is 2 (x + 0.5) - 0.5
    assert found.tolist() == [[6.5, 9.5], [20.5, 29.5], [22.5, 29.5], [78.5, 77.5]]
    assert counts == pytest.approx(500, abs=80)
    padded = prompts(mask, PAD, 100, mask=0.0, box=0.0, click=1.0).points[:, 0]  # 2 of both to a pixel
    assert {tuple(p) for p in padded.tolist()} == {(6.5, 4.5), (20.5, 14.5), (22.5, 14.5), (78.5, 38.5)}


def test_pixel_and_box_of_a_mask():
    mask = rectangle(10, 12, 3, 5, 6, 9)  # 12 pixels, row by row
    assert [tuple(pixel_of(mask, share).tolist()) for share in (0.0, 0.34, 0.999)] == [(5, 3), (5, 4), (8, 5)]
    assert box_of(mask).tolist() == [5, 3, 8, 5]
    box = to_square(box_of(mask), Preprocess(img_size=24, resize="pad"), (10, 12))
    assert box.tolist() == pytest.approx([10.5, 6.5, 16.5, 10.5])


def test_boxes_move_by_a_tenth_of_their_side_and_stay_inside():
    mask = rectangle(40, 40, 10, 4, 21, 37)  # in the square: 8.5 to 72.5, 20.5 to 40.5
    drawn = prompts(mask, SQUARE, mask=0.0, box=1.0, click=0.0).points.view(-1, 4)
    exact = torch.tensor([8.5, 20.5, 72.5, 40.5])
    assert ((drawn - exact).abs() <= torch.tensor([6.4, 2.0, 6.4, 2.0]) + 1e-4).all()
    assert (drawn.std(0) / torch.tensor([6.4, 2.0, 6.4, 2.0])).tolist() == pytest.approx([3**-0.5] * 4, abs=0.05)
    still = prompts(mask, SQUARE, mask=0.0, box=1.0, click=0.0, jitter=False).points.view(-1, 4)
    assert torch.equal(still, exact.expand(400, -1))
    full = prompts(torch.ones(20, 40, dtype=torch.bool), PAD, mask=0.0, box=1.0, click=0.0).points
    assert full.amin() >= 0 and full[..., 0].amax() <= 79 and full[..., 1].amax() <= 39


def test_corners_are_limited_clipped_swapped_and_kept_apart():
    def move(box: list[float], shares: list[float], fitted=(1000, 1000)) -> list[float]:
        return move_corners(torch.tensor(box, dtype=torch.float64), np.array(shares), fitted).tolist()

    assert move([100, 200, 600, 250], [1, -1, -1, 1]) == [120, 195, 580, 255]  # 20 px at most, else a tenth
    assert move([0, 5, 50, 999], [-1, -1, 0, 1]) == [0, 0, 50, 999]
    assert move([0, 5, 50, 300], [0, 0, 0, 1], fitted=(300, 40)) == [0, 5, 39, 299]
    assert move([7, 9, 7, 9], [1, 1, -1, 1]) == [7, 9, 8, 10]  # of one pixel
    assert move([999, 30, 999, 30], [0, 0, 0, 0]) == [998, 30, 999, 31]
    assert move([0, 0, 0, 0], [0, 0, 0, 0], fitted=(1, 1)) == [0, 0, 0, 0]  # there is no more than that


def test_prompts_of_one_object_do_not_depend_on_the_kind_of_another():
    mask = rectangle(40, 40, 4, 4, 20, 30)
    boxes = prompts(mask, SQUARE, 50, mask=0.0, box=1.0, click=0.0)
    mixed = prompts(mask, SQUARE, 50)
    rows = [row for row, kind in enumerate(mixed.kinds) if kind == "box"]
    assert rows and torch.equal(mixed.points[rows], boxes.points[rows])


def test_shares_must_add_up():
    for shares in ((0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)):
        with pytest.raises(ValueError, match="PROMPTS must be 0 or more and add up to 1"):
            PromptSampling(*shares)


# The grid of cells ----------------------------------------------------------------------------------------------------


def test_means_between_edges():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)
    means = mean_between(mask, torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.5, 3.0, 4.0, 4.0]))
    torch.testing.assert_close(means, torch.tensor([[1.0, 0.5 / 1.5, 0.5, 0.0]]))
    halves = mean_between(mask, torch.tensor([0.0, 0.5, 2.0]), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(halves, torch.tensor([[0.0], [0.5 * 1.0 / 1.5]]))


def test_a_cell_is_the_objects_from_half_on():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, 0] = True  # half of the first cell
    mask[2, 2] = True  # a quarter
    mask[4:8, 3:8] = True
    grid = grid_masks(mask[None], Preprocess(img_size=16, resize="square"), 4)[0]
    wanted = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert grid.tolist() == torch.tensor(wanted).bool().tolist()


def test_small_objects_keep_the_cell_they_cover_most_and_absent_ones_none():
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    masks[0, 0, 5, 6] = True
    grid = grid_masks(masks, Preprocess(img_size=16, resize="square"), 2)
    assert grid.shape == (2, 1, 2, 2) and grid[0, 0].tolist() == [[False, False], [False, True]]
    assert not grid[1].any()


@pytest.mark.parametrize("size", [(30, 80), (37, 80), (80, 51), (17, 400)])
def test_in_padded_squares_a_full_mask_is_the_valid_part(size: tuple[int, int]):
    full = torch.ones(1, *size, dtype=torch.bool)
    valid = build_valid_mask(torch.tensor([PAD.fitted_size(*size)]), 80, 20)[0]
    assert torch.equal(grid_masks(full, PAD, 20), valid.bool())
    assert grid_masks(full, SQUARE, 20).all()


def test_an_object_at_the_edge_is_not_lost_in_the_padding():
    size = (41, 80)  # of PAD's cells of 4 pixels the eleventh has one row of the video
    valid = build_valid_mask(torch.tensor([size]), 80, 20)[0, 0].bool()
    assert valid[:, 0].tolist() == [True] * 10 + [False] * 10
    grid = grid_masks(rectangle(*size, 40, 8, 41, 12)[None], PAD, 20)[0]
    assert torch.equal(grid, rectangle(20, 20, 9, 2, 10, 3))
    assert not (grid & ~valid).any()


def test_pad_places_masks_where_pictures_go():
    mask = rectangle(20, 40, 5, 10, 10, 20)  # 2 pixels of the square to one: rows 10 to 20, columns 20 to 40
    grid = grid_masks(mask[None], PAD, 40)[0]
    assert torch.equal(grid, rectangle(40, 40, 5, 10, 10, 20))
    assert torch.equal(grid_masks(mask[None], SQUARE, 40)[0], rectangle(40, 40, 10, 10, 20, 20))


def test_shrinking():
    masks = torch.stack((rectangle(8, 12, 2, 4, 6, 12), rectangle(8, 12, 0, 0, 1, 1)))
    shrunk = shrink_masks(masks, (4, 6))
    assert torch.equal(shrunk[0], rectangle(4, 6, 1, 2, 3, 6)) and not shrunk[1].any()
    assert shrink_masks(masks, (8, 12)) is masks
