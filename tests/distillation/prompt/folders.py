"""Small data sets in the layout of folders, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.parity.fill import image

Box = tuple[int, int, int, int]  # x0 y0 x1 y1, the last two left out


def write_picture(split: Path, key: str, size: tuple[int, int], boxes: Sequence[Box], suffix: str = ".jpg") -> None:
    """One picture of `size` (H, W) with a rectangular mask for each box: obj_0.png, obj_1.png, ..."""
    (split / "image").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image(*size, seed=len(key))).save(split / "image" / f"{key}{suffix}")
    for number, box in enumerate(boxes):
        write_mask(split / "mask" / key / f"obj_{number}.png", rectangle(size, box))


def write_mask(path: Path, mask: np.ndarray) -> None:
    """mask: bool (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, "PNG")


def rectangle(size: tuple[int, int], box: Box) -> np.ndarray:
    """bool (H, W), true in the box."""
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask
