"""The eight terms against numbers worked out by hand, and their gradients."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from distillation import losses
from distillation.config import FEATURE_LOSSES, LOSSES
from distillation.losses import DistillationLoss, dice_and_bce, feature_mse, paired_giou
from tests.distillation.test_hungarian import SURE, Reads, outputs

LOG3 = math.log(3)  # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4
# Which output of the student each term teaches, in the order of the terms.
TAUGHT = ("pred_masks", "pred_boxes", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
FEEDS = dict(zip(LOSSES, (*TAUGHT, "fpn_features", "encoder_output"), strict=True))
# Dice + BCE of the maps below: sum(p t) = 9/8, sum p = sum t = 2; sum of softplus = log(64/3), of x t = log(3)/2.
OURS = [[0.0, LOG3], [-LOG3, 0.0]]
THEIRS = [[LOG3, LOG3], [-LOG3, -LOG3]]
DICE = 1 - (2 * 1.125 + 1) / (2 + 2 + 1)
BCE = (math.log(64 / 3) - LOG3 / 2) / 4
HALF = math.log(2)  # BCE of p = 1/2 with any target


def by_hand() -> tuple[dict, dict, list]:
    """One picture, two queries of three; the first is matched with the teacher's third, the second with its first."""
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    student = {
        "pred_masks": torch.tensor([[OURS, zeros]]),
        "pred_boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0, 0, 0.25, 0.25]]]),
        "pred_logits": torch.tensor([[0, LOG3]]),
        "presence_logits": torch.tensor([[LOG3]]),
        "semantic_seg": torch.tensor([[OURS]]),
        "fpn_features": tuple(torch.full((1, 2, side, side), 1.0) for side in (4, 2, 1)),
        "encoder_output": torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]),  # rows 0 1 and 2 3
        "encoder_hw": (2, 2),
    }
    teacher = {
        "pred_masks": torch.tensor([[zeros, 2 * [[9.0, 9.0]], THEIRS]]),
        "pred_boxes": torch.tensor([[[0.75, 0.75, 1, 1], [9, 9, 9, 9], [0.25, 0.25, 0.75, 0.75]]]),
        "pred_logits": torch.tensor([[-LOG3, 9, LOG3]]),
        "presence_logits": torch.tensor([[-LOG3]]),
        "semantic_seg": torch.tensor([[THEIRS]]),
        "fpn_features": tuple(torch.full((1, 2, side, side), value) for side, value in ((6, 2.0), (3, 3.0), (2, 4.0))),
        "encoder_output": torch.zeros(1, 16, 1),
        "encoder_hw": (4, 4),
    }
    return student, teacher, [(torch.tensor([0, 1]), torch.tensor([2, 0]))]


def random_pair(pictures: int = 2) -> tuple[dict, dict, list]:
    """Random outputs, the student's with gradients, and pairs of them."""
    student, teacher = outputs(pictures, 4, side=8), outputs(pictures, 6, side=12, seed=1)
    for value in tensors(student):
        value.requires_grad_()
    return student, teacher, pictures * [(torch.arange(4), torch.tensor([5, 0, 3, 1]))]


def tensors(side: dict) -> list[torch.Tensor]:
    found = [part for value in side.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in found if isinstance(part, torch.Tensor)]


def cast(side: dict, dtype: torch.dtype) -> dict:
    """New leaves of that type, with gradients."""

    def leaf(value):
        if isinstance(value, torch.Tensor):
            return value.detach().to(dtype, copy=True).requires_grad_()
        return tuple(map(leaf, value)) if isinstance(value, tuple) else value

    return {name: leaf(value) for name, value in side.items()}


def raw(name: str, given: tuple[dict, dict, list], **settings) -> float:
    """The term alone."""
    return DistillationLoss({name: 1}, **settings)(*given, with_features=True)["raw"][name].item()


def test_mask_loss():
    zero_dice = 1 - (2 * 1 + 1) / (2 + 2 + 1)
    assert raw("mask_loss", by_hand()) == pytest.approx((DICE + BCE + zero_dice + HALF) / 2)
    expected = (1 - 2 * 1.125 / 4 + BCE + 1 - 2 * 1 / 4 + HALF) / 2
    assert raw("mask_loss", by_hand(), dice_eps=0.0) == pytest.approx(expected)


def test_box_losses():
    assert raw("box_l1_loss", by_hand()) == pytest.approx((0.25 + 0.75) / 2)
    # inter 1/16, union 7/16, hull 9/16; and apart: union 1/8, hull 1
    first, second = 1 / 7 - (2 / 16) / (9 / 16), -7 / 8
    assert raw("box_giou_loss", by_hand()) == pytest.approx((1 - first + 1 - second) / 2, abs=1e-6)


def test_logit_loss():
    first, second = math.log(2), math.log(4) - LOG3 / 4
    assert raw("logit_loss", by_hand()) == pytest.approx((first + second) / 2)


def test_presence_loss():
    assert raw("presence_loss", by_hand()) == pytest.approx((2 * LOG3) ** 2)
    assert raw("presence_loss", by_hand(), presence_space="prob") == pytest.approx(0.25)


def test_semantic_seg_loss():
    assert raw("semantic_seg_loss", by_hand()) == pytest.approx(DICE + BCE)


def test_fpn_feature_loss():
    assert raw("fpn_feature_loss", by_hand()) == pytest.approx((1 + 4 + 9) / 3)


def test_encoder_feature_loss_is_aligned_in_two_dimensions():
    """2 x 2 -> 4 x 4 gives 2 r + c for r and c in 0, 1/4, 3/4, 1; as a sequence of 16 it would be another mean."""
    steps = (0, 0.25, 0.75, 1)
    expected = sum((2 * r + c) ** 2 for r in steps for c in steps) / 16
    assert raw("encoder_feature_loss", by_hand()) == pytest.approx(expected)
    as_sequence = F.interpolate(torch.tensor([[[0.0, 1, 2, 3]]]), size=16, mode="linear").square().mean().item()
    assert abs(as_sequence - expected) > 0.1


def test_maps_need_not_be_square():
    student, teacher, pairs = by_hand()
    student |= {"encoder_output": torch.tensor([[[0.0], [1.0]]]), "encoder_hw": (1, 2)}
    teacher |= {"encoder_output": torch.zeros(1, 12, 1), "encoder_hw": (3, 4)}
    expected = (0 + 0.25**2 + 0.75**2 + 1) / 4
    assert raw("encoder_feature_loss", (student, teacher, pairs)) == pytest.approx(expected)


