"""The student behind SAM3's frozen heads: one training step's forward, and what validation measures.

Letters: `B` images, `N` objects of an image, `R` prompt rows, `Q` queries, `K` masks of a row (1, or Q), `C` trunk
channels, `G` side of the trunk's grid, `M` side of the masks, `I` decode iterations, `P` refine points of an iteration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam3.backbones.student import StudentEncoder
from sam3.engine.losses import (
    build_valid_mask,
    mask_bce,
    mask_dice,
    mask_focal,
    mask_targets,
    masked_cosine_per_image,
    masked_mse,
    masked_mse_per_image,
)
from sam3.engine.metrics import mask_iou
from sam3.transforms import Preprocess
from stage1_geometry_finetune.data import GeometryBatch
from stage1_geometry_finetune.frozen_path import Entry, FrozenPath, PromptRows
from stage1_geometry_finetune.prompts import LAYOUTS
from stage1_geometry_finetune.query_selection import RULES, best_box, best_mask, best_score
from stage1_geometry_finetune.refinement import sample_error_points

MASK_TARGETS = ("soft", "hard")
MASK_LOSSES = {"bce": mask_bce, "dice": mask_dice, "focal": mask_focal}

Features = list[dict[str, Any]]  # of each image, see `FrozenPath.features`


@dataclass
class PromptEvaluation:
    """Results for R objects prompted in one way, with the mask of the query that the teacher's outputs select.

    images, objects: which object of the batch each row is about. agreement: `(R,)` IoU of student and teacher.
    teacher_iou, student_iou: `(R,)` IoU with the annotated masks; None where the batch has none.
    scores: `(R,)` the teacher's score of the query, in 0..1.
    teacher_masks, student_masks: bool `(R, M, M)`, False in the padding.
    """

    images: list[int]
    objects: list[int]
    agreement: Tensor
    teacher_iou: Tensor | None
    student_iou: Tensor | None
    scores: Tensor
    teacher_masks: Tensor
    student_masks: Tensor


@dataclass
class Evaluation:
    """mse: `(B,)` per element; cosine: `(B,)` similarity; box, point: objects by their box, and those that have one by
    their point; None where there is no such object."""

    mse: Tensor
    cosine: Tensor
    box: PromptEvaluation | None
    point: PromptEvaluation | None


class GeometryDistiller(nn.Module):
    """Pictures, prompts and stored teacher grids in, losses out.

    total = embedding_weight * masked MSE of the grids + the mean over decode iterations of
    (bce_weight * BCE + dice_weight * dice + focal_weight * focal) between the masks that the frozen path makes of the
    student's grid and of the teacher's. A mask term is a mean over the masks of an image, then over the images of the
    batch; an image without prompts counts as 0 there.

    The student is the only child module, as `student_trunk`, so that nothing else is trained, saved or moved.

    Args:
        mask_target: `soft` (the teacher's probabilities) or `hard` (its logits above `mask_threshold`).
        temperature: divides the mask logits of both in the losses.
        layout: `per_object` or `per_image`, see `PromptRows.from_batch`.
        select_best_mask: compare the mask of one query, chosen from the teacher's outputs by `select_by` (`score`,
            `box_iou`, `mask_iou`, see `query_selection`); False compares the masks of all queries.
        iter_on_box: False gives prompts that are a box alone a single iteration.
        mask_threshold: logit above which a mask counts as object.
        chunk: rows that go through the frozen path at once.
        use_checkpoint: keep no activations of the frozen path, compute them again in the backward pass.
    """

    def __init__(
        self,
        student: StudentEncoder,
        frozen: FrozenPath,
        preprocess: Preprocess,
        *,
        embedding_weight: float = 1.5,
        bce_weight: float = 1.0,
        dice_weight: float = 1.0,
        focal_weight: float = 0.0,
        mse_reduction: str = "channel_mean",
        mask_target: str = "soft",
        temperature: float = 1.0,
        layout: str = "per_object",
        select_best_mask: bool = True,
        select_by: str = "score",
        iter_on_box: bool = True,
        mask_threshold: float = 0.0,
        chunk: int = 4,
        use_checkpoint: bool = True,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        given = (
            ("mask_target", mask_target, MASK_TARGETS),
            ("layout", layout, LAYOUTS),
            ("select_by", select_by, RULES),
        )
        for name, value, allowed in given:
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
        if layout == "per_image" and select_best_mask and select_by != "score":
            raise ValueError(f"select_by {select_by!r} needs one object a prompt, but the layout is {layout!r}")
        self.student_trunk = student
        self.frozen = frozen
        self.preprocess = preprocess
        self.embedding_weight = embedding_weight
        self.mask_weights = {"bce": bce_weight, "dice": dice_weight}
        if focal_weight:
            self.mask_weights["focal"] = focal_weight
        self.mse_reduction = mse_reduction
        self.hard_targets = mask_target == "hard"
        self.temperature = temperature
        self.layout = layout
        self.select_best_mask, self.select_by = select_best_mask, select_by
        self.iter_on_box = iter_on_box
        self.mask_threshold = mask_threshold
        self.chunk = chunk
        self.use_checkpoint = use_checkpoint
        self.channels_last = channels_last

    def forward(self, batch: GeometryBatch) -> dict[str, Tensor]:
        """Scalar losses: `total` to minimise, and its unweighted terms `mse`, `bce`, `dice` and, if used, `focal`."""
        if not len(batch):  # no picture of it could be used: no gradient, but the processes stay in step
            zero = 0 * sum(p.sum() for p in self.student_trunk.parameters() if p.requires_grad)
            return dict.fromkeys(("total", "mse", *self.mask_weights), zero)
        student, teacher, valid = self._grids(batch)
        mse = masked_mse(student, teacher, valid, self.mse_reduction)
        terms = self._mask_terms(batch, student, teacher)
        masks = sum(weight * terms[name] for name, weight in self.mask_weights.items())
        return {"total": self.embedding_weight * mse + masks, "mse": mse, **terms}

    @torch.no_grad()
    def evaluate(self, batch: GeometryBatch) -> Evaluation:
        """Every object of a batch that is not empty, by its box and, unless its kind is "box", by its point."""
        student, teacher, valid = self._grids(batch)
        seen = self.frozen.features(student), self.frozen.features(teacher)
        listed = [(i, j, kind) for i, kinds in enumerate(batch.kinds) for j, kind in enumerate(kinds)]
        by_box = [(i, j, "box") for i, j, _ in listed]
        by_point = [(i, j, "point") for i, j, kind in listed if kind != "box"]
        return Evaluation(
            masked_mse_per_image(student, teacher, valid),
            masked_cosine_per_image(student, teacher, valid),
            box=self._compare(batch, by_box, *seen) if by_box else None,
            point=self._compare(batch, by_point, *seen) if by_point else None,
        )

    def _grids(self, batch: GeometryBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Student grid, teacher grid (both float32, `(B, C, G, G)`) and valid mask `(B, 1, G, G)`."""
        images = self.preprocess.normalise(batch.images, batch.sizes)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if batch.embeddings is None:
            raise ValueError("the batch holds no teacher embeddings; state DISTILL.TEACHER_EMBED_PATH")
        student, teacher = self.student_trunk(images), batch.embeddings.values()
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student gives {tuple(student.shape[1:])}, the teacher {tuple(teacher.shape[1:])}; "
                "DISTILL.EMBED_DIM and EMBED_SIZE must be those of the teacher"
            )
        return student.float(), teacher, self._valid(batch, teacher.shape[-1])

    def _valid(self, batch: GeometryBatch, side: int) -> Tensor:
        return build_valid_mask(batch.sizes, self.preprocess.img_size, side)

    # The mask losses ------------------------------------------------------------------------------------------------

    def _mask_terms(self, batch: GeometryBatch, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Each mask loss as a scalar, from the two grids."""
        rows = PromptRows.from_batch(batch, self.layout)
        terms = dict.fromkeys(self.mask_weights, student.new_zeros(()))
        if not len(rows):
            return terms
        by_student = self._recomputed(self.frozen.features, student)
        with torch.no_grad():
            by_teacher = self.frozen.features(teacher)
        rows_of = Counter(rows.images)
        for chunk in rows.chunks(self.chunk):
            # Of each row's sum over its iterations, the share that makes a mean over iterations, rows and images.
            shares = [
                1 / (self._iterations(batch, kind) * rows_of[image] * len(batch))
                for image, kind in zip(chunk.images, chunk.kinds, strict=True)
            ]
            for name, value in self._chunk_terms(batch, chunk, shares, by_student, by_teacher).items():
                terms[name] = terms[name] + value
        return terms

    def _chunk_terms(
        self, batch: GeometryBatch, rows: PromptRows, shares: Sequence[float], student: Features, teacher: Features
    ) -> dict[str, Tensor]:
        """The share of `rows` in each mask loss, over all iterations."""
        valid = self._valid(batch, _mask_side(teacher))
        terms: dict[str, Tensor] = {}
        for iteration in range(self._iterations(batch, "both")):
            _, queries, wanted = self._teacher_masks(batch, rows, teacher)
            asked = queries[:, None] if self.select_best_mask else None
            found = self._recomputed(self._masks, student, rows, asked)
            seen = valid[rows.image_index]
            share = torch.tensor(shares).to(found.device, non_blocking=True)
            for name, losses in self._row_losses(found, wanted, seen).items():
                terms[name] = terms.get(name, 0) + (losses * share).sum()
            left = [row for row, kind in enumerate(rows.kinds) if self._iterations(batch, kind) > iteration + 1]
            if not left:
                break
            shares = [shares[row] for row in left]
            pairs = (_of_query(masks.detach(), queries) for masks in (found, wanted))
            rows = self._refined(batch, rows, *pairs, seen[:, 0], iteration).take(left)
        return terms

    def _iterations(self, batch: GeometryBatch, kind: str) -> int:
        """How often a row of this kind is decoded."""
        if batch.refine_uniforms is None or (kind == "box" and not self.iter_on_box):
            return 1
        return 1 + batch.refine_uniforms.shape[2]

    def _masks(self, features: Features, rows: PromptRows, queries: Tensor | None) -> Tensor:
        return self.frozen.masks(self.frozen.predict(features, rows), queries)

    def _recomputed(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result, with or without what its backward pass needs."""
        if not (self.use_checkpoint and torch.is_grad_enabled()):
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # there is no dropout

    @torch.no_grad()
    def _teacher_masks(
        self, batch: GeometryBatch, rows: PromptRows, teacher: Features
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The teacher's outputs, the selected queries `(R,)`, and mask logits `(R, K, M, M)` of these or of all Q."""
        out = self.frozen.predict(teacher, rows)
        place = rows.image_index, rows.object_index
        masks = None
        if self.select_by == "box_iou":
            queries = best_box(out["pred_boxes_xyxy"], batch.targets[place])
        elif self.select_by == "mask_iou":
            if batch.gt_masks is None:
                raise ValueError("selecting by mask IoU needs the annotated masks; set DATA.LOAD_GT_MASK True")
            masks = self.frozen.masks(out)
            shown = self._valid(batch, masks.shape[-1])[rows.image_index].bool()
            queries = best_mask((masks > self.mask_threshold) & shown, batch.gt_masks[place])
        else:
            queries = best_score(out["pred_logits"])
        if not self.select_best_mask:
            return out, queries, self.frozen.masks(out) if masks is None else masks
        if masks is None:
            return out, queries, self.frozen.masks(out, queries[:, None])
        return out, queries, _of_query(masks, queries)[:, None]

    def _row_losses(self, student: Tensor, teacher: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Mask logits `(R, K, M, M)`, valid `(R, 1, M, M)` -> each loss per row `(R,)`, in float32."""
        with torch.autocast(student.device.type, enabled=False):
            targets = mask_targets(teacher, self.temperature, self.hard_targets, self.mask_threshold)
            logits = student.float() / self.temperature
            return {name: MASK_LOSSES[name](logits, targets, valid).mean(1) for name in self.mask_weights}

    def _refined(
        self, batch: GeometryBatch, rows: PromptRows, student: Tensor, teacher: Tensor, valid: Tensor, iteration: int
    ) -> PromptRows:
        """The rows with points where the two masks, logits `(R, M, M)`, differ; a row of several objects draws with the
        numbers of its first."""
        place = (rows.image_index, rows.object_index, iteration)
        uniforms, counts = batch.refine_uniforms[place], batch.refine_counts[place]
        return rows.with_points(
            *sample_error_points(student, teacher, valid.bool(), uniforms, counts, self.mask_threshold)
        )

    # Validation -----------------------------------------------------------------------------------------------------

    def _compare(
        self, batch: GeometryBatch, entries: Sequence[Entry], student: Features, teacher: Features
    ) -> PromptEvaluation:
        valid = self._valid(batch, _mask_side(teacher)).bool()
        rows = PromptRows.of_objects(batch, entries)
        scores, wanted, found = [], [], []
        for chunk in rows.chunks(self.chunk):
            out, queries, masks = self._teacher_masks(batch, chunk, teacher)
            shown = valid[chunk.image_index, 0]
            wanted.append((_of_query(masks, queries) > self.mask_threshold) & shown)
            masks = self._masks(student, chunk, queries[:, None])[:, 0]
            found.append((masks > self.mask_threshold) & shown)
            scores.append(_score(out, queries))
        teacher_masks, student_masks = torch.cat(wanted), torch.cat(found)
        annotated = None
        if batch.gt_masks is not None:
            annotated = batch.gt_masks[rows.image_index, rows.object_index] & valid[rows.image_index, 0]
        return PromptEvaluation(
            rows.images,
            [item for _, item, _ in entries],
            agreement=mask_iou(student_masks, teacher_masks),
            teacher_iou=None if annotated is None else mask_iou(teacher_masks, annotated),
            student_iou=None if annotated is None else mask_iou(student_masks, annotated),
            scores=torch.cat(scores),
            teacher_masks=teacher_masks,
            student_masks=student_masks,
        )


def _mask_side(features: Features) -> int:
    return features[0]["backbone_fpn"][0].shape[-1]  # masks have the side of the finest level


def _of_query(masks: Tensor, queries: Tensor) -> Tensor:
    """The mask of one query `(R,)` a row: `(R, K, M, M)`, K = 1 (theirs) or Q -> `(R, M, M)`."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), queries]


def _score(out: dict[str, Any], queries: Tensor) -> Tensor:
    """Of each row's query, as inference scores it: probability of the query times that of presence, `(R,)`."""
    scores = out["pred_logits"].float().sigmoid()[..., 0] * out["presence_logit_dec"].float().sigmoid()  # (R, Q)
    return scores.gather(1, queries[:, None])[:, 0]


def parameter_table(distiller: GeometryDistiller) -> dict[str, int]:
    """For the log: parameters of the student, which is trained, and of each frozen part, counted."""
    student, heads = distiller.student_trunk, distiller.frozen.heads
    parts = {
        "student backbone": student.backbone,
        "student head": student.head,
        "neck": heads.backbone.vision_backbone,
        "geometry encoder": heads.geometry_encoder,
        "fusion encoder": heads.transformer.encoder,
        "decoder": heads.transformer.decoder,
        "scoring": heads.dot_prod_scoring,
        "segmentation head": heads.segmentation_head,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return {**counts, "trained": trained, "frozen": sum(counts.values()) - trained}
