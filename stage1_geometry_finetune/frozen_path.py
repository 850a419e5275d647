"""What stands behind the student: SAM3's frozen neck, geometry encoder, transformer and mask head, and their prompts.

Student and teacher grids go through the same `FrozenPath`, which runs the very code of inference, so that what the
student learns to please is what it will meet.

Letters: `B` images, `N` objects of an image, `R` rows (one row is one prompt), `Nb` `Np` boxes and points of a row, `Q`
queries, `K` queries that get a mask, `G` side of the trunk's grid, `M` side of the masks, `C` channels of the trunk,
`D` channels of the heads, `L` tokens of the text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.engine.distributed import main_first
from sam3.engine.weights import load_weights, save_weights
from sam3.model.box_ops import box_xyxy_to_cxcywh
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt, concat_padded
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import VISUAL_PROMPT
from sam3.model_builder import encode_phrase
from stage1_geometry_finetune.data import GeometryBatch
from stage1_geometry_finetune.prompts import LAYOUTS

log = logging.getLogger(__name__)

# A row of `PromptRows.of_objects`: image, object of that image, "box" | "point" | "both".
Entry = tuple[int, int, str]


@dataclass(frozen=True)
class PromptRows:
    """R prompts in the order of their images. Lists are on the host, so that the device is never asked.

    images: image of each row; kinds: what the row began with, "box" | "point" | "both"; counts: its objects.
    image_index, object_index: `(R,)` long, where its (first) object stands in a batch's `(B, N, ...)` tensors.
    boxes: `(R, Nb, 4)` xyxy in 0..1 of the square; box_mask: `(R, Nb)` bool, True = no box.
    points: `(R, Np, 2)` xy; point_labels: `(R, Np)` long, 1 on the object, 0 off it; point_mask: `(R, Np)` bool.
    """

    images: list[int]
    kinds: list[str]
    counts: list[int]
    image_index: Tensor
    object_index: Tensor
    boxes: Tensor
    box_mask: Tensor
    points: Tensor
    point_labels: Tensor
    point_mask: Tensor

    @classmethod
    def from_batch(cls, batch: GeometryBatch, layout: str) -> PromptRows:
        """The prompts that `batch.kinds` asks for: a row for each object, or (`per_image`) one for all of an image."""
        if layout not in LAYOUTS:
            raise ValueError(f"prompt layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
        if layout == "per_image":
            return cls._of_images(batch)
        return cls.of_objects(batch, [(i, j, k) for i, kinds in enumerate(batch.kinds) for j, k in enumerate(kinds)])

    @classmethod
    def of_objects(cls, batch: GeometryBatch, entries: Sequence[Entry]) -> PromptRows:
        """One row for each entry (image, object, kind); images ascend."""
        images, kinds = [image for image, _, _ in entries], [kind for _, _, kind in entries]
        device = batch.boxes.device
        image, item = _to_device(images, device), _to_device([item for _, item, _ in entries], device)
        return cls(
            *(images, kinds, [1] * len(entries), image, item),
            *(batch.boxes[image, item][:, None], _lacks(kinds, "point", device)),
            *(batch.points[image, item][:, None], batch.point_labels[image, item][:, None]),
            _lacks(kinds, "box", device),
        )

    @classmethod
    def _of_images(cls, batch: GeometryBatch) -> PromptRows:
        images = [image for image, kinds in enumerate(batch.kinds) if kinds]
        kinds = [batch.kinds[image][0] for image in images]  # one kind for all objects of an image
        device = batch.boxes.device
        image = _to_device(images, device)
        padding = batch.prompt_mask[image]
        return cls(
            *(images, kinds, [len(batch.kinds[i]) for i in images], image, torch.zeros_like(image)),
            *(batch.boxes[image], padding | _lacks(kinds, "point", device)),
            *(batch.points[image], batch.point_labels[image], padding | _lacks(kinds, "box", device)),
        )

    def __len__(self) -> int:
        return len(self.images)

    def chunks(self, size: int) -> Iterator[PromptRows]:
        """Consecutive rows, at most `size` at a time: views, without the columns that none of these rows uses."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            columns = max(self.counts[rows])
            boxes = columns if any(kind != "point" for kind in self.kinds[rows]) else 0
            points = columns if any(kind != "box" for kind in self.kinds[rows]) else 0
            yield PromptRows(
                *(self.images[rows], self.kinds[rows], self.counts[rows]),
                *(self.image_index[rows], self.object_index[rows]),
                *(self.boxes[rows, :boxes], self.box_mask[rows, :boxes]),
                *(self.points[rows, :points], self.point_labels[rows, :points], self.point_mask[rows, :points]),
            )

    def take(self, kept: Sequence[int]) -> PromptRows:
        """Some of the rows, in their order."""
        if len(kept) == len(self):
            return self
        index = _to_device(kept, self.image_index.device)
        values = vars(self).items()
        return PromptRows(**{k: v[index] if isinstance(v, Tensor) else [v[row] for row in kept] for k, v in values})

    def with_points(self, points: Tensor, labels: Tensor, mask: Tensor) -> PromptRows:
        """The same prompts with points `(R, K, 2)`, labels `(R, K)`, mask `(R, K)` True = no point, behind their own.

        Valid points of `mask` stand in front.
        """
        old, new = (
            torch.cat((xy, label[..., None].to(xy.dtype)), dim=-1)  # the label travels with its point
            for xy, label in ((self.points, self.point_labels), (points, labels))
        )
        joined, joined_mask = concat_padded(old, self.point_mask, new, mask)
        return replace(self, points=joined[..., :2], point_labels=joined[..., 2].long(), point_mask=joined_mask)

    def to_prompt(self) -> Prompt:
        """As the geometry encoder takes it; boxes, or points, of which there are none are left out."""
        fields: dict[str, Tensor] = {}
        if self.boxes.shape[1]:
            fields |= {"box_embeddings": box_xyxy_to_cxcywh(self.boxes).transpose(0, 1), "box_mask": self.box_mask}
        if self.points.shape[1]:
            fields |= {"point_embeddings": self.points.transpose(0, 1), "point_mask": self.point_mask}
            fields |= {"point_labels": self.point_labels.T}
        return Prompt(**fields)


