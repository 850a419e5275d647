"""The distillation losses of all teachers together: which are on, what they weigh, and the projections they need.

Letters: `B` pictures, `P` prompts, `C C'` channels, `G` side of the embedding's grid, `K` masks of a prompt, `h w` rows
and columns of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distillation.prompt.config import LOSSES, PromptDistillConfig
from distillation.prompt.losses import (
    Parts,
    dense_mask_logits_loss,
    encoder_patch_loss,
    mask_token_loss,
    prompt_embed_loss,
    select_masks,
)
from distillation.prompt.projection import make_projection

# `encoder_patch` (B, C', G, G), `prompt_embed` (P|B, C, G, G), `decoder_mask_token` (P, 4, C), `dense_mask_logits`
# (P, K, h, w) and with these `ious` (P, K); the ones that are needed.
Features = Mapping[str, Tensor]


class Objective(nn.Module):
    """`L_dist = sum over losses w_loss sum over teachers w_teacher L_loss(student, teacher)`.

    distill_projections: the learned projections, by teacher; what is trained here.
    """

    def __init__(self, config: PromptDistillConfig) -> None:
        super().__init__()
        self.settings, self.losses = config.distillation, config.distillation.losses
        self.teacher_weights = config.teacher_weights
        self.distill_projections = nn.ModuleDict()
        self._frozen: dict[str, nn.Module] = {}  # no part of checkpoints: they come with the teacher

    def add_projection(self, teacher: str, width: int, student_width: int, neck: Tensor | None) -> None:
        """Make what brings `teacher`'s patch features from `width` channels to the student's.

        neck: weight `(C, C', 1, 1)` of the first convolution of the teacher's neck, if it is known.
        ValueError if the widths need another kind of projection.
        """
        kind = self.settings.encoder_patch.projection
        projection = make_projection(kind, width, student_width, neck)
        if any(p.requires_grad for p in projection.parameters()):
            self.distill_projections[teacher] = projection
        else:
            self._frozen[teacher] = projection

    def _apply(self, *args, **kwargs) -> Objective:
        for projection in self._frozen.values():
            projection._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def forward(
        self, student: Features, teachers: Mapping[str, Features], sizes: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """teachers: features by name. sizes: `(P, 2)` rows and columns of each prompt's picture in the input.

        Returns L_dist and scalars for the log: `distill/<loss>` (weighted by teacher), `distill/<loss>/<teacher>` and
        `distill/<loss>/<part>`, the latter weighted by teacher; with a learned projection also
        `projection_spread/<teacher>`.
        """
        log: dict[str, Tensor] = {}
        total = sizes.new_zeros((), dtype=torch.float32)
        for loss in self.losses:
            weighted = torch.zeros_like(total)
            for name, teacher in teachers.items():
                found = self._compare(loss, name, student, teacher, sizes)
                weight = self.teacher_weights[name]
                weighted = weighted + weight * found.total
                log[f"distill/{loss}/{name}"] = found.total
                for part, value in found.parts.items():
                    key = f"distill/{loss}/{part}"
                    log[key] = log.get(key, 0.0) + weight * value
                if found.spread is not None:
                    log[f"projection_spread/{name}"] = found.spread
            log[f"distill/{loss}"] = weighted
            total = total + getattr(self.settings, loss).weight * weighted
        return total, log

    def _compare(self, loss: str, name: str, student: Features, teacher: Features, sizes: Tensor) -> Parts:
        options = getattr(self.settings, loss)
        if loss == "dense_mask_logits":
            ours, theirs = select_masks(
                student[loss], teacher[loss], student["ious"], teacher["ious"], options.mask_select
            )
            return dense_mask_logits_loss(
                ours,
                theirs,
                options.w_kl,
                options.w_focal,
                options.gamma,
                kl_form=options.kl_form,
                focal_form=options.focal_form,
                sizes=sizes if options.valid_only else None,
            )
        ours, theirs = student[loss], teacher[loss]
        if loss == "encoder_patch":
            projection = self._frozen.get(name) or self.distill_projections[name]
            return encoder_patch_loss(
                ours, theirs, options.w_l2, options.w_cos, cos_mode=options.cos_mode, projection=projection
            )
        if loss == "prompt_embed":
            reduction = options.mse_reduction
            return prompt_embed_loss(
                ours, theirs, options.w_mse, options.w_cos, cos_mode=options.cos_mode, mse_reduction=reduction
            )
        return mask_token_loss(
            ours,
            theirs,
            options.w_kl,
            options.temperature,
            tau_squared=options.tau_squared,
            reduction=options.reduction,
        )

    def log_names(self, teachers: list[str]) -> list[str]:
        """Names of all numbers that `forward` may give."""
        parts = {
            "encoder_patch": ("mse", "cos"),
            "prompt_embed": ("mse", "cos"),
            "decoder_mask_token": ("kl",),
            "dense_mask_logits": ("kl", "focal"),
        }
        names = [f"projection_spread/{name}" for name in teachers]
        for loss in (loss for loss in LOSSES if loss in self.losses):
            names += [f"distill/{loss}", *(f"distill/{loss}/{end}" for end in (*teachers, *parts[loss]))]
        return names
