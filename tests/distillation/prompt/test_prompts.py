"""What is read off a mask's runs, and the prompts that are drawn from it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_closing

from distillation.prompt.config import DatasetSettings
from distillation.prompt.object_mask import ObjectMask
from distillation.prompt.prompts import Prompts, draw, draw_box, draw_points, generator, grid, no_prompts, stack
from sam3.engine import batch
from sam3.transforms import Preprocess
from tests.distillation.prompt.folders import rectangle

PREPROCESS = Preprocess(80, "pad")  # doubles the pictures of 20 x 40 below


def settings(**values) -> DatasetSettings:
    return DatasetSettings(**values)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_mask(seed: int, size: tuple[int, int] = (13, 17), share: float = 0.3) -> np.ndarray:
    return rng(seed).random(size) < share


def brute_box(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


# Masks as runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 1.0])
def test_runs_hold_the_mask(share: float):
    for seed in range(5):
        mask = random_mask(seed, share=share)
        runs = ObjectMask.of_array(mask)
        assert (runs.array() == mask).all()
        assert runs.size == mask.shape and runs.area == mask.sum()
        places = runs.pixels(np.arange(runs.area))
        columns, rows = np.nonzero(mask.T)
        assert (places == np.stack((columns, rows), 1)).all()
        assert runs.box().tolist() == (brute_box(mask) if mask.any() else [0, 0, 0, 0])


def test_a_run_that_goes_on_in_the_next_column_spans_all_rows():
    mask = np.zeros((5, 4), bool)
    mask[3:, 1] = mask[:2, 2] = True  # one run: down to the lower edge, on from the upper one
    runs = ObjectMask.of_array(mask)
    assert runs.runs.tolist() == [8, 4, 8]
    assert runs.box().tolist() == [1, 0, 3, 5]


def test_runs_of_length_zero_count_for_nothing():
    """As compressed RLE may have them: here the object's first run is empty."""
    runs = ObjectMask(np.array([2, 0, 3, 2, 13]), (5, 4))
    assert runs.box().tolist() == [1, 0, 2, 2] and runs.area == 2
    assert runs.pixels(np.array([0, 1])).tolist() == [[1, 0], [1, 1]]


def test_closing_does_not_move_the_box():
    for seed in range(20):
        mask = random_mask(seed, share=0.05)
        mask[6, 6] = True
        closed = binary_closing(np.pad(mask, 3), np.ones((3, 3)))[3:-3, 3:-3]
        assert closed.sum() > mask.sum() or seed
        assert ObjectMask.of_array(mask).box().tolist() == brute_box(closed)


