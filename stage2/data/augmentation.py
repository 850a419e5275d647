"""Changes of a clip's pictures: of all frames alike, and a little of each frame's colours by itself.

Masks move with their frames, and prompts are drawn from the moved masks. Embeddings are of pictures as they are, so
there is no augmentation with them.

Letters: T frames, N objects, H W rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam3.engine.static_clips import GREY, move
from stage2.data.batch import ABSENT, PRESENT
from stage2.data.clips import Scene

LUMA = (0.299, 0.587, 0.114)  # share of red, green and blue in grey: ITU-R BT.601


@dataclass(frozen=True)
class Jitter:
    """Factors are drawn from 1 - x to 1 + x."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def draw(self, count: int, generator: np.random.Generator) -> Tensor:
        """Brightness, contrast and saturation: float32 (count, 3)."""
        most = np.array([self.brightness, self.contrast, self.saturation])
        return torch.from_numpy(1 + generator.uniform(-1, 1, (count, 3)) * most).float()


@dataclass(frozen=True)
class Augmentation:
    """hflip, greyscale: share of the clips, 0..1. degrees, shear: most rotation and shear to either side, in degrees.
    clip_jitter: of all frames alike; frame_jitter: of each frame by itself."""

    hflip: float = 0.5
    degrees: float = 25.0
    shear: float = 20.0
    clip_jitter: Jitter = Jitter(0.1, 0.03, 0.03)
    frame_jitter: Jitter = Jitter(0.1, 0.05, 0.05)
    greyscale: float = 0.05


@dataclass(frozen=True)
class Change:
    """What was drawn for one clip. matrix: float32 (2, 3) on (x, y, 1) in pixels, after the flip; None leaves pixels
    where they are. factors: float32 (T, 3) of brightness, contrast and saturation."""

    flip: bool
    matrix: Tensor | None
    factors: Tensor


def augment(scene: Scene, augmentation: Augmentation, generator: np.random.Generator) -> Scene:
    """The scene changed, with the objects that are still in its first frame; there is always one.

    If rotation and shear would move all of them out of the frame, they are left away.
    """
    change = draw_change(augmentation, len(scene.frames), scene.size, generator)
    changed = apply(scene, change)
    if not changed.begun_by().any():
        changed = apply(scene, Change(change.flip, None, change.factors))
    kept = changed.begun_by()
    return Scene(changed.frames, changed.pictures, changed.masks[kept], changed.states[kept])


def draw_change(
    augmentation: Augmentation, num_frames: int, size: tuple[int, int], generator: np.random.Generator
) -> Change:
    """All numbers are drawn in a fixed order, so that a limit of zero leaves the others as they were."""
    flip, grey = generator.random(2) < (augmentation.hflip, augmentation.greyscale)
    angle, shear = generator.uniform(-1, 1, 2) * (augmentation.degrees, augmentation.shear)
    factors = augmentation.clip_jitter.draw(1, generator) * augmentation.frame_jitter.draw(num_frames, generator)
    if grey:
        factors[:, 2] = 0
    return Change(bool(flip), affine(angle, shear, size) if angle or shear else None, factors)


def affine(angle: float, shear: float, size: tuple[int, int]) -> Tensor:
    """Shear along x, then rotation, in degrees and about the middle of a picture (H, W): float32 (2, 3) on pixels."""
    height, width = size
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, math.tan(math.radians(shear))], [0, 1]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    return torch.from_numpy(np.column_stack([linear, centre - linear @ centre])).float()


def apply(scene: Scene, change: Change) -> Scene:
    """The scene with the change; an object that leaves a frame is absent there."""
    pictures, masks = scene.pictures, scene.masks
    if change.flip:
        pictures, masks = [picture.flip(-1) for picture in pictures], masks.flip(-1)
    moved, shapes = [], []
    for t, picture in enumerate(pictures):
        colours, shape = picture.float(), masks[:, t]
        if change.matrix is not None:
            # Beyond the edges `move` gives zeros, so zero is made to mean grey.
            planes = move(torch.cat((colours.sub_(GREY), shape)), change.matrix[None])[0]
            colours, shape = planes[:3].add_(GREY), planes[3:] > 0.5
        moved.append(recolour(colours, change.factors[t]).round_().to(torch.uint8))
        shapes.append(shape)
    masks = torch.stack(shapes, dim=1)
    gone = (scene.states == PRESENT) & ~masks.flatten(2).any(2)
    return Scene(scene.frames, moved, masks, scene.states.masked_fill(gone, ABSENT))


def recolour(picture: Tensor, factors: Tensor) -> Tensor:
    """float (3, H, W) in 0..255 with brightness, contrast (about the picture's mean grey) and saturation (about each
    pixel's grey) times `factors` (3,). All three are linear, so they are one matrix on the colours of a pixel."""
    brightness, contrast, saturation = factors.tolist()
    luma = picture.new_tensor(LUMA)
    colours = saturation * torch.eye(3) + (1 - saturation) * luma.expand(3, 3)
    middle = (1 - contrast) * brightness * (luma @ picture.mean((1, 2)))
    mixed = torch.addmm(middle.expand(3, 1), contrast * brightness * colours, picture.flatten(1))
    return mixed.clamp_(0, 255).view_as(picture)
