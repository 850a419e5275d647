"""What lies behind the objects of a scene: flat paint, a gradient, clouds, waves, grain, or a piece of a photo.

Nothing in it may look like a named shape. So photos of coins or wheels are no grounds, and neither are tiles.

Letters: `H W` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from sam3.engine.sample_set import list_photos, read_photo
from sam3.engine.scene_names import pick

# Bundled photos with things in them that a phrase might mean: badges, an eye, a cup, coins, a flower, the moon, wheels.
SHOWING_SHAPES = (
    *("astronaut.png", "chelsea.png", "coffee.png", "coins.png", "flower.jpg", "moon.png", "motorcycle_left.png"),
)
VAL_GROUNDS = 7  # of so many photos one lies behind held-out scenes only
PHOTO_SHARE = 0.5  # of the scenes, if there are photos
PHOTO_CONTRAST = (0.5, 0.95)  # what is left of a photo's own, so that objects stand out
BRIGHTNESS = (75, 195)  # the mean of a ground lies between; black and white objects are darker and brighter
TINT = 40  # the most that red, green and blue of a painted ground differ from its brightness


def list_grounds(folder: Path | None) -> list[Path]:
    """The pictures below `folder`, or the bundled photos without SHOWING_SHAPES. Raises what `list_photos` does."""
    photos = list_photos(folder)
    return photos if folder is not None else [path for path in photos if path.name not in SHOWING_SHAPES]


def split_grounds(photos: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Photos of each split, none of both: one of VAL_GROUNDS is val's. ValueError for fewer than two.

    It is the same for all sets of scenes and for training on the fly, whatever their sizes and seeds, so that no model
    is measured on a photo of its training.
    """
    if len(photos) < 2:
        raise ValueError(f"{len(photos)} photos are too few: each split wants one of its own; add photos")
    order = np.random.default_rng(0).permutation(len(photos)).tolist()
    count = max(1, round(len(photos) / VAL_GROUNDS))
    return {
        "train": tuple(photos[i] for i in sorted(order[count:])),
        "val": tuple(photos[i] for i in sorted(order[:count])),
    }


@cache
def read_grounds(paths: tuple[Path, ...], side: int = 288) -> tuple[np.ndarray, ...]:
    """Photos as `make_scene` and `make_clip` take them, uint8 `(H, W, 3)`, the shorter side at most `side` pixels.

    Larger ones are slower to cut pieces from. Read once in a process. ValueError names a file that cannot be decoded.
    """
    photos = []
    for path in paths:
        photo = read_photo(path)
        scale = side / min(photo.size)
        if scale < 1:
            sides = (max(side, round(photo.width * scale)), max(side, round(photo.height * scale)))
            photo = photo.resize(sides, Image.Resampling.LANCZOS)
        photos.append(np.asarray(photo))
    return tuple(photos)


def grounds_of(folder: str, split: str, side: int) -> tuple[np.ndarray, ...]:
    """Photos for scenes and clips made on the fly: those of a split, of `folder` or, if empty, the bundled ones.

    side: as for `read_grounds`. Raises what these raise.
    """
    photos = list_grounds(Path(folder) if folder else None)
    return read_grounds(split_grounds(photos)[split], side)


def draw_ground(size: int, photos: Sequence[np.ndarray] | None, generator: np.random.Generator) -> np.ndarray:
    """A square ground: float32 `(3, size, size)`, about 0..255."""
    if photos and generator.random() < PHOTO_SHARE:
        return _crop(pick(photos, generator), size, generator)
    return pick((_flat, _gradient, _clouds, _waves, _grain), generator)(size, generator)


def _paint(generator: np.random.Generator) -> np.ndarray:
    """A colour that is nearly grey, float32 `(3, 1, 1)`."""
    return (generator.uniform(*BRIGHTNESS) + generator.uniform(-TINT, TINT, (3, 1, 1))).astype(np.float32)


def _flat(size: int, generator: np.random.Generator) -> np.ndarray:
    return np.tile(_paint(generator), (1, size, size))


def _gradient(size: int, generator: np.random.Generator) -> np.ndarray:
    direction = generator.uniform(0, 2 * math.pi)
    return _blend(_ramp(size, direction), generator)


def _waves(size: int, generator: np.random.Generator) -> np.ndarray:
    """Wide soft bands, bent by others across them."""
    direction, number = generator.uniform(0, 2 * math.pi), generator.uniform(1.5, 6)
    bend = np.sin(generator.uniform(4, 10) * _ramp(size, direction + math.pi / 2))
    return _blend(0.5 + 0.5 * np.sin(2 * math.pi * number * _ramp(size, direction) + bend), generator)


def _ramp(size: int, direction: float) -> np.ndarray:
    """0.5 in the middle, rising along `direction` by 1 over the side: float32 `(size, size)`."""
    steps = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size - np.float32(0.5)
    return np.float32(0.5) + np.float32(math.cos(direction)) * steps + np.float32(math.sin(direction)) * steps[:, None]


def _blend(share: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    first, second = _paint(generator), _paint(generator)
    return first + (second - first) * share


def _clouds(size: int, generator: np.random.Generator) -> np.ndarray:
    """Soft blotches of one size, nearly of one colour."""
    cells = int(generator.integers(3, 14))
    light = generator.normal(0, 34, (1, cells, cells)) + generator.normal(0, 12, (3, cells, cells))
    return _paint(generator) + _enlarge(light, size)


def _grain(size: int, generator: np.random.Generator) -> np.ndarray:
    """Clouds with fine speckles, as of gravel or grass."""
    fine = generator.normal(0, generator.uniform(10, 34), (1, 64, 64))
    return _clouds(size, generator) + _enlarge(fine, size)


def _enlarge(planes: np.ndarray, size: int) -> np.ndarray:
    """Planes `(n, k, k)` of independent noise at another size, smooth and as strong: float32 `(n, size, size)`."""
    weights = _smooth_weights(size, planes.shape[1])
    return weights @ planes.astype(np.float32) @ weights.T


@cache
def _smooth_weights(size: int, cells: int) -> np.ndarray:
    """How much of each of `cells` values goes into each of `size` pixels of a line: float32 `(size, cells)`."""
    place = np.linspace(0, cells - 1, size)
    weights = np.exp(-1.2 * (place[:, None] - np.arange(cells)) ** 2)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def _crop(photo: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """A square piece of a photo, of 40% to 100% of its shorter side, maybe mirrored, with less contrast and neither
    very dark nor very bright.
    """
    height, width = photo.shape[:2]
    side = max(1, round(min(height, width) * generator.uniform(0.4, 1)))
    left, top = int(generator.integers(width - side + 1)), int(generator.integers(height - side + 1))
    piece = Image.fromarray(photo[top : top + side, left : left + side])
    ground = np.asarray(piece.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    if generator.random() < 0.5:
        ground = ground[..., ::-1]
    ground = ground.astype(np.float32, order="C")
    middle = ground.mean((1, 2), keepdims=True)
    return (ground - middle) * np.float32(generator.uniform(*PHOTO_CONTRAST)) + middle.clip(*BRIGHTNESS)
