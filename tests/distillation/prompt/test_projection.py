"""What brings a teacher's features to the student's width, and how its collapse is noticed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from distillation.prompt.projection import COLLAPSED, least_spread, make_projection, warn_if_collapsed

NECK = torch.arange(6.0).view(2, 3, 1, 1)


@pytest.mark.parametrize("kind", ["auto", "none", "neck"])
def test_equal_widths_need_nothing(kind: str) -> None:
    assert isinstance(make_projection(kind, 4, 4), nn.Identity)


@pytest.mark.parametrize("kind", ["auto", "learned"])
def test_a_learned_projection_starts_as_the_teachers_neck(kind: str) -> None:
    projection = make_projection(kind, 3, 2, NECK.half())
    assert torch.equal(projection.weight, NECK)
    assert torch.equal(projection.bias, torch.zeros(2))
    assert all(parameter.requires_grad for parameter in projection.parameters())
    assert projection(torch.ones(1, 3, 1, 1)).flatten().tolist() == [3, 12]  # 0 + 1 + 2, 3 + 4 + 5


def test_without_a_fitting_neck_it_starts_by_kaiming() -> None:
    torch.manual_seed(0)
    for neck in (None, NECK, NECK.view(3, 2, 1, 1)):
        weight = make_projection("learned", 400, 64, neck).weight
        assert weight.std().item() == pytest.approx(1 / 20, rel=0.05)  # keeps the variance: 1 / sqrt(400)


def test_the_neck_is_frozen() -> None:
    projection = make_projection("neck", 3, 2, NECK)
    assert [(name, parameter.requires_grad) for name, parameter in projection.named_parameters()] == [("weight", False)]
    assert torch.equal(projection.weight, NECK)
    assert projection.weight.data_ptr() != NECK.data_ptr()


def test_equal_widths_may_be_learned() -> None:
    assert make_projection("learned", 4, 4).weight.shape == (4, 4, 1, 1)


def test_autocast_changes_nothing() -> None:
    projection, features = make_projection("neck", 3, 2, NECK / 7), torch.randn(1, 3, 4, 4).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = projection(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, projection(features.float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 3, 2), "projection 'linear' is unknown; choose one of auto, learned, neck, none"),
        (("none", 1280, 256), "have 1280 channels, the student's 256: projection 'none' needs equal widths"),
        (("neck", 3, 2), r"needs a weight \(2, 3, 1, 1\) of its neck, but there is none; choose learned"),
        (("neck", 3, 2, NECK.view(3, 2, 1, 1)), r"but it is \(3, 2, 1, 1\); choose learned"),
    ],
)
def test_what_cannot_be_projected(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_projection(*arguments)


def test_collapse_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """Channels 0, 2, 0, 2 (deviation 1) and 5, 5, 5, 5 (none)."""
    target = torch.tensor([[[[0.0, 2.0], [0.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]]]])
    assert least_spread(target[:, :1]).item() == 1.0
    assert least_spread(target).item() == 0.0
    with caplog.at_level(logging.WARNING, "sam3.distillation"):
        assert not warn_if_collapsed("A", COLLAPSED)
        assert not caplog.records
        assert warn_if_collapsed("A", 0.0)
    (record,) = caplog.records
    assert "teacher A hardly vary" in record.getMessage()
