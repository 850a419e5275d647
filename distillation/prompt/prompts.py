"""Prompts, drawn from the mask of an object or laid out as a grid; student and teachers get the same ones.

Letters: `P` prompts, `k` points of a prompt, `H W` rows and columns of the original picture, `S` side of the model's
square. The frame is that square: pixels of the resized picture, which lies in its upper left corner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distillation.prompt.config import DatasetSettings
from distillation.prompt.object_mask import ObjectMask
from sam3.sam.prompt_encoder import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PADDING, POSITIVE
from sam3.transforms import Preprocess

BOX_SHARE = 0.5  # of the prompts of mixed mode


@dataclass
class Prompts:
    """P prompts in pixels of the frame.

    points: float32 `(P, k, 2)` xy, and labels: int64 `(P, k)`, -1 padding, 1 on the object, 2 and 3 the corners of a
    box; both or neither. boxes: float32 `(P, 4)` xyxy. Without all three it is one empty prompt.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.points is None) == (self.labels is None), "points come with labels"

    def __len__(self) -> int:
        return next((len(part) for part in (self.points, self.boxes) if part is not None), 1)

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on `device`."""
        return self._map(lambda part: part.to(device))

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Prompts:
        """The prompts `rows`, as a tensor's first dimension takes them; a number gives one prompt."""
        if isinstance(rows, int):
            number = range(len(self))[rows]  # IndexError beyond the end
            rows = slice(number, number + 1)
        return self._map(lambda part: part[rows])

    def arguments(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """(points, boxes) as prompt encoders take them: coordinates with labels or None, `(P, 4)` or None."""
        return None if self.points is None else (self.points, self.labels), self.boxes

    def _map(self, change: Callable[[Tensor], Tensor]) -> Prompts:
        parts = (self.points, self.labels, self.boxes)
        return Prompts(*(None if part is None else change(part) for part in parts))


def stack(prompts: Sequence[Prompts]) -> Prompts:
    """All rows of `prompts`, at least one, in order. ValueError if they are of several kinds or widths."""
    kinds = {tuple(None if part is None else tuple(part.shape[1:]) for part in vars(each).values()) for each in prompts}
    if len(kinds) != 1:
        raise ValueError(f"prompts of {len(kinds)} kinds (widths {sorted(map(str, kinds))}) make no batch")
    columns = zip(*(vars(each).values() for each in prompts), strict=True)
    return Prompts(*(None if column[0] is None else torch.cat(column) for column in columns))


def no_prompts(settings: DatasetSettings) -> Prompts:
    """None of the kind that `draw` gives."""
    if settings.prompt_mode == "box":
        return Prompts(boxes=torch.zeros(0, 4))
    width = num_points(settings)
    return Prompts(torch.zeros(0, width, 2), torch.zeros(0, width, dtype=torch.int64))


def num_points(settings: DatasetSettings) -> int:
    """`k` of every prompt of point and mixed mode, where a box takes two."""
    return max(settings.max_points, 2) if settings.prompt_mode == "mixed" else settings.max_points


def generator(seed: int, epoch: int, key: str, name: str) -> np.random.Generator:
    """Random numbers of the mask `name` of picture `key` in one epoch, the same in every process."""
    digest = hashlib.sha256(f"{key}\0{name}".encode()).digest()
    return np.random.default_rng((seed, epoch, int.from_bytes(digest[:8], "big")))


def draw(mask: ObjectMask, rng: np.random.Generator, settings: DatasetSettings, preprocess: Preprocess) -> Prompts:
    """One prompt for an object of at least one pixel: points, a box, or in mixed mode either, as likely as the other.

    Points are `(1, k, 2)`, see `num_points`, padded with label -1. In mixed mode a box is two points with labels 2 and
    3, so that both kinds go into one batch.
    """
    mode = settings.prompt_mode
    as_box = mode == "box" or (mode == "mixed" and rng.random() < BOX_SHARE)
    if as_box:
        places, kinds = draw_box(mask, rng, settings.max_bbox_shift).reshape(2, 2), [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]
    else:
        places = draw_points(mask, rng, settings.min_points, settings.max_points)
        kinds = [POSITIVE] * len(places)
    places = to_frame(places, mask.size, preprocess)
    if mode == "box":
        return Prompts(boxes=places.reshape(1, 4))
    width = num_points(settings)
    points, labels = torch.zeros(1, width, 2), torch.full((1, width), PADDING)
    points[0, : len(kinds)], labels[0, : len(kinds)] = places, torch.tensor(kinds)
    return Prompts(points, labels)


def draw_points(mask: ObjectMask, rng: np.random.Generator, min_points: int, max_points: int) -> np.ndarray:
    """Different pixels of the object, each as likely as any other: int64 `(n, 2)` xy in the original picture.

    n is drawn from min_points to max_points, but is at most the number of pixels.
    """
    count = min(int(rng.integers(min_points, max_points + 1)), mask.area)
    return mask.pixels(rng.choice(mask.area, count, replace=False))


def draw_box(mask: ObjectMask, rng: np.random.Generator, max_shift: int) -> np.ndarray:
    """The tight box, each side moved out by 0 to max_shift pixels, but not beyond the picture: int64 `(4,)` xyxy."""
    height, width = mask.size
    shifts = rng.integers(0, max_shift + 1, 4) * [-1, -1, 1, 1]
    return np.clip(mask.box() + shifts, 0, [width, height, width, height])


def to_frame(places: np.ndarray, size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    """Pixels of the original picture of `size` `(H, W)` -> pixels of the frame: float32 `(n, 2)`."""
    coords = torch.from_numpy(np.asarray(places, np.float64))
    return (preprocess.coords_to_input(coords, size) * preprocess.img_size).float()


def grid(count: int, size: tuple[int, int]) -> Prompts:
    """count x count single points, row by row, at (i + 0.5) / count of the sides of a picture: P = count^2, k = 1.

    size: `(rows, columns)` of the resized picture, in the frame.
    """
    rows, columns = ((torch.arange(count) + 0.5) * (side / count) for side in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack((x, y), dim=-1).reshape(-1, 1, 2)
    return Prompts(points, torch.full((count * count, 1), POSITIVE))