def two_steps(mask: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Resize, pad, resize, each by the pixel below the centre, with whole numbers."""
    (height, width), side = mask.shape, preprocess.img_size
    h, w = preprocess.fitted_size(height, width)
    rows = [(2 * r + 1) * height // (2 * h) for r in range(h)]
    columns = [(2 * c + 1) * width // (2 * w) for c in range(w)]
    square = np.zeros((side, side), bool)
    square[:h, :w] = mask[np.ix_(rows, columns)]
    kept = [(2 * i + 1) * side // (2 * (side // 4)) for i in range(side // 4)]
    return square[np.ix_(kept, kept)]


@pytest.mark.parametrize(
    "size", [(64, 64), (20, 40), (41, 17), (150, 150), (333, 500), (1, 90), (300, 2), (63, 65), (128, 37)]
)
def test_low_resolution_is_that_of_two_steps(size: tuple[int, int]):
    preprocess = Preprocess(64, "pad")
    for seed in range(4):
        mask = random_mask(seed, size, share=0.5)
        low = ObjectMask.of_array(mask).low_res(preprocess)
        assert low.shape == (16, 16) and low.dtype == bool
        assert (low == two_steps(mask, preprocess)).all()


@pytest.mark.parametrize("size", [(64, 64), (128, 100), (301, 500)])
def test_low_resolution_is_that_of_torch(size: tuple[int, int]):
    preprocess = Preprocess(64, "pad")
    mask = random_mask(1, size, share=0.5)
    h, w = preprocess.fitted_size(*size)
    resized = F.interpolate(torch.from_numpy(mask)[None, None].float(), (h, w), mode="nearest-exact")
    padded = F.pad(resized, (0, 64 - w, 0, 64 - h))
    wanted = F.interpolate(padded, (16, 16), mode="nearest-exact")[0, 0].bool()
    assert torch.equal(torch.from_numpy(ObjectMask.of_array(mask).low_res(preprocess)), wanted)


# Drawing --------------------------------------------------------------------------------------------------------------


def test_points_are_different_pixels_of_the_object_each_as_likely():
    mask = np.zeros((20, 40), bool)
    mask[3, 5] = mask[3, 7] = mask[19, 39] = mask[0, 0] = True
    runs, generator_, numbers, seen = ObjectMask.of_array(mask), rng(), Counter(), Counter()
    for _ in range(3000):
        places = draw_points(runs, generator_, 1, 3)
        rows = {tuple(place) for place in places.tolist()}
        assert len(rows) == len(places)
        numbers[len(places)] += 1
        seen.update(rows)
    assert set(seen) == {(5, 3), (7, 3), (39, 19), (0, 0)}
    assert all(900 < count < 1100 for count in numbers.values()) and set(numbers) == {1, 2, 3}
    assert all(1400 < count < 1600 for count in seen.values())  # 6000 points on four pixels


def test_no_more_points_than_pixels():
    mask = rectangle((20, 40), (4, 4, 6, 5))
    assert sorted(draw_points(ObjectMask.of_array(mask), rng(), 5, 5).tolist()) == [[4, 4], [5, 4]]


def test_box_is_tight_without_a_shift():
    mask = ObjectMask.of_array(rectangle((20, 40), (4, 6, 15, 12)))
    assert draw_box(mask, rng(), 0).tolist() == [4, 6, 15, 12]


def test_box_sides_move_outwards_only_and_stay_in_the_picture():
    mask = ObjectMask.of_array(rectangle((20, 40), (4, 6, 35, 12)))
    generator_ = rng()
    boxes = np.array([draw_box(mask, generator_, 7) for _ in range(500)])
    assert boxes.min(0).tolist() == [0, 0, 35, 12]  # 4 - 7 is cut at 0, 6 - 7 as well
    assert boxes.max(0).tolist() == [4, 6, 40, 19]  # 35 + 7 is cut at 40


def test_points_in_the_frame_are_padded():
    mask = ObjectMask.of_array(rectangle((20, 40), (5, 3, 7, 4)))
    prompt = draw(mask, rng(), settings(prompt_mode="point", min_points=2, max_points=4), PREPROCESS)
    assert prompt.points.dtype == torch.float32 and prompt.labels.dtype == torch.int64 and prompt.boxes is None
    assert prompt.labels.tolist() == [[1, 1, -1, -1]]  # the object has two pixels
    assert sorted(prompt.points[0, :2].tolist()) == [[10.0, 6.0], [12.0, 6.0]]
    assert prompt.points[0, 2:].tolist() == [[0.0, 0.0]] * 2


def test_box_in_the_frame():
    mask = ObjectMask.of_array(rectangle((20, 40), (4, 6, 15, 12)))
    prompt = draw(mask, rng(), settings(prompt_mode="box", max_bbox_shift=0), PREPROCESS)
    assert prompt.points is None and prompt.labels is None
    assert prompt.boxes.tolist() == [[8.0, 12.0, 30.0, 24.0]]


def test_sides_have_their_own_scale_where_sizes_are_rounded():
    """30 x 70 fits 80 as 34 x 80: rows by 34/30, columns by 80/70."""
    mask = ObjectMask.of_array(rectangle((30, 70), (0, 0, 70, 30)))
    prompt = draw(mask, rng(), settings(prompt_mode="box"), PREPROCESS)
    assert prompt.boxes[0].tolist() == pytest.approx([0, 0, 80, 34])


@pytest.mark.parametrize(("max_points", "width"), [(1, 2), (3, 3)])
def test_mixed_is_a_box_half_of_the_time(max_points: int, width: int):
    mask = ObjectMask.of_array(rectangle((20, 40), (4, 6, 15, 12)))
    values = settings(prompt_mode="mixed", max_points=max_points, max_bbox_shift=0)
    generator_ = rng()
    prompts = stack([draw(mask, generator_, values, PREPROCESS) for _ in range(1000)])
    assert prompts.points.shape == (1000, width, 2) and prompts.boxes is None
    is_box = prompts.labels[:, 0] == 2
    assert 450 < int(is_box.sum()) < 550
    assert prompts.labels[is_box].unique(dim=0).tolist() == [[2, 3, *[-1] * (width - 2)]]
    corners = prompts.points[is_box][:, :2].flatten(1).unique(dim=0)
    assert corners.tolist() == [[8.0, 12.0, 30.0, 24.0]]
    assert set(prompts.labels[~is_box].unique().tolist()) == {-1, 1}


def test_generators_are_those_of_a_mask_and_an_epoch():
    def first(*arguments) -> float:
        return generator(*arguments).random()

    wanted = first(0, 0, "sa_1", "0")
    assert wanted == first(0, 0, "sa_1", "0")
    others = {first(1, 0, "sa_1", "0"), first(0, 1, "sa_1", "0"), first(0, 0, "sa_2", "0"), first(0, 0, "sa_1", "1")}
    others.add(first(0, 0, "sa_", "10"))
    assert len(others) == 5 and wanted not in others


# Grids and batches of prompts -----------------------------------------------------------------------------------------


def test_grid():
    prompts = grid(2, (30, 40))
    assert prompts.points.tolist() == [[[10, 7.5]], [[30, 7.5]], [[10, 22.5]], [[30, 22.5]]]
    assert prompts.labels.tolist() == [[1]] * 4 and prompts.labels.dtype == torch.int64
    assert len(grid(5, (64, 64))) == 25


def test_rows_and_stack():
    prompts = grid(2, (30, 40))
    assert torch.equal(stack([prompts[:1], prompts[1:]]).points, prompts.points)
    assert prompts[-1].points.tolist() == [[[30, 22.5]]] and len(prompts[-1]) == 1
    assert prompts[torch.tensor([3, 0])].points[:, 0, 0].tolist() == [30, 10]
    assert [len(row) for row in prompts] == [1, 1, 1, 1]
    with pytest.raises(IndexError):
        prompts[4]
    with pytest.raises(ValueError, match="of 2 kinds"):
        stack([prompts, Prompts(boxes=torch.zeros(1, 4))])
    with pytest.raises(ValueError, match="of 2 kinds"):
        stack([prompts, Prompts(torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.int64))])


def test_arguments_of_prompt_encoders():
    prompts, boxes = grid(1, (8, 8)), Prompts(boxes=torch.zeros(3, 4))
    assert prompts.arguments() == ((prompts.points, prompts.labels), None)
    assert boxes.arguments() == (None, boxes.boxes) and len(boxes) == 3
    assert Prompts().arguments() == (None, None) and len(Prompts()) == 1


@pytest.mark.parametrize("mode", ["point", "box", "mixed"])
def test_no_prompts_fit_those_that_are_drawn(mode: str):
    values = settings(prompt_mode=mode, max_points=1)
    mask = ObjectMask.of_array(rectangle((20, 40), (4, 6, 15, 12)))
    assert len(no_prompts(values)) == 0
    assert len(stack([no_prompts(values), draw(mask, rng(), values, PREPROCESS)])) == 1


def test_prompts_move_with_a_batch():
    moved = batch.to_device(grid(2, (30, 40)), torch.device("meta"))
    assert isinstance(moved, Prompts) and moved.points.is_meta and moved.labels.is_meta and moved.boxes is None
    assert grid(2, (30, 40)).to("meta").points.is_meta
