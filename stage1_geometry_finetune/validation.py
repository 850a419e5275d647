"""Validation: the student's embeddings, and its masks behind boxes and points, on pictures kept from training."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sam3.engine import amp, distributed
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.log import MetricLog
from sam3.visualize import prompt_panels
from stage1_geometry_finetune.data import GeometryBatch
from stage1_geometry_finetune.model import GeometryDistiller, PromptEvaluation

NUM_PICTURES = 4


class Validator:
    """Called by the training loop after each epoch, on every process: see `LoopSettings.best_metric`."""

    def __init__(
        self,
        distiller: GeometryDistiller,
        loader: DataLoader[GeometryBatch],
        world: World,
        amp_dtype: torch.dtype | None,
        metrics: MetricLog,
    ) -> None:
        self.distiller, self.loader, self.world = distiller, loader, world
        self.amp_dtype, self.metrics = amp_dtype, metrics

    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        """Means over pictures: `val/mse` per element, `val/cosine` similarity. Means over objects, prompted by their
        box, and again by their point: `val/<kind>_iou` of the student's mask with the teacher's,
        `val/<kind>_iou_annotated` and `val/<kind>_iou_annotated_teacher` of either with the annotated mask, and
        `val/<kind>_score`, the teacher's. `val/mask_iou` is the mean of both kinds' IoU with the teacher.

        The main process also records pictures: photo with prompt, teacher's mask, student's mask.
        """
        values: dict[str, list[Tensor]] = defaultdict(list)  # left on the device until the end
        shown = 0
        for batch in self.loader:
            if not len(batch):
                continue
            batch = to_device(batch, self.world.device)
            with amp.autocast(self.world.device, self.amp_dtype):
                result = self.distiller.evaluate(batch)
            values["mse"].append(result.mse)
            values["cosine"].append(result.cosine)
            for kind, prompts in (("box", result.box), ("point", result.point)):
                if prompts is None:
                    continue
                values[f"{kind}_iou"].append(prompts.agreement)
                values[f"{kind}_score"].append(prompts.scores)
                if prompts.teacher_iou is not None:
                    values[f"{kind}_iou_annotated"].append(prompts.student_iou)
                    values[f"{kind}_iou_annotated_teacher"].append(prompts.teacher_iou)
            if self.world.is_main and shown < NUM_PICTURES:
                shown += self._record_pictures(step, batch, result.box, result.point, NUM_PICTURES - shown)
        return self._means({name: torch.cat(parts).cpu() for name, parts in values.items()})

    def _means(self, own: dict[str, Tensor]) -> dict[str, float]:
        """Over the values of all processes."""
        everywhere = distributed.gather_objects(own)
        names = dict.fromkeys(name for values in everywhere for name in values)
        if not names:
            raise ValueError("no picture of the val split could be used; see the log, or set DATA.NUM_VAL_SAMPLES 0")
        means = {
            f"val/{name}": torch.cat([values[name] for values in everywhere if name in values]).double().mean().item()
            for name in names
        }
        kinds = [means[name] for name in ("val/box_iou", "val/point_iou") if name in means]
        return {**means, "val/mask_iou": sum(kinds) / len(kinds)}

    def _record_pictures(
        self, step: int, batch: GeometryBatch, box: PromptEvaluation | None, point: PromptEvaluation | None, count: int
    ) -> int:
        """One panel for each of the first pictures and each kind of prompt; returns how many pictures."""
        count = min(count, len(batch))
        for kind, prompts in (("box", box), ("point", point)):
            for image in range(count):
                if prompts is not None and image in prompts.images:
                    row = prompts.images.index(image)
                    picture = draw_prompt(batch, prompts, row, kind)
                    self.metrics.image(step, f"val/{kind}_teacher_student/{batch.keys[image]}", picture)
        return count


def draw_prompt(batch: GeometryBatch, prompts: PromptEvaluation, row: int, kind: str) -> Tensor:
    """Photo with the prompt of a row | the teacher's mask | the student's: `(3, h, 3 w)` uint8 on the CPU."""
    image, item = prompts.images[row], prompts.objects[row]
    height, width = batch.sizes[image].tolist()
    side = batch.images.shape[-1]
    cells = [-(-pixels * prompts.teacher_masks.shape[-1] // side) for pixels in (height, width)]
    masks = [m[row, : cells[0], : cells[1]].cpu() for m in (prompts.teacher_masks, prompts.student_masks)]
    prompt = (batch.boxes if kind == "box" else batch.points)[image, item].cpu() * side
    panels = prompt_panels(batch.images[image, :, :height, :width].cpu(), masks, **{kind: prompt})
    return torch.from_numpy(np.concatenate([np.asarray(panel) for panel in panels], axis=1)).permute(2, 0, 1)
