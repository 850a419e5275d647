"""The module that the training loop trains: a student with the task's loss and its teachers'.

Letters: `B` pictures, `P` prompts, `K` masks of a prompt, `C` channels, `G` side of the embedding's grid, `h w` rows
and columns of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distillation.prompt import everything
from distillation.prompt.batch import PromptBatch
from distillation.prompt.config import EpochSettings, PromptDistillConfig
from distillation.prompt.hooked import Encoded, HookedSam, patch_width
from distillation.prompt.hooks import COMPONENTS
from distillation.prompt.losses import TASK_TERMS, all_finite, foreground_loss, task_loss
from distillation.prompt.objective import Objective
from distillation.prompt.prompts import Prompts, grid
from distillation.prompt.teachers import Teacher
from sam3.sam.sam1 import Sam1


@dataclass
class Seen:
    """What the student makes of a batch, and the teachers of the same prompts.

    masks `(P, K, h, w)`, ious `(P, K)` and targets `(P, 1, h, w)` are for the task; in everything mode P counts the
    pairs and K is 1. student, teachers: features for the distillation, see `objective.Features`. sizes: `(P, 2)`, rows
    and columns of each prompt's picture in the input. candidates: (predicted IoUs, whether they meet a mask), of the
    whole grid; None in single mode.
    """

    masks: Tensor
    ious: Tensor
    targets: Tensor
    sizes: Tensor
    student: dict[str, Tensor]
    teachers: dict[str, Mapping[str, Tensor]]
    candidates: tuple[Tensor, Tensor] | None = None


class PromptDistiller(nn.Module):
    """`forward(batch)` gives the losses; gradients reach the student and the learned projections.

    teachers: none if features come with the batches, or distillation is off. They are no submodules: nothing that
    trains, saves or moves this module touches them.
    """

    def __init__(self, student: Sam1, config: PromptDistillConfig, teachers: Sequence[Teacher] = ()) -> None:
        super().__init__()
        self.student, self.config, self.teachers = student, config, tuple(teachers)
        self.objective = Objective(config)
        own, losses = config.distillation.hooks.student, config.distillation.losses if config.distills else ()
        hooks = {name: own.get(name) for name in COMPONENTS if name in losses}
        self.hooked = HookedSam(student, hooks, config.distillation.prompt_embed.tap, "student")
        self.spreads: dict[str, Tensor] = {}  # of what learned projections gave last; see `projection.least_spread`
        self._checked = False

    def add_projections(self, stored_widths: Mapping[str, int]) -> None:
        """Make the projections of the patch features, once all weights are in place.

        stored_widths: teacher -> channels of its stored features.
        """
        if not self.config.distills or "encoder_patch" not in self.config.distillation.losses:
            return
        own = self.config.distillation.hooks.student.get("encoder_patch")
        width = patch_width(self.student, own, "student")
        for name, channels in stored_widths.items():
            self.objective.add_projection(name, channels, width, None)
        hooks = {teacher.name: teacher.hooks.get("encoder_patch") for teacher in self.config.teachers}
        for teacher in self.teachers:
            channels = patch_width(teacher.model, hooks[teacher.name], teacher.name)
            self.objective.add_projection(teacher.name, channels, width, teacher.neck_projection())

    # A training step --------------------------------------------------------------------------------------------------

    def forward(self, batch: PromptBatch) -> dict[str, Tensor]:
        """`total`; for the log the task's loss and its terms, those of `Objective.forward`, and L_dist."""
        now = self.config.at(batch.epoch)
        self._freeze(batch.epoch)
        seen = self.run(batch, now)
        losses = self._task(seen, now)
        total = losses["task_loss"]
        if now.lambda_coef:
            distance, log = self.objective(seen.student, seen.teachers, seen.sizes)
            if self.training:
                self.spreads = {name: log[f"projection_spread/{name}"] for name in self.objective.distill_projections}
            scaled = now.lambda_coef * distance
            coefficient = total.new_full((), now.lambda_coef)
            losses |= {**log, "dist_loss": distance, "dist_loss_scaled": scaled, "lambda_coef": coefficient}
            total = total + scaled
        return {"total": total, **losses}

    def run(self, batch: PromptBatch, now: EpochSettings) -> Seen:
        """Student and teachers on a batch that is on the device. Teachers are asked only if their loss counts."""
        images = self.student.preprocess.normalise(batch.images, batch.sizes)
        encoded = self.hooked.encode(images)
        patches = self._teach_patches(images) if now.lambda_coef else {}
        if batch.prompts is None:
            return self._run_grids(batch, encoded, patches, now)
        return self._run_prompts(batch, encoded, patches, now)

    def _task(self, seen: Seen, now: EpochSettings) -> dict[str, Tensor]:
        weights = now.loss_weights
        terms = task_loss(seen.masks, seen.ious, seen.targets, {name: getattr(weights, name) for name in TASK_TERMS})
        losses = {f"task/{name}": terms[name] for name in TASK_TERMS}
        total = terms["total"]
        if weights.cls and seen.candidates is not None:
            losses["task/cls"] = foreground_loss(*seen.candidates)
            total = total + weights.cls * losses["task/cls"]
        return {"task_loss": total, **losses}

    def _freeze(self, epoch: int) -> None:
        """Parts that are frozen in this epoch; those that are frozen for good never needed gradients."""
        if self.config.freeze.unfreeze_epoch and self.training:
            frozen = self.config.freeze.parts(epoch)
            for name in self.config.freeze.parts(0):
                getattr(self.student, name).requires_grad_(name not in frozen)
            freeze_unused(self.student)
        for name in self.config.freeze.parts(epoch):
            for module in getattr(self.student, name).modules():
                if isinstance(module, _BatchNorm):  # frozen, its statistics stay, too
                    module.eval()

    # One prompt for each picture --------------------------------------------------------------------------------------

    def _run_prompts(
        self, batch: PromptBatch, encoded: Encoded, patches: Mapping[str, Encoded], now: EpochSettings
    ) -> Seen:
        multimask = self.config.model.multimask_output
        decoded = self.hooked.decode(encoded.embedding, batch.prompts, multimask)
        student = _features({**encoded.features, **decoded.features}, decoded.masks, decoded.ious)
        features: dict[str, Mapping[str, Tensor]] = {}
        if now.lambda_coef:
            features = batch.features or {
                teacher.name: self._teach(teacher, patches[teacher.name], batch.prompts) for teacher in self.teachers
            }
            self._check_once(features)
        return Seen(decoded.masks, decoded.ious, batch.masks, batch.sizes, student, features)

    def _teach_patches(self, images: Tensor) -> dict[str, Encoded]:
        """Each teacher's encoder on each picture, once."""
        return {teacher.name: teacher.encode(images) for teacher in self.teachers}

    def _teach(self, teacher: Teacher, encoded: Encoded, prompts: Prompts) -> dict[str, Tensor]:
        if not teacher.needs_decoder:
            return dict(encoded.features)
        decoded = teacher.decode(encoded.embedding, prompts, self.config.model.multimask_output)
        return _features({**encoded.features, **decoded.features}, decoded.masks, decoded.ious)

    def _check_once(self, features: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The first features of each teacher must be finite; later ones would be found by their gradients."""
        if self._checked:
            return
        for name, found in features.items():
            if bad := [component for component, value in found.items() if not all_finite([value])]:
                raise ValueError(
                    f"teacher {name} gives NaN or infinite {', '.join(bad)}; set its dtype to fp32 (teachers[].dtype), "
                    "or check its checkpoint"
                )
        self._checked = True

    # A grid of prompts for each picture -------------------------------------------------------------------------------

    def _run_grids(
        self, batch: PromptBatch, encoded: Encoded, patches: Mapping[str, Encoded], now: EpochSettings
    ) -> Seen:
        parts, first_mask, first_row = [], 0, 0
        for i, count in enumerate(batch.counts):
            masks = batch.masks[first_mask : first_mask + count]
            prompts, rows = self._grid(batch, i)
            stored = _rows_of(batch.features, i, first_row + rows)
            teaching = {name: Encoded(each.embedding[i : i + 1]) for name, each in patches.items()}
            one = slice(i, i + 1)
            parts.append(
                self._run_grid(encoded.embedding[one], masks, batch.sizes[one], prompts, teaching, stored, now)
            )
            first_mask, first_row = first_mask + count, first_row + self.config.dataset.grid_points**2
        seen = _together(parts)
        seen.student |= encoded.features
        for name, features in seen.teachers.items():
            whole = batch.features[name] if batch.features else patches[name].features
            seen.teachers[name] = {**features, **{k: whole[k] for k in ("encoder_patch",) if k in whole}}
        if now.lambda_coef:
            self._check_once(seen.teachers)
        return seen

    def _grid(self, batch: PromptBatch, i: int) -> tuple[Prompts, Tensor]:
        """The prompts of picture i, in training perhaps a random part of the grid; their places `(P,)` in it."""
        device, count = batch.images.device, self.config.dataset.grid_points
        prompts = grid(count, tuple(batch.sizes[i].tolist()))
        rows = torch.arange(len(prompts))
        most = self.config.everything.max_points_train
        if self.training and most is not None and most < len(rows):
            seed = (self.config.train.seed, batch.epoch, *batch.keys[i].encode())
            rows = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False)))
        return prompts[rows].to(device), rows.to(device)

    def _run_grid(
        self,
        embedding: Tensor,
        masks: Tensor,
        size: Tensor,
        prompts: Prompts,
        teaching: Mapping[str, Encoded],
        stored: Mapping[str, Mapping[str, Tensor]],
        now: EpochSettings,
    ) -> Seen:
        chunk, multimask = self.config.everything.points_per_batch, self.config.model.multimask_output
        overlaps = everything.match(self.hooked.decode, embedding, prompts, masks, multimask, chunk)
        pairs = everything.assign(overlaps, self.config.everything.match_iou_threshold)
        losses = self.config.distillation.losses if now.lambda_coef else ()
        tokens, scores = "decoder_mask_token" in losses, now.loss_weights.cls > 0
        found = everything.decode_grid(
            self.hooked.decode, embedding, prompts, pairs, multimask, chunk, whole=tokens or scores
        )
        teachers: dict[str, Mapping[str, Tensor]] = {}
        for teacher in self.teachers if losses else ():
            teachers[teacher.name] = {}
            if teacher.needs_decoder:
                dense = pairs if "dense_mask_logits" in losses else everything.NO_PAIRS
                with torch.no_grad():
                    theirs = everything.decode_grid(
                        teacher.decode, teaching[teacher.name].embedding, prompts, dense, multimask, chunk, whole=tokens
                    )
                teachers[teacher.name] = _features(theirs.features, theirs.masks, theirs.pair_ious)
        for name, features in stored.items() if losses else ():
            teachers[name] = _stored_pairs(features, pairs)
        candidates = None
        if scores:
            matched = torch.zeros(overlaps.shape[:2], dtype=torch.bool)
            matched[pairs.prompts, pairs.slots] = True
            candidates = found.ious, matched.to(embedding.device)
        student = _features(found.features, found.masks, found.pair_ious)
        targets, sizes = masks[pairs.objects.to(masks.device)], size.expand(len(pairs), 2)
        return Seen(found.masks, found.pair_ious, targets, sizes, student, teachers, candidates)


def _features(hooked: Mapping[str, Tensor], masks: Tensor, ious: Tensor) -> dict[str, Tensor]:
    """What hooks captured, with the masks as the fourth feature; see `objective.Features`."""
    return {**hooked, "dense_mask_logits": masks, "ious": ious}


def freeze_unused(student: Sam1) -> None:
    """No gradients for what no prompt of this training reaches: mask prompts, and MobileSAM's classifier."""
    unused = [student.prompt_encoder.mask_downscaling]
    unused += [part for name, part in student.image_encoder.named_children() if name in ("norm_head", "head")]
    for part in unused:
        part.requires_grad_(False)


def _rows_of(
    features: Mapping[str, Mapping[str, Tensor]] | None, picture: int, rows: Tensor
) -> dict[str, dict[str, Tensor]]:
    """What a batch's stores hold of one picture, and of `rows` of all pictures' prompts."""
    whole = ("encoder_patch", "prompt_embed")
    return {
        teacher: {
            name: value[picture : picture + 1] if name in whole else value[rows.to(value.device)]
            for name, value in found.items()
        }
        for teacher, found in (features or {}).items()
    }


def _stored_pairs(features: Mapping[str, Tensor], pairs: everything.Pairs) -> dict[str, Tensor]:
    """A picture's stored features, of which the masks are those of the pairs only."""
    chosen = dict(features)
    if "dense_mask_logits" in features:
        device = features["ious"].device
        prompts, slots = pairs.prompts.to(device), pairs.slots.to(device)
        chosen |= {name: features[name][prompts, slots][:, None] for name in ("dense_mask_logits", "ious")}
    return chosen


def _together(parts: Sequence[Seen]) -> Seen:
    """The pictures of a batch as one."""

    def joined(features: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([each[name] for each in features]) for name in features[0]}

    candidates = None
    if all(part.candidates is not None for part in parts):
        ious, matched = zip(*(part.candidates for part in parts), strict=True)
        candidates = torch.cat(ious), torch.cat(matched)
    return Seen(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("masks", "ious", "targets", "sizes")),
        joined([part.student for part in parts]),
        {name: joined([part.teachers[name] for part in parts]) for name in parts[0].teachers},
        candidates,
    )
