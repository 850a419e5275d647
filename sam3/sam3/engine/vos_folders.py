"""Videos whose masks are pictures: SA-V val and test, and DAVIS 2017.

`sav`:   JPEGImages_24fps/<video>/00000.jpg ..., Annotations_6fps/<video>/<object>/00000.png, 00004.png ..., one binary
         mask per object, so that objects may overlap; sav_<split>.txt lists the videos.
`davis`: JPEGImages/480p/<video>/00000.jpg ..., Annotations/480p/<video>/00000.png ..., where the pixel's number is the
         object; ImageSets/2017/<split>.txt lists the videos.

Letters: `H W` rows and columns of a frame.
Source: Ravi et al., SAM 2, 2024; Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, 2017.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from sam3.engine.sav import VideoFolder, require_plain_names, shown

MASK_SUFFIXES = (".png",)
DAVIS_RESOLUTION = "480p"
DAVIS_VOID = 255  # pixels that belong to nobody knows whom


@dataclass
class AnnotatedVideo(ABC):
    """One video. frames: its pictures; annotations: the folder of its masks. Nothing is read before it is asked for."""

    name: str
    frames: VideoFolder
    annotations: Path

    @property
    @abstractmethod
    def objects(self) -> tuple[str, ...]:
        """Names of the objects, as the annotations have them: `000` (folder) or `1` (pixel value)."""

    @property
    @abstractmethod
    def annotated(self) -> tuple[int, ...]:
        """Frames for which any object has a mask file, ascending. FileNotFoundError if one of them is not there."""

    @abstractmethod
    def numbers_of(self, index: int) -> tuple[int, ...]:
        """Frames for which object `index` has a mask file, ascending."""

    @abstractmethod
    def mask(self, number: int, index: int) -> np.ndarray | None:
        """Object `index` in frame `number`: bool `(H, W)`, all False where it is absent; None without a mask file.

        ValueError names a mask that is damaged, no label picture, or of another size than the first one.
        """

    @property
    def num_objects(self) -> int:
        return len(self.objects)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the masks, from the first one's file."""
        path = self._first_mask()
        try:
            with Image.open(path) as picture:
                return picture.height, picture.width
        except OSError as error:
            raise ValueError(f"mask {path} is damaged: {error}; fetch it again") from error

    def visible(self, number: int) -> list[int]:
        """Objects known to be in frame `number`."""
        masks = ((index, self.mask(number, index)) for index in range(self.num_objects))
        return [index for index, mask in masks if mask is not None and mask.any()]

    @abstractmethod
    def _first_mask(self) -> Path:
        """Any mask file of this video."""


@dataclass
class ObjectFolders(AnnotatedVideo):
    """One folder of binary masks for each object."""

    @cached_property
    def _folders(self) -> tuple[VideoFolder, ...]:
        names = _subfolders(self.annotations)
        if not names:
            raise FileNotFoundError(f"no folders of objects in {self.annotations}; fetch the annotations again")
        return tuple(VideoFolder(f"{self.name}/{name}", self.annotations / name, MASK_SUFFIXES) for name in names)

    @cached_property
    def objects(self) -> tuple[str, ...]:
        return tuple(folder.folder.name for folder in self._folders)

    @cached_property
    def annotated(self) -> tuple[int, ...]:
        numbers = tuple(sorted({number for folder in self._folders for number in folder.numbers}))
        self.frames.require(numbers, self.annotations)
        return numbers

    def numbers_of(self, index: int) -> tuple[int, ...]:
        return self._folders[index].numbers

    def mask(self, number: int, index: int) -> np.ndarray | None:
        folder = self._folders[index]
        return read_labels(folder.path(number), self.size) > 0 if number in folder.numbers else None

    def _first_mask(self) -> Path:
        return self._folders[0].path(self._folders[0].numbers[0])


@dataclass
class LabelPictures(AnnotatedVideo):
    """One picture of labels for each annotated frame. The objects are those of the first one, as DAVIS has it."""

    _last: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    @cached_property
    def _labels(self) -> VideoFolder:
        return VideoFolder(self.name, self.annotations, MASK_SUFFIXES)

    @cached_property
    def objects(self) -> tuple[str, ...]:
        values = np.unique(self._read(self._labels.numbers[0]))
        return tuple(str(value) for value in values if value not in (0, DAVIS_VOID))

    @cached_property
    def annotated(self) -> tuple[int, ...]:
        self.frames.require(self._labels.numbers, self.annotations)
        return self._labels.numbers

    def numbers_of(self, index: int) -> tuple[int, ...]:
        if not 0 <= index < self.num_objects:
            raise IndexError(f"{self.name} has {self.num_objects} objects, asked for number {index}")
        return self._labels.numbers

    def mask(self, number: int, index: int) -> np.ndarray | None:
        value = int(self.objects[index])
        return self._read(number) == value if number in self._labels.numbers else None

    def _read(self, number: int) -> np.ndarray:
        # All objects of a frame are asked for one after the other.
        if self._last is None or self._last[0] != number:
            self._last = number, read_labels(self._labels.path(number), self.size)
        return self._last[1]

    def _first_mask(self) -> Path:
        return self._labels.path(self._labels.numbers[0])


def list_annotated_videos(root: str | Path, split: str, layout: str = "sav") -> list[AnnotatedVideo]:
    """The videos of `split` (val, test; DAVIS also train, test-dev) in the order of its list; layout: sav or davis.

    root: for `sav` the folder that holds sav_<split>/, or that one itself; for `davis` the one that holds JPEGImages/.
    Raises FileNotFoundError naming what is missing, ValueError for another layout or names that are no plain names.
    """
    root = Path(root)
    if layout == "sav":
        base = root / f"sav_{split}" if (root / f"sav_{split}").is_dir() else root
        listing, kind = base / f"sav_{split}.txt", ObjectFolders
        frames, annotations = base / "JPEGImages_24fps", base / "Annotations_6fps"
    elif layout == "davis":
        listing, kind = root / "ImageSets" / "2017" / f"{split}.txt", LabelPictures
        frames, annotations = root / "JPEGImages" / DAVIS_RESOLUTION, root / "Annotations" / DAVIS_RESOLUTION
    else:
        raise ValueError(f"layout {layout!r} is unknown; choose sav or davis")
    for folder in (frames, annotations):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; wanted the {layout} layout: name the folder above it")
    if not listing.is_file():
        raise FileNotFoundError(f"no list of videos {listing}; it comes with the data set: check the split's name")
    names = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    require_plain_names(names, listing)
    if not names:
        raise ValueError(f"{listing} names no videos; fetch it again")
    for folder in (frames, annotations):
        there = set(_subfolders(folder))
        if missing := [name for name in names if name not in there]:
            raise FileNotFoundError(f"of {len(names)} videos in {listing}, {shown(missing)} are not in {folder}")
    return [kind(name, VideoFolder(name, frames / name), annotations / name) for name in names]


def read_labels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Pixel values of a one-channel picture, palette or not: bool or uint8 `(H, W)` = `size`; ValueError otherwise."""
    try:
        with Image.open(path) as picture:
            mode, labels = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"mask {path} is damaged: {error}; fetch it again") from error
    if labels.ndim != 2:
        raise ValueError(f"mask {path} is {mode}, wanted one number per pixel (modes 1, L, P); convert it")
    if labels.shape != size:
        raise ValueError(
            f"mask {path} has {labels.shape} rows and columns, the video's first one {size}; fetch it again"
        )
    return labels


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no folder {folder}; check the path") from error
