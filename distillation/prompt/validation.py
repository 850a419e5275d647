"""Validation: how well the student's masks fit, on pictures kept from training, and masks to look at.

Letters: `P` prompts, `K` masks of a prompt, `M` masks in the ground truth of a picture, `h w` rows and columns
of a mask.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.prompt import everything
from distillation.prompt.batch import PromptBatch
from distillation.prompt.model import PromptDistiller
from distillation.prompt.projection import warn_if_collapsed
from distillation.prompt.prompts import grid
from sam3.engine import amp, distributed
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.loader import PictureLoader
from sam3.engine.log import MetricLog
from sam3.engine.metrics import mask_iou
from sam3.visualize import overlay_masks

NUM_PICTURES = 4
SHOWN_SIDE = 384  # pixels


class Validator:
    """Called by the training loop, on every process. Prompts are the same in all validations."""

    def __init__(
        self,
        distiller: PromptDistiller,
        loader: PictureLoader[PromptBatch],
        world: World,
        amp_dtype: torch.dtype | None,
        metrics: MetricLog,
    ) -> None:
        self.distiller, self.loader, self.world = distiller, loader, world
        self.amp_dtype, self.metrics = amp_dtype, metrics
        self._last: tuple[str, Tensor] | None = None  # the last picture and its embedding: its masks follow each other

    def __call__(self, epoch: int, step: int) -> dict[str, float]:
        """`val/iou` and `val/dice`: means over masks, each in 0..1.

        In single mode of the mask that answers its prompt, with three answers the one that the student thinks best. In
        everything mode of the candidate that the best assignment gives it, 0 for a mask without.
        The main process records pictures: the masks as annotated, and the student's.
        """
        sums: dict[str, Tensor | float] = {"iou": 0.0, "dice": 0.0}
        seen: set[str] = set()  # a sample that cannot be used is replaced by the next one, which counts once
        count = shown = 0
        self._last = None  # of other weights
        for batch in self.loader:
            batch = to_device(batch, self.world.device)
            with amp.autocast(self.world.device, self.amp_dtype):
                masks = self.answers(batch)
            inside = _inside(batch, masks)
            truth = batch.masks[:, 0].bool()
            new = torch.tensor([key not in seen for key in batch.keys]).repeat_interleave(torch.tensor(batch.counts))
            seen.update(batch.keys)
            iou = mask_iou(masks, truth, inside)[new.to(masks.device)]
            sums["iou"] = sums["iou"] + iou.sum()
            sums["dice"] = sums["dice"] + (2 * iou / (1 + iou)).sum()
            count += len(iou)
            if self.world.is_main and shown < NUM_PICTURES:
                self.metrics.image(step, f"val/annotated_student/{batch.keys[0]}", draw(batch, masks & inside))
                shown += 1
        for name, spread in self.distiller.spreads.items():
            warn_if_collapsed(name, float(spread))
        totals = distributed.sum_over_ranks({"count": count, **{name: float(value) for name, value in sums.items()}})
        return {f"val/{name}": totals[name] / max(totals["count"], 1) for name in sums}

    def answers(self, batch: PromptBatch) -> Tensor:
        """The student's mask for each annotated one: bool `(M, h, w)`."""
        student, config = self.distiller.hooked, self.distiller.config
        multimask = config.model.multimask_output
        embedding = self._embed(batch)
        if batch.prompts is not None:
            decoded = student.decode(embedding, batch.prompts, multimask)
            best = decoded.ious.argmax(1)
            return decoded.masks[torch.arange(len(best), device=best.device), best] > 0
        found, first, chunk = [], 0, config.everything.points_per_batch
        for i, count in enumerate(batch.counts):
            prompts = grid(config.dataset.grid_points, tuple(batch.sizes[i].tolist())).to(batch.images.device)
            one, masks = embedding[i : i + 1], batch.masks[first : first + count]
            pairs = everything.assign(everything.match(student.decode, one, prompts, masks, multimask, chunk), 0.0)
            answers = everything.decode_grid(student.decode, one, prompts, pairs, multimask, chunk, whole=False)
            missed = masks.new_zeros(masks[:, 0].shape, dtype=torch.bool)
            missed[pairs.objects.to(missed.device)] = answers.masks[:, 0] > 0
            found.append(missed)
            first += count
        return torch.cat(found)

    def _embed(self, batch: PromptBatch) -> Tensor:
        """Embeddings `(B, C, G, G)`; a picture that several samples show, one behind the other, is encoded once."""
        pictures = [key if batch.prompts is None else key.rsplit("/", 1)[0] for key in batch.keys]
        known = dict([self._last]) if self._last else {}
        new = [i for i, picture in enumerate(pictures) if picture not in (*known, *pictures[:i])]
        if new:
            images = self.distiller.student.preprocess.normalise(batch.images[new], batch.sizes[new])
            embeddings = self.distiller.hooked.encode(images).embedding
            known |= {pictures[i]: embedding for i, embedding in zip(new, embeddings, strict=True)}
        self._last = pictures[-1], known[pictures[-1]]
        return torch.stack([known[picture] for picture in pictures])


def _inside(batch: PromptBatch, masks: Tensor) -> Tensor:
    """Which pixels of each mask look at its picture rather than at the padding: bool `(M, h, w)`."""
    stride = batch.images.shape[-1] // masks.shape[-1]
    sides = (batch.sizes.to(masks.device) + stride - 1) // stride
    sides = sides.repeat_interleave(torch.tensor(batch.counts, device=masks.device), dim=0)
    rows, columns = (
        torch.arange(n, device=masks.device) < side[:, None]
        for n, side in zip(masks.shape[1:], sides.unbind(1), strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]


def draw(batch: PromptBatch, masks: Tensor) -> Tensor:
    """The first picture of the batch with its masks as annotated | as the student has them, in equal colours.

    Returns uint8 `(3, r, 2 c)` on the CPU, of a picture whose longest side is SHOWN_SIDE.
    """
    side = batch.images.shape[-1]
    rows, columns = (max(1, round(int(length) * SHOWN_SIDE / side)) for length in batch.sizes[0])
    square = (SHOWN_SIDE, SHOWN_SIDE)
    photo = F.interpolate(batch.images[:1].cpu(), square, mode="bilinear", antialias=True)[0]
    photo = photo[:, :rows, :columns].permute(1, 2, 0).numpy()
    panels = []
    for each in (batch.masks[: batch.counts[0], 0].bool(), masks[: batch.counts[0]]):
        large = F.interpolate(each[:, None].float().cpu(), square, mode="nearest")[:, 0, :rows, :columns] > 0
        panels.append(overlay_masks(photo, {k + 1: mask.numpy() for k, mask in enumerate(large)}))
    return torch.from_numpy(np.concatenate(panels, axis=1)).permute(2, 0, 1)
