"""Validation: teacher and student follow the objects of fixed clips; how they agree, and how each meets the truth."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from sam3.engine import amp, distributed
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.loader import PictureLoader
from sam3.engine.log import MetricLog
from sam3.engine.vos_metrics import boundary_accuracy, region_similarity
from sam3.visualize import overlay_masks
from stage2.data.batch import UNKNOWN, ClipBatch
from stage2.model import ClipEvaluation, MemoryDistiller

NUM_PICTURES = 4
FRAMES_SHOWN = 4  # of a clip


class Validator:
    """Called by the training loop, on every process: see `LoopSettings.best_metric`."""

    def __init__(
        self,
        distiller: MemoryDistiller,
        loader: PictureLoader[ClipBatch],
        world: World,
        amp_dtype: torch.dtype | None,
        metrics: MetricLog,
    ) -> None:
        self.distiller, self.loader, self.world = distiller, loader, world
        self.amp_dtype, self.metrics = amp_dtype, metrics

    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        """Means over the objects of the clips; of each object, means over the frames after the first.

        `val/agreement`: IoU of the student's masks with the teacher's. `val/j`, `val/f`, `val/jf` of the student's
        masks with the annotated ones, where those are known, at the decoder's resolution; `_teacher`: the teacher's.

        The main process also records pictures: a few frames of a clip with true, the teacher's and the student's masks.
        """
        values: dict[str, list[float]] = defaultdict(list)
        shown = 0
        for batch in self.loader:
            if not len(batch):
                continue
            batch = to_device(batch, self.world.device)
            with amp.autocast(self.world.device, self.amp_dtype):
                result = self.distiller.evaluate(batch)
            values["agreement"] += result.agreement.mean(1).tolist()
            truth, known = batch.masks[:, 1:].cpu().numpy(), (batch.states[:, 1:] != UNKNOWN).cpu().numpy()
            for suffix, masks in (("", result.student), ("_teacher", result.teacher)):
                for name, scores in score(masks.cpu().numpy(), truth, known).items():
                    values[f"{name}{suffix}"] += scores
            if self.world.is_main and shown < NUM_PICTURES:
                shown += self._record_pictures(step, batch, result, NUM_PICTURES - shown)
        return self._means(values)

    def _means(self, own: dict[str, list[float]]) -> dict[str, float]:
        """Over the values of all processes; ValueError if no object has a frame after the first with a known mask."""
        joined: dict[str, list[float]] = defaultdict(list)
        for values in distributed.gather_objects(dict(own)):
            for name, numbers in values.items():
                joined[name] += numbers
        if not joined["jf"]:
            raise ValueError("no clip of the val split could be used; see the log, or set DATA.NUM_VAL_SAMPLES 0")
        return {f"val/{name}": float(np.mean(numbers)) for name, numbers in joined.items()}

    def _record_pictures(self, step: int, batch: ClipBatch, result: ClipEvaluation, count: int) -> int:
        count = min(count, len(batch))
        for clip in range(count):
            self.metrics.image(step, f"val/truth_teacher_student/{batch.keys[clip]}", draw_clip(batch, result, clip))
        return count


def score(masks: np.ndarray, truth: np.ndarray, known: np.ndarray) -> dict[str, list[float]]:
    """J, F and their mean, one number for each object that has a known frame.

    masks, truth: bool (B, T, M, M); known: bool (B, T), the frames that count.
    """
    scores: dict[str, list[float]] = {"j": [], "f": [], "jf": []}
    for row in range(len(masks)):
        frames = np.flatnonzero(known[row])
        if not len(frames):
            continue
        j = float(np.mean([region_similarity(masks[row, t], truth[row, t]) for t in frames]))
        f = float(np.mean([boundary_accuracy(masks[row, t], truth[row, t]) for t in frames]))
        for name, value in (("j", j), ("f", f), ("jf", (j + f) / 2)):
            scores[name].append(value)
    return scores


def draw_clip(batch: ClipBatch, result: ClipEvaluation, clip: int) -> Tensor:
    """Rows of frames of a clip with its objects: true masks, the teacher's, the student's; uint8 (3, H, W) on the CPU.

    The background is the frames where the batch has them, else grey.
    """
    rows = (batch.clip_of_object == clip).nonzero()[:, 0].tolist()
    side = batch.masks.shape[-1]
    shown = np.unique(np.linspace(1, batch.num_frames - 1, FRAMES_SHOWN).round().astype(int))
    lines = []
    for masks in (batch.masks[:, 1:], result.teacher, result.student):
        line = [
            overlay_masks(_background(batch, clip, t, side), {row: masks[row, t - 1].cpu().numpy() for row in rows})
            for t in shown
        ]
        lines.append(np.concatenate(line, axis=1))
    return torch.from_numpy(np.concatenate(lines, axis=0)).permute(2, 0, 1)


def _background(batch: ClipBatch, clip: int, t: int, side: int) -> np.ndarray:
    if batch.images is None:
        return np.full((side, side, 3), 96, dtype=np.uint8)
    frame = torch.nn.functional.interpolate(batch.images[clip, t][None].float(), (side, side), mode="area")[0]
    return frame.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
