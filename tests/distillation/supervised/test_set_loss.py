"""The set loss and its matcher against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distillation.supervised.set_loss import (
    Assignment,
    SetLoss,
    SetWeights,
    Targets,
    assign,
    covers,
    mask_queries,
    mask_terms,
)

LOG2, LOG3 = math.log(2), math.log(3)  # sigmoid(0) = 1/2, sigmoid(log 3) = 3/4
HERE, THERE = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)  # one apart in cx + cy; a hull of 1, a union of 1/2: GIoU -1/2
FOCAL_HALF = 0.5 * 0.25 * LOG2  # of a logit of 0, hit or miss: alpha (1 - p)^2 log 2
LOSS = SetLoss(SetWeights(), copies=2)


def layer(boxes: list, presence: list[float], many: bool = False) -> dict[str, Tensor]:
    """One decoder layer whose queries all have a logit of 0. boxes: (B, Q, 4); presence: B logits."""
    boxes = torch.tensor(boxes)
    out = {
        "pred_logits": torch.zeros(*boxes.shape[:2], 1),
        "pred_boxes_xyxy": boxes,
        "presence_logit_dec": torch.tensor(presence)[:, None],
    }
    return out | {"pred_logits_o2m": out["pred_logits"], "pred_boxes_xyxy_o2m": boxes} if many else out


def targets(
    wanted: list[list[bool]], boxes: list | None = None, masks: Tensor | None = None, doubtful: list | None = None
) -> Targets:
    """Where nothing is given: boxes and masks of zeros, and no object is doubtful."""
    wanted = torch.tensor(wanted)
    boxes = torch.zeros(*wanted.shape, 4) if boxes is None else torch.tensor(boxes)
    masks = torch.zeros(*wanted.shape, 2, 2) if masks is None else masks
    return Targets(wanted, boxes, masks, torch.zeros_like(wanted) if doubtful is None else torch.tensor(doubtful))


def lists(matched: Assignment) -> tuple[list[int], ...]:
    return matched.rows.tolist(), matched.queries.tolist(), matched.objects.tolist()


# Costs and assignment -------------------------------------------------------------------------------------------------


def test_costs_by_hand():
    logits, boxes = torch.tensor([[LOG3, 0.0]]), torch.tensor([[HERE, THERE]])
    costs = LOSS.costs(logits, boxes, torch.tensor([[HERE, THERE]]))
    # Of a score of 3/4: hit log(4/3) / 16, miss log(4) 9/16, both halved by alpha; of 1/2, the two are the same.
    score = 2 * (math.log(4 / 3) / 16 - math.log(4) * 9 / 16) / 2
    wanted = [[score - 2, score + 5 * 1 + 2 * 0.5], [5 * 1 + 2 * 0.5, -2]]
    torch.testing.assert_close(costs[0], torch.tensor(wanted), atol=1e-5, rtol=0)


COSTS = torch.tensor([[[1.0, 2.0], [1.0, 5.0], [9.0, 9.0]]])


@pytest.mark.parametrize(
    ("wanted", "copies", "found"),
    [
        ([True, True], 1, ([0, 0], [0, 1], [1, 0])),  # 2 + 1; the nearest first would cost 1 + 5
        ([False, True], 1, ([0], [0], [1])),
        ([True, False], 2, ([0, 0], [0, 1], [0, 0])),
        ([True, True], 2, ([0, 0, 0], [0, 1, 2], [0, 0, 1])),  # 1 + 1 + 9: a fourth match finds no query
        ([False, False], 4, ([], [], [])),
    ],
)
def test_the_cheapest_assignment(wanted: list[bool], copies: int, found: tuple[list[int], ...]):
    matched = assign(COSTS, torch.tensor([wanted]), copies)
    assert lists(matched) == found and matched.rows.dtype == torch.int64


def test_rows_are_assigned_by_themselves():
    wanted = torch.tensor([[True, True], [False, False], [True, False]])
    assert lists(assign(COSTS.expand(3, -1, -1), wanted)) == ([0, 0, 2], [0, 1, 0], [1, 0, 0])


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_a_cost_that_is_no_number_is_avoided(cost: float):
    costs = torch.tensor([[[cost, 2.0], [3.0, cost], [50.0, 50.0]]])
    assert lists(assign(costs, torch.tensor([[True, True]]))) == ([0, 0], [0, 1], [1, 0])


def test_some_sets_of_an_assignment():
    matched = Assignment(*torch.tensor([[0, 0, 2], [1, 2, 0], [0, 1, 0]]))
    assert lists(matched.take(torch.tensor([0, 2]), 3)) == ([0, 0, 1], [1, 2, 0], [0, 1, 0])
    assert lists(matched.take(torch.tensor([2]), 3)) == ([0], [0], [0])
    assert len(matched) == 3 and len(matched.take(torch.tensor([1]), 3)) == 0


# Terms ----------------------------------------------------------------------------------------------------------------


def test_terms_by_hand():
    """Pair 0 shows one of two padded objects, pair 1 none: of it, only presence counts."""
    out = layer([[HERE, THERE], [HERE, HERE]], [LOG3, LOG3])
    terms, matched = LOSS(out, targets([[True, False], [False, False]], [[HERE, HERE], [HERE, HERE]]))
    assert lists(matched) == ([0], [0], [0])
    assert set(terms) == {"presence", "score", "box_l1", "box_giou"}
    assert terms["score"].item() == pytest.approx(2 * FOCAL_HALF)  # two queries over one object
    assert terms["box_l1"].item() == pytest.approx(0) and terms["box_giou"].item() == pytest.approx(0, abs=1e-5)
    assert terms["presence"].item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_absent_things_may_teach_scores():
    """Of the pair without an object, the same two logits at half the weight; the mean stays one over objects."""
    loss = SetLoss(SetWeights(), absent_score=0.5)
    out = layer([[HERE, THERE], [HERE, HERE]], [LOG3, LOG3])
    terms, _ = loss(out, targets([[True, False], [False, False]], [[HERE, HERE], [HERE, HERE]]))
    assert terms["score"].item() == pytest.approx(3 * FOCAL_HALF)


def test_queries_on_doubtful_objects_are_left_alone():
    """Pair 0: one query hits, the other lies on a doubtful object. Pair 1: whether it is absent is not to be learnt."""
    loss = SetLoss(SetWeights(), absent_score=1.0)
    out = layer([[HERE, THERE], [THERE, HERE]], [LOG3, LOG3])
    asked = targets([[True, False], [False, False]], [[HERE, THERE]] * 2, doubtful=[[False, True], [False, True]])
    terms, _ = loss(out, asked)
    assert terms["score"].item() == pytest.approx(2 * FOCAL_HALF)  # the hit, and the query of pair 1 that is elsewhere
    assert terms["presence"].item() == pytest.approx(math.log(4 / 3))


def test_a_box_covers_an_object_from_half_their_union_on():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.6, 1.0]]])
    found = covers(boxes, torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]]), torch.tensor([[True, True]]))
    assert found.tolist() == [[True, True, False]]
    assert not covers(boxes, boxes, torch.zeros(1, 3, dtype=torch.bool)).any()


def test_hits_and_misses_may_weigh_differently():
    """With nothing to hit, both queries are misses: a quarter of the weight instead of a half."""
    loss = SetLoss(SetWeights(), absent_score=1.0, focal_alpha=0.75)
    terms, _ = loss(layer([[HERE, THERE]], [0.0]), targets([[False]], [[HERE]]))
    assert terms["score"].item() == pytest.approx(2 * FOCAL_HALF / 2)
    with pytest.raises(ValueError, match="an alpha between 0 and 1, got 1"):
        SetLoss(SetWeights(), focal_alpha=1.0)


def test_terms_are_means_over_layers_and_the_last_assignment_is_given():
    """The earlier layer finds the object with its second query, a tenth to the right: l1 of 0.1, IoU of 4 / 6."""
    moved = (0.1, 0.0, 0.6, 0.5)
    out = layer([[HERE, THERE]], [0.0]) | {"aux_outputs": [layer([[THERE, moved]], [0.0])]}
    terms, matched = LOSS(out, targets([[True]], [[HERE]]))
    assert lists(matched) == ([0], [0], [0])
    assert terms["box_l1"].item() == pytest.approx(0.1 / 2, abs=1e-6)
    assert terms["box_giou"].item() == pytest.approx((1 - 4 / 6) / 2, abs=1e-5)
    assert terms["score"].item() == pytest.approx(2 * FOCAL_HALF) and terms["presence"].item() == pytest.approx(LOG2)


def test_one_to_many_queries_share_an_object():
    terms, _ = LOSS(layer([[HERE, THERE]], [0.0], many=True), targets([[True]], [[HERE]]))
    assert terms["box_l1"].item() == pytest.approx(0)
    assert terms["many_score"].item() == pytest.approx(FOCAL_HALF)  # two queries over two matches
    assert terms["many_box_l1"].item() == pytest.approx(0.5)
    assert terms["many_box_giou"].item() == pytest.approx(0.75, abs=1e-5)  # 0 and 1 + 1/2


def test_where_nothing_is_wanted_only_presence_counts():
    out = layer([[HERE, THERE]], [0.0], many=True)
    for value in out.values():
        value.requires_grad_()
    terms, matched = LOSS(out, targets([[False]], [[HERE]]))
    assert len(matched) == 0
    assert {name for name, value in terms.items() if value.item()} == {"presence"}
    sum(LOSS.weigh(terms).values()).backward()
    assert out["presence_logit_dec"].grad.item() == pytest.approx(0.5)
    assert not out["pred_logits"].grad.any() and not out["pred_boxes_xyxy"].grad.any()


def test_weights():
    names = ("score", "box_l1", "box_giou", "presence", "mask_bce", "many_score", "many_box_l1", "many_box_giou")
    loss = SetLoss(SetWeights(score=2, box_l1=5, box_giou=3, presence=7, mask_bce=11, one_to_many=0.5))
    weighed = loss.weigh({name: torch.tensor(2.0) for name in names})
    assert [weighed[name].item() for name in names] == [4, 10, 6, 14, 22, 2, 5, 3]
    assert SetWeights.from_mapping({"score": 0}) == SetWeights(score=0)


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="no loss term is named box, masks; see SetWeights"):
        SetWeights.from_mapping({"masks": 1, "box": 2})
    with pytest.raises(ValueError, match="must not be negative: box_l1"):
        SetWeights.from_mapping({"box_l1": -1, "score": 0})
    with pytest.raises(ValueError, match="at least one copy of each object, got 0"):
        SetLoss(SetWeights(), copies=0)


# Masks ----------------------------------------------------------------------------------------------------------------


def test_queries_that_get_a_mask():
    matched = Assignment(*torch.tensor([[0, 0, 2], [4, 1, 3], [0, 1, 0]]))
    queries, place = mask_queries(matched, 3)
    assert queries.tolist() == [[4, 1], [0, 0], [3, 0]] and place.tolist() == [0, 1, 0]
    queries, place = mask_queries(matched.take(torch.tensor([1]), 3), 2)
    assert queries.tolist() == [[0], [0]] and place.tolist() == []


def test_mask_terms_by_hand():
    """Three objects, the last of which nobody asks for; the second is matched by a mask that is 3/4 everywhere."""
    rows = {"upper": [[1.0, 1.0], [0.0, 0.0]], "left": [[1.0, 0.0], [1.0, 0.0]], "all": [[1.0, 1.0], [1.0, 1.0]]}
    asked = targets([[True, True, False]], masks=torch.tensor([list(rows.values())]))
    masks = {"pred_masks": torch.full((1, 1, 2, 2), LOG3), "semantic_seg": torch.zeros(1, 1, 2, 2)}
    matched = Assignment(*torch.tensor([[0], [7], [1]]))
    terms = mask_terms(masks, torch.tensor([0]), matched, asked)
    assert terms["mask_bce"].item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert terms["mask_dice"].item() == pytest.approx(1 - (2 * 1.5 + 1) / (3 + 2 + 1))
    # Three of four cells belong to what is meant: the upper left one once, although two objects lie on it.
    assert terms["semantic_bce"].item() == pytest.approx(LOG2)
    assert terms["semantic_dice"].item() == pytest.approx(1 - (2 * 1.5 + 1) / (2 + 3 + 1))


def test_what_is_meant_is_not_learnt_where_a_doubtful_object_is():
    true = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]]])
    asked = targets([[True, False]], masks=true, doubtful=[[False, True]])
    masks = {"pred_masks": torch.zeros(1, 1, 2, 2), "semantic_seg": torch.tensor([[[[LOG3, LOG3], [9.0, -LOG3]]]])}
    terms = mask_terms(masks, torch.tensor([0]), Assignment(*torch.tensor([[0], [0], [0]])), asked)
    assert terms["semantic_bce"].item() == pytest.approx(math.log(4 / 3))


def test_mask_terms_are_means_over_matches_and_pairs():
    true = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    asked = targets([[True], [False]], masks=true)
    semantic = torch.tensor([LOG3, -LOG3])[:, None, None, None].expand(2, 1, 2, 2)
    masks = {"pred_masks": torch.full((2, 1, 2, 2), LOG3), "semantic_seg": semantic}
    matched = Assignment(*torch.tensor([[0], [0], [0]]))
    terms = mask_terms(masks, torch.tensor([0]), matched, asked)
    assert terms["mask_bce"].item() == pytest.approx(math.log(4 / 3))
    assert terms["semantic_bce"].item() == pytest.approx(math.log(4 / 3))  # right of both pairs
    assert terms["semantic_dice"].item() == pytest.approx(((1 - 7 / 8) + (1 - 1 / 2)) / 2)


def test_masks_where_nothing_was_matched():
    asked = targets([[False]], masks=torch.ones(1, 1, 2, 2))
    masks = {"pred_masks": torch.zeros(1, 1, 2, 2, requires_grad=True), "semantic_seg": torch.zeros(1, 1, 2, 2)}
    nothing = Assignment(*torch.zeros(3, 0, dtype=torch.long))
    queries, place = mask_queries(nothing, 1)
    terms = mask_terms(masks, place, nothing, asked)
    assert queries.shape == (1, 1)
    assert terms["mask_bce"].item() == terms["mask_dice"].item() == 0
    assert terms["semantic_bce"].item() == pytest.approx(LOG2)
    sum(terms.values()).backward()
    assert not masks["pred_masks"].grad.any()
