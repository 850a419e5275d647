"""What the loader hands to a training step.

Letters: `B` pictures, `P` prompts, `M` masks, `S` side of the model's square, `G` = S/16, `C C'` channels,
`h w` = S/4 x S/4, `K` masks of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from distillation.prompt.prompts import Prompts
from sam3.engine import batch


@dataclass
class PromptBatch:
    """A `sam3.engine.loader.PictureBatch`.

    images: uint8 `(B, 3, S, S)`, resized, in the upper left corner of zeros; channels last in memory. sizes: int64
    `(B, 2)`, rows and columns that each picture takes there, as `Preprocess.normalise` and `prompts.grid` want them.
    prompts: one of each picture; None in everything mode, where they are a grid.
    masks: uint8 0 or 1, `(M, 1, h, w)`, those of all pictures in order, at the resolution of the decoder's; counts:
    how many each picture has, 1 in single mode. keys: B of `<picture key>/<mask name>`, in everything mode of
    `<picture key>`. epoch: the one that drew the prompts.
    features: teacher -> component -> as its store has it, float32; None without stores. Of each picture encoder_patch
    `(B, C', G, G)` and prompt_embed `(B, C, G, G)`, of each prompt decoder_mask_token `(P, 4, C)`, dense_mask_logits
    `(P, K, h, w)` with ious `(P, K)`, and prompt_embed if it was taken behind block 0. In everything mode the prompts
    of all pictures follow one another.
    skipped: (key, reason) of pictures and masks that cannot be used; others stand in their places.
    """

    images: Tensor
    sizes: Tensor
    prompts: Prompts | None
    masks: Tensor
    counts: list[int]
    keys: list[str]
    epoch: int
    features: dict[str, dict[str, Tensor]] | None = None
    embeddings: None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> PromptBatch:
        """A copy in page-locked memory; a DataLoader calls this."""
        return batch.pin(self)
