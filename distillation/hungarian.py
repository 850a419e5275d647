"""Which student query learns from which teacher query: the assignment of least cost (Carion et al. 2020, DETR).

Letters: `B` pictures, `Ns Nt` queries of student and teacher, `M` matched pairs of one picture, `h w` rows and columns
of a mask, `m` side at which masks are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distillation.config import MATCHERS

OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
IOU_EPS = 1e-6
IMPOSSIBLE = 1e6  # cost of a pair that has none, far above any sum of the three terms

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Matches:
    """pairs: of each picture student and teacher queries, two long `(M,)`, the student's ascending, none twice.

    iou: scalar on the outputs' device, mean soft IoU of all matched pairs in 0..1, 0 without any.
    finite: whether everything both said, features included, and all costs are finite numbers.
    """

    pairs: list[Pair]
    iou: Tensor
    finite: bool


class HungarianMatcher:
    """Matches the queries of a student with those of its teacher, picture by picture, each query at most once.

    The cost of a pair is `w_mask (1 - IoU) + w_box L1 + w_logit |p_s - p_t|`, in float32: the soft IoU of their masks,
    the mean distance of their boxes' four coordinates, the difference of their probabilities. Which side has more
    queries does not matter; the smaller number of them is matched.

    mask_size: side at which masks are compared; None: the teacher's size. teacher_score_threshold: teacher queries of
    lower probability are left out, all but the best one. max_matches: of each picture keep so many pairs, the cheapest.
    method: `hungarian`, the least total cost (Kuhn 1955), or `greedy`, the cheapest free pair again and again.
    ValueError for settings that cannot work.
    """

    def __init__(
        self,
        w_mask: float = 1.0,
        w_box: float = 1.0,
        w_logit: float = 1.0,
        mask_size: int | None = 144,
        teacher_score_threshold: float = 0.0,
        max_matches: int | None = None,
        method: str = "hungarian",
    ) -> None:
        if method not in MATCHERS:
            raise ValueError(f"matcher {method!r} is unknown; choose one of {', '.join(MATCHERS)}")
        for name, value in (("mask_size", mask_size), ("max_matches", max_matches)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        self.w_mask, self.w_box, self.w_logit = w_mask, w_box, w_logit
        self.mask_size = mask_size
        self.teacher_score_threshold = teacher_score_threshold
        self.max_matches = max_matches
        self.solve = linear_sum_assignment if method == "hungarian" else assign_greedily

    def __call__(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[Pair]:
        """The pairs of `match`."""
        return self.match(student, teacher).pairs

    @torch.no_grad()
    def match(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Matches:
        """Outputs of the same pictures, as in `distillation.teachers.teacher`; waits once for the device.

        Used are `pred_masks` `(B, N, h, w)` logits, `pred_boxes` `(B, N, 4)` xyxy in 0..1, `pred_logits` `(B, N)`; the
        sides may differ in queries and in mask size. A cost that is no number counts as `IMPOSSIBLE`.
        """
        device = student["pred_masks"].device
        with torch.autocast(device.type, enabled=False):
            iou = self._mask_iou(student["pred_masks"], teacher["pred_masks"])  # (B, Ns, Nt)
            scores = teacher["pred_logits"].float().sigmoid()  # (B, Nt)
            costs = self._costs(iou, scores, student, teacher)
            # A sum is finite only if all its parts are, and costs one pass and no memory.
            total = sum(part.sum(dtype=torch.float32) for side in (student, teacher) for part in _said(side))
        host = torch.cat((costs.flatten(), scores.flatten(), total.view(1))).cpu().numpy()  # the only wait
        host_costs, host_scores, _ = np.split(host, (costs.numel(), costs.numel() + scores.numel()))
        host_costs = host_costs.reshape(costs.shape).astype(np.float64)
        host_costs[~np.isfinite(host_costs)] = IMPOSSIBLE
        host_scores = host_scores.reshape(scores.shape)
        found = [self._assign(*of_picture) for of_picture in zip(host_costs, host_scores, strict=True)]
        pairs, iou = _to_device(found, iou)
        return Matches(pairs, iou, bool(np.isfinite(host).all()))

    def _mask_iou(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Soft IoU of every two masks: `(B, Ns, Nt)` in 0..1."""
        size = teacher.shape[-2:] if self.mask_size is None else (self.mask_size, self.mask_size)
        ours, theirs = (resize(logits.float(), size).flatten(2).sigmoid() for logits in (student, teacher))
        overlap = torch.bmm(ours, theirs.transpose(1, 2))
        return overlap / (ours.sum(2)[:, :, None] + theirs.sum(2)[:, None] - overlap + IOU_EPS)

    def _costs(self, iou: Tensor, scores: Tensor, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Tensor:
        boxes = student["pred_boxes"].float()[:, :, None] - teacher["pred_boxes"].float()[:, None]  # (B, Ns, Nt, 4)
        logits = student["pred_logits"].float().sigmoid()[:, :, None] - scores[:, None]
        return self.w_mask * (1 - iou) + self.w_box * boxes.abs().mean(-1) + self.w_logit * logits.abs()

    def _assign(self, costs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """costs: `(Ns, Nt)`, scores: `(Nt,)`, of one picture -> student and teacher queries, `(M,)` each."""
        columns = np.flatnonzero(scores >= self.teacher_score_threshold)
        if len(columns) == 0 and len(scores):
            columns = scores.argmax(keepdims=True)
        rows, chosen = self.solve(costs[:, columns])
        columns = columns[chosen]
        if self.max_matches is not None:
            cheapest = np.argsort(costs[rows, columns], kind="stable")[: self.max_matches]
            kept = np.sort(cheapest)  # rows stay in order
            rows, columns = rows[kept], columns[kept]
        return rows, columns


def assign_greedily(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest pair whose row and column are free, until one side is used up; rows ascending, as scipy's solver."""
    free = costs.copy()
    count = min(free.shape)
    rows, columns = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        rows[i], columns[i] = np.unravel_index(free.argmin(), free.shape)
        free[rows[i]] = np.inf
        free[:, columns[i]] = np.inf
    order = rows.argsort()
    return rows[order], columns[order]


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, K, h, w)` -> `(B, K, *size)`, bilinear between pixel centres; the maps themselves if they fit already.

    Not `area` and not adaptive pooling, which MPS lacks where sizes do not divide one another.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if maps.numel() == 0:  # no queries: interpolate refuses it
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _said(outputs: Mapping[str, Any]) -> list[Tensor]:
    """All there is that is compared."""
    parts = [outputs[name] for name in OUTPUTS if name in outputs]
    parts += outputs.get("fpn_features") or ()
    if outputs.get("encoder_output") is not None:
        parts.append(outputs["encoder_output"])
    return parts


def _to_device(found: list[tuple[np.ndarray, np.ndarray]], iou: Tensor) -> tuple[list[Pair], Tensor]:
    """Queries of each picture on the device, and the mean of `iou` `(B, Ns, Nt)` over them; one copy."""
    counts = [len(rows) for rows, _ in found]
    rows, columns = (np.concatenate(side) for side in zip(*found, strict=True))
    table = np.stack((np.repeat(np.arange(len(found)), counts), rows, columns)).astype(np.int64)
    picture, ours, theirs = torch.from_numpy(table).to(iou.device)
    mean = iou[picture, ours, theirs].sum() / max(1, sum(counts))
    ends = np.cumsum([0, *counts]).tolist()
    return [(ours[start:end], theirs[start:end]) for start, end in pairwise(ends)], mean
