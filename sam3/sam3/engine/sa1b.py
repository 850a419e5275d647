"""SA-1B: `images/<split>/<key>.jpg` with `annotations/<split>/<key>.json` beside them.

Masks are handled as the runs they are stored in: pixels are counted down the first column, then down the second, and so
on, and the lengths of stretches outside and inside the object take turns, beginning outside (maybe with 0).

Letters: `N` objects of one picture, `H W` its rows and columns, `R` runs of a mask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from sam3.engine.image_list import ImageList, scan_images

MAX_SIDE = 65535  # of a picture: what a JPEG can state
MIN_SIDE_PX = 1.0  # of a box
UNKNOWN = float("nan")


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
        annotated = _json_stems(annotations)
        items = [item for item in items if item[0] in annotated]
    if not items:
        reason = f"; the {found} there have no JSON file in {annotations}; add the files" if found else ""
        raise FileNotFoundError(f"no pictures to use in {images}{reason}")
    prefix = f"images/{split}/"
    return ImageList.build(root, ((stem, prefix + name) for stem, name in items), found - len(items))


def list_unannotated(root: str | Path, split: str) -> list[str]:
    """Keys of the pictures of `split` without a JSON file, sorted: those that `list_sa1b` leaves out."""
    images, annotations = Path(root) / "images" / split, Path(root) / "annotations" / split
    annotated = _json_stems(annotations) if annotations.is_dir() else set()
    return sorted(stem for stem, _ in scan_images(images) if stem not in annotated)


def _json_stems(folder: Path) -> set[str]:
    return {name[: -len(".json")] for name in os.listdir(folder) if name.endswith(".json")}  # noqa: PTH208


def annotation_path(root: str | Path, split: str, key: str) -> Path:
    """Where the annotations of `key` lie."""
    return Path(root) / "annotations" / split / f"{key}.json"


@dataclass
class ImageAnnotations:
    """The objects of one picture.

    boxes: float `(N, 4)` xyxy in pixels; points: float `(N, 2)` xy in pixels, NaN where the file states none;
    areas: float `(N,)` in pixels; predicted_iou, stability_score: float `(N,)` in 0..1, NaN where not stated;
    segmentations: as in the file, read by `runs`. source names the file in messages.
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
    _runs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.segmentations)

    def runs(self, index: int) -> np.ndarray:
        """Run lengths of the mask of object `index`, int64 `(R,)`, read once. ValueError names a damaged one."""
        if index not in self._runs:
            try:
                self._runs[index] = run_lengths(self.segmentations[index], self.height, self.width)
            except Exception as error:  # pycocotools raises many types; all mean that this entry is damaged
                raise ValueError(
                    f"segmentation {index} of {self.source} cannot be decoded: {error}; fetch the file again"
                ) from error
        return self._runs[index]

    def rle(self, index: int) -> dict[str, Any]:
        """The mask of object `index` as pycocotools takes it, compressed. ValueError names a damaged one."""
        runs, segmentation, size = self.runs(index), self.segmentations[index], [self.height, self.width]
        if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects({"size": size, "counts": runs.tolist()}, *size)
        counts = segmentation["counts"]
        return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}


def read_annotations(path: str | Path) -> ImageAnnotations:
    """The annotation file at `path`; no annotations at all are fine. ValueError names a file that is damaged,
    FileNotFoundError one that is missing.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no annotation file {path}; fetch it, or remove its picture") from error
    with naming_damage(path):
        document = json.loads(text)
        image, entries = document["image"], document["annotations"]
        height, width = image["height"], image["width"]
        if not isinstance(entries, list):
            raise TypeError(f"its annotations are a {type(entries).__name__}, wanted a list")
    return build_annotations(path, height, width, entries)


def read_phrases(path: str | Path) -> list[tuple[str, list[int]]]:
    """Phrases of an annotation file of data/make_sample_sa1b.py --scenes, each with the places of the objects that it
    means, none for a phrase that is true of nothing; [] for a file without any, such as SA-1B's own. Raises as
    `read_annotations`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}; fetch it, or remove its picture")
    with naming_damage(path):
        document = json.loads(path.read_bytes())
        places = {entry.get("id"): place for place, entry in enumerate(document["annotations"])}
        return [(str(phrase["text"]), [places[i] for i in phrase["ids"]]) for phrase in document.get("phrases", ())]


def build_annotations(source: Path, height: int, width: int, entries: Sequence[Mapping[str, Any]]) -> ImageAnnotations:
    """From annotation entries in COCO's form (bbox xywh, segmentation), with SA-1B's extra fields where they exist.

    source names the file in messages. ValueError for sides below 1 or above MAX_SIDE and for damaged entries.
    """
    with naming_damage(source):
        boxes = _table("bbox", [entry["bbox"] for entry in entries], 4)
        boxes[:, 2:] += boxes[:, :2]
        # SA-1B lists the points that its mask was made with; one was enough.
        points = [(entry.get("point_coords") or [[UNKNOWN, UNKNOWN]])[0] for entry in entries]
        columns = {
            name: _table(name, [entry.get(name, UNKNOWN) for entry in entries])
            for name in ("area", "predicted_iou", "stability_score")
        }
        return ImageAnnotations(
            source=source,
            height=whole_side("height", height),
            width=whole_side("width", width),
            boxes=boxes,
            points=_table("point_coords", points, 2),
            areas=columns["area"],
            predicted_iou=columns["predicted_iou"],
            stability_score=columns["stability_score"],
            segmentations=[entry["segmentation"] for entry in entries],
        )


