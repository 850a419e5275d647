"""Validation: how close the student's embeddings are to the teacher's on pictures it does not train on."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from sam3.engine import amp, distributed
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.log import MetricLog
from stage1.data.dataset import Stage1Batch
from stage1.model import EncoderDistiller
from stage1.pictures import compare_embeddings

PERCENTILES = (5, 25, 50, 75, 95)
NUM_PICTURES = 4


class Validator:
    """Called by the training loop after each epoch, on every process: see `LoopSettings.best_metric`."""

    def __init__(
        self,
        distiller: EncoderDistiller,
        loader: DataLoader[Stage1Batch],
        world: World,
        amp_dtype: torch.dtype | None,
        metrics: MetricLog,
    ) -> None:
        self.distiller, self.loader, self.world = distiller, loader, world
        self.amp_dtype, self.metrics = amp_dtype, metrics

    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        """`val/mse` per element, `val/cosine` similarity, and percentiles of the cosine over pictures.

        The main process also records pictures: photo, teacher and student side by side.
        """
        values: list[torch.Tensor] = []  # (2, B) of each batch, left on the device until the end
        shown = 0
        for batch in self.loader:
            if not len(batch):
                continue
            batch = to_device(batch, self.world.device)
            with amp.autocast(self.world.device, self.amp_dtype):
                result = self.distiller.evaluate(batch)
            values.append(torch.stack([result["mse"], result["cosine"]]))
            if self.world.is_main:
                for row in range(min(len(batch), NUM_PICTURES - shown)):
                    self._record_picture(step, row, batch, result)
                    shown += 1
        own = torch.cat(values, dim=1).cpu() if values else torch.zeros(2, 0)
        mse, cosine = torch.cat(distributed.gather_objects(own), dim=1).double()
        if not len(cosine):
            raise ValueError("no picture of the val split could be read; see the log, or set DATA.NUM_VAL_SAMPLES 0")
        levels = torch.quantile(cosine, torch.tensor(PERCENTILES, dtype=torch.float64) / 100)
        return {
            "val/mse": mse.mean().item(),
            "val/cosine": cosine.mean().item(),
            **{f"val/cosine_p{p}": level.item() for p, level in zip(PERCENTILES, levels, strict=True)},
        }

    def _record_picture(self, step: int, row: int, batch: Stage1Batch, result: dict[str, torch.Tensor]) -> None:
        picture = compare_embeddings(
            batch.images[row],
            tuple(batch.sizes[row].tolist()),
            result["target"][row],
            result["prediction"][row],
            result["mask"][row],
        )
        self.metrics.image(step, f"val/photo_teacher_student/{batch.keys[row]}", picture)
