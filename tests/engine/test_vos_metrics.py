"""J and F against plain loops and by hand; which frames and objects count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.morphology import dilation, disk

from sam3.engine.vos_metrics import (
    ObjectScore,
    boundary,
    boundary_accuracy,
    evaluate_sequence,
    region_similarity,
    summarise,
)

EMPTY = np.zeros((6, 8), dtype=bool)


def rectangle(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    rows = mask.tolist()
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            others = (rows[below][x], rows[y][right], rows[below][right])
            found[y, x] = any(other != rows[y][x] for other in others)
    return found


def slow_f(predicted: np.ndarray, truth: np.ndarray) -> float:
    """The DAVIS measure as its paper's toolkit defines it, by dilation with a disk."""
    radius = math.ceil(0.008 * math.sqrt(predicted.shape[0] ** 2 + predicted.shape[1] ** 2))
    first, second = slow_boundary(predicted), slow_boundary(truth)
    thick_first, thick_second = dilation(first, disk(radius)), dilation(second, disk(radius))
    num_first, num_second = int(first.sum()), int(second.sum())
    if num_first == 0 and num_second == 0:
        precision = recall = 1.0
    elif num_first == 0:
        precision, recall = 1.0, 0.0
    elif num_second == 0:
        precision, recall = 0.0, 1.0
    else:
        precision = int((first & thick_second).sum()) / num_first
        recall = int((second & thick_first).sum()) / num_second
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def slow_j(predicted: np.ndarray, truth: np.ndarray) -> float:
    pairs = list(zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True))
    both, either = sum(a and b for a, b in pairs), sum(a or b for a, b in pairs)
    return 1.0 if either == 0 else both / either


def blob(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Ellipses, some cut by the picture's edge, with a hole and single pixels."""
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), dtype=bool)
    for sign in (True, True, False):
        cy, cx = generator.uniform(0, height), generator.uniform(0, width)
        ry, rx = generator.uniform(2, 3 + height / 3), generator.uniform(2, 3 + width / 3)
        mask[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1] = sign
    mask[generator.random(mask.shape) < 0.002] ^= True
    return mask


@pytest.mark.parametrize(("height", "width"), [(40, 60), (131, 90), (1, 50), (200, 320)])
def test_j_and_f_equal_the_slow_reference(height: int, width: int):
    generator = np.random.default_rng(height)
    scores = []
    for number in range(4):
        truth = blob(generator, height, width)
        shifted = np.roll(truth, (number, 2 * number), axis=(0, 1))
        predicted = blob(generator, height, width) if number == 3 else shifted
        assert np.array_equal(boundary(truth), slow_boundary(truth))
        assert region_similarity(predicted, truth) == slow_j(predicted, truth)
        scores.append(boundary_accuracy(predicted, truth))
        assert scores[-1] == slow_f(predicted, truth)
    assert max(scores) == 1, "the first is not shifted"
    assert height == 1 or min(scores) < 0.9, "else F would not be tried"


