"""What a SAM3 makes of held-out scenes, in the terms of its users: objects above a score of one half, clicked masks.

Letters: `B` image-prompt pairs, `Q` queries, `N` objects, `S` side of the pictures, `M` of the masks.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distillation.supervised.batch import SceneBatch
from distillation.supervised.model import SupervisedSam3
from sam3.engine import distributed
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.scene_names import PARTS

THRESHOLD = 0.5  # of a score, as in `Sam3Processor`
TARGET, REJECTED = 0.75, 0.9  # what is aimed at: IoUs of masks, and the share of the absent phrases that are rejected


class SceneValidator:
    """Called by the training loop; `loader` gives batches of a SceneDataset's val split, on each
    process its share.

    Results, means over everything of a kind:
    val/text_iou      of each object that a phrase means: IoU of the mask assigned to it among those with a score above
                      one half, 0 if there is none
    val/text_detected  share of the phrases that mean something with any score above one half
    val/text_found_iou  the same, of the objects that some mask was assigned to
    val/text_precision  share of these masks that were assigned with an IoU of at least one half
    val/box_iou, val/point_iou  of the object under an exemplar: IoU of the mask whose box (query) fits it best
    val/box_found, val/point_found  share of these masks whose score is above one half
    val/rejected      share of the absent phrases with no score above one half
    val/click_iou, val/corner_iou  of the click head's likeliest mask for one click, for a box
    val/target        the least of text, box and click IoU, and TARGET less what rejection is short of REJECTED
    """

    def __init__(self, model: SupervisedSam3, loader: Any, world: World) -> None:
        self.model, self.loader, self.world = model, loader, world

    @torch.no_grad()
    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        values: dict[str, list[float]] = defaultdict(list)
        for batch in self.loader:
            batch = to_device(batch, self.world.device)
            grid = self.model.embed(batch)
            self._detector(grid, batch, values)
            self._clicks(grid, batch, values)
        joined: dict[str, list[float]] = defaultdict(list)
        for own in distributed.gather_objects(dict(values)):
            for name, numbers in own.items():
                joined[name] += numbers
        means = {f"val/{name}": float(np.mean(joined[name])) for name in sorted(joined) if joined[name]}
        reached = [means[f"val/{name}_iou"] for name in ("text", "box", "click")]
        means["val/target"] = min(*reached, TARGET + means["val/rejected"] - REJECTED)
        return means

    def _detector(self, grid: Tensor, batch: SceneBatch, values: dict[str, list[float]]) -> None:
        out = self.model.predict_boxes(grid, batch)
        masks = self.model.detector.predict_masks(out)["pred_masks"]
        scores = out["pred_logits"][..., 0].sigmoid() * out["presence_logit_dec"].sigmoid()  # (B, Q)
        for row, kind in enumerate(batch.kinds):
            kept = scores[row] > THRESHOLD
            if kind == "absent":
                values["rejected"].append(float(not kept.any()))
                continue
            truth = batch.full_masks[batch.image[row]]  # (N, S, S)
            if kind == "text":
                values["text_detected"].append(float(kept.any()))
                self._phrase(masks[row, kept], truth[batch.wanted[row]], values)
            else:
                shown = batch.shown[row]
                box = batch.boxes[batch.image[row], shown]
                query = box_ious(out["pred_boxes_xyxy"][row], box).argmax()
                found = enlarged(masks[row, query][None], truth.shape[-1])[0]
                values[f"{kind}_iou"].append(float(ious_of(found[None], truth[shown][None])[0, 0]))
                values[f"{kind}_found"].append(float(kept[query]))

    def _phrase(self, masks: Tensor, truth: Tensor, values: dict[str, list[float]]) -> None:
        """masks: `(K, M, M)` logits of what was found, truth: bool `(n, S, S)` of what was meant."""
        own = np.zeros(len(truth))
        if len(masks):
            ious = ious_of(enlarged(masks, truth.shape[-1]), truth).cpu().numpy()
            found, objects = linear_sum_assignment(ious, maximize=True)
            own[objects] = ious[found, objects]
            values["text_precision"] += [float((ious[found, objects] >= 0.5).sum() / len(masks))]
        values["text_iou"] += own.tolist()
        values["text_found_iou"] += own[own > 0].tolist()

    def _clicks(self, grid: Tensor, batch: SceneBatch, values: dict[str, list[float]]) -> None:
        features, slots = self.model.click_features(grid, batch)
        for name, rows in (("click", batch.clicks), ("corner", batch.corners)):
            masks, ious, _ = self.model.decode(features, slots, rows)
            truth = batch.full_masks[rows.image, rows.object]
            best = masks[torch.arange(len(masks), device=masks.device), ious.argmax(1)]
            found = enlarged(best, truth.shape[-1])
            both, either = (found & truth).flatten(1).sum(1), (found | truth).flatten(1).sum(1)
            values[f"{name}_iou"] += (both / either.clamp(min=1)).tolist()


def enlarged(masks: Tensor, size: int) -> Tensor:
    """Logits `(K, M, M)` -> bool `(K, size, size)`."""
    return F.interpolate(masks[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0] > 0


def ious_of(found: Tensor, truth: Tensor) -> Tensor:
    """bool `(K, S, S)` and `(n, S, S)` -> IoU of every two, `(K, n)`."""
    ours, theirs = found.flatten(1).float(), truth.flatten(1).float()
    both = ours @ theirs.T
    return both / (ours.sum(1)[:, None] + theirs.sum(1)[None] - both).clamp(min=1)


def box_ious(boxes: Tensor, box: Tensor) -> Tensor:
    """`(Q, 4)` and `(4,)` xyxy -> `(Q,)`."""
    sides = (torch.minimum(boxes[:, 2:], box[2:]) - torch.maximum(boxes[:, :2], box[:2])).clamp(min=0)
    both = sides.prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) + (box[2:] - box[:2]).prod()
    return both / (areas - both).clamp(min=1e-9)


class WordValidator:
    """As `SceneValidator`, for a model that learns single words: val/shape_named, val/colour_named, val/texture_named,
    shares of the objects that have such a word, and val/target, the least of them."""

    def __init__(self, model: SupervisedSam3, loader: Any, world: World) -> None:
        self.model, self.loader, self.world = model, loader, world

    @torch.no_grad()
    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        hits, counts = np.zeros(len(PARTS)), np.zeros(len(PARTS))
        for batch in self.loader:
            batch = to_device(batch, self.world.device)
            shares = self.model.word_term(self.model.name_map(self.model.embed(batch)), batch)[1]
            count = (batch.words >= 0).sum((0, 1)).cpu().numpy()
            hits += count * [float(shares[part]) for part in PARTS]
            counts += count
        hits, counts = np.sum(distributed.gather_objects((hits, counts)), axis=0)
        means = {
            f"val/{part}_named": float(hit / count)
            for part, hit, count in zip(PARTS, hits, counts, strict=True)
            if count
        }
        return {**means, "val/target": min(means.values())}
