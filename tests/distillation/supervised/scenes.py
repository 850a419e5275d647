"""Scenes whose objects, phrases and masks are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sam3.engine.scene_names import Kind, Phrase
from sam3.engine.scenes import Scene

RED_SQUARE, BLUE_SQUARE = Kind("square", "red", "plain"), Kind("square", "blue", "plain")
STRIPED_RED, GREEN_STAR = Kind("square", "red", "striped"), Kind("star", "green", "plain")

Corners = tuple[int, int, int, int]  # left, top, right, bottom


def hand_made(
    side: int, objects: Sequence[tuple[Kind, Corners]], phrases: Mapping[str, Sequence[int]] | None = None
) -> Scene:
    """Rectangles that do not touch, on a picture of which no two pixels are alike."""
    image = np.arange(side * side * 3).reshape(side, side, 3).astype(np.uint8)
    masks = np.zeros((len(objects), side, side), bool)
    for mask, (_, (left, top, right, bottom)) in zip(masks, objects, strict=True):
        mask[top:bottom, left:right] = True
    found = [Phrase(text, tuple(matches)) for text, matches in (phrases or {}).items()]
    return Scene(image, masks, [kind for kind, _ in objects], found, np.zeros(len(objects)))


def squares() -> Scene:
    """24 px: two plain red squares, a blue one, a green star; squares and a red one are named, a heart is not there."""
    return hand_made(
        24,
        [
            (RED_SQUARE, (1, 2, 6, 7)),
            (BLUE_SQUARE, (9, 2, 14, 7)),
            (RED_SQUARE, (1, 12, 6, 17)),
            (GREEN_STAR, (9, 12, 23, 23)),
        ],
        {"square": (0, 1, 2), "red square": (0, 2), "red heart": ()},
    )
