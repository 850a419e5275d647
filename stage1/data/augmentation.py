"""Augmentation that one stored number replays: the student sees exactly what its teacher saw."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms import functional as tvf

MAX_SEED = 2**31


@dataclass(frozen=True)
class Augmentation:
    """Horizontal flip and colour jitter, drawn only from a generator seeded by the record's seed.

    flip: probability in 0..1. brightness, contrast, saturation: half width around 1 of the factor drawn, in 0..1.
    """

    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """image: uint8 `(3, h, w)` without padding; returns the same shape and type."""
        draw = np.random.Generator(np.random.PCG64(seed))
        # All numbers are drawn in a fixed order, so that switching one step off leaves the others as they were.
        turned = draw.random() < self.flip
        brightness, contrast, saturation = (
            draw.uniform(1 - width, 1 + width) for width in (self.brightness, self.contrast, self.saturation)
        )
        if turned:
            image = tvf.hflip(image)
        image = tvf.adjust_brightness(image, brightness)
        image = tvf.adjust_contrast(image, contrast)
        return tvf.adjust_saturation(image, saturation)

    def to_meta(self) -> dict[str, Any]:
        """Plain numbers, for the store's description."""
        return asdict(self)


def seed_of(key: str, run_seed: int = 0) -> int:
    """The seed of a picture when its embedding is made: in [0, 2^31), from its key alone, whoever exports it."""
    digest = hashlib.sha256(f"{run_seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED
