"""Rotary positions, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sam3.model.rope import axial_angles, grid_centres, grid_table, rotate_pairs, rotation_table


def test_angles_by_hand():
    angles = axial_angles(torch.tensor([3.0, 0.0]), torch.tensor([0.5, 2.0]), dim=8, theta=10000.0)
    # dim 8 has two frequencies of each axis: 1 and 10000 ** -0.5 = 0.01; columns first
    expected = torch.tensor([[3.0, 0.03, 0.5, 0.005], [0.0, 0.0, 2.0, 0.02]])
    torch.testing.assert_close(angles, expected)
    assert angles.dtype == torch.float32


def test_theta_sets_the_slower_frequencies():
    angles = axial_angles(torch.tensor([1]), torch.tensor([1]), dim=8, theta=100.0)
    torch.testing.assert_close(angles, torch.tensor([[1.0, 0.1, 1.0, 0.1]]))


def test_a_width_that_cannot_be_shared_by_two_axes():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        axial_angles(torch.zeros(1), torch.zeros(1), dim=6)


@pytest.mark.parametrize(
    ("cells", "grid", "expected"),
    [(3, 3, [0, 1, 2]), (2, 4, [0.5, 2.5]), (4, 18, [1.75, 6.25, 10.75, 15.25]), (1, 72, [35.5])],
)
def test_centres(cells, grid, expected):
    assert grid_centres(cells, grid).tolist() == expected


def test_a_pair_turns_by_its_angle():
    table = rotation_table(torch.tensor([[math.pi / 2, math.pi], [0.0, math.pi / 6]]))
    x = torch.tensor([[[1.0, 0.0, 2.0, 3.0], [5.0, 7.0, 1.0, 0.0]]])
    expected = torch.tensor([[[0.0, 1.0, -2.0, -3.0], [5.0, 7.0, math.sqrt(0.75), 0.5]]])
    torch.testing.assert_close(rotate_pairs(x, table), expected)


def test_scores_depend_on_the_difference_of_places_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 32)

    def score(query_place, key_place):
        places = torch.tensor([query_place, key_place], dtype=torch.float32)
        cos, sin = rotation_table(axial_angles(places[:, 0], places[:, 1], 32))
        return (rotate_pairs(q, (cos[:1], sin[:1])) * rotate_pairs(k, (cos[1:], sin[1:]))).sum()

    torch.testing.assert_close(score((5, 2), (1, 9)), score((14, 3), (10, 10)), rtol=1e-5, atol=1e-5)
    assert (score((5, 2), (1, 9)) - score((5, 2), (9, 1))).abs() > 0.1


def test_tokens_of_a_grid_run_along_the_rows():
    cos, sin = grid_table(3, 4)  # one frequency, 1: angle 0 is the column, angle 1 the row
    angles = torch.atan2(sin, cos)
    assert angles.round().tolist() == [[x, y] for y in range(3) for x in range(3)]


def test_tables_are_kept_also_if_first_asked_for_under_inference_mode():
    with torch.inference_mode():
        table = grid_table(5, 12)
    assert grid_table(5, 12)[0] is table[0]
    assert grid_table(5, 12, cells=2)[0].shape == (4, 6)
    x = torch.randn(1, 25, 12, requires_grad=True)
    rotate_pairs(x, table).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a turn keeps lengths


def test_low_precision_goes_in_and_out_but_not_through():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 8).bfloat16()
    turned = rotate_pairs(x, grid_table(4, 8))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate_pairs(x.float(), grid_table(4, 8)).bfloat16())


@pytest.mark.parametrize("compiling", [False, True])
def test_a_quarter_turn_is_exact(monkeypatch, compiling: bool):
    """Also where cosine and sine are views of one table, as the trunk of the image model keeps them."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    table = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # (tokens, pairs, cosine and sine): 90 degrees, none
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert rotate_pairs(x, table.unbind(-1)).tolist() == [[-2.0, 1.0, 3.0, 4.0]]


def test_backends_without_complex_numbers_get_the_same(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8)
    expected = rotate_pairs(x, grid_table(4, 8))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate_pairs(x, grid_table(4, 8)), expected)
