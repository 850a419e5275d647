"""How well held-out clips are tracked, from a click or from the mask in the first frame."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sam3.engine import distributed
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.loader import PictureLoader
from stage2.data.batch import PRESENT
from stage2.supervised.dataset import SceneClipBatch
from stage2.supervised.model import SupervisedTracker
from stage2.validation import score

PROMPTS = ("click", "mask")


class ClipValidator:
    """Called by the training loop, on every process; `loader` gives batches of `ValidationClips`, to each its share.

    Objects are followed by the training's own roll-out, which takes the steps of the predictor, one object apart from
    the others; masks are compared at the size of the frames.

    Results, means over the objects of all clips, and of each object over the frames after the first:
    val/j_click, val/f_click, val/jf_click   after one click into the middle of the object; an empty mask of an object
                                             that has left counts as 1
    val/j_mask, val/f_mask, val/jf_mask      after its mask was given
    val/click_iou      IoU of the mask that the click gives in the first frame
    val/presence       share of the frames in which it is rightly said whether a clicked object is there
    val/absence        the same of the frames in which it is not there; NaN if there are none
    val/target         val/jf_click
    """

    def __init__(self, model: SupervisedTracker, loader: PictureLoader[SceneClipBatch], world: World) -> None:
        self.model, self.loader, self.world = model, loader, world

    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        values: dict[str, list[float]] = defaultdict(list)
        for batch in self.loader:
            batch = to_device(batch, self.world.device)
            with torch.no_grad():
                frames = self.model.encode(batch)
                for kind in PROMPTS:
                    prompted = replace(batch, kinds=[kind] * len(batch.kinds))
                    self._compare(kind, *self.model.follow(frames, prompted), batch, values)
        joined: dict[str, list[float]] = defaultdict(list)
        for own in distributed.gather_objects(dict(values)):
            for name, numbers in own.items():
                joined[name] += numbers
        means = {f"val/{name}": float(np.mean(numbers or [np.nan])) for name, numbers in joined.items()}
        return {**means, "val/target": means["val/jf_click"]}

    def _compare(
        self, kind: str, masks: Tensor, present: Tensor, batch: SceneClipBatch, values: dict[str, list[float]]
    ) -> None:
        """masks, present: as `SupervisedTracker.follow` gives them."""
        found, truth = masks.cpu().numpy(), batch.full_masks.cpu().numpy()
        known = np.ones((len(found), batch.num_frames - 1), dtype=bool)
        for name, scores in score(found[:, 1:], truth[:, 1:], known).items():
            values[f"{name}_{kind}"] += scores
        if kind == "click":
            there = batch.states == PRESENT
            right = (present == there)[:, 1:]
            values["presence"] += right.float().mean(1).tolist()
            values["absence"] += right[~there[:, 1:]].float().tolist()
            both, either = ((found[:, 0] & truth[:, 0]).sum((1, 2)), (found[:, 0] | truth[:, 0]).sum((1, 2)))
            values["click_iou"] += (both / np.maximum(either, 1)).tolist()
