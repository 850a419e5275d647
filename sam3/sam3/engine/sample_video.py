"""Draws videos with exact masks: pieces of photos that move over another photo.

Letters: `T` frames, `N` objects, `H W` rows and columns of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sam3.engine.sample_set import read_photo

RADIUS = (0.13, 0.2)  # of an object, as a share of the frame's shorter side
WOBBLE = 0.12  # share of the radius that each of three waves adds to an outline
PAN = 1.15  # the background is so much larger than the frame, which wanders over it
PHOTO_SHARE = (0.35, 0.7)  # of its photo's shorter side that an object shows


@dataclass(frozen=True)
class Shape:
    """Sides of a frame in pixels, and frames of a video."""

    width: int
    height: int
    num_frames: int


@dataclass(frozen=True)
class Draw:
    """What is drawn for one object's way: places as shares of the frame's sides, and an angle."""

    lane: float
    spot: float
    phase: float


# share of the time passed, shape of the video, a distance that takes the object out of sight, draw -> centre (x, y)
Way = Callable[[float, Shape, float, Draw], tuple[float, float]]


@dataclass
class Actor:
    """One object. cut: RGBA uint8 `(h, h, 4)`; path: share of the time passed, 0..1 -> centre (x, y) in pixels;
    start, turn: degrees; breath: share by which it grows and shrinks, once in the video from `phase` on.
    """

    cut: np.ndarray
    path: Callable[[float], tuple[float, float]]
    start: float
    turn: float
    breath: float
    phase: float

    def matrix(self, share: float) -> np.ndarray:
        """From pixels of `cut` to those of the frame, `(2, 3)`."""
        import cv2

        centre = ((self.cut.shape[1] - 1) / 2, (self.cut.shape[0] - 1) / 2)
        scale = 1 + self.breath * np.sin(2 * np.pi * (share + self.phase))
        matrix = cv2.getRotationMatrix2D(centre, self.start + self.turn * share, scale)
        matrix[:, 2] += np.array(self.path(share)) - centre
        return matrix


def draw_video(
    photos: Sequence[Path], shape: Shape, ways: Sequence[Way], generator: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Every frame, RGB uint8 `(H, W, 3)`, and the visible part of each object, bool `(T, N, H, W)`.

    photos: the background's, then one for each object, later ones in front; objects take turns at the `ways`.
    The same state of the generator gives the same video. ValueError names a photo that cannot be read.
    """
    background = draw_background(photos[0], shape, generator)
    actors = [cast(photo, ways[i % len(ways)], shape, generator) for i, photo in enumerate(photos[1:])]
    start, end = generator.uniform(0, 1, (2, 2)) * (
        background.shape[1] - shape.width,
        background.shape[0] - shape.height,
    )
    shares = np.linspace(0, 1, shape.num_frames)
    drawn = [draw_frame(background, start + (end - start) * share, actors, share, shape) for share in shares]
    return [frame for frame, _ in drawn], np.stack([masks for _, masks in drawn])


def draw_frame(
    background: np.ndarray, corner: np.ndarray, actors: list[Actor], share: float, shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
    """One frame `(H, W, 3)` uint8 and its masks `(N, H, W)` bool; later actors are in front of earlier ones."""
    import cv2

    sides = (shape.width, shape.height)
    shift = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]]])
    frame = cv2.warpAffine(background, shift, sides, borderMode=cv2.BORDER_REFLECT).astype(np.float32)
    masks = np.zeros((len(actors), shape.height, shape.width), bool)
    for i, actor in enumerate(actors):
        matrix = actor.matrix(share)
        # Only the part of the frame that the object can touch.
        side = actor.cut.shape[0]
        corners = np.array([[0, 0, 1], [side, 0, 1], [0, side, 1], [side, side, 1]]) @ matrix.T
        left, top = np.clip(np.floor(corners.min(0)).astype(int) - 1, 0, sides)
        right, bottom = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, sides)
        if left >= right or top >= bottom:
            continue
        matrix[:, 2] -= left, top
        box, area = (int(right - left), int(bottom - top)), np.s_[top:bottom, left:right]
        colour = cv2.warpAffine(actor.cut[..., :3], matrix, box, borderMode=cv2.BORDER_REPLICATE)
        cover = cv2.warpAffine(actor.cut[..., 3], matrix, box).astype(np.float32) / 255
        frame[area] += (colour - frame[area]) * cover[..., None]
        masks[i][area] = cover >= 0.5
        masks[:i] &= ~masks[i]
    return frame.round().astype(np.uint8), masks


