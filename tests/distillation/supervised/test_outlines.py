"""What tokens tell beside names: classes of turns, places and outlines by hand, and heads that learn them."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distillation.supervised.batch import NOTHING
from distillation.supervised.dataset import words_of
from distillation.supervised.outlines import (
    CELLS,
    CUTS,
    FIRST,
    NUM_TURNS,
    REACH,
    SHAPE_OF,
    OutlineLoss,
    parts_shown,
    places,
    rivals,
    turns_of,
)
from sam3.engine.image_list import SPLITS
from sam3.engine.scene_drawing import SYMMETRY
from sam3.engine.scene_names import PARTS, PLAIN, SHAPES, WORDS, Kind, kinds_of
from tests.distillation.supervised.scenes import GREEN_STAR, RED_SQUARE, squares


def test_every_shape_has_its_classes():
    assert NUM_TURNS == 49 and len(CUTS) == len(SHAPES) == len(SYMMETRY)
    assert {shape: CUTS[SHAPES.index(shape)] for shape in ("ring", "heart", "oval", "triangle", "star")} == {
        "ring": 1,
        "heart": 8,
        "oval": 4,
        "triangle": 3,
        "star": 2,
    }


@pytest.mark.parametrize(
    ("kind", "degrees", "place"),
    [
        *((RED_SQUARE, degrees, place) for degrees, place in ((0, 0), (44, 0), (46, 1), (89, 1), (91, 0), (-1, 1))),
        *((GREEN_STAR, degrees, place) for degrees, place in ((35, 0), (37, 1), (71, 1), (73, 0))),
    ],
)
def test_turns_count_within_the_symmetry(kind, degrees: float, place: int):
    scene = replace(squares(), objects=[kind], angles=np.array([math.radians(degrees)]))
    assert turns_of(scene).tolist() == [FIRST[SHAPES.index(kind.shape)] + place]


def test_places_by_hand():
    """4 x 4 tokens; one object on the two left columns of the two upper rows, one on the token at the lower right."""
    shares = torch.zeros(1, 2, 4, 4)
    shares[0, 0, :2, :2] = 1
    shares[0, 1, 3, 3] = 1
    shares = shares.flatten(2)
    owner = torch.zeros(1, 16, dtype=torch.long)
    owner[0, 15] = 1
    found = places(shares, shares.sum(2), owner)
    first, last = found[0, 0].tolist(), found[0, 15].tolist()
    assert first == pytest.approx([0.5 / REACH, 0.5 / REACH, math.log(2)])
    assert last == pytest.approx([0, 0, 0], abs=1e-6)
    assert found[0, 4 * 1 + 3, :2].tolist() == pytest.approx([-2.5 / REACH, -0.5 / REACH])  # row 1, column 3


def test_parts_of_a_token_by_hand():
    size = 2 * CELLS
    instances = torch.full((1, 2 * size, 2 * size), NOTHING, dtype=torch.uint8)
    instances[0, :size, : size + 2] = 0  # the upper left token, and the first column of parts of the next
    shown = parts_shown(instances, torch.zeros(1, 4, dtype=torch.long), 2).view(2, 2, CELLS, CELLS)
    assert (shown[0, 0] == 1).all() and (shown[1] == 0).all()
    assert (shown[0, 1, :, 0] == 1).all() and (shown[0, 1, :, 1:] == 0).all()


def test_heads_learn_what_the_map_shows():
    """A map that holds the answers, times a random matrix."""
    torch.manual_seed(0)
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.uint8)
    masks[0, 0, :8, :8], masks[0, 1, 8:, 8:] = 255, 255
    instances = torch.full((1, 28, 28), NOTHING, dtype=torch.uint8)
    instances[0, :14, :14], instances[0, 14:, 14:] = 0, 1
    words = torch.tensor([[[SHAPE_OF[3], 0, -1], [SHAPE_OF[7], 0, -1]]])
    batch = SimpleNamespace(masks=masks, instances=instances, words=words, turns=torch.tensor([[3, 7]]))
    loss, seen = OutlineLoss(16), torch.randn(1, 16, 4, 4)
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    values = []
    for _ in range(150):
        values.append(loss(seen, batch))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1].item() < 0.1 * values[0].item()


@pytest.mark.parametrize("split", SPLITS)
def test_only_what_training_shows_competes(split: str):
    """And always an object's own words, which in val are never shown together."""
    kinds = kinds_of(split)
    words = torch.from_numpy(words_of(kinds))
    found = rivals(words)
    for row, kind in enumerate(kinds):
        own = {"shape": kind.shape, "colour": kind.colour, "texture": kind.texture}
        for part in PARTS:
            for place, word in enumerate(WORDS[part]):
                shown = Kind(**{**own, part: word}) in kinds_of("train")
                assert found[part][row, place] == (shown or word == own[part] or (own[part] == PLAIN and place == 0))


def test_no_object_at_all_is_no_error():
    batch = SimpleNamespace(
        masks=torch.zeros(1, 1, 16, 16, dtype=torch.uint8),
        instances=torch.full((1, 28, 28), NOTHING, dtype=torch.uint8),
        words=torch.zeros(1, 1, 3).long(),
        turns=torch.tensor([[0]]),
    )
    assert torch.isfinite(OutlineLoss(8)(torch.randn(1, 8, 4, 4), batch))
