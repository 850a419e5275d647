"""The figures of a validation, of followers whose masks are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sam3.engine.distributed import World
from stage2.supervised.dataset import SceneClipBatch
from stage2.supervised.validation import ClipValidator

WORLD = World(0, 1, 0, torch.device("cpu"))
SIDE = 32


def batch() -> SceneClipBatch:
    """Two objects in three frames; the second one leaves after the first two."""
    masks = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.bool)
    masks[0, :, :8, :8] = True
    masks[1, :2, 16:, 16:] = True
    states = torch.tensor([[1, 1, 1], [1, 1, 0]])
    size, points, labels = torch.tensor([[SIDE, SIDE]]), torch.zeros(2, 2, 2), torch.full((2, 2), -1)
    rows = torch.tensor([0, 0])
    return SceneClipBatch(
        ["clip"], None, size, None, rows, masks, states, ["click"] * 2, points, labels, full_masks=masks
    )


def values(follow) -> dict[str, float]:
    model = SimpleNamespace(encode=lambda batch: None, follow=lambda frames, batch: follow(batch))
    return ClipValidator(model, [batch()], WORLD)(0, 0)


def test_a_perfect_follower():
    found = values(lambda batch: (batch.full_masks, batch.states == 1))
    assert all(value == 1 for value in found.values())
    assert len(found) == 10


def test_prompts_are_told_apart_and_absence_counts():
    def follow(batch: SceneClipBatch):
        masks = batch.full_masks.clone()
        if batch.kinds == ["click"] * 2:
            masks[0, 0, :, :8] = True  # 256 pixels, 64 of them true, in the first frame
            masks[0, 1:] = False
            masks[1, 2] = True  # it has left
        return masks, torch.ones(2, 3, dtype=torch.bool)

    found = values(follow)
    assert found["val/click_iou"] == pytest.approx((64 / 256 + 1) / 2)
    assert found["val/j_click"] == pytest.approx((0 + (1 + 0) / 2) / 2)
    assert found["val/jf_mask"] == 1
    assert found["val/target"] == found["val/jf_click"] < 0.5
    assert found["val/presence"] == pytest.approx((1 + 0.5) / 2)
    assert found["val/absence"] == 0
