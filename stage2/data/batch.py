"""What a training step of Stage 2 gets: clips, the objects that are followed in them, and how each is prompted.

Letters: V clips, T frames of a clip, B objects of all clips together, S side of the model's input, G side of the
trunk's grid, E its channels, M = 4 G side of the masks, P points of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam3.engine.batch import pin

UNKNOWN, ABSENT, PRESENT = -1, 0, 1  # what an annotation says of an object in a frame
PROMPT_KINDS = ("mask", "box", "click")


@dataclass
class ClipBatch:
    """V clips with B objects.

    keys: a name for each clip: video, and the number of its first frame. frames: for each clip T of (video, number), in
    the order in which they are shown; a short video repeats some.
    images: uint8 (V, T, 3, S, S), or None where embeddings are read. sizes: int64 (V, 2), rows and columns of the
    frames inside the square. embeddings: (V, T, E, G, G) as stored, or None.
    clip_of_object: int64 (B,), sorted. masks: bool (B, T, M, M) over the square, False where absent or unknown.
    states: int64 (B, T), UNKNOWN, ABSENT or PRESENT; PRESENT in frame 0.
    kinds: of each object's prompt in frame 0, on the host. points: (B, P, 2) in pixels of the square, labels (B, P): 2
    and 3 the corners of a box, 1 a click, -1 none, so that rows of kind mask have -1 only.
    skipped: (key, reason) of videos that could not be used.
    """

    keys: list[str]
    images: Tensor | None
    sizes: Tensor
    embeddings: Tensor | None
    clip_of_object: Tensor
    masks: Tensor
    states: Tensor
    kinds: list[str]
    points: Tensor
    labels: Tensor
    frames: list[list[tuple[str, int]]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_frames(self) -> int:
        """T."""
        return self.states.shape[1]

    def pin_memory(self) -> ClipBatch:
        """A copy in page-locked memory."""
        return pin(self)

    def rows_of(self, kind: str) -> list[int]:
        """The objects that are prompted in this way."""
        return [row for row, own in enumerate(self.kinds) if own == kind]


def mean_per_clip(values: Tensor, weights: Tensor, clip_of_object: Tensor, num_clips: int) -> Tensor:
    """Mean over the clips of their weighted means over objects (and frames): a scalar.

    values, weights: (B,) or (B, T). Clips count alike, however many objects they have, so that the mean over processes
    is that of the joined batch; a clip without weight counts as 0.
    """
    pairs = torch.stack((values * weights, weights))  # (2, B) or (2, B, T)
    if pairs.dim() == 3:
        pairs = pairs.sum(2)
    sums = pairs.new_zeros(2, num_clips).index_add(1, clip_of_object, pairs)
    return (sums[0] / sums[1].clamp(min=1)).mean()
