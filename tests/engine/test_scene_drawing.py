from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest

from sam3.engine.scene_drawing import PAINTS, SHAPES, Look, Pose, draw_look, draw_object, fill
from sam3.engine.scene_names import COLOURS, TEXTURES, Kind
from sam3.engine.scene_names import SHAPES as NAMES

SIZE = 200


def look(shape: str, colour: str = "red", texture: str = "plain", seed: int = 0) -> Look:
    return draw_look(Kind(shape, colour, texture), np.random.default_rng(seed))


def whole(shape: str, pose: Pose) -> np.ndarray:
    sprite = draw_object(look(shape), pose, SIZE)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[sprite.area] = sprite.mask
    return mask


def test_every_name_can_be_drawn() -> None:
    assert set(SHAPES) == set(NAMES) and set(PAINTS) == set(COLOURS)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi / 4),
        ("square", 0.7**2),
        ("triangle", 3 * math.sqrt(3) / 16),
        ("oval", 0.55 * math.pi / 4),
        ("ring", math.pi / 4 * (1 - 0.48**2)),
        ("cross", (2 * 1.9 * 0.6 - 0.6**2) / 4),
        ("star", 5 * 0.45 * math.sin(math.pi / 5) / 4),
        ("heart", (1 + math.pi / 4) / 4),
    ],
)
def test_areas_by_hand(shape: str, area: float) -> None:
    assert fill(shape) == pytest.approx(area, rel=0.01)
    drawn = whole(shape, Pose(0.5, 0.5, 0.6, 0.4)).sum() / (0.6 * SIZE) ** 2
    assert drawn == pytest.approx(area, rel=0.01), "turned and scaled, it has as many pixels as it should"


@pytest.mark.parametrize("shape", NAMES)
def test_shapes_stay_in_their_circle_and_fill_it(shape: str) -> None:
    mask = whole(shape, Pose(0.5, 0.5, 0.8, 0.0))
    rows, columns = np.nonzero(mask)
    reach = np.hypot(rows + 0.5 - SIZE / 2, columns + 0.5 - SIZE / 2).max() / (0.4 * SIZE)
    assert 0.85 < reach < 1.01


@pytest.mark.parametrize("shape", NAMES)
def test_no_two_shapes_look_alike(shape: str) -> None:
    pose = Pose(0.5, 0.5, 0.8, 0.0)
    mine = whole(shape, pose)
    for other in NAMES:
        if other != shape:
            theirs = whole(other, pose)
            assert (mine & theirs).sum() < 0.9 * (mine | theirs).sum()


def test_edges_are_soft_and_half_covered_where_the_outline_runs() -> None:
    """A square whose left side is at x = 50.25: the pixel from 50 to 51 lies inside by three quarters."""
    half = 0.35 * 0.6 * SIZE
    sprite = draw_object(look("square"), Pose((50.25 + half) / SIZE, 0.5, 0.6, 0.0), SIZE)
    left = sprite.area[1].start
    row = sprite.cover[len(sprite.cover) // 2]
    assert row[49 - left] == 0 and row[51 - left] == 1
    assert row[50 - left] == pytest.approx(0.75, abs=0.01)


def test_cut_at_the_edges_and_outside() -> None:
    full = draw_object(look("circle"), Pose(0.5, 0.5, 0.4, 0.0), SIZE).mask.sum()
    half = draw_object(look("circle"), Pose(0.0, 0.5, 0.4, 0.0), SIZE).mask.sum()
    assert 2 * half == full
    for x, y in ((-0.3, 0.5), (1.3, 0.5), (0.5, -0.3), (0.5, 1.3)):
        assert draw_object(look("circle"), Pose(x, y, 0.4, 0.0), SIZE) is None


@pytest.mark.parametrize("colour", COLOURS)
def test_paint_keeps_its_name(colour: str) -> None:
    """A second paint has the hue of the first, and of an object two fifths or more have its colour."""
    base, seconds = PAINTS[colour]
    hue, saturation, _ = colorsys.rgb_to_hsv(*base)
    for second in seconds:
        other, other_saturation, _ = colorsys.rgb_to_hsv(*second)
        if colour in ("black", "white"):
            assert max(saturation, other_saturation) < 0.1
        else:
            assert abs((hue - other + 0.5) % 1 - 0.5) < 0.06
    for texture in TEXTURES:
        for seed in range(6):
            sprite = draw_object(look("circle", colour, texture, seed), Pose(0.5, 0.5, 0.5, 0.0), SIZE)
            inside = sprite.colour[:, sprite.cover == 1].T  # (pixels, 3)
            assert (np.abs(inside - base).max(1) < 65).mean() > 0.4


def test_textures_repeat_and_differ() -> None:
    plain = look("circle", "blue", "plain")
    pictures = {}
    for texture in TEXTURES:
        kind = Kind("circle", "blue", texture)
        flat = replace(plain, kind=kind, light=(0.0, 0.0), texture_angle=0.0, periods=4.0, shift=(0.0, 0.0))
        pictures[texture] = draw_object(flat, Pose(0.5, 0.5, 0.8, 0.0), SIZE).colour[2]
    inner = np.s_[60:100, 60:100]  # one period of 40 pixels, about the middle
    assert np.ptp(pictures["plain"][inner]) < 1
    assert np.ptp(pictures["striped"][inner], axis=0).max() < 1 < np.ptp(pictures["striped"][inner], axis=1).min()
    assert min(np.ptp(pictures["checkered"][inner], axis=axis).max() for axis in (0, 1)) > 30
    first, second = plain.palette[:2, 2]
    share = {name: float((picture[inner].mean() - first) / (second - first)) for name, picture in pictures.items()}
    assert share["plain"] == pytest.approx(0, abs=0.01)
    assert share["striped"] == pytest.approx(0.44, abs=0.02) and share["checkered"] == pytest.approx(0.5, abs=0.02)
    assert share["dotted"] == pytest.approx(math.pi * 0.3**2, abs=0.02)
