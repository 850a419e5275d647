"""Which frames and objects of a video make a clip, and reading them.

All frames of a clip have annotations: they are taken from the numbers that have some, every 4th of SA-V's, so that no
mask is ever older than its frame.

Letters: T frames of a clip, N its objects, H W rows and columns of the video.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam3.engine.sav import ANNOTATION_STEP, Masklets, VideoFolder
from sam3.transforms import read_image
from stage2.data.batch import ABSENT, PRESENT, UNKNOWN


@dataclass(frozen=True)
class ClipSampling:
    """How clips are drawn.

    num_frames: T. skip: from one frame to the next in the video's own count. grid: frames that can be taken are those
    whose numbers it divides; a multiple of 4, larger where fewer embeddings are stored. max_objects: of a clip.
    reversal: share of the clips that are played backwards, 0..1.
    """

    num_frames: int = 8
    skip: int = 4
    grid: int = ANNOTATION_STEP
    max_objects: int = 3
    reversal: float = 0.5

    def __post_init__(self) -> None:
        """ValueError for what cannot work, in terms of the config's keys."""
        if self.num_frames < 2 or self.max_objects < 1:
            raise ValueError(
                f"DATA.NUM_FRAMES must be at least 2 and DATA.MAX_OBJECTS at least 1, got {self.num_frames} and "
                f"{self.max_objects}"
            )
        if self.grid < 1 or self.grid % ANNOTATION_STEP or self.skip < 1 or self.skip % self.grid:
            raise ValueError(
                f"DATA.FRAME_SKIP must be a multiple of {self.grid}, because annotations come every {ANNOTATION_STEP} "
                f"frames and embeddings may be rarer (see --frame_stride of their export), got {self.skip}"
            )


@dataclass(frozen=True)
class Choice:
    """A clip of a video. numbers: T frame numbers in the order in which they are shown. objects: rows of the video's
    masklets, ascending; all are visible in the first frame."""

    numbers: tuple[int, ...]
    objects: tuple[int, ...]


@dataclass
class Scene:
    """A clip as it lies in its files, or after augmentation.

    frames: T of (video, number). pictures: T of uint8 (3, H, W), or None where embeddings are read. masks: bool
    (N, T, H, W), False where absent or unknown. states: int64 (N, T), see `ClipBatch`.
    """

    frames: list[tuple[str, int]]
    pictures: list[Tensor] | None
    masks: Tensor
    states: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.masks.shape[2], self.masks.shape[3]

    def begun_by(self) -> Tensor:
        """Which objects are in the first frame: bool (N,)."""
        return self.states[:, 0] == PRESENT


def spread(count: int, num_frames: int, step: int) -> tuple[int, int]:
    """Places from one frame of a clip to the next, out of `count` places, and how many starts there are.

    At most `step`; less where the clip would not fit, down to 1, which is also given to videos that are still too
    short: their last places are repeated.
    """
    step = max(1, min(step, (count - 1) // (num_frames - 1)))
    return step, max(1, count - (num_frames - 1) * step)


def places(start: int, step: int, count: int, num_frames: int, reverse: bool) -> list[int]:
    """Places of a clip's frames in 0..count-1, from `start` on; beyond the end the last one is repeated.

    reverse: the same clip from its end to `start`.
    """
    last = min(start + (num_frames - 1) * step, count - 1)
    if reverse:
        return [max(last - i * step, start) for i in range(num_frames)]
    return [min(start + i * step, last) for i in range(num_frames)]


def choose_clip(masklets: Masklets, sampling: ClipSampling, generator: np.random.Generator) -> Choice | None:
    """A clip with at least one object in its first frame, each start being equally likely; None if there is none."""
    numbers = [number for number in masklets.numbers if number % sampling.grid == 0]
    reverse = generator.random() < sampling.reversal
    if not numbers:
        return None
    step, num_starts = spread(len(numbers), sampling.num_frames, sampling.skip // sampling.grid)
    for start in generator.permutation(num_starts).tolist():
        chosen = [numbers[i] for i in places(start, step, len(numbers), sampling.num_frames, reverse)]
        if visible := masklets.visible(chosen[0]):
            objects = generator.permutation(visible)[: sampling.max_objects]
            return Choice(tuple(chosen), tuple(sorted(objects.tolist())))
    return None


def read_scene(video: VideoFolder, masklets: Masklets, choice: Choice, with_pictures: bool) -> Scene:
    """The frames and masks of a clip. Raises FileNotFoundError or ValueError naming the file that is missing, damaged
    or of another size."""
    size = (masklets.height, masklets.width)
    masks = torch.zeros(len(choice.objects), len(choice.numbers), *size, dtype=torch.bool)
    states = torch.full(masks.shape[:2], UNKNOWN, dtype=torch.int64)
    for row, index in enumerate(choice.objects):
        for t, number in enumerate(choice.numbers):
            mask = masklets.mask(number, index)
            if mask is not None:
                masks[row, t] = torch.from_numpy(mask)
                states[row, t] = PRESENT if mask.any() else ABSENT
    pictures = [read_frame(video, number, size) for number in choice.numbers] if with_pictures else None
    return Scene([(video.name, number) for number in choice.numbers], pictures, masks, states)


def read_frame(video: VideoFolder, number: int, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W); ValueError if that is not `size`."""
    path = video.path(number)
    picture = read_image(path)
    if (found := tuple(picture.shape[1:])) != size:
        raise ValueError(
            f"frame {path} has {found} rows and columns, but the annotations of {video.name} are about {size}; extract "
            "the video again"
        )
    return picture
