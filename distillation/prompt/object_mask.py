"""The mask of one object as run lengths: its box, its pixels and what a coarser grid sees of it.

Letters: `H W` rows and columns of the picture, `R` runs, `S` side of the model's square, `h w` = S/4 x S/4, the grid of
the low-resolution masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam3.engine.sa1b import decode_runs, sample_runs
from sam3.transforms import Preprocess

LOW_RES_STRIDE = 4  # pixels of the square for each cell of the decoder's masks


@dataclass(frozen=True)
class ObjectMask:
    """runs: int64 `(R,)`, see `sam3.engine.sa1b`: down the columns, outside and inside by turns. size: `(H, W)`."""

    runs: np.ndarray
    size: tuple[int, int]

    @classmethod
    def of_array(cls, mask: np.ndarray) -> ObjectMask:
        """From a whole mask, bool `(H, W)`."""
        pixels = mask.T.ravel()
        changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        runs = np.diff(np.concatenate(([0], changes, [pixels.size])))
        if pixels.size and pixels[0]:
            runs = np.concatenate(([0], runs))
        return cls(runs, (mask.shape[0], mask.shape[1]))

    def array(self) -> np.ndarray:
        """The whole mask, bool `(H, W)`."""
        return decode_runs(self.runs, *self.size)

    @property
    def area(self) -> int:
        """In pixels."""
        return int(self.runs[1::2].sum())

    def box(self) -> np.ndarray:
        """The tight box, int64 `(4,)` xyxy: the edges of the outermost pixels, so that its sides count pixels.

        It is that of the mask after a morphological closing, too: filling holes and notches moves no outermost pixel.
        Zeros for an empty mask.
        """
        ends = np.cumsum(self.runs)
        starts, stops = ends[:-1:2], ends[1::2]
        starts, last = starts[stops > starts], stops[stops > starts] - 1
        if not len(starts):
            return np.zeros(4, np.int64)
        height = self.size[0]
        left, right = starts[0] // height, last[-1] // height
        # A run that goes on in the next column touches both the picture's upper and its lower edge.
        whole = (starts // height != last // height).any()
        top, bottom = (0, height - 1) if whole else ((starts % height).min(), (last % height).max())
        return np.array([left, top, right + 1, bottom + 1], np.int64)

    def pixels(self, numbers: np.ndarray) -> np.ndarray:
        """Where pixels of the object lie, int64 `(n, 2)` xy; numbers: integers `(n,)` in 0..area-1, which count its
        pixels down the columns."""
        inside = np.cumsum(self.runs[1::2])
        stretch = np.searchsorted(inside, numbers, side="right")
        places = np.cumsum(self.runs)[2 * stretch + 1] - (inside[stretch] - numbers)
        columns, rows = np.divmod(places, self.size[0])
        return np.stack((columns, rows), axis=1)

    def low_res(self, preprocess: Preprocess) -> np.ndarray:
        """What the decoder's masks are compared with, bool `(h, w)`: the mask resized to the picture's size in the
        square, padded with zeros and resized to a quarter, both by the nearest pixel's centre. Only the pixels that
        stay are looked at."""
        side = preprocess.img_size // LOW_RES_STRIDE
        wanted = [
            _pixels_seen(side, fitted, pixels)
            for fitted, pixels in zip(preprocess.fitted_size(*self.size), self.size, strict=True)
        ]
        mask = np.zeros((side, side), bool)
        mask[: len(wanted[0]), : len(wanted[1])] = sample_runs(self.runs, self.size[0], *wanted)
        return mask


def _pixels_seen(cells: int, fitted: int, pixels: int) -> np.ndarray:
    """The picture's rows (or columns) that the cells see, from the first to the last one inside the picture.

    A cell's centre is a corner of four pixels of the square, of which the lower right one is taken; its centre lies in
    a pixel of the picture. Whole numbers all the way: no rounding.
    """
    places = np.arange(cells) * LOW_RES_STRIDE + LOW_RES_STRIDE // 2
    places = places[places < fitted]
    return (2 * places + 1) * pixels // (2 * fitted)