def test_boundary_by_hand():
    corner = rectangle(0, 0, 2, 3, size=(4, 5))
    assert boundary(corner).astype(int).tolist() == [
        [0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    middle = rectangle(1, 1, 3, 3, size=(4, 5))
    assert boundary(middle).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert not boundary(np.ones((4, 5), dtype=bool)).any(), "the picture's edge is no boundary"


def test_j_by_hand():
    assert region_similarity(rectangle(0, 0, 2, 2), rectangle(0, 1, 2, 3)) == pytest.approx(2 / 6)
    assert region_similarity(rectangle(0, 0, 2, 2), EMPTY) == 0
    assert region_similarity(EMPTY, EMPTY) == 1


def test_f_by_hand():
    # Vertical edges: the boundary is the column left of the edge, 6 pixels; the tolerance is 1 = ceil(0.008 * 10).
    left, right = rectangle(0, 0, 6, 3), rectangle(0, 0, 6, 4)
    assert boundary_accuracy(left, right) == 1
    assert boundary_accuracy(left, rectangle(0, 0, 6, 5)) == 0, "two columns away"
    assert boundary_accuracy(left, rectangle(0, 0, 6, 5), tolerance=2) == 1
    # Three of the six rows agree on both sides; the upper half also has a boundary of its own.
    half = rectangle(0, 0, 3, 3)  # column 2 in rows 0..2 and row 2 in columns 0..2: 5 pixels
    # Of those 5, (2, 0) lies two away from column 2; of column 2's 6 pixels, rows 4 and 5 lie more than one away.
    precision, recall = 4 / 5, 4 / 6
    assert boundary_accuracy(half, left) == pytest.approx(2 * precision * recall / (precision + recall))


def test_f_of_empty_and_full_masks():
    full = np.ones_like(EMPTY)
    assert boundary_accuracy(EMPTY, EMPTY) == 1
    assert boundary_accuracy(EMPTY, rectangle(1, 1, 3, 3)) == 0
    assert boundary_accuracy(rectangle(1, 1, 3, 3), EMPTY) == 0
    assert boundary_accuracy(full, EMPTY) == 1, "neither has a boundary"


HALF, WHOLE = rectangle(0, 0, 3, 4), rectangle(0, 0, 6, 4)  # J 1/2


def test_first_and_last_annotated_frame_do_not_count():
    truth = dict.fromkeys((0, 4, 8, 12), WHOLE)
    predicted = {4: WHOLE, 8: HALF}  # frames 0 and 12 are not even asked for
    scores = evaluate_sequence([8, 0, 4, 12, 13], [7], lambda n, _: predicted.get(n), lambda n, _: truth.get(n))
    assert scores[7].num_frames == 2
    assert scores[7].j == pytest.approx(0.75)
    assert scores[7].f == pytest.approx((1 + boundary_accuracy(HALF, WHOLE)) / 2)
    assert scores[7].jf == pytest.approx((scores[7].j + scores[7].f) / 2)


def test_each_object_has_its_own_annotated_frames():
    truth = {(n, 1): WHOLE for n in range(3)} | {(n, 2): EMPTY for n in range(2, 7)}
    asked = []

    def predicted(number: int, object_id: int) -> np.ndarray:
        asked.append((number, object_id))
        return WHOLE if number == 3 else EMPTY

    scores = evaluate_sequence(range(8), [1, 2], predicted, lambda *key: truth.get(key))
    assert asked == [(1, 1), (3, 2), (4, 2), (5, 2)]
    assert scores[1] == ObjectScore(0.0, 0.0, 1)
    assert scores[2].j == pytest.approx(2 / 3), "an absent object found absent is right"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_sequences_have_no_score(count: int):
    scores = evaluate_sequence(range(count), [1], lambda *_: WHOLE, lambda *_: WHOLE)
    assert scores[1].num_frames == 0
    assert math.isnan(scores[1].jf)
    with pytest.raises(ValueError, match="three annotated frames"):
        summarise({"one": scores}, "sav")
    both = summarise({"one": scores, "two": {1: ObjectScore(0.5, 0.7, 3)}}, "sav")
    assert (both.j, both.num_videos, both.num_objects, both.num_unscored) == (0.5, 1, 1, 1)


def test_missing_and_misshapen_predictions_are_named():
    with pytest.raises(ValueError, match="no predicted mask of object 3 in frame 1"):
        evaluate_sequence(range(3), [3], lambda *_: None, lambda *_: WHOLE)
    with pytest.raises(ValueError, match=r"object 3 in frame 1 has the shape \(3, 4\), the true one \(6, 8\)"):
        evaluate_sequence(range(3), [3], lambda *_: WHOLE[:3, :4], lambda *_: WHOLE)


def test_sav_weighs_videos_alike_and_davis_objects():
    videos = {
        "a": {1: ObjectScore(0.2, 0.4, 5), 2: ObjectScore(0.4, 0.6, 50)},
        "b": {1: ObjectScore(0.9, 1.0, 1)},
    }
    sav, davis = summarise(videos, "sav"), summarise(videos, "davis")
    assert (sav.j, sav.f, sav.jf) == pytest.approx((0.6, 0.75, 0.675))
    assert (davis.j, davis.f, davis.jf) == pytest.approx((0.5, 2 / 3, (0.5 + 2 / 3) / 2))
    assert (davis.num_videos, davis.num_objects, davis.num_unscored) == (2, 3, 0)
    with pytest.raises(ValueError, match="choose one of sav, davis"):
        summarise(videos, "coco")