@contextmanager
def naming_damage(source: Path) -> Iterator[None]:
    """Turns whatever a damaged file leads to into a ValueError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"annotation file {source} is damaged: {reason}; fetch it again") from error


def whole_side(name: str, value: Any) -> int:
    """A side of a picture in pixels as a file states it, maybe as 848.0. ValueError unless whole and 1..MAX_SIDE."""
    if not (isinstance(value, (int, float)) and 1 <= value <= MAX_SIDE and value == int(value)):
        raise ValueError(f"its {name} is {value!r}, wanted a whole number from 1 to {MAX_SIDE}")
    return int(value)


def _table(name: str, rows: Sequence[Any], *row: int) -> Tensor:
    """One row of shape `row` for each object: float32 `(N, *row)`. ValueError if the file has another shape."""
    table = torch.tensor(rows, dtype=torch.float32) if rows else torch.zeros(0, *row)
    if table.shape != (len(rows), *row):
        raise ValueError(f"its {name} have the shape {tuple(table.shape)}, wanted {(len(rows), *row)}")
    return table


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Boxes `(N, 4)` xyxy in pixels, cut at the edges of a picture of `image_size` `(H, W)`; NaN if not finite."""
    height, width = image_size
    finite = np.isfinite(boxes).all(1)
    return np.where(finite[:, None], np.clip(boxes, 0, [width, height, width, height]), np.nan)


def is_usable(boxes: np.ndarray) -> np.ndarray:
    """Which boxes `(N, 4)`, in pixels, have sides of at least MIN_SIDE_PX: bool `(N,)`; NaN has not."""
    return (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE_PX).all(1)


def drop_outside(points: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Points `(N, 2)` xy in pixels, NaN for those beyond a picture of `image_size` `(H, W)`."""
    height, width = image_size
    inside = ((points >= 0) & (points <= [width, height])).all(1)
    return np.where(inside[:, None], points, np.nan)


def run_lengths(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Run lengths, int64 `(R,)`, of COCO's compressed RLE, uncompressed RLE (a list of counts) or polygons.

    They are checked to cover the picture exactly; ValueError otherwise. (pycocotools does not check, and never ends
    merging two masks that cover different numbers of pixels.)
    """
    if isinstance(segmentation, list):
        if not segmentation:
            return np.array([height * width])
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size {segmentation['size']} is not the picture's {[height, width]}")
    counts = segmentation["counts"]
    runs = np.array(counts, dtype=np.int64) if isinstance(counts, list) else _parse_counts(counts)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"its runs cover {runs.sum()} pixels, the picture has {height * width}")
    return runs


def decode_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole mask of run lengths that cover `height` x `width` pixels: bool `(H, W)`."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _parse_counts(counts: str | bytes) -> np.ndarray:
    """COCO's compressed counts: five bits a character, lowest first, bit 5 = more follow, the last one's bit 4 = sign.

    From the fourth number on, each stands for the difference to the one before the previous.
    """
    bits = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)
    if not len(ends) or ends[-1] != len(bits) - 1 or bits.min() < 0 or bits.max() > 63:
        raise ValueError("its counts are cut off or hold characters that are none of theirs")
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > 12:
        raise ValueError("its counts hold a number beyond 60 bits")
    starts = ends - lengths + 1
    place = np.arange(len(bits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((bits & 31) << (5 * place), starts)
    numbers -= np.where(bits[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def sample_runs(runs: np.ndarray, height: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The mask at pixels `rows` x `columns` (integers, rows ascending): bool `(len(rows), len(columns))`.

    The rest is not decoded: each run says how many of these pixels it covers.
    """
    columns, where = np.unique(columns, return_inverse=True)
    places = columns[:, None] * height + rows
    before = np.searchsorted(places.ravel(), np.cumsum(runs), side="left")  # how many lie before the end of each run
    return np.repeat(np.arange(len(runs)) % 2 == 1, np.diff(before, prepend=0)).reshape(places.shape)[where].T


def pixel_of_runs(runs: np.ndarray, height: int, share: float) -> tuple[int, int] | None:
    """Row and column of the object's pixel that comes after `share` (in [0, 1)) of them; None for an empty mask."""
    inside = np.cumsum(runs[1::2])
    if not len(inside) or inside[-1] == 0:
        return None
    number = int(share * inside[-1])
    stretch = int(np.searchsorted(inside, number, side="right"))
    # The stretch ends where it and all runs before it do; `number` is so many pixels before that.
    place = int(runs[: 2 * stretch + 2].sum() - (inside[stretch] - number))
    column, row = divmod(place, height)
    return row, column
