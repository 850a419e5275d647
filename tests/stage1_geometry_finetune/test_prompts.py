"""Which objects become prompts, and what each is prompted with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3.engine.sa1b import build_annotations, clip_boxes, is_usable
from sam3.transforms import Preprocess
from stage1_geometry_finetune.prompts import (
    PromptSampling,
    choose_kinds,
    choose_prompts,
    draw,
    filter_by_area,
    jitter_boxes,
    mask_nms,
    pick,
    sample_generator,
)

HEIGHT, WIDTH = 400, 600
PREPROCESS = Preprocess(img_size=300)  # half the size: 200 x 300 in the square
NAN = float("nan")


def mask_of(rectangles, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), np.uint8, order="F")
    for x, y, w, h in rectangles:
        mask[y : y + h, x : x + w] = 1
    return mask


def entry(box, point="centre", mask=None):
    """An annotation: box xywh, point xy (None = not stated), mask = list of rectangles (default: the box)."""
    rle = coco_mask.encode(mask_of([[int(v) for v in box]] if mask is None else mask))
    stated = [box[0] + box[2] / 2, box[1] + box[3] / 2] if point == "centre" else point
    return {"bbox": box, "segmentation": rle, "point_coords": None if stated is None else [stated]}


def objects(entries):
    return build_annotations(Path("a.json"), HEIGHT, WIDTH, entries)


def grid(count=40):
    """Objects that can be told apart by their box, none like another in area."""
    return objects([entry([10 * (i % 8), 40 * (i // 8), 20.0 + i, 21.0]) for i in range(count)])


def choose(annotations, epoch=0, key="sa_1", seed=0, **sampling):
    return choose_prompts(annotations, PromptSampling(**sampling), PREPROCESS, sample_generator(seed, epoch, key))


# Draws ------------------------------------------------------------------------------------------------------------


def test_generator_depends_on_seed_epoch_and_key_alone():
    first = sample_generator(3, 1, "sa_7").random(4)
    assert np.array_equal(first, sample_generator(3, 1, "sa_7").random(4))
    others = [(4, 1, "sa_7"), (3, 2, "sa_7"), (3, 1, "sa_8"), (3, None, "sa_7"), (31, 0, "sa_7")]
    assert len({tuple(sample_generator(*other).random(4)) for other in others} | {tuple(first)}) == 6


def test_switching_one_thing_off_leaves_the_others():
    annotations = grid()
    usual = choose(annotations, max_prompts=5, prompt_mix=True)
    still = choose(annotations, max_prompts=5, prompt_mix=True, jitter=False)
    assert np.array_equal(usual.indices, still.indices)
    assert usual.kinds == still.kinds
    assert torch.equal(usual.targets, still.targets)
    assert not torch.equal(usual.boxes, still.boxes)
    assert torch.equal(still.boxes, still.targets)
    unmixed = choose(annotations, max_prompts=5)
    assert torch.equal(unmixed.boxes, usual.boxes)
    refined = choose(annotations, max_prompts=5, prompt_mix=True, decode_iters=3, refine_points=2)
    assert torch.equal(refined.boxes, usual.boxes)
    assert refined.kinds == usual.kinds
    pixels = choose(annotations, max_prompts=5, prompt_mix=True, point_source="mask")
    assert torch.equal(pixels.boxes, usual.boxes)


def test_refine_numbers():
    annotations = grid(6)
    none = choose(annotations, decode_iters=1, refine_points=4)
    assert none.refine_uniforms is None
    assert none.refine_counts is None
    assert choose(annotations, decode_iters=3).refine_uniforms is None
    fixed = choose(annotations, decode_iters=3, refine_points=4)
    assert fixed.refine_uniforms.shape == (6, 2, 4)
    assert fixed.refine_uniforms.dtype == torch.float32
    assert torch.equal(fixed.refine_counts, torch.full((6, 2), 4))
    drawn = [
        choose(annotations, epoch, decode_iters=3, refine_points_min=2, refine_points_max=5) for epoch in range(40)
    ]
    counts = torch.stack([each.refine_counts for each in drawn])
    assert drawn[0].refine_uniforms.shape == (6, 2, 5)
    assert sorted(counts.unique().tolist()) == [2, 3, 4, 5]
    assert all(90 <= (counts == value).sum() <= 150 for value in range(2, 6))  # 480 draws, 120 each
    uniforms = torch.stack([each.refine_uniforms for each in drawn])
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.02


# Which objects ----------------------------------------------------------------------------------------------------


def test_unusable_boxes_are_left_out():
    found = choose(objects([entry(box) for box in ([0.0, 0.0, 30.0, 20.0], [5.0, 5.0, 0.0, 9.0])]), jitter=False)
    assert found.indices.tolist() == [0]
    # Both sides shrink by half, to the longest side of 300: (30, 20) pixels are (15, 10) of 300.
    assert torch.allclose(found.targets, torch.tensor([[0, 0, 0.05, 10 / 300]]))
    assert torch.allclose(found.points, torch.tensor([[0.025, 5 / 300]]))


def test_nothing_usable_gives_no_prompts():
    for unusable in (objects([]), objects([entry([5.0, 5.0, 0.0, 9.0])])):
        for sampling in ({}, {"mask_nms": 0.8}, {"point_source": "mask", "decode_iters": 2, "refine_points": 1}):
            found = choose(unusable, **sampling)
            assert found.kinds == []
            assert found.boxes.shape == (0, 4)
            assert found.points.shape == (0, 2)


def test_area_filter_counts_resized_pixels():
    # Boxes of 400, 1600, 6400 px in the picture are 100, 400, 1600 px after halving.
    annotations = objects([entry([0.0, 0.0, side, side]) for side in (20.0, 40.0, 80.0)])
    for limits, kept in (
        ((None, None), [2, 1, 0]),
        ((400, None), [2, 1]),
        ((None, 400), [1, 0]),
        ((101, 399), [2, 1, 0]),  # none would be left
        ((400, 400), [1]),
    ):
        assert choose(annotations, filter_by_area=limits).indices.tolist() == kept
    assert filter_by_area(np.array([], int), np.ones(3), (5, None)).tolist() == []


def test_subset_is_uniform_and_sorted():
    annotations = grid(10)
    unsorted = choose(annotations, max_prompts=4, sort_by_area=False).indices
    assert unsorted.tolist() == sorted(unsorted.tolist())
    by_area = choose(annotations, max_prompts=4).indices
    assert by_area.tolist() == sorted(unsorted.tolist(), reverse=True)  # `grid` grows with the index
    counts = np.bincount(np.concatenate([choose(annotations, epoch, max_prompts=4).indices for epoch in range(500)]))
    assert len(counts) == 10
    assert all(150 < count < 250 for count in counts)  # 500 x 4 / 10 = 200 each
    assert choose(annotations, max_prompts=10).indices.tolist() == list(range(9, -1, -1))
    assert pick(np.array([2, 5, 7]), np.array([9, 9, 0.3, 9, 9, 0.1, 9, 0.2]), 2).tolist() == [5, 7]


def test_boxes_and_points_stay_paired():
    annotations = grid()
    found = choose(annotations, max_prompts=7)
    assert len(found.kinds) == 7
    points = PREPROCESS.coords_to_input(annotations.points[found.indices], (HEIGHT, WIDTH))
    targets = PREPROCESS.coords_to_input(annotations.boxes[found.indices], (HEIGHT, WIDTH))
    assert torch.allclose(found.points, points)
    assert torch.allclose(found.targets, targets)
    assert torch.allclose((found.targets[:, :2] + found.targets[:, 2:]) / 2, found.points, atol=1e-6)
    areas = (found.targets[:, 2:] - found.targets[:, :2]).prod(1)
    assert (areas.diff() <= 0).all()


@pytest.mark.parametrize("size", [(400, 600), (600, 400), (123, 457)])
def test_coordinates_stay_in_the_square(size):
    annotations = build_annotations(
        Path("a.json"), *size, [{"bbox": [0, 0, size[1], size[0]], "segmentation": [], "point_coords": [[size[1], 0]]}]
    )
    found = choose(annotations, jitter=False)
    assert found.boxes.max() == 1.0
    assert found.points.max() <= 1.0


# Mask NMS ---------------------------------------------------------------------------------------------------------


def test_mask_nms_by_hand():
    masks = [
        mask_of([(0, 0, 10, 8)]),  # 0: 80 px, 64 of them under 1, 8 more under 3
        mask_of([(0, 0, 8, 100)]),  # 1: 800 px, the largest
        mask_of([]),  # 2: empty
        mask_of([(8, 0, 1, 200)]),  # 3: 200 px, none under 1
        mask_of([(300, 300, 5, 5)]),  # 4: alone
        mask_of([(300, 300, 5, 5)]),  # 5: the same as 4
    ]
    rles = [coco_mask.encode(mask) for mask in masks]
    # Mask 0 lies with 72 of 80 pixels = 0.9 under 1 and 3 together, with 0.8 under 1 alone.
    assert mask_nms(rles, 0.8) == [1, 3, 4]
    assert mask_nms(rles, 0.9) == [0, 1, 3, 4]  # "more than"
    assert mask_nms(rles, 1.0) == [0, 1, 3, 4, 5]
    assert mask_nms(rles[:2], 0.8) == [0, 1]
    assert mask_nms(rles[:2], 0.79) == [1]
    assert mask_nms([], 0.8) == []


def test_mask_nms_is_a_choice():
    annotations = objects([entry([0.0, 0.0, 40.0, 40.0]), entry([0.0, 0.0, 30.0, 30.0]), entry([99.0, 0.0, 5.0, 5.0])])
    assert choose(annotations).indices.tolist() == [0, 1, 2]
    assert choose(annotations, mask_nms=0.8).indices.tolist() == [0, 2]


def test_damaged_mask_is_named_only_if_needed():
    damaged = {**entry([0.0, 0.0, 40.0, 40.0]), "segmentation": {"size": [HEIGHT, WIDTH], "counts": [7]}}
    assert choose(objects([damaged])).kinds == ["both"]
    for sampling in ({"mask_nms": 0.8}, {"point_source": "mask"}):
        with pytest.raises(ValueError, match=r"segmentation 0 of a\.json cannot be decoded: its runs cover 7"):
            choose(objects([damaged]), **sampling)


# Jitter -----------------------------------------------------------------------------------------------------------


def test_jitter_by_hand():
    box = np.array([[100.0, 100.0, 200.0, 150.0]])
    # A tenth of the sides is 10 and 5 px; the third move would be 30 px and is held at 20.
    moved = jitter_boxes(box, np.array([[1.0, -1.0, 3.0, 0.5]]), (HEIGHT, WIDTH))
    assert moved.tolist() == [[110, 95, 220, 152.5]]
    assert jitter_boxes(np.array([[5.0, 0.0, 595.0, 399.0]]), np.full((1, 4), -9.0), (HEIGHT, WIDTH)).tolist() == [
        [0, 0, 575, 379]
    ]
    # Corners pass each other: 100 + 20 and 300 - 20 do not, 100 + 1 and 110 - 11 do.
    crossed = jitter_boxes(
        np.array([[100.0, 100.0, 110.0, 300.0]]), np.array([[1.0, 1.0, -11.0, -1.0]]), (HEIGHT, WIDTH)
    )
    assert crossed.tolist() == [[99, 120, 101, 280]]
    # What is left would be half a pixel wide.
    narrow = np.array([[100.0, 100.0, 110.0, 300.0]])
    assert jitter_boxes(narrow, np.array([[4.75, 0, -4.75, 0]]), (HEIGHT, WIDTH)).tolist() == narrow.tolist()


def test_jitter_bounds_and_spread():
    draws = np.random.default_rng(0)
    low = draws.uniform(0, 300, (4000, 2))
    boxes = np.concatenate([low, low + draws.uniform(1, 400, (4000, 2))], 1)
    boxes = clip_boxes(boxes, (HEIGHT, WIDTH))
    boxes = boxes[is_usable(boxes)]
    moved = jitter_boxes(boxes, draws.standard_normal(boxes.shape), (HEIGHT, WIDTH))
    assert is_usable(moved).all()
    assert (moved >= 0).all()
    assert (moved <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()
    assert np.abs(moved - boxes).max() <= 20 + 1e-9
    assert (moved[:, 2:] > moved[:, :2]).all()
    inside = (boxes[:, :2] > 30).all(1) & (boxes[:, 2] < 560) & (boxes[:, 3] < 360)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    small = inside[:, None] & (sides < 60) & (sides > 10)  # the limit of 20 px is beyond three standard deviations
    ratio = ((moved - boxes) / sides)[small]
    assert abs(ratio.std() - 0.1) < 0.01
    assert abs(ratio.mean()) < 0.01


def test_jittered_boxes_differ_between_epochs_and_targets_do_not():
    annotations = grid(8)
    first, second = choose(annotations, 0), choose(annotations, 1)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.boxes, second.boxes)
    assert torch.equal(first.points, second.points)


# Points and kinds -------------------------------------------------------------------------------------------------


def test_points_come_from_the_mask():
    """Two separate stretches, neither of which holds the box's centre."""
    rectangles = [(10, 10, 4, 30), (90, 20, 6, 20)]  # 120 pixels each
    annotations = objects([entry([10.0, 10.0, 86.0, 30.0], mask=rectangles)])
    found = torch.cat([choose(annotations, epoch, point_source="mask").points for epoch in range(300)])
    x, y = (PREPROCESS.coords_to_image(found, (HEIGHT, WIDTH)) - 0.5).round().long().T
    assert torch.allclose(PREPROCESS.coords_to_image(found, (HEIGHT, WIDTH)), torch.stack([x, y], 1) + 0.5, atol=1e-3)
    assert mask_of(rectangles)[y, x].all()
    assert 110 < (x < 50).sum() < 190
    assert {10, 13} <= set(x.tolist())
    assert {90, 95} <= set(x.tolist())


