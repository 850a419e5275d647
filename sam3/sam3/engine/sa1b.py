"""SA-1B: `images/<split>/<key>.jpg` with `annotations/<split>/<key>.json` beside them.

Letters: `N` objects of one picture, `H W` its rows and columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from sam3.engine.image_list import ImageList, scan_images


def list_sa1b(root: str | Path, split: str) -> ImageList:
    """Pictures of `split` (`train` or `val`) below `root`, sorted by key = file name without suffix.

    Where `annotations/<split>` exists, pictures without a JSON file there are left out and counted as `skipped`; where
    it does not, all are used. No JSON file is opened. Raises FileNotFoundError if nothing is left.
    """
    root = Path(root)
    images, annotations = root / "images" / split, root / "annotations" / split
    if not images.is_dir():
        raise FileNotFoundError(
            f"no folder {images}; arrange the pictures with data/reorg_sa1b.py, or set DATA.DATA_PATH to the folder "
            "that holds images/train"
        )
    items = list(scan_images(images))
    found = len(items)
    if annotations.is_dir():
        annotated = {name[: -len(".json")] for name in os.listdir(annotations) if name.endswith(".json")}  # noqa: PTH208
        items = [item for item in items if item[0] in annotated]
    if not items:
        reason = f"; the {found} there have no JSON file in {annotations}" if found else ""
        raise FileNotFoundError(f"no pictures to use in {images}{reason}")
    prefix = f"images/{split}/"
    return ImageList.build(root, ((stem, prefix + name) for stem, name in items), found - len(items))


def annotation_path(root: str | Path, split: str, key: str) -> Path:
    """Where the annotations of `key` lie."""
    return Path(root) / "annotations" / split / f"{key}.json"


@dataclass
class ImageAnnotations:
    """The objects of one picture.

    boxes: float `(N, 4)` xyxy in pixels; points: float `(N, 2)` xy in pixels, NaN where the file states none;
    areas: float `(N,)` in pixels; predicted_iou, stability_score: float `(N,)` in 0..1, NaN where not stated;
    segmentations: as in the file, decoded by `masks`. source names the file in messages.
    """

    source: Path
    height: int
    width: int
    boxes: Tensor
    points: Tensor
    areas: Tensor
    predicted_iou: Tensor
    stability_score: Tensor
    segmentations: list[Any]

    def __len__(self) -> int:
        return len(self.segmentations)

    def masks(self, indices: Sequence[int] | None = None) -> Tensor:
        """Masks of the objects `indices` (default: all), bool `(len(indices), H, W)`. ValueError names a bad one."""
        indices = range(len(self)) if indices is None else indices
        masks = torch.zeros(len(indices), self.height, self.width, dtype=torch.bool)
        for row, index in enumerate(indices):
            try:
                mask = decode_segmentation(self.segmentations[index], self.height, self.width)
            except Exception as error:  # pycocotools raises many types; all mean that this entry is damaged
                raise ValueError(f"segmentation {index} of {self.source} cannot be decoded: {error}") from error
            masks[row] = torch.from_numpy(mask)
        return masks


def read_annotations(path: str | Path) -> ImageAnnotations:
    """The annotation file at `path`; no annotations at all are fine. ValueError names a file that is damaged."""
    path = Path(path)
    try:
        document = json.loads(path.read_bytes())
        image = document["image"]
        return build_annotations(path, int(image["height"]), int(image["width"]), document["annotations"])
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"annotation file {path} is damaged: {reason}; fetch it again") from error


def build_annotations(source: Path, height: int, width: int, entries: Sequence[Mapping[str, Any]]) -> ImageAnnotations:
    """From annotation entries in COCO's form (bbox xywh, segmentation), with SA-1B's extra fields where they exist."""
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    unknown = float("nan")
    points = [(entry.get("point_coords") or [[unknown, unknown]])[0] for entry in entries]
    columns = {
        name: torch.tensor([entry.get(name, unknown) for entry in entries], dtype=torch.float32)
        for name in ("area", "predicted_iou", "stability_score")
    }
    return ImageAnnotations(
        source=source,
        height=height,
        width=width,
        boxes=boxes,
        points=torch.tensor(points, dtype=torch.float32).reshape(-1, 2),
        areas=columns["area"],
        predicted_iou=columns["predicted_iou"],
        stability_score=columns["stability_score"],
        segmentations=[entry["segmentation"] for entry in entries],
    )


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask, bool `(H, W)`, from COCO's compressed RLE, uncompressed RLE (a list of counts) or polygons."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)) if segmentation else None
        return np.zeros((height, width), bool) if rle is None else coco_mask.decode(rle).astype(bool)
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size {segmentation['size']} is not the picture's {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise ValueError(f"its runs cover {sum(counts)} pixels, the picture has {height * width}")
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return coco_mask.decode(rle).astype(bool)
