"""Prompts of the video predictor: checking what a user gives, and bringing it to the model's square and back.

Letters: P points, H W rows and columns of the video, S side of the model's square, h w those of the video inside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.transforms import Preprocess

BOX_LABELS = (2, 3)  # of a box's corners, which are points to the model
MAX_POINTS = 16  # that the model is shown of an object: the first and the last half of what was given
SLACK_PX = 1e-3  # for rounding of relative coordinates
TEXT_REFUSED = (
    "text prompts in video need SAM3's text-driven video model, which this predictor is not; give points, a box or a "
    "mask with an obj_id (Sam3Processor finds objects by text in a picture)"
)


def check_points(
    points: Sequence | np.ndarray | Tensor,
    labels: Sequence | np.ndarray | Tensor,
    size: tuple[int, int],
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Points as float32 (P, 2) x, y in pixels of a video of `size` (H, W), and labels as (P,) long.

    Args:
        points: (P, 2), or (2,) for one; `relative`: in 0..1 of the picture, else in pixels.
        labels: (P,) 1 on the object, 0 beside it.

    Raises ValueError where they do not belong together, or a point lies outside the picture.
    """
    coords, marks = finite_numbers(points, "points"), finite_numbers(labels, "labels").flatten()
    if coords.numel() != 2 * len(marks) or not len(marks):
        raise ValueError(f"points are (P, 2) with as many labels, got {points!r} with labels {labels!r}")
    if not ((marks == 0) | (marks == 1)).all():
        raise ValueError(f"the label of a point is 1 (on the object) or 0 (beside it), got {marks.tolist()}")
    return _inside(coords.reshape(-1, 2), size, relative, "point"), marks.long()


def check_box(box: Sequence | np.ndarray | Tensor, size: tuple[int, int], relative: bool = False) -> Tensor:
    """A box left, top, right, bottom as its two corners, float32 (2, 2) in pixels of a video of `size` (H, W).

    Raises ValueError where it has no area, or leaves the picture.
    """
    numbers = finite_numbers(box, "a box")
    if numbers.numel() != 4:
        raise ValueError(f"a box is four numbers (left, top, right, bottom), got {box!r}")
    corners = numbers.reshape(2, 2)
    if not (corners[0] < corners[1]).all():
        raise ValueError(f"box {_text(corners)} has no area; wanted left < right and top < bottom")
    return _inside(corners, size, relative, "box")


def check_mask(mask: np.ndarray | Tensor, size: tuple[int, int]) -> Tensor:
    """A mask as bool (H, W); above one half is the object. Raises ValueError for another size than the video's."""
    given = torch.as_tensor(mask)
    if given.ndim == 3 and given.shape[0] == 1:
        given = given[0]
    if tuple(given.shape) != tuple(size):
        raise ValueError(
            f"the mask has the shape {tuple(given.shape)}, wanted {tuple(size)}, the rows and columns of the video"
        )
    return given > 0.5


def input_coords(pixels: Tensor, preprocess: Preprocess, size: tuple[int, int]) -> Tensor:
    """(P, 2) pixels of a video of `size` -> pixels of the S x S input."""
    return preprocess.coords_to_input(pixels, size) * preprocess.img_size


def first_and_last(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of more than MAX_POINTS points, the first and the last half of so many."""
    if len(labels) <= MAX_POINTS:
        return points, labels
    half = MAX_POINTS // 2
    return torch.cat((points[:half], points[-half:])), torch.cat((labels[:half], labels[-half:]))


def mask_in_square(mask: Tensor, side: int, preprocess: Preprocess) -> Tensor:
    """A mask of the video, bool (H, W), over the model's square at another resolution: float (1, 1, side, side), 0..1.

    Bilinear with antialiasing, so that edges are soft; 0 beside the picture.
    """
    fitted = preprocess.fitted_size(*mask.shape)
    rows, columns = (max(1, round(length * side / preprocess.img_size)) for length in fitted)
    resized = F.interpolate(mask[None, None].float(), (rows, columns), mode="bilinear", antialias=True)
    return F.pad(resized, (0, side - columns, 0, side - rows))


def finite_numbers(values: Sequence | np.ndarray | Tensor, what: str) -> Tensor:
    """As float32 on the CPU; ValueError naming `what` where they are no numbers, or not finite."""
    try:
        numbers = torch.as_tensor(values).to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} must be numbers, got {values!r}") from error
    if not numbers.isfinite().all():
        raise ValueError(f"{what} must be finite numbers, got {values!r}")
    return numbers


def _inside(coords: Tensor, size: tuple[int, int], relative: bool, what: str) -> Tensor:
    height, width = size
    pixels = coords * torch.tensor([width, height]) if relative else coords
    limits = torch.tensor([width, height]) + SLACK_PX
    if not ((pixels >= -SLACK_PX) & (pixels <= limits)).all():
        unit = "relative coordinates are in 0..1; for pixels pass rel_coordinates=False" if relative else "in pixels"
        raise ValueError(f"{what} {_text(coords)} lies outside the picture of {width} x {height} pixels ({unit})")
    return pixels


def _text(coords: Tensor) -> str:
    return ", ".join(f"({x:g}, {y:g})" for x, y in coords.tolist())