@pytest.mark.parametrize("layout", ["per_object", "per_image"])
def test_kinds_that_are_not_drawn(layout):
    both, none = np.array([True, True]), np.array([True, False])
    shares = np.zeros(2)
    sampling = {name: PromptSampling(layout=layout, use_boxes=name != "points", use_points=name != "boxes")
                for name in ("all", "boxes", "points")}  # fmt: skip
    assert choose_kinds(both, shares, 0, sampling["all"]) == ["both", "both"]
    assert choose_kinds(both, shares, 0, sampling["boxes"]) == ["box", "box"]
    assert choose_kinds(both, shares, 0, sampling["points"]) == ["point", "point"]
    expected = ["both", "box"] if layout == "per_object" else ["box", "box"]
    assert choose_kinds(none, shares, 0, sampling["all"]) == expected


def test_mix_draws_per_object_or_per_image():
    has_point = np.array([True, True, True, False])
    shares = np.array([0.1, 0.29, 0.3, 0.9])
    mixed = PromptSampling(prompt_mix=True, prob_box=0.3)
    assert choose_kinds(has_point, shares, 0.0, mixed) == ["box", "box", "point", "box"]
    alike = PromptSampling(prompt_mix=True, prob_box=0.3, layout="per_image")
    assert choose_kinds(has_point[:3], shares[:3], 0.2, alike) == ["box"] * 3
    assert choose_kinds(has_point[:3], shares[:3], 0.4, alike) == ["point"] * 3
    assert choose_kinds(has_point, shares, 0.4, alike) == ["box"] * 4
    kinds = [choose(grid(1), epoch, prompt_mix=True, prob_box=0.3).kinds[0] for epoch in range(400)]
    assert 90 < kinds.count("box") < 150
    assert set(kinds) == {"box", "point"}
    for epoch in range(10):
        assert len(set(choose(grid(9), epoch, prompt_mix=True, layout="per_image").kinds)) == 1


def test_objects_without_a_point():
    missing = [None, [NAN, 3.0], [700.0, 3.0], [-1.0, 3.0]]  # not stated, damaged, beyond the picture
    annotations = objects([entry([0.0, 0.0, 50.0 - i, 20.0], point) for i, point in enumerate(["centre", *missing])])
    found = choose(annotations)
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    assert found.kinds == ["both", "box", "box", "box", "box"]
    assert not found.points[1:].any()
    assert choose(annotations, use_boxes=False).indices.tolist() == [0]
    empty = objects([entry([0.0, 0.0, 50.0, 20.0], mask=[]), entry([0.0, 0.0, 40.0, 20.0])])
    assert choose(empty, point_source="mask").kinds == ["box", "both"]
    assert choose(empty, point_source="mask", use_boxes=False).indices.tolist() == [1]


def test_validation_gives_everything():
    sampling = PromptSampling(use_points=False, mask_nms=0.5, max_prompts=3).for_validation()
    assert (sampling.jitter, sampling.use_boxes, sampling.use_points) == (False, True, True)
    assert (sampling.mask_nms, sampling.max_prompts) == (0.5, 3)
    assert not PromptSampling(prompt_mix=True).for_validation().prompt_mix


def test_draw_has_a_row_for_every_object():
    draws = draw(5, PromptSampling(decode_iters=3, refine_points=2), sample_generator(0, 0, "a"))
    assert draws.corners.shape == (5, 4)
    assert draws.refine_counts.shape == (5, 2)
    assert draws.refine_uniforms.shape == (5, 2, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_prompts": 0}, r"DISTILL\.MAX_PROMPTS must be at least 1, got 0"),
        ({"decode_iters": 0}, r"DISTILL\.DECODE_ITERS must be at least 1, got 0"),
        ({"refine_points": -1}, r"DISTILL\.POINTS_PER_REFINE_ITER must be at least 0, got -1"),
        ({"refine_points_max": -1}, r"DISTILL\.POINTS_PER_REFINE_ITER_MAX must be at least 0, got -1"),
        ({"refine_points_min": 3, "refine_points_max": 2}, "_ITER_MIN is 3 and _MAX 2; wanted 1 <= MIN <= MAX"),
        ({"refine_points_min": 0, "refine_points_max": 2}, "_ITER_MIN is 0 and _MAX 2"),
        ({"prob_box": 1.5}, r"DISTILL\.PROMPT_MIX_PROB_BOX is a share in 0\.\.1, got 1\.5"),
        ({"prob_box": NAN}, r"DISTILL\.PROMPT_MIX_PROB_BOX is a share"),
        ({"mask_nms": -0.1}, r"DATA\.MASK_NMS is a share in 0\.\.1, got -0\.1"),
        ({"use_boxes": False, "use_points": False}, r"DISTILL\.USE_BOX_PROMPTS and USE_POINT_PROMPTS are both False"),
        ({"prompt_mix": True, "use_points": False}, r"DISTILL\.PROMPT_MIX draws between .*: set both"),
        (
            {"layout": "per_batch"},
            r"DISTILL\.PROMPT_LAYOUT 'per_batch' is unknown; choose one of per_object, per_image",
        ),
        ({"point_source": "box"}, r"DISTILL\.POINT_SOURCE 'box' is unknown; choose one of annotation, mask"),
        ({"filter_by_area": (4,)}, r"DATA\.FILTER_BY_AREA is \[smallest, largest\], numbers or None, got \[4\]"),
        ({"filter_by_area": (-1, None)}, r"DATA\.FILTER_BY_AREA .* got \[-1, None\]"),
        ({"filter_by_area": (None, NAN)}, r"DATA\.FILTER_BY_AREA .* got \[None, nan\]"),
        ({"filter_by_area": ("4", None)}, r"DATA\.FILTER_BY_AREA .* got \['4', None\]"),
        ({"filter_by_area": (5, 4)}, r"DATA\.FILTER_BY_AREA .* 5 is above 4"),
    ],
)
def test_sampling_that_cannot_work(wrong, message):
    with pytest.raises(ValueError, match=message):
        PromptSampling(**wrong)
