"""Which image and which phrase each image-prompt pair of a call uses.

Letters: B image-prompt pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FindStage:
    """Pair i looks for phrase `text_ids[i]` in image `img_ids[i]`; both (B,) long."""

    img_ids: Tensor
    text_ids: Tensor

    @classmethod
    def single(cls, device: torch.device | str | None = None, image: int = 0, text: int = 0) -> FindStage:
        """One pair."""
        return cls(torch.tensor([image], device=device), torch.tensor([text], device=device))
