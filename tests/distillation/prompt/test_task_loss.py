"""The loss of prompted masks and of the foreground score against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from distillation.prompt.losses import SURE, dice_loss, foreground_loss, task_loss
from tests.distillation.prompt.test_losses import normal

WEIGHTS = {"bce": 1.0, "focal": 10.0, "dice": 100.0, "iou": 1000.0}
HALF = math.log(2)


def test_task_loss_by_hand() -> None:
    """Four pixels, two of the object; logits of 0 on one and off one, sure and right elsewhere.

    BCE: log 2 / 2. Focal: (1/4 + 3/4) 1/4 log 2 of 4. Dice: 1 - 2 (1 + 1/2) / (2 + 2). Logit 0 is outside: IoU 1/2.
    """
    masks = torch.tensor([[50.0, 0.0], [0.0, -50.0]]).view(1, 1, 2, 2)
    target = torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8).view(1, 1, 2, 2)
    found = task_loss(masks, torch.tensor([[0.75]]), target, WEIGHTS)
    wanted = {"bce": HALF / 2, "focal": HALF / 16, "dice": 0.25, "iou": 0.0625}
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, abs=1e-6), name
    assert found["total"].item() == pytest.approx(
        sum(WEIGHTS[name] * value for name, value in wanted.items()), abs=1e-4
    )
    assert list(found) == ["total", "bce", "focal", "dice", "iou"]


def test_small_masks_are_not_excused() -> None:
    """An object of one pixel that is missed costs all of the Dice loss, and nothing drawn where nothing is is right."""
    missed, target = torch.full((1, 1, 4, 4), -50.0), torch.zeros(1, 1, 4, 4)
    assert dice_loss(missed, target).item() == pytest.approx(0, abs=1e-6)
    target[..., 0, 0] = 1
    assert dice_loss(missed, target).item() == pytest.approx(1, abs=1e-5)


def test_the_best_of_three_masks_is_taught_and_all_predicted_ious_are() -> None:
    target = torch.zeros(2, 1, 2, 2)
    target[:, :, 0] = 1  # the upper row
    right = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    masks = torch.stack([torch.stack([-right, right, 0 * right]), torch.stack([0 * right, -right, right])])
    masks.requires_grad_()
    ious = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 1.0]], requires_grad=True)
    found = task_loss(masks, ious, target, {"bce": 1.0, "iou": 1.0})
    assert found["bce"].item() == pytest.approx(math.log1p(math.exp(-2)))
    # True IoUs: 0, 1, 0 and 0, 0, 1; only the first prompt's are wrong, by 1/2 each.
    assert found["iou"].item() == pytest.approx(3 * 0.25 / 6)
    found["total"].backward()
    taught = masks.grad.abs().sum((2, 3)) > 0
    assert taught.tolist() == [[False, True, False], [False, False, True]]
    torch.testing.assert_close(ious.grad, torch.tensor([[0.5, -0.5, 0.5], [0.0, 0.0, 0.0]]) * 2 / 6)


def test_task_loss_of_no_prompts() -> None:
    masks, ious = torch.zeros(0, 3, 2, 2, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    found = task_loss(masks, ious, torch.zeros(0, 1, 2, 2), WEIGHTS)
    found["total"].backward()
    assert [value.item() for value in found.values()] == [0] * 5


def test_task_loss_in_half_precision() -> None:
    masks, target = normal(2, 3, 4, 4, dtype=torch.float32), (normal(2, 1, 4, 4, seed=1) > 0).to(torch.uint8)
    ious = torch.full((2, 3), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = task_loss(masks.bfloat16(), ious.bfloat16(), target, WEIGHTS)
    wanted = task_loss(masks.bfloat16().float(), ious, target, WEIGHTS)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_bad_input_of_the_task_loss() -> None:
    with pytest.raises(ValueError, match=r"masks \(2, 3, 4, 4\) need targets \(2, 1, 4, 4\), got \(2, 3, 4, 4\)"):
        task_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3), torch.zeros(2, 3, 4, 4), WEIGHTS)
    with pytest.raises(ValueError, match="no task loss is named box; there are bce, focal, dice, iou"):
        task_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1), torch.zeros(1, 1, 2, 2), {"box": 1.0})


def test_foreground_loss() -> None:
    """Half sure, sure and right, sure and wrong (bounded), beyond 1 and right."""
    ious = torch.tensor([0.5, 0.0, 1.5, 1.5], requires_grad=True)
    matched = torch.tensor([True, False, False, True])
    found = foreground_loss(ious, matched)
    nearly = -math.log(1 - SURE)
    assert found.item() == pytest.approx((HALF + nearly - math.log(SURE) + nearly) / 4, rel=1e-4)
    found.backward()
    assert ious.grad.tolist() == pytest.approx([-0.5, 0, 0, 0])
    assert foreground_loss(ious[:0], matched[:0]).item() == 0
    with pytest.raises(ValueError, match="cls: the student has 4 candidates, the teacher 1"):
        foreground_loss(ious, matched[:1])
