"""Which pictures of SA-1B there are, in the order of their numbers, and which of them validate."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sam3.engine.image_list import SPLITS, ImageList

# Folders of pictures, and where the JSON files of each lie: the plan's flat layout, and the sorted one.
IMAGES, ANNOTATIONS = "images", "annotations"
LAYOUTS = (
    ("", ""),
    (IMAGES, ANNOTATIONS),
    *((f"{IMAGES}/{split}", f"{ANNOTATIONS}/{split}") for split in SPLITS),
)
PICTURE_NAME = re.compile(r"(sa_([0-9]{1,18})(?![0-9]).*)\.(?i:jpe?g)", re.DOTALL)  # more digits fit in no int64


@dataclass(frozen=True)
class Pictures(ImageList):
    """Pictures below `root`, by number rather than by key; their keys are file names without suffix, such as
    `sa_223750`. skipped: pictures of the whole folder left out for want of a JSON file."""

    @classmethod
    def by_number(cls, root: Path, files: Iterable[str], skipped: int = 0) -> Pictures:
        """files: relative to `root`, in any order, their names as PICTURE_NAME has them. ValueError if two have the
        same key or a name is not UTF-8."""
        files = sorted(files, key=_key)
        keys = [_key(file) for file in files]
        for row, (key, other) in enumerate(itertools.pairwise(keys)):
            if key == other:
                raise ValueError(
                    f"{root} holds two pictures for the key {key!r}: {files[row]} and {files[row + 1]}; remove one"
                )
        order = np.argsort([int(PICTURE_NAME.fullmatch(_name(file))[2]) for file in files], kind="stable")
        try:
            columns = [np.array([text.encode() for text in column], dtype=np.bytes_) for column in (keys, files)]
        except UnicodeEncodeError as error:
            raise ValueError(f"the file name {error.object!r} in {root} is not UTF-8; rename it") from error
        return cls(root, *(column[order] for column in columns), skipped)

    def annotation_path(self, index: int) -> Path:
        """Where the annotations of picture `index` lie, if it has any."""
        file = PurePosixPath(self._files[index].decode())
        if file.parts[0] == IMAGES:
            file = PurePosixPath(ANNOTATIONS, *file.parts[1:])
        return self.root / file.with_suffix(".json")

    def part(self, start: int, stop: int | None = None) -> Pictures:
        """Pictures `start` to `stop` (left out), as a slice takes them."""
        return self._take(slice(start, stop))


def scan_sa1b(folder: str | Path, require_json: bool = True) -> Pictures:
    """The pictures `sa_<number>*.jpg` of a folder, by number (which is not zero-padded), then by name.

    They lie in `folder` with their JSON files beside them, in `images/` with `annotations/`, or in `images/{train,val}`
    with `annotations/{train,val}`; whatever exists is taken together, since `split_pictures` divides by number.
    require_json: leave out pictures without a JSON file and count them as `skipped`. Only names are read: a million
    take seconds. Raises FileNotFoundError if no picture is left, ValueError if two have the same key.
    """
    root = Path(folder)
    fetch = (
        "fetch SA-1B with LINKS=links.txt bash data/download_sa1b.sh and sort it with python data/reorg_sa1b.py "
        f"--output {root}, or name its folder (--data)"
    )
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; {fetch}")
    files, found = [], 0
    for images, jsons in LAYOUTS:
        every = _names(root / images)
        names = list(filter(PICTURE_NAME.fullmatch, every))
        found += len(names)
        if names and require_json:
            others = every if images == jsons else _names(root / jsons)
            annotated = {name[: -len(".json")] for name in others if name.endswith(".json")}
            names = [name for name in names if _key(name) in annotated]
        files += [f"{images}/{name}" for name in names] if images else names
    if not found:
        raise FileNotFoundError(f"no sa_<number>.jpg in {root} or its images, images/train and images/val; {fetch}")
    if not files:
        raise FileNotFoundError(
            f"none of the {found} pictures in {root} has a JSON file (beside it, or in annotations as it is in "
            "images); add the files, or use pictures without (--opts require_json=false)"
        )
    return Pictures.by_number(root, files, found - len(files))


def split_pictures(pictures: Pictures, num_val: int, num_train: int | None = None) -> tuple[Pictures, Pictures]:
    """(train, val): val is the last `num_val` pictures, train all before them.

    num_train: keep at most so many for training, the first ones; val does not change. ValueError if no picture would
    be left to train on.
    """
    assert num_val >= 1, num_val
    assert num_train is None or num_train >= 1, num_train
    rest = len(pictures) - num_val
    if rest < 1:
        raise ValueError(
            f"{pictures.root} holds {len(pictures)} pictures, and the last {num_val} are for validation, which leaves "
            "none to train on; lower num_val (--num-val) or add pictures"
        )
    return pictures.part(0, rest if num_train is None else min(num_train, rest)), pictures.part(rest)


def _name(file: str) -> str:
    return file.rpartition("/")[2]


def _key(file: str) -> str:
    """The name without folder and suffix."""
    return _name(file).rpartition(".")[0]


def _names(folder: Path) -> list[str]:
    """Names in a folder, none if it does not exist."""
    return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - a million Path objects would be slow
