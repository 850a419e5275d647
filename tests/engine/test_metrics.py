"""Measures by hand."""

from __future__ import annotations

import pytest
import torch

from sam3.engine.metrics import mask_iou

FIRST = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]]).bool()
SECOND = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]], [[1, 1, 1, 1]]]).bool()


def test_mask_iou_by_hand():
    assert mask_iou(FIRST, SECOND).tolist() == pytest.approx([1 / 3, 1, 0, 0])


def test_mask_iou_counts_valid_cells_only():
    left = torch.tensor([[[1, 1, 0, 0]]]).bool()
    assert mask_iou(FIRST, SECOND, left).tolist() == [0.5, 1, 0, 0]
    each = torch.tensor([[[0, 1, 0, 0]], [[1, 1, 1, 1]], [[0, 1, 1, 0]], [[0, 0, 0, 0]]]).bool()
    assert mask_iou(FIRST, SECOND, each).tolist() == [1, 1, 1, 1]