def _lacks(kinds: Sequence[str], other: str, device: torch.device) -> Tensor:
    """(R, 1) bool: the rows that are of the `other` kind only."""
    return _to_device([[kind == other] for kind in kinds], device).view(len(kinds), 1).bool()


def _to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Long tensor of host values; the copy to an accelerator waits for nothing."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


class FrozenPath:
    """From the trunk's grid to masks, without a trunk, and with the text's tokens given.

    No `nn.Module`, so that a module that keeps one does not own its weights.
    """

    def __init__(self, heads: Sam3Image, text: dict[str, Tensor] | None = None) -> None:
        """
        Args:
            heads: see `build_sam3_heads`.
            text: language_features `(L, 1, D)` and language_mask `(1, L)`; None: prompts have no text tokens at all.
        """
        self.heads = heads.eval().requires_grad_(False)
        width = heads.transformer.decoder.query_embed.weight.shape[1]
        if text is None:
            empty = torch.zeros(0, 1, width), torch.zeros(1, 0, dtype=torch.bool)
            text = dict(zip(("language_features", "language_mask"), empty, strict=True))
        found = tuple(text["language_features"].shape)
        if found != (text["language_mask"].shape[1], 1, width):
            raise ValueError(
                f"text features have shape {found} and mask {tuple(text['language_mask'].shape)}, wanted "
                f"(L, 1, {width}) and (1, L); they are of another SAM3 file"
            )
        self.text = {name: tensor.to(heads.device) for name, tensor in text.items()}

    def features(self, grid: Tensor) -> list[dict[str, Any]]:
        """Grid `(B, C, G, G)` -> for each image its pyramid and the text, as `Sam3Image` names them.

        The three levels `(1, D, kG, kG)`, k = 4, 2, 1, are views. Split once, images get their gradients without a
        batch of zeros around each.
        """
        out = self.heads.backbone.forward_image(grid)
        positions = [position[:1] for position in out["vision_pos_enc"]]  # the same for every image
        pyramids = zip(*(level.split(1) for level in out["backbone_fpn"]), strict=True)
        return [{"backbone_fpn": list(levels), "vision_pos_enc": positions, **self.text} for levels in pyramids]

    def predict(self, features: Sequence[dict[str, Any]], rows: PromptRows) -> dict[str, Any]:
        """All outputs but masks (see `Sam3Image.predict_boxes`) for rows of the images in `features`.

        Rows of one image share its pyramid; for rows of several, theirs are joined, which costs a copy.
        """
        first, last = rows.images[0], rows.images[-1]
        seen = features[first]
        if first < last:
            pyramids = zip(*(image["backbone_fpn"] for image in features[first : last + 1]), strict=True)
            seen = {**seen, "backbone_fpn": [torch.cat(levels) for levels in pyramids]}
        find_input = FindStage(rows.image_index - first, torch.zeros_like(rows.image_index))
        return self.heads.predict_boxes(seen, find_input, rows.to_prompt())

    def masks(self, out: dict[str, Any], queries: Tensor | None = None) -> Tensor:
        """Mask logits `(R, K, M, M)` of `queries` `(R, K)` for the result of `predict`; left out, of all Q."""
        return self.heads.predict_masks(out, queries)["pred_masks"]


def visual_text_features(
    sam3_checkpoint: str | Path, sha256: str, folder: str | Path, store: bool = True
) -> dict[str, Tensor]:
    """What SAM3's text encoder makes of the phrase that stands beside boxes and points, for `FrozenPath`.

    Computed once and stored beside the checkpoint or, where that place cannot be written to, in `folder`; later calls
    read the file and leave the text encoder alone. Every process of a run must call this.

    Args:
        sha256: of the checkpoint.
        store: False writes nothing, as a dry run must, and computes them if no file has them yet.

    Raises:
        ValueError: a stored file of another checkpoint or shape; a checkpoint without its text encoder.
    """
    name = f"visual_text_{sha256[:16]}.safetensors"
    places = [Path(sam3_checkpoint).parent / name, Path(folder) / name]
    with main_first():
        for place in places:
            if place.is_file():
                return _read_text(place, sha256)
        text = encode_phrase(sam3_checkpoint, VISUAL_PROMPT)
        if not store:
            return text
        meta = {"phrase": VISUAL_PROMPT, "sam3_sha256": sha256}
        try:
            save_weights(places[0], text, meta)
        except OSError as error:
            log.info("%s; the text features go to %s", error, places[1])
            save_weights(places[1], text, meta)
        return text


def _read_text(path: Path, sha256: str) -> dict[str, Tensor]:
    file = load_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    length, _, width = shapes.get("language_features", (0, 0, 0))
    wanted = {"language_features": (length, 1, width), "language_mask": (1, length)}
    if shapes != wanted or not length or file.meta != {"phrase": VISUAL_PROMPT, "sam3_sha256": sha256}:
        raise ValueError(
            f"{path} holds {shapes} of {file.meta}; wanted the features of {VISUAL_PROMPT!r} by the text encoder with "
            f"sha256 {sha256}; remove the file, it will be written again"
        )
    return file.tensors