def draw_background(photo: Path, shape: Shape, generator: np.random.Generator) -> np.ndarray:
    """A crop of the photo with the frame's proportions, PAN times as large as the frame."""
    width, height = round(PAN * shape.width), round(PAN * shape.height)
    picture = read_photo(photo)
    zoom = min(picture.width / width, picture.height / height) * generator.uniform(0.8, 1)
    return crop(picture, (zoom * width, zoom * height), (width, height), generator)


def crop(
    picture: Image.Image, part: tuple[float, float], sides: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """`part` (width, height in pixels) of a picture, from anywhere in it, resized to `sides`: uint8 `(H, W, 3)`."""
    left, top = generator.uniform(0, 1, 2) * (picture.width - part[0], picture.height - part[1])
    box = (left, top, left + part[0], top + part[1])
    return np.asarray(picture.resize(sides, Image.Resampling.LANCZOS, box=box))


def cast(photo: Path, way: Way, shape: Shape, generator: np.random.Generator) -> Actor:
    """An object: a piece of `photo` with a wavy outline, and the way it goes."""
    import cv2

    radius = min(shape.width, shape.height) * generator.uniform(*RADIUS)
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = [np.cos(k * angles + generator.uniform(0, 2 * np.pi)) for k in (2, 3, 4)]
    outline = radius * (1 + WOBBLE * sum(generator.uniform(0.2, 1) * wave for wave in waves))
    side = int(np.ceil(2 * outline.max())) + 4
    corners = (side - 1) / 2 + outline[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    cover = np.zeros((side, side), np.uint8)
    cv2.fillPoly(cover, [np.round(corners * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    picture = read_photo(photo)
    part = min(picture.size) * generator.uniform(*PHOTO_SHARE)
    colour = crop(picture, (part, part), (side, side), generator)
    start, turn = generator.uniform(0, 360), generator.uniform(-60, 60)
    breath, phase = generator.uniform(0.05, 0.2), generator.uniform(0, 1)
    draw = Draw(*generator.uniform((0.4, 0.6, 0), (0.6, 0.8, 2 * np.pi)))
    path = partial(way, shape=shape, away=2 * radius, draw=draw)
    return Actor(np.dstack((colour, cover)), path, start, turn, breath, phase)


def steady(share: float, shape: Shape, away: float, draw: Draw) -> tuple[float, float]:
    """Stays about the middle."""
    x, y = np.sin(2 * np.pi * share + draw.phase), np.cos(5 * share + draw.phase)
    return shape.width * (0.5 + 0.06 * x), shape.height * (0.5 + 0.06 * y)


def crossing(share: float, shape: Shape, away: float, draw: Draw) -> tuple[float, float]:
    """Passes before the middle, from left to right."""
    return shape.width * (0.15 + 0.7 * share), shape.height * draw.lane


def late(share: float, shape: Shape, away: float, draw: Draw) -> tuple[float, float]:
    """Comes in from above after a third of the time."""
    return shape.width * (1 - draw.spot), -away + (away + 0.25 * shape.height) * ease((share - 0.35) / 0.25)


def leaving(share: float, shape: Shape, away: float, draw: Draw) -> tuple[float, float]:
    """Leaves to the right after a third of the time."""
    way = shape.width * (1 - draw.spot) + away
    return shape.width * draw.spot + way * ease((share - 0.35) / 0.3), shape.height * 0.75


def returning(share: float, shape: Shape, away: float, draw: Draw) -> tuple[float, float]:
    """Leaves to the left and comes back."""
    gone = ease((share - 0.2) / 0.2) - ease((share - 0.6) / 0.2)
    return shape.width * 0.25 - (shape.width * 0.25 + away) * gone, shape.height * draw.spot * 0.4


def ease(share: float) -> float:
    """0 up to 0, 1 from 1 on, and a smooth way between."""
    share = min(max(share, 0.0), 1.0)
    return share * share * (3 - 2 * share)


TRAIN_WAYS = (steady, crossing, late, leaving)
VAL_WAYS = (steady, crossing, leaving, returning)  # all of them are in the first frame
