"""Validation: the losses of the phase on pictures kept from training, the memory budget, and masks to look at.

Letters: `B` pictures, `Q` queries, `S` side of the square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.batch import DistillBatch
from distillation.config import LOSSES, DistillationConfig
from distillation.memory import check_budget
from distillation.model import Distiller
from sam3.engine import amp, distributed
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.loader import PictureLoader
from sam3.engine.log import MetricLog
from sam3.visualize import overlay_masks

MEANS = ("total", *LOSSES, "matched_pairs", "match_iou")
NUM_PICTURES = 4
NUM_MASKS = 8  # of a picture, the teacher's best
SHOWN_SIDE = 336  # pixels


class Validator:
    """Called by the training loop after each epoch, on every process: see `LoopSettings.best_metric`."""

    def __init__(
        self,
        distiller: Distiller,
        loader: PictureLoader[DistillBatch],
        world: World,
        amp_dtype: torch.dtype | None,
        metrics: MetricLog,
        config: DistillationConfig,
    ) -> None:
        self.distiller, self.loader, self.world = distiller, loader, world
        self.amp_dtype, self.metrics, self.config = amp_dtype, metrics, config

    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        """Means over pictures: `val/total_loss`, `val/<term>` (weighted), `val/match_iou`, `val/matched_pairs`; and
        `val/skipped`, the pictures without finite outputs, which are in none of the means.

        The main process also records pictures: photo, the teacher's best masks, the student's for the same queries.
        Raises ValueError if no picture could be used, or the memory budget is exceeded and that is forbidden.
        """
        sums: dict[str, Tensor | float] = dict.fromkeys(MEANS, 0.0)  # tensors stay on the device until the end
        count = skipped = shown = 0
        for batch in self.loader:
            batch = to_device(batch, self.world.device)
            with amp.autocast(self.world.device, self.amp_dtype):
                teacher, student = self.distiller.run(batch)
                losses = self.distiller.compare(student, teacher)
            if losses is None:
                skipped += len(batch)
                continue
            count += len(batch)
            for name in MEANS:
                sums[name] = sums[name] + losses[name] * len(batch)
            if self.world.is_main and shown < NUM_PICTURES:
                picture = draw_outputs(batch, teacher, student, self.distiller.matcher(student, teacher))
                self.metrics.image(step, f"val/photo_teacher_student/{batch.keys[0]}", picture)
                shown += 1
        totals = distributed.sum_over_ranks(
            {"count": count, "skipped": skipped, **{name: float(value) for name, value in sums.items()}}
        )
        if not totals["count"]:
            raise ValueError("none of the validation pictures could be used; see the log, or lower num_val (--num-val)")
        check_budget(self.config, self.world.device)
        means = {f"val/{name}": totals[name] / totals["count"] for name in MEANS}
        return {"val/total_loss": means.pop("val/total"), **means, "val/skipped": totals["skipped"]}


def draw_outputs(
    batch: DistillBatch,
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    pairs: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """First picture of the batch | the teacher's best masks | the student's of the matched queries, in equal colours.

    Returns uint8 `(3, h, 3 h)` on the CPU, with h = SHOWN_SIDE.
    """
    rows, columns = (index.cpu() for index in pairs[0])
    best = teacher["pred_logits"][0].float().cpu()[columns].topk(min(NUM_MASKS, len(columns))).indices
    side = (SHOWN_SIDE, SHOWN_SIDE)
    photo = F.interpolate(batch.images[:1].cpu(), side, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    panels = [photo]
    for outputs, queries in ((teacher, columns[best]), (student, rows[best])):
        logits = outputs["pred_masks"][0].detach()[queries.to(outputs["pred_masks"].device)].float().cpu()
        masks = F.interpolate(logits[None], side, mode="bilinear")[0] > 0
        panels.append(overlay_masks(photo, {k + 1: mask.numpy() for k, mask in enumerate(masks)}))
    return torch.from_numpy(np.concatenate(panels, axis=1)).permute(2, 0, 1)
