"""Frames of many videos in batches, for the trunk; a batch may hold frames of several videos.

Letters: `B` frames, `S` side of the model's square.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sam3.engine import batch
from sam3.engine.pictures import empty_images
from sam3.engine.prefetch import ReusedMemory
from sam3.engine.sav import VideoFolder
from sam3.transforms import Preprocess, read_image


@dataclass
class FrameBatch:
    """images: uint8 `(B, 3, S, S)`, channels last in memory. sizes: int64 `(B, 2)`, rows and columns inside the square.
    frames: B pairs (video, number). skipped: (key, reason) of frames that could not be read and are in no other field.
    """

    images: Tensor
    sizes: Tensor
    frames: list[tuple[str, int]]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    embeddings: None = None  # what a loader looks at; frames have none yet

    @property
    def keys(self) -> list[str]:
        return [frame_key(video, number) for video, number in self.frames]

    def __len__(self) -> int:
        return len(self.frames)

    def pin_memory(self) -> FrameBatch:
        """A copy in page-locked memory; a DataLoader calls this."""
        return batch.pin(self)


def frame_key(video: str, number: int) -> str:
    """A frame's name in messages: `sav_000001/00012`."""
    return f"{video}/{number:05d}"


class FrameDataset(Dataset[FrameBatch]):
    """Chosen frames of `videos`, video by video; a `sam3.engine.loader.PictureDataset`.

    numbers: for each video the numbers of its frames. Frames that cannot be read are left out of their batch and listed
    in `skipped`, which may leave a batch empty.
    """

    store = None

    def __init__(self, videos: Sequence[VideoFolder], numbers: Sequence[Sequence[int]], preprocess: Preprocess) -> None:
        self.videos, self.preprocess = videos, preprocess
        # Arrays: millions of tuples would be copied into each worker as soon as it counts their references.
        self._video = np.repeat(np.arange(len(videos), dtype=np.int32), [len(chosen) for chosen in numbers])
        self._number = np.fromiter(itertools.chain.from_iterable(numbers), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, index: int) -> FrameBatch:
        return self.load([index])

    def load(self, indices: Sequence[int], epoch: int = 0) -> FrameBatch:
        """The batch of frames `indices`; every epoch shows the same."""
        images = empty_images(len(indices), self.preprocess.img_size)
        sizes = torch.empty(len(indices), 2, dtype=torch.int64)
        frames, skipped, good = [], [], []
        for row, index in enumerate(indices):
            video, number = self.videos[self._video[index]], int(self._number[index])
            try:
                image = read_image(video.path(number))
            except (ValueError, OSError) as error:
                skipped.append((frame_key(video.name, number), str(error)))
                continue
            sizes[row] = torch.tensor(self.preprocess.fit_into(image, images[row]))
            frames.append((video.name, number))
            good.append(row)
        if skipped:
            images, sizes = images[good], sizes[good]
        return FrameBatch(images, sizes, frames, skipped)

    def read_embeddings(self, batch: FrameBatch, memory: ReusedMemory | None = None, pin: bool = False) -> FrameBatch:
        """`batch` as it is: there are no embeddings to read."""
        return batch
