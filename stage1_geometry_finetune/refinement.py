"""Refinement points: clicks where the student's mask and the teacher's disagree, for the next decode iteration.

After EdgeSAM (Zhou et al. 2023, "EdgeSAM: Prompt-In-the-Loop Distillation").

Letters: `R` prompt rows, `M` mask side, `K` most points of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A row wants this many error pixels for every point: fewer are the ragged rim that any two masks differ by.
ERRORS_PER_POINT = 10


@torch.no_grad()
def sample_error_points(
    student_logits: Tensor, teacher_logits: Tensor, valid: Tensor, uniforms: Tensor, counts: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws points uniformly, with replacement, from the valid pixels on which the two binarised masks disagree.

    Args:
        student_logits, teacher_logits: (R, M, M); mask is what exceeds `threshold`.
        valid: (R, M, M) bool, True on the picture.
        uniforms: (R, K) float32 in [0, 1), the only randomness: the same numbers give the same points.
        counts: (R,) integers in 0..K, points wanted. A row with fewer than `10 * count` error pixels gets none.

    Returns:
        points: (R, K, 2) x, y of pixel centres in 0..1 of the square, 0 where there is no point.
        labels: (R, K) long, 1 where only the teacher has mask, 0 where only the student has, 0 where there is no point.
        mask: (R, K) bool, True = no point; points come first. With points and labels transposed, that is what
        `Prompt.append_points` takes, which keeps padding at the right.

    All of it stays on the device and waits for nothing.
    """
    side = student_logits.shape[-1]
    teacher = teacher_logits > threshold
    errors = ((student_logits > threshold) != teacher) & valid
    # Integers: float32 would do for 288 x 288 pixels, half precision would not.
    running = errors.flatten(1).cumsum(1, dtype=torch.int32)  # (R, M * M) errors up to and with this pixel
    total = running[:, -1:]
    # A uniform just below 1 may round up to `total`. Rows without errors look for rank 0, at pixel 0, masked below.
    rank = torch.minimum((uniforms.float() * total).int() + 1, total)  # (R, K) in 1..total
    pixel = torch.searchsorted(running, rank)  # first pixel that has counted `rank` errors

    none = (torch.arange(uniforms.shape[1], device=counts.device) >= counts[:, None]) | (
        total < ERRORS_PER_POINT * counts[:, None]
    )
    points = torch.stack((pixel % side, pixel // side), dim=-1).add(0.5) / side
    labels = teacher.flatten(1).gather(1, pixel).long()
    return points.masked_fill(none[..., None], 0), labels.masked_fill(none, 0), none
