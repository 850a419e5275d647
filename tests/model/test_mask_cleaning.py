"""Holes and specks, by hand."""

from __future__ import annotations

import torch

from sam3.model.mask_cleaning import fill_holes, remove_specks


def drawing(*rows: str) -> torch.Tensor:
    """'#' is a logit of 2, '.' one of -3; (1, 1, h, w)."""
    return torch.tensor([[2.0 if cell == "#" else -3.0 for cell in row] for row in rows])[None, None]


def test_small_holes_are_filled_and_no_others():
    logits = drawing(
        "########",
        "#.##..##",
        "##.#..##",
        "####.###",
        "########",
    )
    filled = fill_holes(logits, area=2, value=0.1)
    assert filled[0, 0, 1, 1] == filled[0, 0, 2, 2] == torch.tensor(0.1)  # one region: they touch by a corner
    assert (filled[0, 0, 1:4, 4:6] == logits[0, 0, 1:4, 4:6]).all()  # of five cells
    assert (filled != logits).sum() == 2
    assert torch.equal(fill_holes(logits, area=1, value=0.1), logits)
    assert (fill_holes(logits, area=5, value=0.1) > 0).all()


def test_specks_go_unless_they_are_most_of_the_mask():
    logits = torch.cat([drawing("##...#", "##....", "......"), drawing(".....#", "......", "......")])
    cleaned = remove_specks(logits, area=3, value=-0.1)
    assert cleaned[0, 0, 0, 5] == torch.tensor(-0.1)
    assert (cleaned != logits).sum() == 1
    assert torch.equal(remove_specks(logits, area=100, value=-0.1), cleaned)  # four cells are more than half of five
