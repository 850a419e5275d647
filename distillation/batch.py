"""What the loader hands to a training step.

Letters: `B` pictures, `S` side of the model's square, `Q` queries, `C` channels, `G` side of the trunk's grid,
`h w` rows and columns of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sam3.engine import batch
from sam3.engine.embeddings import EmbeddingBatch


@dataclass
class DistillBatch:
    """A `sam3.engine.loader.PictureBatch`.

    images: uint8 `(B, 3, S, S)`, channels last in memory: each picture decoded and resized once, to be normalised on
    the device for the teacher and again for the student.
    prompt_index: int64 `(B,)`, places in the config's `prompts`. sizes: int64 `(B, 2)`, rows and columns of the
    original pictures. keys: B names such as `sa_223750`.
    embeddings: what the trunk gave, as stored, `(B, C, G, G)`; only with a trunk cache.
    outputs: the teacher's common outputs as stored, each with `B` in front, such as `pred_masks` `(B, Q, h, w)`; only
    with an output cache.
    skipped: (key, reason) of pictures that could not be read; others stand in their places.
    """

    images: Tensor
    prompt_index: Tensor
    sizes: Tensor
    keys: list[str]
    embeddings: EmbeddingBatch | None = None
    outputs: dict[str, Tensor] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> DistillBatch:
        """A copy in page-locked memory; a DataLoader calls this."""
        return batch.pin(self)