def test_total_is_the_weighted_sum():
    weights = {name: 0.5 + i for i, name in enumerate(LOSSES)}
    found = DistillationLoss(weights)(*random_pair(), with_features=True)
    assert list(found["raw"]) == list(found["weighted"]) == list(LOSSES)
    for name, weight in weights.items():
        assert math.isfinite(found["raw"][name].item()) and found["raw"][name] > 0
        assert found["weighted"][name].item() == pytest.approx(weight * found["raw"][name].item())
    expected = sum(weight * found["raw"][name].item() for name, weight in weights.items())
    assert found["total_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_means_are_over_pairs_then_over_pictures():
    """Of a picture with both pairs and one with only the second; and of one without any, which counts as 0."""
    one, two, (pairs,) = by_hand()
    twice = [{name: torch.cat((side[name], side[name])) for name in list(one)[:5]} for side in (one, two)]
    second = tuple(rows[1:] for rows in pairs)
    for name, values in {"box_l1_loss": (0.25, 0.75), "logit_loss": (HALF, math.log(4) - LOG3 / 4)}.items():
        assert raw(name, (*twice, [pairs, second])) == pytest.approx((sum(values) / 2 + values[1]) / 2)
        nothing = tuple(rows[:0] for rows in pairs)
        assert raw(name, (*twice, [pairs, nothing])) == pytest.approx(sum(values) / 4)


def test_score_weighting():
    """Teacher's probabilities: third query 3/4, first 1/4, so that the first pair counts three times the second."""
    given = by_hand()
    assert raw("box_l1_loss", given, score_weighting=True) == pytest.approx(0.75 * 0.25 + 0.25 * 0.75)
    zero_dice = 1 - (2 * 1 + 1) / (2 + 2 + 1)
    expected = 0.75 * (DICE + BCE) + 0.25 * (zero_dice + HALF)
    assert raw("mask_loss", given, score_weighting=True) == pytest.approx(expected)
    assert raw("logit_loss", given, score_weighting=True) == pytest.approx(raw("logit_loss", given))


def test_score_weighting_is_per_picture():
    student, teacher, pairs = random_pair()
    teacher["pred_logits"][1] -= 8  # a picture that the teacher is unsure of counts as much as another
    found = raw("box_l1_loss", (student, teacher, pairs), score_weighting=True)
    expected = 0
    for b, (ours, theirs) in enumerate(pairs):
        error = (student["pred_boxes"][b, ours] - teacher["pred_boxes"][b, theirs]).abs().mean(1)
        score = teacher["pred_logits"][b, theirs].sigmoid()
        expected += (error * score).sum() / score.sum() / 2
    assert found == pytest.approx(expected.item())


def test_a_student_like_its_teacher():
    """Distances are 0, cross-entropies are the entropy of the targets, whose gradient is 0."""
    teacher = outputs(2, 5)
    teacher["pred_masks"] = teacher["pred_masks"] / 20
    student = cast(teacher, torch.float32)
    same = 2 * [(torch.arange(5), torch.arange(5))]
    found = DistillationLoss(dict.fromkeys(LOSSES, 1.0))(student, teacher, same, with_features=True)["raw"]
    for name in ("box_l1_loss", "presence_loss", *FEATURE_LOSSES):
        assert found[name].item() == 0
    assert found["box_giou_loss"].item() == pytest.approx(0, abs=1e-5)

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        p = logits.double().sigmoid()
        return -(p * p.log() + (1 - p) * (1 - p).log())

    assert found["logit_loss"].item() == pytest.approx(entropy(teacher["pred_logits"]).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found["logit_loss"], student["pred_logits"])
    assert gradient.abs().max() < 1e-7
    p = teacher["pred_masks"].double().sigmoid()
    dice = 1 - (2 * p.square().sum((2, 3)) + 1) / (2 * p.sum((2, 3)) + 1)
    expected = (dice + entropy(teacher["pred_masks"]).mean((2, 3))).mean().item()
    assert found["mask_loss"].item() == pytest.approx(expected, rel=1e-5) and (dice > 0).all()


def test_hard_masks_alike_have_no_loss():
    logits = torch.tensor([[[SURE, -SURE], [SURE, SURE]], 2 * [[-SURE, -SURE]]])
    assert dice_and_bce(logits, logits, 1.0).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_giou_range():
    corner, size = torch.rand(2, 500, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat((corner, corner + size + 0.1), 1)
    giou = paired_giou(boxes, boxes.flip(0))
    assert giou.min() >= -1 and giou.max() <= 1 and giou.min() < -0.3 and giou.max() > 0.5
    torch.testing.assert_close(paired_giou(boxes, boxes), torch.ones(500), atol=1e-4, rtol=0)
    far = paired_giou(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[999.0, 999, 1000, 1000]]))
    assert far.item() == pytest.approx(-1, abs=1e-4)
    assert paired_giou(torch.zeros(1, 4), torch.zeros(1, 4)).isfinite().all()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4], [88.0, -104.0]]]).requires_grad_()
    loss = dice_and_bce(logits, -logits.detach(), 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1 - 1 / 5 + (2e4 + 88 + 104) / 4, rel=1e-4) and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_each_term_alone_teaches_its_output(name):
    student, teacher, pairs = random_pair()
    for part in tensors(teacher):
        part.requires_grad_()
    loss = DistillationLoss({name: 2.0}, score_weighting=True)
    loss(student, teacher, pairs, with_features=True)["total_loss"].backward()
    for key, value in student.items():
        for part in tensors({key: value}):
            assert (part.grad is not None and bool(part.grad.abs().max() > 0)) == (key == FEEDS[name]), key
    assert all(part.grad is None for part in tensors(teacher))


