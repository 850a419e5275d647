"""Clips out of still pictures: one picture and its masks, moved a little further in each frame.

SA-1B has far more scenes than any video set; moved pictures teach a tracker what an object looks like from frame to
frame, though not what moves on its own.

Letters: `T` frames, `N` objects, `H W` rows and columns, `C` channels.
Source: still pictures as clips for video object segmentation: Perazzi et al., Learning Video Object Segmentation from
Static Images, 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.engine.sa1b import ImageAnnotations, decode_runs

GREY = 127.5  # what lies beyond the picture: zero once the network's input is normalised


@dataclass(frozen=True)
class Motion:
    """The most that the last frame differs from the first, to either side.

    rotation_deg, shear_deg: degrees; shift: share of the picture's side; scale: 0.2 for sizes from 1/1.2 to 1.2.
    """

    rotation_deg: float = 15.0
    shear_deg: float = 5.0
    shift: float = 0.15
    scale: float = 0.2


@dataclass
class StaticClip:
    """frames: uint8 `(T, 3, H, W)`; masks: bool `(T, N, H, W)`, all False where an object has left the picture."""

    frames: Tensor
    masks: Tensor


def static_clip(
    picture: Tensor, masks: Tensor, num_frames: int, generator: np.random.Generator, motion: Motion | None = None
) -> StaticClip:
    """Move `picture`, uint8 `(3, H, W)`, with `masks`, bool `(N, H, W)`, over `num_frames` frames.

    Frame 0 is the picture itself. The same generator state gives the same clip. ValueError if the sizes differ.
    """
    if picture.shape[-2:] != masks.shape[-2:]:
        raise ValueError(
            f"the picture has {tuple(picture.shape[-2:])} rows and columns, its masks {tuple(masks.shape[-2:])}"
        )
    matrices = draw_path(num_frames, (picture.shape[-2], picture.shape[-1]), motion or Motion(), generator)
    # Sampling reads zeros beyond the edges, so zero is made to mean grey.
    frames = move(picture.float() - GREY, matrices) + GREY
    return StaticClip(frames.round().clamp(0, 255).to(torch.uint8), move(masks.float(), matrices) > 0.5)


def annotated_masks(annotations: ImageAnnotations, objects: Sequence[int]) -> Tensor:
    """Masks of `objects` of one picture: bool `(N, H, W)`. ValueError names one that is damaged."""
    height, width = annotations.height, annotations.width
    masks = torch.zeros(len(objects), height, width, dtype=torch.bool)
    for row, index in enumerate(objects):
        masks[row] = torch.from_numpy(decode_runs(annotations.runs(index), height, width))
    return masks


def draw_path(num_frames: int, image_size: tuple[int, int], motion: Motion, generator: np.random.Generator) -> Tensor:
    """Where a pixel of the picture goes in each frame: float32 `(T, 2, 3)`, on (x, y, 1) in pixels.

    The first matrix is the identity; the way to the last one, drawn within `motion`, is even.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    height, width = image_size
    # All numbers are drawn in a fixed order, so that a limit of zero leaves the others as they were.
    angle, shear, shift_x, shift_y, size = generator.uniform(-1, 1, 5) * (
        np.deg2rad(motion.rotation_deg),
        np.deg2rad(motion.shear_deg),
        motion.shift * width,
        motion.shift * height,
        np.log1p(motion.scale),
    )
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    matrices = np.zeros((num_frames, 2, 3))
    for t, share in enumerate(np.linspace(0, 1, num_frames)):
        cos, sin = np.cos(share * angle), np.sin(share * angle)
        turn = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, np.tan(share * shear)], [0, 1]])
        linear = np.exp(share * size) * turn
        matrices[t, :, :2] = linear
        matrices[t, :, 2] = centre - linear @ centre + share * np.array([shift_x, shift_y])
    return torch.from_numpy(matrices).float()


def move(maps: Tensor, matrices: Tensor) -> Tensor:
    """`maps`, float `(C, H, W)`, moved by `matrices` `(T, 2, 3)` on pixels: `(T, C, H, W)`, zero beyond the edges."""
    height, width = maps.shape[-2:]
    device = maps.device
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    matrices = matrices.to(device)
    # Each pixel of a frame asks which point of the picture came here: the way back.
    back = torch.linalg.inv(matrices[:, :, :2])
    place = torch.stack((x, y), dim=-1) - matrices[:, None, None, :, 2]  # (T, H, W, 2)
    source = torch.einsum("tij,thwj->thwi", back, place)
    # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last one.
    grid = (2 * source + 1) / torch.tensor([width, height], device=device) - 1
    return F.grid_sample(maps.expand(len(matrices), -1, -1, -1), grid, align_corners=False)
