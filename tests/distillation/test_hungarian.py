"""The matcher against assignments worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distillation.hungarian import IMPOSSIBLE, HungarianMatcher, assign_greedily, resize

SURE = 50.0  # a logit whose probability is 1 in float32
LOG3 = float(np.log(3))  # of probability 3/4


def outputs(pictures: int, queries: int, side: int = 8, seed: int = 0) -> dict:
    """Random common outputs with features, of confident masks."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    corner, size = torch.rand(2, pictures, queries, 2, generator=generator) / 2
    return {
        "pred_masks": 20 * noise(pictures, queries, side, side),
        "pred_boxes": torch.cat((corner, corner + size + 0.1), -1),
        "pred_logits": noise(pictures, queries),
        "presence_logits": noise(pictures, 1),
        "semantic_seg": noise(pictures, 1, side, side),
        "fpn_features": tuple(noise(pictures, 4, side // k, side // k) for k in (1, 2, 4)),
        "encoder_output": noise(pictures, (side // 4) ** 2, 4),
        "encoder_hw": (side // 4, side // 4),
    }


def by_hand() -> tuple[dict, dict]:
    """Two queries against three, 2 x 2 masks. Soft IoUs: 1/2, 0, 1 of the first, 0, 1, 0 of the second."""

    def mask(*pixels: int) -> list[list[float]]:
        logits = [SURE if pixel else -SURE for pixel in pixels]
        return [logits[:2], logits[2:]]

    student, teacher = outputs(1, 2, side=4), outputs(1, 3, side=4)
    student["pred_masks"] = torch.tensor([[mask(1, 1, 0, 0), mask(0, 0, 0, 1)]])
    teacher["pred_masks"] = torch.tensor([[mask(1, 0, 0, 0), mask(0, 0, 0, 1), mask(1, 1, 0, 0)]])
    student["pred_boxes"] = torch.tensor([[[0, 0, 1, 0.5], [0.5, 0.5, 1, 1]]])
    teacher["pred_boxes"] = torch.tensor([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0.1, 1, 0.5]]])
    student["pred_logits"] = torch.tensor([[0, LOG3]])
    teacher["pred_logits"] = torch.tensor([[LOG3, LOG3, -LOG3]])
    return student, teacher


def costs_seen(matcher: HungarianMatcher, student: dict, teacher: dict) -> list[np.ndarray]:
    """What the matcher gives its solver, picture by picture."""
    seen, solve = [], matcher.solve
    matcher.solve = lambda costs: (seen.append(costs), solve(costs))[1]
    matcher(student, teacher)
    matcher.solve = solve
    return seen


class Reads(TorchDispatchMode):
    """Counts the numbers that the program reads from tensors, each of which would wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_costs_by_hand():
    (costs,) = costs_seen(HungarianMatcher(1, 1, 1, mask_size=2), *by_hand())
    assert costs.dtype == np.float64
    expected = [[0.5 + 0.5 / 4 + 0.25, 1 + 1.5 / 4 + 0.25, 0.1 / 4 + 0.25], [1 + 2 / 4, 0, 1 + 1.4 / 4 + 0.5]]
    np.testing.assert_allclose(costs, expected, atol=3e-6)
    (weighted,) = costs_seen(HungarianMatcher(2, 4, 8, mask_size=None), *by_hand())
    assert weighted[0, 0] == pytest.approx(2 * 0.5 + 4 * 0.125 + 8 * 0.25, abs=1e-5)


def test_pairs_and_their_iou_by_hand():
    matches = HungarianMatcher(mask_size=2).match(*by_hand())
    ((ours, theirs),) = matches.pairs
    assert (ours.tolist(), theirs.tolist()) == ([0, 1], [2, 1])
    assert ours.dtype == theirs.dtype == torch.int64
    assert matches.iou.item() == pytest.approx(1, abs=1e-5) and matches.finite is True
    student, teacher = by_hand()
    teacher["pred_boxes"][0, 2] += 3  # out of the question: the first one it is, IoU 1/2
    matches = HungarianMatcher(mask_size=2).match(student, teacher)
    assert matches.pairs[0][1].tolist() == [0, 1] and matches.iou.item() == pytest.approx((0.5 + 1) / 2, abs=1e-5)


def test_soft_masks_have_a_soft_iou():
    student, teacher = by_hand()
    student["pred_masks"], teacher["pred_masks"] = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), LOG3)
    for side in (student, teacher):
        side["pred_boxes"], side["pred_logits"] = side["pred_boxes"][:, :1], side["pred_logits"][:, :1]
    iou = HungarianMatcher(mask_size=2).match(student, teacher).iou.item()
    assert iou == pytest.approx(4 * 0.375 / (4 * 0.5 + 4 * 0.75 - 4 * 0.375), abs=1e-6)


def test_a_hundred_of_two_hundred():
    matches = HungarianMatcher().match(outputs(2, 100, 16), outputs(2, 200, 24, seed=1))
    for ours, theirs in matches.pairs:
        assert ours.tolist() == list(range(100)) and theirs.unique().numel() == 100 and theirs.max() < 200
    assert 0 < matches.iou.item() < 1


def test_a_shuffled_superset_is_recovered():
    """Each picture's student is made of queries of its teacher, taken in another order."""
    teacher = outputs(2, 40)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:25] for seed in (1, 2)])
    student = {name: torch.stack([teacher[name][b, order[b]] for b in range(2)]) for name in list(teacher)[:3]}
    for method in ("hungarian", "greedy"):
        pairs = HungarianMatcher(mask_size=None, method=method)(student, teacher)
        assert [theirs.tolist() for _, theirs in pairs] == order.tolist()


def test_greedy_takes_the_cheapest_pair_first():
    costs = np.array([[2.0, 10.0, 30.0], [1.0, 2.0, 30.0]])
    rows, columns = assign_greedily(costs)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0]) and costs[0, 1] == 10  # 11, where 4 would do
    assert [part.tolist() for part in assign_greedily(costs.T)] == [[0, 1], [1, 0]]
    assert [len(part) for part in assign_greedily(np.zeros((3, 0)))] == [0, 0]


def test_hungarian_costs_no_more_than_greedy():
    less = 0
    for seed in range(10):
        student, teacher = outputs(1, 8, seed=2 * seed), outputs(1, 12, seed=2 * seed + 1)
        (costs,) = costs_seen(HungarianMatcher(mask_size=8), student, teacher)
        best, greedy = (
            sum(costs[i, j] for i, j in zip(*HungarianMatcher(mask_size=8, method=m)(student, teacher)[0], strict=True))
            for m in ("hungarian", "greedy")
        )
        assert best <= greedy + 1e-12
        less += best < greedy - 1e-6
    assert less


def test_more_student_than_teacher_queries():
    """Nothing says which side is the larger one; rows stay in order."""
    student, teacher = by_hand()
    ((ours, theirs),) = HungarianMatcher(mask_size=2)(teacher, student)
    assert (ours.tolist(), theirs.tolist()) == ([1, 2], [1, 0])