@pytest.mark.parametrize("slice_pixels", [1, 100, 2**21])
@pytest.mark.parametrize("size", [(4, 3), (6, 5), (3, 3)])
def test_gradients_of_maps_against_finite_differences(size, slice_pixels, monkeypatch):
    """In double: as large as the targets, smaller, and larger along one axis; maps by ones, threes and all at once."""
    monkeypatch.setattr(losses, "SLICE_PIXELS", slice_pixels)
    generator = torch.Generator().manual_seed(0)
    ours = (2 * torch.randn(5, *size, generator=generator, dtype=torch.float64)).requires_grad_()
    theirs = 2 * torch.randn(5, 6, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(partial(dice_and_bce, theirs=theirs, eps=1.0), (ours,))
    both = torch.stack((theirs, theirs.flip(0)))
    assert torch.autograd.gradcheck(lambda maps: feature_mse(torch.stack((maps, maps.sin())), both), (ours,))


def plain_resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def plain_dice_and_bce(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    logits = plain_resize(ours, theirs.shape[-2:])
    p, t = logits.sigmoid(), theirs.sigmoid()
    dice = 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
    return dice + F.binary_cross_entropy_with_logits(logits, t, reduction="none").mean((1, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_against_plain_operations(layout, monkeypatch):
    monkeypatch.setattr(losses, "SLICE_PIXELS", 3 * 16 * 16)
    ours = torch.randn(1, 8, 14, 14).to(memory_format=layout)[0].requires_grad_()
    theirs = torch.randn(1, 8, 16, 16).to(memory_format=layout)[0]
    weight = torch.rand(8)
    for found, wanted in (
        (weight @ dice_and_bce(ours, theirs, 1.0), weight @ plain_dice_and_bce(ours, theirs)),
        (3 * feature_mse(ours[None], theirs[None]), 3 * F.mse_loss(plain_resize(ours, (16, 16)), theirs)),
    ):
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, ours)[0], torch.autograd.grad(wanted, ours)[0])


def test_the_graph_may_be_walked_twice():
    student, teacher, pairs = random_pair()
    total = DistillationLoss(dict.fromkeys(LOSSES, 1.0))(student, teacher, pairs, with_features=True)["total_loss"]
    total.backward(retain_graph=True)
    once = [part.grad.clone() for part in tensors(student)]
    total.backward()
    for part, grad in zip(tensors(student), once, strict=True):
        torch.testing.assert_close(part.grad, 2 * grad)


def test_half_precision_goes_in_and_gradients_come_out():
    """Scaled as a GradScaler does, the small gradients of many pixels do not vanish."""
    student, teacher, pairs = random_pair()
    halves = [cast(side, torch.float16) for side in (student, teacher)]
    widened = [cast(side, torch.float32) for side in halves]
    loss = DistillationLoss(dict.fromkeys(LOSSES, 1.0))
    found, wanted = loss(*halves, pairs, True)["total_loss"], loss(*widened, pairs, True)["total_loss"]
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=1e-6)
    grads = torch.autograd.grad(2**10 * found, tensors(halves[0]))
    for grad, exact in zip(grads, torch.autograd.grad(2**10 * wanted, tensors(widened[0])), strict=True):
        assert grad.dtype == torch.float16
        torch.testing.assert_close(grad.float(), exact, rtol=2e-3, atol=1e-4)


def test_losses_never_wait_for_the_device():
    student, teacher, pairs = random_pair()
    loss = DistillationLoss(dict.fromkeys(LOSSES, 1.0), score_weighting=True)
    with Reads() as reads:
        total = loss(student, teacher, pairs, with_features=True)["total_loss"]
        total.backward()
    assert reads.count == 0
    with Reads() as reads:
        total.item()
    assert reads.count == 1


def test_autocast_changes_nothing():
    given = random_pair()
    loss = DistillationLoss(dict.fromkeys(LOSSES, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*given, with_features=True)
    wanted = loss(*given, with_features=True)
    assert {name: value.item() for name, value in found["raw"].items()} == {
        name: value.item() for name, value in wanted["raw"].items()
    }


def test_validation_needs_no_gradient():
    given = random_pair()
    loss = DistillationLoss(dict.fromkeys(LOSSES, 1.0))
    wanted = loss(*given, with_features=True)["total_loss"].item()
    with torch.no_grad():
        for part in tensors(given[0]):
            part.requires_grad_(False)
        total = loss(*given, with_features=True)["total_loss"]
    assert not total.requires_grad and total.item() == pytest.approx(wanted)


def test_no_pairs_give_zeros_in_the_graph():
    student, teacher, _ = random_pair()
    nothing = 2 * [(torch.arange(0), torch.arange(0))]
    pair_terms = list(LOSSES)[:4]
    for score_weighting in (False, True):
        loss = DistillationLoss(dict.fromkeys(pair_terms, 1.0), score_weighting=score_weighting)
        found = loss(student, teacher, nothing, with_features=True)
        assert [found["raw"][name].item() for name in pair_terms] == [0, 0, 0, 0]
        found["total_loss"].backward()
        for name in ("pred_masks", "pred_boxes", "pred_logits"):
            assert torch.equal(student[name].grad, torch.zeros_like(student[name]))


def test_a_weight_of_zero_skips_the_work(monkeypatch):
    called = []
    for name in LOSSES:
        monkeypatch.setattr(DistillationLoss, name, lambda *_, name=name: (called.append(name), torch.ones(()))[1])
    found = DistillationLoss({"box_l1_loss": 0.0, "logit_loss": 3.0})(*by_hand(), with_features=True)
    assert called == ["logit_loss"] and found["total_loss"].item() == 3
    assert {name: value.item() for name, value in found["weighted"].items()} == {
        **dict.fromkeys(LOSSES, 0),
        "logit_loss": 3,
    }


def test_phase_2_touches_no_features():
    student, teacher, pairs = by_hand()
    loss = DistillationLoss(dict.fromkeys(LOSSES, 1.0))
    first = loss(student, teacher, pairs, with_features=True)
    for side in (student, teacher):
        side["fpn_features"] = side["encoder_output"] = None
        del side["encoder_hw"]
    for _ in range(2):
        second = loss(student, teacher, pairs, with_features=False)
        assert [second[kind][name].item() for kind in ("raw", "weighted") for name in FEATURE_LOSSES] == 4 * [0]
        rest = sum(first["raw"][name].item() for name in LOSSES if name not in FEATURE_LOSSES)
        assert second["total_loss"].item() == pytest.approx(rest)
        for side in (student, teacher):
            side.pop("fpn_features", None), side.pop("encoder_output", None)


def test_masks_and_features_are_resized_in_a_way_that_mps_has(monkeypatch):
    calls, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *given, **how: (calls.append(how), interpolate(*given, **how))[1])
    student, teacher, pairs = random_pair()
    loss = DistillationLoss(dict.fromkeys(LOSSES, 1.0))
    loss(student, teacher, pairs, with_features=True)
    assert len(calls) == 6 and {(how["mode"], how["align_corners"]) for how in calls} == {("bilinear", False)}
    assert [how["size"] for how in calls] == [(12, 12)] * 3 + [(6, 6), (3, 3), (3, 3)]
    calls.clear()
    loss(teacher, teacher, 2 * [(torch.arange(6), torch.arange(6))], with_features=True)
    assert not calls  # nothing to resize where sizes agree


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="no loss term is named dice; there are mask_loss, "):
        DistillationLoss({"dice": 1.0})
    with pytest.raises(ValueError, match="presence_space is 'odds'; choose one of logit, prob"):
        DistillationLoss({}, presence_space="odds")


def test_outputs_that_do_not_belong_together():
    student, teacher, pairs = random_pair()
    loss = DistillationLoss(dict.fromkeys(LOSSES, 1.0))
    with pytest.raises(AssertionError, match="pairs of 1 pictures for outputs of 2"):
        loss(student, teacher, pairs[:1], with_features=True)
    with pytest.raises(AssertionError, match="against"):
        feature_mse(torch.zeros(1, 4, 2, 2), torch.zeros(1, 6, 2, 2))
