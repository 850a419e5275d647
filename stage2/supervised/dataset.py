"""Generated clips made on the fly, with an object's prompt in the first frame and its true masks in all of them.

The same seed, epoch and index give the same clip and prompts in any process.

Letters: V clips, T frames, N objects of a clip, B objects of all clips together, S side of the frames and of the
model's input, M side of the mask grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam3.engine.prefetch import ReusedMemory
from sam3.engine.scene_videos import Clip, make_clip
from sam3.engine.scenes import MIN_AREA, number_of_scene
from sam3.transforms import Preprocess
from stage2.data.batch import ABSENT, PRESENT, UNKNOWN, ClipBatch
from stage2.data.mask_grid import grid_masks
from stage2.data.prompts import CLICK, Prompts, PromptSampling, draw_prompts, to_square
from stage2.data.sav_dataset import clip_generator
from stage2.vos_tracking import middle_of

SLIVER = 0.0005  # share of a frame; of a smaller part of an object nobody can tell what it is, nor that it is there
VAL_SEED = 0  # of the clips that are validated on


@dataclass(frozen=True)
class ClipDraws:
    """How the training clips are drawn.

    num_frames: T in epoch 0, 1, ..., the last also in all that follow: what is learnt from short clips costs least.
    max_objects: of a clip, from those that are seen well in its first frame. max_span: a clip is a piece of T frames of
    a longer one of up to `max_span` T frames, so that motion comes in large and in small steps. reversal: share of the
    clips that are played backwards, 0..1.
    """

    num_frames: tuple[int, ...] = (4, 8)
    max_objects: int = 3
    max_span: float = 2.0
    reversal: float = 0.3


@dataclass
class SceneClipBatch(ClipBatch):
    """full_masks: bool (B, T, S, S), of clips to validate on; else None."""

    full_masks: Tensor | None = None


@dataclass
class _Sample:
    """A clip. frames: uint8 (T, S, S, 3); masks: bool (N, T, S, S); states: int64 (N, T)."""

    key: str
    frames: np.ndarray
    masks: Tensor
    states: Tensor
    prompts: Prompts


class SceneClips:
    """Clips of the train split; a `sam3.engine.loader.PictureDataset` of `num_clips` an epoch.

    mask_size: M. photos: see `make_clip`.
    """

    store = None

    def __init__(
        self,
        num_clips: int,
        preprocess: Preprocess,
        mask_size: int,
        draws: ClipDraws,
        prompts: PromptSampling,
        seed: int = 0,
        photos: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.num_clips, self.preprocess, self.mask_size = num_clips, preprocess, mask_size
        self.draws, self.prompts, self.seed, self.photos = draws, prompts, seed, photos

    def __len__(self) -> int:
        return self.num_clips

    def load(self, indices: Sequence[int], epoch: int = 0) -> SceneClipBatch:
        """The clips `indices` as `epoch` shows them: each epoch has clips of its own."""
        num_frames = self.draws.num_frames[min(epoch, len(self.draws.num_frames) - 1)]
        samples = [self._sample(epoch * self.num_clips + index, num_frames) for index in indices]
        return collate(samples, self.preprocess, self.mask_size)

    def read_embeddings(
        self, batch: SceneClipBatch, memory: ReusedMemory | None = None, pin: bool = False
    ) -> SceneClipBatch:
        """`batch` as it is: there are no embeddings to read."""
        return batch

    def _sample(self, number: int, num_frames: int) -> _Sample:
        generator = clip_generator(self.seed, 0, number)
        length = int(generator.integers(num_frames, int(self.draws.max_span * num_frames) + 1))
        seed = number_of_scene(self.seed, number)
        clip = make_clip(seed, self.preprocess.img_size, length, "train", self.photos)
        frames, masks = self._piece(clip, num_frames, generator)
        visible = well_seen(masks[:, 0])
        chosen = np.sort(generator.permutation(visible)[: self.draws.max_objects])
        shown = torch.from_numpy(masks[chosen])
        prompts = draw_prompts(shown[:, 0], self.preprocess, self.prompts, generator)
        return _Sample(f"train/{seed}", frames, shown, states_of(shown, SLIVER), prompts)

    def _piece(self, clip: Clip, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """T = `count` frames in a row, (T, S, S, 3), and masks (N, T, S, S), in either direction.

        From the clip's beginning, where all objects are, if the piece drawn begins with none.
        """
        start = int(generator.integers(len(clip.frames) - count + 1))
        order = np.arange(start, start + count)
        if generator.random() < self.draws.reversal:
            order = order[::-1]
        if not len(well_seen(clip.masks[order[0]])):
            order = np.arange(count)
        return clip.frames[order], clip.masks[order].swapaxes(0, 1)


class ValidationClips:
    """Clips of the val split, whole and forwards, with all their objects, a click into the middle of each, and masks of
    full size; a `sam3.engine.loader.PictureDataset` of `num_clips`, the same in every epoch."""

    store = None

    def __init__(
        self,
        num_clips: int,
        preprocess: Preprocess,
        mask_size: int,
        num_frames: int,
        photos: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.num_clips, self.preprocess, self.mask_size = num_clips, preprocess, mask_size
        self.num_frames, self.photos = num_frames, photos

    def __len__(self) -> int:
        return self.num_clips

    def load(self, indices: Sequence[int], epoch: int = 0) -> SceneClipBatch:
        """The clips `indices`."""
        samples = [self._sample(index) for index in indices]
        batch = collate(samples, self.preprocess, self.mask_size)
        batch.full_masks = torch.cat([sample.masks for sample in samples])
        return batch

    def read_embeddings(
        self, batch: SceneClipBatch, memory: ReusedMemory | None = None, pin: bool = False
    ) -> SceneClipBatch:
        """`batch` as it is: there are no embeddings to read."""
        return batch

    def _sample(self, number: int) -> _Sample:
        seed, size = number_of_scene(VAL_SEED, number), self.preprocess.img_size
        clip = make_clip(seed, size, self.num_frames, "val", self.photos)
        masks = torch.from_numpy(np.ascontiguousarray(clip.masks.swapaxes(0, 1)))
        points, labels = torch.zeros(len(masks), 2, 2), torch.full((len(masks), 2), -1)
        for row, mask in enumerate(masks[:, 0].numpy()):
            middle = torch.tensor(middle_of(mask), dtype=torch.float64) - 0.5
            points[row, 0], labels[row, 0] = to_square(middle, self.preprocess, (size, size)), CLICK
        prompts = Prompts(["click"] * len(masks), points, labels)
        return _Sample(f"val/{seed}", clip.frames, masks, states_of(masks, 0), prompts)


def well_seen(masks: np.ndarray) -> np.ndarray:
    """Which masks (N, S, S) of a frame cover enough of it to be pointed at: their numbers."""
    return np.flatnonzero(masks.mean((1, 2)) >= MIN_AREA)


def states_of(masks: Tensor, sliver: float) -> Tensor:
    """Masks (N, T, S, S) -> int64 (N, T), see `ClipBatch`; UNKNOWN for less than `sliver` of the frame."""
    area = masks.float().mean((2, 3))
    states = torch.where(area > 0, PRESENT, ABSENT)
    return torch.where((area > 0) & (area < sliver), UNKNOWN, states)


def collate(samples: Sequence[_Sample], preprocess: Preprocess, mask_size: int) -> SceneClipBatch:
    """Joins clips of the same number of frames."""
    frames = torch.from_numpy(np.stack([sample.frames for sample in samples]))  # (V, T, S, S, 3)
    states = torch.cat([sample.states for sample in samples])
    masks = torch.cat([grid_masks(sample.masks, preprocess, mask_size) for sample in samples])
    counts = torch.tensor([len(sample.masks) for sample in samples])
    size = preprocess.fitted_size(*frames.shape[2:4])
    return SceneClipBatch(
        keys=[sample.key for sample in samples],
        images=frames.permute(0, 1, 4, 2, 3).contiguous(),
        sizes=torch.tensor([size] * len(samples)),
        embeddings=None,
        clip_of_object=torch.arange(len(samples)).repeat_interleave(counts),
        masks=masks & (states == PRESENT)[..., None, None],
        states=states,
        kinds=[kind for sample in samples for kind in sample.prompts.kinds],
        points=torch.cat([sample.prompts.points for sample in samples]),
        labels=torch.cat([sample.prompts.labels for sample in samples]),
        frames=[[(sample.key, t) for t in range(len(sample.frames))] for sample in samples],
    )
