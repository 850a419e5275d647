"""Teacher and student of Stage 2: SAM3's tracker with its dense memory, and the same with a compressed one.

Letters: V clips, B objects, T frames, K proposed masks of an object, C channels, G side of the feature map, M = 4 G
side of the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.engine.losses import FOCAL_ALPHA, FOCAL_GAMMA, build_valid_mask, mask_dice, mask_focal, mask_soft_iou
from sam3.engine.metrics import mask_iou
from sam3.model.tracker import ObjectMasks
from sam3.model.tracker_memory import CompressedMemory
from stage2.data.batch import PRESENT, UNKNOWN, ClipBatch, mean_per_clip
from stage2.rollout import Clip, Rollout

IOU_TYPES = ("mask", "score")
FrameTerms = Mapping[int, Mapping[str, Tensor]]  # of frames 1 to T - 1, as `frame_terms` gives them


@dataclass
class ClipEvaluation:
    """Masks of B objects in frames 1 to T - 1, and how they agree.

    teacher, student: bool (B, T - 1, M, M), False in the padding. agreement: (B, T - 1) IoU of the two.
    """

    teacher: Tensor
    student: Tensor
    agreement: Tensor


class MemoryDistiller(nn.Module):
    """Clips in, losses out: the student's memory is trained behind the frozen tracker.

    total = focal_weight focal + dice_weight dice + iou_weight iou + mse_weight mse (+ occlusion_weight occlusion),
    means over the objects and frames 1 to T - 1 of a clip, then over clips.

    focal, dice: of the proposed mask that fits the annotation best, where the object is known to be in the frame. iou
    with iou_type `mask`: 1 - soft IoU of that mask; with `score`: |predicted IoU - IoU| of all proposals. mse: between
    the student's and the teacher's memory-conditioned maps. occlusion: cross-entropy of the object logit where it is
    known whether the object is there.

    Children are what is trained: `memory_attention` and, unless it is switched off, `spatial_perceiver`.

    Args:
        rollout: of the teacher.
        memory: the student's.
        share_memory: the teacher looks at the student's masks instead of following the objects itself.
        focal_alpha, focal_gamma: of the focal loss.
    """

    def __init__(
        self,
        rollout: Rollout,
        memory: CompressedMemory,
        *,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        iou_weight: float = 1.0,
        mse_weight: float = 1.0,
        occlusion_weight: float = 0.0,
        iou_type: str = "mask",
        share_memory: bool = False,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ) -> None:
        super().__init__()
        if iou_type not in IOU_TYPES:
            raise ValueError(f"iou_type {iou_type!r} is unknown; choose one of {', '.join(IOU_TYPES)}")
        self.memory_attention = memory.attention
        if memory.perceiver is not None:
            self.spatial_perceiver = memory.perceiver
        self.memory = memory
        self.rollout = rollout
        weights = {"focal": focal_weight, "dice": dice_weight, "iou": iou_weight, "mse": mse_weight}
        self.weights = {**weights, "occlusion": occlusion_weight}
        self.iou_type, self.share_memory = iou_type, share_memory
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Scalars `total` and its terms, of which only `total` carries gradients; zeros for a batch without objects."""
        if not batch.kinds:
            nothing = sum(parameter.sum() * 0 for parameter in self.parameters())  # other processes wait for gradients
            return {"total": nothing, **{name: nothing.detach() for name in self._names()}}
        clip = self.rollout.start(batch)
        valid = self._valid(batch)[batch.clip_of_object]  # (B, 1, M, M)
        targets: dict[int, Tensor] = {}
        terms: dict[int, dict[str, Tensor]] = {}

        def visit(t: int, conditioned: Tensor, heads: ObjectMasks) -> None:
            terms[t] = frame_terms(
                heads,
                batch.masks[:, t],
                valid,
                focal_weight=self.weights["focal"],
                dice_weight=self.weights["dice"],
                iou_types=(self.iou_type,),
                focal_alpha=self.focal_alpha,
                focal_gamma=self.focal_gamma,
            )
            if t in targets:
                terms[t]["mse"] = (conditioned.float() - targets.pop(t).float()).square().mean((1, 2, 3))

        def keep_target(t: int, conditioned: Tensor) -> None:
            targets[t] = conditioned

        if self.share_memory:
            self.rollout.follow_both(clip, visit, keep_target, self.memory)
        else:
            if self.weights["mse"]:
                self._follow_teacher(clip, keep_target)
            self.rollout.follow(clip, visit, self.memory)
        return self._losses(terms, batch)

    @torch.no_grad()
    def _follow_teacher(self, clip: Clip, keep_target: Callable[[int, Tensor], None]) -> None:
        self.rollout.follow(clip, lambda t, conditioned, heads: keep_target(t, conditioned))

    def _losses(self, terms: dict[int, dict[str, Tensor]], batch: ClipBatch) -> dict[str, Tensor]:
        present = (batch.states[:, 1:] == PRESENT).float()  # (B, T - 1)
        losses = {name: mean_over_frames(terms, name, present, batch) for name in ("focal", "dice")}
        losses["iou"] = mean_over_frames(terms, self.iou_type, present, batch)
        if "mse" in self._names():
            losses["mse"] = mean_over_frames(terms, "mse", torch.ones_like(present), batch)
        if "occlusion" in self._names():
            losses["occlusion"] = occlusion_loss(terms, batch)
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        return {"total": total, **{name: loss.detach() for name, loss in losses.items()}}

    def _names(self) -> list[str]:
        """Of the terms."""
        return [name for name, weight in self.weights.items() if weight or name in ("focal", "dice", "iou")]

    @torch.no_grad()
    def evaluate(self, batch: ClipBatch) -> ClipEvaluation:
        """Both follow the objects on their own."""
        clip = self.rollout.start(batch)
        inside = self._valid(batch)[batch.clip_of_object].bool()  # (B, 1, M, M)
        teacher, student = (self._follow_masks(clip, memory) & inside for memory in (None, self.memory))
        agreement = mask_iou(teacher.flatten(0, 1), student.flatten(0, 1)).view(teacher.shape[:2])
        return ClipEvaluation(teacher, student, agreement)

    def _follow_masks(self, clip: Clip, memory: CompressedMemory | None) -> Tensor:
        """bool (B, T - 1, M, M)."""
        found: list[Tensor] = []
        self.rollout.follow(clip, lambda t, conditioned, heads: found.append(heads.low[:, 0] > 0), memory)
        return torch.stack(found, dim=1)

    def _valid(self, batch: ClipBatch) -> Tensor:
        """(V, 1, M, M), ones over the frames, zeros over the padding."""
        model = self.rollout.model
        return build_valid_mask(batch.sizes, model.preprocess.img_size, model.tracker.low_side)


