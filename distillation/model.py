"""The module that the training loop trains: student and teacher see the same pictures, and are compared.

Letters: `B` pictures, `S` side of the square, `P` prompts, `L` text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distillation.batch import DistillBatch
from distillation.config import LOSSES, Phase
from distillation.hungarian import HungarianMatcher
from distillation.losses import DistillationLoss
from distillation.models.efficient_sam3 import EfficientSAM3
from distillation.teachers.teacher import Teacher
from sam3.engine.loop_settings import divides
from sam3.transforms import Preprocess

MAX_BAD_OUTPUTS = 50  # in a row
logger = logging.getLogger("sam3.distillation")


class Distiller(nn.Module):
    """`forward(batch)` gives the weighted losses of a phase; only the student has gradients."""

    def __init__(
        self,
        student: EfficientSAM3,
        teacher: Teacher | None,
        matcher: HungarianMatcher,
        loss: DistillationLoss,
        phase: Phase,
        teacher_preprocess: Preprocess,
        tokens: tuple[Tensor, Tensor],
        empty_cache_every: int = 0,
    ) -> None:
        """
        Args:
            teacher: None if its outputs come with the batch.
            tokens: the prompts for the student, ids (P, L) and padding (P, L).
            empty_cache_every: forward passes between releases of MPS's cache; 0 never.
        """
        super().__init__()
        self.student, self.teacher = student, teacher
        self.matcher, self.loss, self.phase = matcher, loss, phase
        self.teacher_preprocess = teacher_preprocess
        self.empty_cache_every = empty_cache_every
        self.register_buffer("token_ids", tokens[0], persistent=False)
        self.register_buffer("token_padding", tokens[1], persistent=False)
        self.passes = self.bad_in_a_row = 0

    def forward(self, batch: DistillBatch) -> dict[str, Tensor]:
        """`total`, the weighted terms, and for the log `matched_pairs` per picture, `match_iou` and `skipped`.

        A pass in which teacher or student give NaN or infinities has losses of exactly 0, and `skipped` 1.
        Raises ValueError after MAX_BAD_OUTPUTS of them in a row.
        """
        teacher, student = self.run(batch)
        losses = self.compare(student, teacher)
        if losses is None:
            return self._skipped(batch)
        self.bad_in_a_row = 0
        return losses

    def run(self, batch: DistillBatch) -> tuple[dict[str, Any], dict[str, Any]]:
        """Common outputs of teacher and student for a batch on the device, as they come."""
        self.passes += 1
        teacher = self.teach(batch)
        if batch.images.device.type == "mps" and divides(self.empty_cache_every, self.passes):
            torch.mps.empty_cache()
        images = self.student.preprocess.normalise(batch.images, batch.sizes)
        ids, padding = self.token_ids[batch.prompt_index], self.token_padding[batch.prompt_index]
        run = self.student.forward_with_intermediates if self.phase.with_features else self.student
        return teacher, run(images, ids, padding)

    @torch.no_grad()
    def teach(self, batch: DistillBatch) -> dict[str, Any]:
        """The teacher's outputs: read with the batch, computed from the trunk's maps, or from the pictures."""
        if batch.outputs is not None:
            return batch.outputs
        assert self.teacher is not None, "without a teacher, batches bring its outputs"
        features = self.phase.with_features
        if batch.embeddings is not None:
            return self.teacher.forward_from_trunk(batch.embeddings.values(), batch.prompt_index, features)
        images = self.teacher_preprocess.normalise(batch.images, batch.sizes)
        return self.teacher(images, batch.prompt_index, features)

    def compare(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Match and compare, both in float32; None where something is not finite."""
        matches = self.matcher.match(student, teacher)
        if not matches.finite:
            return None
        losses = self.loss(student, teacher, matches.pairs, self.phase.with_features)
        total = losses["total_loss"]
        pairs = sum(len(rows) for rows, _ in matches.pairs) / len(matches.pairs)
        return {
            "total": total,
            **losses["weighted"],
            "matched_pairs": total.new_full((), pairs),
            "match_iou": matches.iou,
            "skipped": total.new_zeros(()),
        }

    def _skipped(self, batch: DistillBatch) -> dict[str, Tensor]:
        self.bad_in_a_row += 1
        if self.bad_in_a_row > MAX_BAD_OUTPUTS:
            raise ValueError(
                f"teacher or student gave NaN or infinite outputs {self.bad_in_a_row} times in a row, last for "
                f"{', '.join(batch.keys)}; try teacher_dtype fp32, student_precision fp32 or a lower learning rate"
            )
        logger.warning(f"skipped {', '.join(batch.keys)}: teacher or student gave NaN or infinite outputs")
        # Exact zeros as gradients of all weights: other processes may be waiting for them.
        zero = sum((p * 0).sum() for p in self.student.parameters() if p.requires_grad)
        nothing = zero.detach()
        terms = dict.fromkeys((*LOSSES, "matched_pairs", "match_iou"), nothing)
        return {"total": zero, **terms, "skipped": torch.ones_like(nothing)}
