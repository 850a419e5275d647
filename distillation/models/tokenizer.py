"""Prompts as the student's text tower reads them: CLIP's byte-level BPE, 77 tokens, a mask of the padding.

Letters: n prompts, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from sam3.model.tokenizer import SimpleTokenizer

CONTEXT_LENGTH = 77
END_ID = 49407


def tokenize(prompts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> tuple[Tensor, Tensor]:
    """Phrases -> ids `(n, L)` long and padding `(n, L)` bool, True = ignore.

    The ids are those of open_clip's tokenizer of MobileCLIP-S1: start, tokens, end, zeros. What does not fit is cut
    off, and the last id is still the end. Raises ValueError for a prompt that is no string.
    """
    ids = SimpleTokenizer(context_length=context_length)(list(prompts))
    return ids, padding_of(ids)


def padding_of(ids: Tensor) -> Tensor:
    """ids `(n, L)` -> bool `(n, L)`, True after the first end token; nowhere if there is none."""
    ended = (ids == END_ID).cumsum(dim=1) > 0
    return F.pad(ended[:, :-1], (1, 0))
