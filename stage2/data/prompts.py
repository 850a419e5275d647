"""How each object of a clip is given in the first frame: by its mask, a box or a click.

Letters: N objects, H W rows and columns of the video, S side of the model's square, h w those of the video inside it.
Source: Ravi et al., SAM 2: Segment Anything in Images and Videos, 2024 (the mix of prompts and the noise of boxes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sam3.transforms import Preprocess
from stage2.data.batch import PROMPT_KINDS

JITTER_SHARE = 0.1  # of the box's side, at most, ...
JITTER_LIMIT_PX = 20.0  # ... and at most so many pixels of the square
MIN_SIDE_PX = 1.0
CLICK, LEFT_TOP, RIGHT_BOTTOM, NONE = 1, 2, 3, -1  # labels of points


@dataclass(frozen=True)
class PromptSampling:
    """Shares of the kinds, which add up to 1. jitter: move the corners of boxes."""

    mask: float = 0.5
    box: float = 0.25
    click: float = 0.25
    jitter: bool = True

    def __post_init__(self) -> None:
        shares = (self.mask, self.box, self.click)
        if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):  # so that NaN is refused too
            raise ValueError(f"the shares of DISTILL.PROMPTS must be 0 or more and add up to 1, got {shares}")

    def for_validation(self) -> PromptSampling:
        """The same without jitter."""
        return replace(self, jitter=False)


@dataclass
class Prompts:
    """kinds: N of `PROMPT_KINDS`. points: float32 (N, 2, 2), x y in pixels of the square, where a whole number is the
    centre of a pixel, as the prompt encoder takes it. labels: int64 (N, 2)."""

    kinds: list[str]
    points: Tensor
    labels: Tensor


def draw_prompts(
    masks: Tensor, preprocess: Preprocess, sampling: PromptSampling, generator: np.random.Generator
) -> Prompts:
    """Prompts for objects by their masks in the first frame, bool (N, H, W), none of them empty."""
    count, size = len(masks), (masks.shape[1], masks.shape[2])
    # All numbers are drawn for all objects, so that one's kind leaves the others as they are.
    kinds, pixels, corners = generator.random(count), generator.random(count), generator.uniform(-1, 1, (count, 4))
    limits = np.cumsum([sampling.mask, sampling.box])
    prompts = Prompts(
        [PROMPT_KINDS[i] for i in np.searchsorted(limits, kinds, side="right")],
        torch.zeros(count, 2, 2),
        torch.full((count, 2), NONE, dtype=torch.int64),
    )
    for row, kind in enumerate(prompts.kinds):
        if kind == "click":
            prompts.points[row, 0] = to_square(pixel_of(masks[row], pixels[row]), preprocess, size)
            prompts.labels[row, 0] = CLICK
        elif kind == "box":
            box = to_square(box_of(masks[row]), preprocess, size)
            box = move_corners(box, corners[row] * sampling.jitter, preprocess.fitted_size(*size))
            prompts.points[row] = box.view(2, 2)
            prompts.labels[row] = torch.tensor([LEFT_TOP, RIGHT_BOTTOM])
    return prompts


def pixel_of(mask: Tensor, share: float) -> Tensor:
    """x, y of the pixel of a mask (H, W) that comes after `share`, in [0, 1), of them: float64 (2,)."""
    inside = mask.flatten().nonzero()[:, 0]
    row, column = divmod(int(inside[int(share * len(inside))]), mask.shape[1])
    return torch.tensor([column, row], dtype=torch.float64)


def box_of(mask: Tensor) -> Tensor:
    """The outermost pixels of a mask (H, W), themselves included: float64 (4,) left, top, right, bottom."""
    rows, columns = (mask.any(dim).nonzero()[:, 0] for dim in (1, 0))
    return torch.stack((columns[0], rows[0], columns[-1], rows[-1])).double()


def to_square(pixels: Tensor, preprocess: Preprocess, size: tuple[int, int]) -> Tensor:
    """Coordinates in pixels of the video -> in pixels of the square; whole numbers are centres in both."""
    return preprocess.coords_to_input(pixels + 0.5, size) * preprocess.img_size - 0.5


def move_corners(box: Tensor, shares: np.ndarray, fitted: tuple[int, int]) -> Tensor:
    """A box (4,) in pixels of the square with each coordinate moved by `shares` (4,), in -1..1, of the most allowed.

    It stays inside the video, `fitted` (h, w). Corners that pass each other change places, and a side below one pixel
    becomes one: neither a line nor a dot is a box.
    """
    corners = box.view(2, 2)
    most = ((corners[1] - corners[0]) * JITTER_SHARE).clamp(max=JITTER_LIMIT_PX)
    moved = corners + torch.from_numpy(shares).view(2, 2) * most
    last = torch.tensor([fitted[1] - 1.0, fitted[0] - 1.0], dtype=box.dtype).clamp(min=0)
    moved = moved.clamp(min=torch.zeros_like(last), max=last)
    low, high = moved.amin(0), moved.amax(0)
    high = torch.maximum(high, (low + MIN_SIDE_PX).minimum(last))
    low = torch.minimum(low, (high - MIN_SIDE_PX).clamp(min=0))
    return torch.cat((low, high))
