"""How far SAM3's objects are from the annotated ones, after an assignment of least cost (Carion et al. 2020, DETR).

Letters: `B` image-prompt pairs, `Q` queries, `N` annotated objects of an image (padded), `L` decoder layers, `K`
objects that were found for a pair (padded), `P` matched pairs of all layers together, `M` side of the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from distillation.hungarian import IMPOSSIBLE
from distillation.losses import paired_giou
from sam3.engine.losses import mask_bce, mask_dice

FOCAL_GAMMA = 2.0
HALF = 0.5  # IoU from which a box lies on an object


@dataclass(frozen=True)
class Targets:
    """What B pairs ask for. wanted: bool `(B, N)`, the objects of the pair's image that match its prompt; boxes:
    `(B, N, 4)` xyxy in 0..1; masks: float `(B, N, M, M)`, the covered share of each cell; doubtful: bool `(B, N)`,
    objects of which it is not to be learnt that they do not match (`scene_prompts.doubtful`)."""

    wanted: Tensor
    boxes: Tensor
    masks: Tensor
    doubtful: Tensor

    def take(self, rows: Tensor) -> Targets:
        """Those of some pairs."""
        return Targets(self.wanted[rows], self.boxes[rows], self.masks[rows], self.doubtful[rows])

    @property
    def present(self) -> Tensor:
        """`(B,)` bool: does the picture show what the prompt asks for."""
        return self.wanted.any(1)

    @property
    def certain(self) -> Tensor:
        """`(B,)` bool: is it to be learnt whether it does."""
        return self.present | ~self.doubtful.any(1)


@dataclass(frozen=True)
class Assignment:
    """Matched queries of `rows` output sets: set, query and object of each pair, long `(P,)` each."""

    rows: Tensor
    queries: Tensor
    objects: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor, num_rows: int) -> Assignment:
        """What belongs to some of the `num_rows` sets, ascending ones, which are numbered anew."""
        place = self.rows.new_full((num_rows,), -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        kept = place[self.rows] >= 0
        return Assignment(place[self.rows[kept]], self.queries[kept], self.objects[kept])


@dataclass(frozen=True)
class SetWeights:
    """Of the terms of `SetLoss`; those of the matcher are the first three."""

    score: float = 2.0
    box_l1: float = 5.0
    box_giou: float = 2.0
    presence: float = 1.0
    mask_bce: float = 5.0
    mask_dice: float = 5.0
    semantic_bce: float = 2.0
    semantic_dice: float = 1.0
    one_to_many: float = 0.5  # of all that the one-to-many queries say, relative to the one-to-one queries

    @classmethod
    def from_mapping(cls, weights: Mapping[str, float]) -> SetWeights:
        """ValueError for names that no term has, and for negative weights."""
        if unknown := sorted(set(weights) - {field.name for field in fields(cls)}):
            raise ValueError(f"no loss term is named {', '.join(unknown)}; see SetWeights")
        if negative := [name for name, value in weights.items() if value < 0]:
            raise ValueError(f"loss weights must not be negative: {', '.join(negative)}")
        return cls(**weights)


class SetLoss:
    """Losses of `Sam3Image`'s outputs in train mode, without those of masks (`mask_terms`).

    Of each decoder layer, of the one-to-one queries (each object matched once) and of the one-to-many ones (each
    `copies` times, Jia et al. 2023, H-DETR):

    score     focal loss of all queries but those on doubtful objects, over the number of objects; of absent things
              too, `absent_score` as much
    box_l1    mean over matched pairs of the sum over cx, cy, w, h of |box - object|
    box_giou  mean over matched pairs of 1 - GIoU
    presence  mean over certain pairs of BCE of the presence logit (one-to-one only)

    focal_alpha: weight of hits in the focal loss, misses have the rest; one half is even. absent_score: 0 leaves it to
    the presence token alone whether a thing is in the picture, as SAM3 does: a score is the product of the two. More
    makes the queries learn from absent things what a phrase does not mean.
    """

    def __init__(
        self, weights: SetWeights, copies: int = 4, focal_alpha: float = 0.5, absent_score: float = 0.0
    ) -> None:
        if copies < 1:
            raise ValueError(f"one-to-many queries need at least one copy of each object, got {copies}")
        if not 0 < focal_alpha < 1:
            raise ValueError(f"the focal loss weighs hits with an alpha between 0 and 1, got {focal_alpha}")
        self.weights, self.copies = weights, copies
        self.focal_alpha, self.absent_score = focal_alpha, absent_score

    def __call__(self, out: Mapping[str, Any], targets: Targets) -> tuple[dict[str, Tensor], Assignment]:
        """Outputs of `Sam3Image.predict_boxes` -> the terms, unweighted scalars, and the last layer's assignment.

        Terms are means over layers; the one-to-many ones are named `many_*`. Waits once for the device and half.
        """
        layers = [*out.get("aux_outputs", ()), out]
        presence = torch.stack([layer["presence_logit_dec"] for layer in layers])[..., 0].float()  # (L, B)
        present, certain = (side.float().expand_as(presence) for side in (targets.present, targets.certain))
        wrong = F.binary_cross_entropy_with_logits(presence, present, certain, reduction="sum")
        terms = {"presence": wrong / certain.sum().clamp(min=1)}
        one, matched = self._half(layers, targets, "", 1)
        terms |= one
        if "pred_logits_o2m" in out:
            many, _ = self._half(layers, targets, "_o2m", self.copies)
            terms |= {f"many_{name}": value for name, value in many.items()}
        last = matched.rows >= (len(layers) - 1) * len(targets.wanted)
        rows = matched.rows[last] - (len(layers) - 1) * len(targets.wanted)
        return terms, Assignment(rows, matched.queries[last], matched.objects[last])

    def weigh(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term times its weight."""
        weights = vars(self.weights)
        factor = {name: weights[name] for name in weights if name != "one_to_many"}
        factor |= {f"many_{name}": weights["one_to_many"] * factor[name] for name in ("score", "box_l1", "box_giou")}
        return {name: factor[name] * value for name, value in terms.items()}

    def _half(
        self, layers: Sequence[Mapping[str, Tensor]], targets: Targets, suffix: str, copies: int
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The three terms of one kind of queries, and which were matched, with L * B output sets as rows."""
        logits = torch.cat([layer[f"pred_logits{suffix}"] for layer in layers])[..., 0].float()  # (L B, Q)
        boxes = torch.cat([layer[f"pred_boxes_xyxy{suffix}"] for layer in layers]).float()  # (L B, Q, 4)
        depth = len(layers)
        wanted, wanted_boxes = targets.wanted.repeat(depth, 1), targets.boxes.float().repeat(depth, 1, 1)
        with torch.no_grad():
            costs = self.costs(logits, boxes, wanted_boxes)
        matched = assign(costs, wanted, copies)
        found, true = boxes[matched.rows, matched.queries], wanted_boxes[matched.rows, matched.objects]
        hits = torch.zeros_like(logits)
        hits[matched.rows, matched.queries] = 1
        count = max(1, len(matched))
        focal = sigmoid_focal_loss(logits, hits, self.focal_alpha, FOCAL_GAMMA, reduction="none")
        asked = torch.where(wanted.any(1, keepdim=True), 1.0, self.absent_score)
        asked = torch.where((hits == 0) & covers(boxes, wanted_boxes, targets.doubtful.repeat(depth, 1)), 0.0, asked)
        terms = {
            "score": (focal * asked).sum() / count,
            "box_l1": (_centred(found) - _centred(true)).abs().sum() / count,
            "box_giou": (1 - paired_giou(found, true)).sum() / count,
        }
        return terms, matched

    def costs(self, logits: Tensor, boxes: Tensor, wanted: Tensor) -> Tensor:
        """logits `(R, Q)`, boxes `(R, Q, 4)` and wanted `(R, N, 4)` xyxy -> what each match would cost: `(R, Q, N)`."""
        ones = torch.ones_like(logits)
        hit = sigmoid_focal_loss(logits, ones, self.focal_alpha, FOCAL_GAMMA, reduction="none")
        miss = sigmoid_focal_loss(logits, 1 - ones, self.focal_alpha, FOCAL_GAMMA, reduction="none")
        ours, theirs = (
            side.expand(-1, boxes.shape[1], wanted.shape[1], -1) for side in (boxes[:, :, None], wanted[:, None])
        )
        apart = (_centred(ours) - _centred(theirs)).abs().sum(-1)
        giou = paired_giou(ours.reshape(-1, 4), theirs.reshape(-1, 4)).view(apart.shape)
        weights = self.weights
        return weights.score * (hit - miss)[..., None] + weights.box_l1 * apart - weights.box_giou * giou


@torch.no_grad()
def covers(boxes: Tensor, objects: Tensor, which: Tensor) -> Tensor:
    """`(R, Q)` bool, whether a box `(R, Q, 4)` overlaps by half with one of `which` `(R, N)` of the objects
    `(R, N, 4)`."""
    low = torch.maximum(boxes[:, :, None, :2], objects[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], objects[:, None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)  # (R, Q, N)
    ours, theirs = ((side[..., 2:] - side[..., :2]).clamp(min=0).prod(-1) for side in (boxes, objects))
    overlap = both / (ours[:, :, None] + theirs[:, None] - both).clamp(min=1e-9)
    return ((overlap >= HALF) & which[:, None]).any(-1)


def assign(costs: Tensor, wanted: Tensor, copies: int = 1) -> Assignment:
    """The assignment of least total cost of each row, every query at most once, every wanted object `copies` times as
    far as there are queries. costs: `(R, Q, N)`; wanted: bool `(R, N)`. One copy to the host, one back."""
    host = torch.cat((costs.flatten(1), wanted.to(costs.dtype)), dim=1).cpu().numpy()
    cells = costs[0].numel()
    table: list[np.ndarray] = []
    for row, (flat, asked) in enumerate(zip(host[:, :cells], host[:, cells:], strict=True)):
        columns = np.tile(np.flatnonzero(asked), copies)
        if len(columns):
            own = flat.reshape(costs.shape[1:])[:, columns].astype(np.float64)
            queries, chosen = linear_sum_assignment(np.where(np.isfinite(own), own, IMPOSSIBLE))
            table.append(np.stack((np.full_like(queries, row), queries, columns[chosen])))
    joined = np.concatenate(table, axis=1) if table else np.zeros((3, 0), np.int64)
    return Assignment(*torch.from_numpy(joined.astype(np.int64)).to(costs.device))


def mask_queries(matched: Assignment, num_pairs: int) -> tuple[Tensor, Tensor]:
    """The matched queries as `Sam3Image.predict_masks` takes them: `(B, K)` long, and the place in it of each of the P
    matches, `(P,)`. Free places repeat query 0; K is at least 1. The matches' rows ascend."""
    counts = torch.bincount(matched.rows, minlength=num_pairs)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(matched), device=counts.device) - starts[matched.rows]
    queries = matched.rows.new_zeros(num_pairs, max(1, int(counts.max())))
    queries[matched.rows, place] = matched.queries
    return queries, place


