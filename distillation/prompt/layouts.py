"""Pictures with the masks of their objects, from three layouts of files on disk.

folder  `<path>/image/<key>.jpg` and `<path>/mask/<key>/*.png`: a PNG for each object, which is where it exceeds 127.
sa1b    `<root>/images/<split>/<key>.jpg` and `<root>/annotations/<split>/<key>.json`, or both kinds beside each other
        in one folder, as the archives of SA-1B unpack.
coco    `<root>/annotations/instances_<split>2017.json` and `<root>/trainval/<key>.jpg`; only pictures with objects.

A data set is named by one path for each split. Of sa1b and coco it is `<root>/<split>`, whether there is such a folder
or not: `data/sample-sa1b/train` is the split `train` of `data/sample-sa1b`.

A picture's key is its file name without suffix. Masks are called like their PNG without suffix, or by their place in
the JSON file: 0, 1, ...

Letters: `H W` rows and columns of a picture.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from distillation.prompt.object_mask import ObjectMask
from sam3.engine.coco import ANNOTATION_FILES, read_coco
from sam3.engine.image_list import ImageList, scan_images
from sam3.engine.sa1b import ImageAnnotations, read_annotations
from sam3.transforms import to_rgb

LAYOUTS = ("auto", "folder", "sa1b", "coco")
FOREGROUND = 127  # a mask's pixels above it are the object
MASK_SUFFIX = ".png"
MAKE_SAMPLE = "make a sample with python data/make_sample_sa1b.py, then python data/make_sample_prompts.py"


class PromptSource(Protocol):
    """One split. Mask names are sorted as the layout has them; a picture may have none."""

    def keys(self) -> list[str]:
        """Of all pictures, sorted, those without masks included."""

    def image_path(self, key: str) -> Path:
        """Of the picture `key`. KeyError if it is not in this split."""

    def count(self, key: str) -> int:
        """How many masks a picture has: fast, and not sure to hold if its file of annotations is damaged."""

    def objects(self, key: str) -> list[str]:
        """Names of the masks of a picture. ValueError or OSError for damaged annotations."""

    def mask(self, key: str, name: str, size: tuple[int, int]) -> ObjectMask:
        """One mask. size: `(H, W)` of the picture; ValueError naming both if the mask has another, or is damaged."""


class _Pictures:
    """What the layouts share: keys and paths, as arrays, because worker processes share their memory."""

    def __init__(self, images: ImageList) -> None:
        self.images = images
        self._sorted = np.array([key.encode() for key in images.keys()])  # noqa: SIM118 - no dict

    def keys(self) -> list[str]:
        return self.images.keys()

    def image_path(self, key: str) -> Path:
        index = int(np.searchsorted(self._sorted, key.encode()))
        if index == len(self._sorted) or self._sorted[index] != key.encode():
            raise KeyError(f"no picture {key!r} in {self.images.root}")
        return self.images.path(index)


class FolderSource(_Pictures):
    """The layout `folder`; image_dir, mask_dir: its two folders."""

    def __init__(self, image_dir: Path, mask_dir: Path) -> None:
        super().__init__(_list_images(image_dir))
        self.mask_dir = mask_dir

    def count(self, key: str) -> int:
        return len(self._files(key))

    def objects(self, key: str) -> list[str]:
        files = self._files(key)
        names = [file[: -len(MASK_SUFFIX)] for file in files]
        if len(set(names)) < len(names):
            raise ValueError(f"two masks in {self.mask_dir / key} differ only in the case of their suffix; rename one")
        return names

    def mask(self, key: str, name: str, size: tuple[int, int]) -> ObjectMask:
        path = self.mask_dir / key / f"{name}{MASK_SUFFIX}"
        if not path.is_file():  # the suffix may be in capitals
            files = (file for file in self._files(key) if file[: -len(MASK_SUFFIX)] == name)
            path = path.with_name(next(files, path.name))
        levels = _read_levels(path)
        if levels.shape != size:
            raise ValueError(_sizes_differ(f"mask {path}", levels.shape, self.image_path(key), size))
        mask = levels > FOREGROUND
        if not mask.any():
            raise ValueError(
                f"mask {path} is empty: its largest value is {levels.max()}, and the object is where it exceeds "
                f"{FOREGROUND} of 255; write it again or remove it"
            )
        return ObjectMask.of_array(mask)

    def _files(self, key: str) -> list[str]:
        try:
            names = os.listdir(self.mask_dir / key)  # noqa: PTH208 - names are wanted
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if name.lower().endswith(MASK_SUFFIX) and not name.startswith("."))


class _Annotated(_Pictures, ABC):
    """Masks that come from annotations of whole pictures, of which the last one is kept."""

    _last: tuple[str, ImageAnnotations] | None = None

    def objects(self, key: str) -> list[str]:
        return [str(number) for number in range(len(self._annotations(key)))]

    def mask(self, key: str, name: str, size: tuple[int, int]) -> ObjectMask:
        annotations = self._annotations(key)
        found = annotations.height, annotations.width
        if found != size:
            raise ValueError(_sizes_differ(f"annotation file {annotations.source}", found, self.image_path(key), size))
        return ObjectMask(annotations.runs(int(name)), found)

    def _annotations(self, key: str) -> ImageAnnotations:
        if self._last is None or self._last[0] != key:
            self._last = key, self._read(key)
        return self._last[1]

    @abstractmethod
    def _read(self, key: str) -> ImageAnnotations:
        """The annotations of a picture."""


class Sa1bSource(_Annotated):
    """The layout `sa1b`: pictures of image_dir, annotated in annotation_dir, which may be the same folder."""

    def __init__(self, image_dir: Path, annotation_dir: Path) -> None:
        super().__init__(_list_images(image_dir))
        self.annotation_dir = annotation_dir

    def count(self, key: str) -> int:
        try:
            return self._path(key).read_bytes().count(b'"segmentation"')  # fifty times as fast as parsing it
        except FileNotFoundError:
            return 0

    def objects(self, key: str) -> list[str]:
        return super().objects(key) if self._path(key).exists() else []

    def _read(self, key: str) -> ImageAnnotations:
        return read_annotations(self._path(key))

    def _path(self, key: str) -> Path:
        return self.annotation_dir / f"{key}.json"


class CocoSource(_Annotated):
    """The layout `coco`; root: the folder that holds annotations/ and trainval/."""

    def __init__(self, root: Path, split: str) -> None:
        coco = read_coco(root, split)
        names = coco.images.keys()
        items = [(_stem(name), str(coco.images.path(i).relative_to(root))) for i, name in enumerate(names)]
        super().__init__(ImageList.build(root, items, coco.images.skipped))
        self._coco, self._names = coco, {_stem(name): name for name in names}

    def count(self, key: str) -> int:
        return len(self._coco.entries[self._names[key]])

    def _read(self, key: str) -> ImageAnnotations:
        return self._coco.annotations(self._names[key])


def open_split(
    path: str | Path, layout: str = "auto", image_subdir: str = "image", mask_subdir: str = "mask"
) -> PromptSource:
    """The split at `path`, see above; image_subdir and mask_subdir are names of the layout `folder`.

    layout: auto takes the first of folder, sa1b and coco that is there. FileNotFoundError if none is, or no picture;
    ValueError for two pictures with the same key.
    """
    path = Path(path).absolute()  # "." has no name
    root, split = path.parent, path.name
    assert layout in LAYOUTS, layout
    if layout == "auto":
        layout = _find_layout(path, root, split, image_subdir)
    if layout == "folder":
        return FolderSource(path / image_subdir, path / mask_subdir)
    if layout == "coco":
        return CocoSource(root, split)
    sorted_ = root / "images" / split
    return Sa1bSource(sorted_, root / "annotations" / split) if sorted_.is_dir() else Sa1bSource(path, path)


def _find_layout(path: Path, root: Path, split: str, image_subdir: str) -> str:
    coco_file = root / "annotations" / ANNOTATION_FILES["coco"].format(split=split)
    if (path / image_subdir).is_dir():
        return "folder"
    if (root / "images" / split).is_dir() or (path.is_dir() and next(scan_images(path), None)):
        return "sa1b"
    if coco_file.is_file():
        return "coco"
    raise FileNotFoundError(
        f"no data set at {path}: wanted the folder {path / image_subdir} (masks in folders beside it), "
        f"{root / 'images' / split} (SA-1B), {coco_file} (COCO), or pictures in {path} itself; set "
        f"dataset.train_dataset and dataset.val_dataset, or {MAKE_SAMPLE}"
    )


def _list_images(folder: Path) -> ImageList:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; set dataset.train_dataset and dataset.val_dataset, or {MAKE_SAMPLE}"
        )
    images = ImageList.build(folder, scan_images(folder))
    if not len(images):
        raise FileNotFoundError(f"no pictures in {folder}; add some, or {MAKE_SAMPLE}")
    return images


def _read_levels(path: Path) -> np.ndarray:
    """A mask file, uint8 `(H, W)`; of colours the strongest. ValueError naming a damaged one."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture) if picture.mode == "L" else to_rgb(picture).max(axis=2)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no mask {path}; it was there when the folder was listed: write it again") from error
    except Exception as error:  # Pillow's decoders raise many types; each of them means that this file is damaged
        raise ValueError(f"cannot read mask {path}: {error}; write it again or remove it") from error


def _sizes_differ(what: str, found: tuple[int, ...], picture: Path, size: tuple[int, int]) -> str:
    return (
        f"{what} is of {found[1]} x {found[0]} pixels, its picture {picture} of {size[1]} x {size[0]}; make them fit "
        "or remove both"
    )


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name