@pytest.mark.parametrize("queries", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("settings", [{}, {"method": "greedy"}, {"teacher_score_threshold": 0.5, "max_matches": 2}])
def test_nothing_to_match(queries, settings):
    matches = HungarianMatcher(mask_size=4, **settings).match(outputs(2, queries[0]), outputs(2, queries[1]))
    assert [(ours.tolist(), theirs.tolist()) for ours, theirs in matches.pairs] == [([], []), ([], [])]
    assert matches.iou.item() == 0 and matches.finite


def test_teacher_queries_below_the_threshold_are_left_out():
    student, teacher = by_hand()
    ((ours, theirs),) = HungarianMatcher(mask_size=2, teacher_score_threshold=0.5)(student, teacher)
    assert (ours.tolist(), theirs.tolist()) == ([0, 1], [0, 1])  # without the third, of probability 1/4
    teacher["pred_logits"] = torch.tensor([[-3.0, -1.0, -2.0]])
    ((ours, theirs),) = HungarianMatcher(mask_size=2, teacher_score_threshold=0.5)(student, teacher)
    assert (ours.tolist(), theirs.tolist()) == ([1], [1])  # the best one stays


def test_pictures_may_keep_different_numbers_of_queries():
    student, teacher = outputs(3, 4), outputs(3, 6, seed=1)
    teacher["pred_logits"] = torch.tensor([[-1.0] * 6, [1, 1, -1, -1, -1, 1], [1.0] * 6])
    pairs = HungarianMatcher(mask_size=8, teacher_score_threshold=0.5)(student, teacher)
    assert [len(ours) for ours, _ in pairs] == [1, 3, 4] and set(pairs[1][1].tolist()) == {0, 1, 5}


def test_the_cheapest_pairs_are_kept():
    student, teacher = by_hand()
    ((ours, theirs),) = HungarianMatcher(mask_size=2, max_matches=1)(student, teacher)
    assert (ours.tolist(), theirs.tolist()) == ([1], [1])
    student, teacher = outputs(1, 9), outputs(1, 12, seed=1)
    matcher = HungarianMatcher(mask_size=8)
    (costs,), ((ours, theirs),) = costs_seen(matcher, student, teacher), matcher(student, teacher)
    every = sorted(costs[ours, theirs])
    ((ours, theirs),) = HungarianMatcher(mask_size=8, max_matches=4)(student, teacher)
    assert ours.tolist() == sorted(ours.tolist()) and sorted(costs[ours, theirs]) == every[:4]


def test_a_batch_is_matched_picture_by_picture():
    student, teacher = outputs(3, 5), outputs(3, 7, seed=1)
    together = HungarianMatcher(mask_size=6).match(student, teacher)
    names = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
    ious = []
    for b in range(3):
        one = ({name: side[name][b : b + 1] for name in names} for side in (student, teacher))
        alone = HungarianMatcher(mask_size=6).match(*one)
        ious.append(alone.iou.item())
        assert all(map(torch.equal, alone.pairs[0], together.pairs[b]))
    assert together.iou.item() == pytest.approx(sum(ious) / 3, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [*list(outputs(1, 1))[:5], "fpn_features", "encoder_output"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_what_both_say_must_be_finite(who, name, value):
    student, teacher = outputs(2, 4), outputs(2, 6, seed=1)
    side = {"student": student, "teacher": teacher}[who]
    damaged = side[name][-1] if name == "fpn_features" else side[name]
    damaged.view(-1)[-1] = value
    matches = HungarianMatcher(mask_size=8).match(student, teacher)
    assert matches.finite is False
    assert [len(ours) for ours, _ in matches.pairs] == [4, 4]  # and still there are pairs


def test_a_student_without_numbers_is_not_finite():
    student, teacher = outputs(1, 4), outputs(1, 6, seed=1)
    student["pred_boxes"][0, 2, 1] = float("nan")
    matcher = HungarianMatcher(mask_size=8)
    assert matcher.match(student, teacher).finite is False
    (costs,) = costs_seen(matcher, student, teacher)
    assert (costs[2] == IMPOSSIBLE).all() and (costs[[0, 1, 3]] < 10).all()


def test_features_may_be_missing():
    student, teacher = outputs(1, 4), outputs(1, 6, seed=1)
    expected = HungarianMatcher(mask_size=8).match(student, teacher)
    teacher |= {"fpn_features": None, "encoder_output": None}
    for side in (teacher, {name: value for name, value in teacher.items() if value is not None}):
        matches = HungarianMatcher(mask_size=8).match(student, side)
        assert matches.finite and all(map(torch.equal, matches.pairs[0], expected.pairs[0]))


def test_half_precision_and_autocast_change_nothing():
    student, teacher = outputs(1, 12, 16), outputs(1, 20, 24, seed=1)
    halves = [{name: side[name].half() for name in list(side)[:5]} for side in (student, teacher)]
    widened = [{name: value.float() for name, value in side.items()} for side in halves]
    (wanted,) = costs_seen(HungarianMatcher(mask_size=12), *widened)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = costs_seen(HungarianMatcher(mask_size=12), *halves)
    np.testing.assert_array_equal(found, wanted)


def test_no_gradient_and_no_further_wait_for_the_device(monkeypatch):
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copies.append(tensor.shape), cpu(tensor))[1])
    student, teacher = outputs(2, 4), outputs(2, 6, seed=1)
    student["pred_masks"].requires_grad_()
    with Reads() as reads:
        matches = HungarianMatcher(mask_size=8, teacher_score_threshold=0.4, max_matches=3).match(student, teacher)
    assert reads.count == 0 and copies == [(2 * 4 * 6 + 2 * 6 + 1,)]
    assert not matches.iou.requires_grad


def test_masks_are_resized_in_a_way_that_mps_has(monkeypatch):
    calls, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *given, **how: (calls.append(how), interpolate(*given, **how))[1])
    HungarianMatcher(mask_size=5)(outputs(1, 4, 8), outputs(1, 6, 12))
    assert calls == 2 * [{"size": (5, 5), "mode": "bilinear", "align_corners": False}]


def test_resize_by_hand():
    """From 2 to 4, the centres lie at -1/4, 1/4, 3/4, 5/4 of the way between the two, and stop at the ends."""
    maps = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    assert resize(maps, (2, 4))[0, 0].tolist() == 2 * [[0, 0.25, 0.75, 1]]
    assert resize(maps, (2, 2)) is maps and resize(maps[:, :0], (4, 4)).shape == (1, 0, 4, 4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "best"}, "matcher 'best' is unknown; choose one of hungarian, greedy"),
        ({"mask_size": 0}, "mask_size must be at least 1 or None, got 0"),
        ({"max_matches": 0}, "max_matches must be at least 1 or None, got 0"),
    ],
)
def test_settings_that_cannot_work(settings, told):
    with pytest.raises(ValueError, match=told):
        HungarianMatcher(**settings)