def mask_terms(masks: Mapping[str, Tensor], place: Tensor, matched: Assignment, targets: Targets) -> dict[str, Tensor]:
    """BCE and Dice of the matched masks, means over matches, and of the semantic mask, means over pairs, where no
    doubtful object is.

    masks: `pred_masks` `(B, K, M, M)` of the queries of `mask_queries`, and `semantic_seg` `(B, 1, M, M)`.
    """
    found, true = masks["pred_masks"][matched.rows, place], targets.masks[matched.rows, matched.objects]
    union, doubtful = (
        (targets.masks * which[..., None, None]).sum(1, keepdim=True).clamp(max=1)
        for which in (targets.wanted, targets.doubtful)
    )
    terms = {}
    for name, logits, wanted, valid in (
        ("mask", found[:, None], true[:, None], torch.ones_like(true[:, None])),
        ("semantic", masks["semantic_seg"], union, 1 - doubtful),
    ):
        count = max(1, len(logits))
        terms[f"{name}_bce"] = mask_bce(logits, wanted, valid).sum() / count
        terms[f"{name}_dice"] = mask_dice(logits, wanted, valid).sum() / count
    return terms


def _centred(boxes: Tensor) -> Tensor:
    """xyxy -> cxcywh, whose L1 distance weighs place and size alike."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)
