"""Which of the teacher's queries shows a row's object. Queries are learnt, so a number means the same in the student.

Letters: `R` rows, `Q` queries, `M` side of the masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("score", "box_iou", "mask_iou")


def best_score(logits: Tensor) -> Tensor:
    """The query with the highest logit: `(R, Q, 1)` -> `(R,)`."""
    return logits[..., 0].argmax(1)


def best_box(boxes: Tensor, target: Tensor) -> Tensor:
    """The query whose box overlaps the annotated one best (IoU): boxes `(R, Q, 4)`, target `(R, 4)`, xyxy -> `(R,)`."""
    target = target[:, None]
    sides = (torch.minimum(boxes[..., 2:], target[..., 2:]) - torch.maximum(boxes[..., :2], target[..., :2])).clamp(
        min=0
    )
    both = sides.prod(-1)
    either = _area(boxes) + _area(target) - both
    return (both / either.clamp(min=1e-12)).argmax(1)


def best_mask(masks: Tensor, target: Tensor) -> Tensor:
    """The query whose mask overlaps the annotated one best (IoU): bool `(R, Q, M, M)`, `(R, M, M)` -> `(R,)`."""
    target = target[:, None]
    both = (masks & target).flatten(2).sum(2)
    either = (masks | target).flatten(2).sum(2)
    return (both / either.clamp(min=1)).argmax(1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
