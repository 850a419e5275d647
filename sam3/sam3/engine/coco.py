"""COCO and LVIS: one JSON file per split in `annotations/`, all pictures in `trainval/`."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3.engine.image_list import ImageList
from sam3.engine.sa1b import ImageAnnotations, build_annotations

ANNOTATION_FILES = {
    "coco": "instances_{split}2017.json",
    "lvis": "lvis_v1_{split}.json",
    "cocofied_lvis": "lvis_v1_{split}_cocofied.json",
}
IMAGE_FOLDER = "trainval"


@dataclass
class CocoSplit:
    """images: the pictures, key = file name; entries: per key its annotations as in the file, crowds left out."""

    images: ImageList
    entries: dict[str, list[dict[str, Any]]]
    sizes: dict[str, tuple[int, int]]
    source: Path

    def annotations(self, key: str) -> ImageAnnotations:
        """The objects of one picture. KeyError if it is not in this split."""
        return build_annotations(self.source, *self.sizes[key], self.entries[key])


def list_coco(root: str | Path, split: str, dataset: str = "coco") -> ImageList:
    """The pictures of `read_coco`."""
    return read_coco(root, split, dataset).images


def read_coco(root: str | Path, split: str, dataset: str = "coco") -> CocoSplit:
    """Read `annotations/<file of dataset and split>` below `root`; dataset: coco, lvis or cocofied_lvis.

    Pictures without annotations (crowds do not count) are left out and counted as skipped; file names listed in
    `annotations/ignore.json`, if it exists, are left out too. Raises FileNotFoundError for a missing JSON file or
    picture folder, ValueError naming the file if it is damaged or names pictures that are not there.
    """
    root = Path(root)
    if dataset not in ANNOTATION_FILES:
        raise ValueError(f"dataset {dataset!r} is unknown; choose one of {', '.join(ANNOTATION_FILES)}")
    source = root / "annotations" / ANNOTATION_FILES[dataset].format(split=split)
    document = _read_json(source)
    ignore_path = source.with_name("ignore.json")
    ignored = set(_read_json(ignore_path)) if ignore_path.exists() else set()
    try:
        names = {image["id"]: _file_name(image) for image in document["images"]}
        sizes = {names[image["id"]]: (int(image["height"]), int(image["width"])) for image in document["images"]}
        entries: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in document["annotations"]:
            if not entry.get("iscrowd", 0):
                entries[names[entry["image_id"]]].append(entry)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} is not a COCO annotation file: no entry {error}") from error
    wanted = set(names.values()) - ignored
    used = sorted(name for name in wanted if name in entries)
    _require_pictures(root / IMAGE_FOLDER, used, source)
    images = ImageList.build(root, ((name, f"{IMAGE_FOLDER}/{name}") for name in used), len(wanted) - len(used))
    if not len(images):
        raise ValueError(f"{source} has no picture with annotations")
    return CocoSplit(images, dict(entries), sizes, source)


def _file_name(image: dict[str, Any]) -> str:
    """LVIS states no file name, only the address, whose last part it is."""
    return image["file_name"] if "file_name" in image else image["coco_url"].rsplit("/", 1)[-1]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}; set DATA.DATA_PATH to the folder that holds annotations/") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; fetch it again") from error


def _require_pictures(folder: Path, names: list[str], source: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; {source.name} wants its pictures there")
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries}
    missing = [name for name in names if name not in present and not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures of {source} are not in {folder}, such as {missing[0]}"
        )
