"""Room for the pictures of a batch.

Letters: `B` pictures, `S` side of the model's square.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def empty_images(count: int, size: int) -> Tensor:
    """Zeros, uint8 `(B, 3, S, S)` for `count` pictures of side `size`, channels last: the resize is faster so.

    In a loader's worker they lie in shared memory, so that the main process gets them without a copy.
    """
    flat = torch.zeros(0, dtype=torch.uint8)
    if get_worker_info() is None:
        flat = torch.zeros(count * size * size * 3, dtype=torch.uint8)
    else:
        flat.set_(torch.UntypedStorage._new_shared(count * size * size * 3))  # new shared memory is zero
    return flat.view(count, size, size, 3).permute(0, 3, 1, 2)