def frame_terms(
    heads: ObjectMasks,
    target: Tensor,
    valid: Tensor,
    *,
    focal_weight: float,
    dice_weight: float,
    iou_types: Sequence[str] = IOU_TYPES,
    focal_alpha: float = FOCAL_ALPHA,
    focal_gamma: float = FOCAL_GAMMA,
) -> dict[str, Tensor]:
    """Losses of one frame, of each object: (B,).

    focal, dice: of the proposed mask whose weighted sum of the two is least. mask: 1 - soft IoU of that mask. score:
    |predicted IoU - IoU|, mean of all proposals. object_logits: as they are, for `occlusion_loss`.

    Args:
        target: bool (B, M, M); valid: (B, 1, M, M), ones over the frame, zeros over its padding.
        iou_types: which of mask and score to compute.
    """
    target = target[:, None].float()  # (B, 1, M, M)
    repeated = target.expand_as(heads.candidates)
    focal = mask_focal(heads.candidates, repeated, valid, focal_alpha, focal_gamma)  # (B, K)
    dice = mask_dice(heads.candidates, repeated, valid)
    cost = focal_weight * focal + dice_weight * dice
    best = cost.detach().argmin(dim=1, keepdim=True)  # (B, 1)
    terms = {"focal": focal.gather(1, best)[:, 0], "dice": dice.gather(1, best)[:, 0]}
    if "mask" in iou_types:
        chosen = heads.candidates.gather(1, best[..., None, None].expand(-1, -1, *target.shape[2:]))
        terms["mask"] = mask_soft_iou(chosen, target, valid)[:, 0]
    if "score" in iou_types:
        inside = valid.bool()
        drawn = (heads.candidates.detach() > 0) & inside
        found = mask_iou(drawn.flatten(0, 1), (repeated.bool() & inside).flatten(0, 1)).view_as(heads.ious)
        terms["score"] = (heads.ious.float() - found).abs().mean(1)
    terms["object_logits"] = heads.object_logits[:, 0].float()
    return terms


def mean_over_frames(terms: FrameTerms, name: str, weights: Tensor, batch: ClipBatch) -> Tensor:
    """Mean of a term by weights (B, T - 1); see `mean_per_clip`."""
    values = torch.stack([terms[t][name] for t in sorted(terms)], dim=1)  # (B, T - 1)
    return mean_per_clip(values, weights, batch.clip_of_object, len(batch))


def occlusion_loss(terms: FrameTerms, batch: ClipBatch) -> Tensor:
    """Cross-entropy of the object logits of frames 1 to T - 1 where it is known whether the object is there."""
    states = batch.states[:, 1:]  # (B, T - 1)
    logits = torch.stack([terms[t]["object_logits"] for t in sorted(terms)], dim=1)
    values = F.binary_cross_entropy_with_logits(logits, (states == PRESENT).float(), reduction="none")
    return mean_per_clip(values, (states != UNKNOWN).float(), batch.clip_of_object, len(batch))
