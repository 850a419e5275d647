"""Which pictures there are: sorted, with unique keys, the same on every machine that sees the same files."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageList:
    """Pictures below `root`, sorted by key.

    _keys, _files: byte strings `(N,)`; files are relative to `root`. Arrays, because worker processes share their
    memory, which a list of a million Python strings would not allow.
    skipped: pictures left out for want of annotations.
    """

    root: Path
    _keys: np.ndarray
    _files: np.ndarray
    skipped: int = 0

    @classmethod
    def build(cls, root: Path, items: Iterable[tuple[str, str]], skipped: int = 0) -> ImageList:
        """items: (key, file relative to `root`) in any order. ValueError if two share a key or a name is not UTF-8."""
        pairs = sorted(items)
        for (key, file), (other, other_file) in itertools.pairwise(pairs):
            if key == other:
                raise ValueError(f"{root} holds two pictures for the key {key!r}: {file} and {other_file}; rename one")
        try:
            keys, files = (
                ([name.encode() for name in column] for column in zip(*pairs, strict=True)) if pairs else ([], [])
            )
        except UnicodeEncodeError as error:
            raise ValueError(f"the file name {error.object!r} in {root} is not UTF-8; rename it") from error
        if bad := next((key for key, _ in pairs if "\n" in key), None):
            raise ValueError(f"the file name {bad!r} in {root} holds a line break; rename it")
        return cls(Path(root), np.array(keys, dtype=np.bytes_), np.array(files, dtype=np.bytes_), skipped)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index].decode()

    def path(self, index: int) -> Path:
        return self.root / self._files[index].decode()

    def keys(self) -> list[str]:
        return [key.decode() for key in self._keys]

    def digest(self) -> str:
        """SHA-256 over all keys in order, to compare what several processes found."""
        return hashlib.sha256(b"\n".join(self._keys.tolist())).hexdigest()

    def head(self, count: int) -> ImageList:
        """The first `count` pictures; all of them if `count` is negative or larger."""
        return self if count < 0 else self._take(slice(count))

    def joined(self, other: ImageList) -> ImageList:
        """Both lists as one; ValueError if they have another root or share a key."""
        if other.root != self.root:
            raise ValueError(f"cannot join pictures of {self.root} with those of {other.root}")
        pairs = [
            (key.decode(), file.decode())
            for part in (self, other)
            for key, file in zip(part._keys.tolist(), part._files.tolist(), strict=True)
        ]
        return ImageList.build(self.root, pairs, self.skipped + other.skipped)

    def select(self, keys: Iterable[str]) -> ImageList:
        """The pictures whose key is in `keys`, in this list's order."""
        return self._take(np.isin(self._keys, np.array([key.encode() for key in keys] or [b""])))

    def _take(self, rows: slice | np.ndarray) -> ImageList:
        return replace(self, _keys=self._keys[rows], _files=self._files[rows])


def list_folder(root: str | Path, split: str | None = None, val_fraction: float = 0.1) -> ImageList:
    """All pictures anywhere below `root`; key = path below `root` without suffix, with forward slashes.

    split: `train` or `val` keeps a part, None keeps all. A hash of the key decides, so that a picture never changes
    sides when others come or go; about `val_fraction` (0..1) of them are `val`, which may be none of a few.
    Raises FileNotFoundError if there is no such folder or no picture in it.
    """
    root = Path(root)
    if split not in (None, *SPLITS):
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction (={val_fraction}) must be in [0, 1)")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; set DATA.DATA_PATH to a folder of pictures")
    items = [(file.rpartition(".")[0], file) for file in _walk(root)]
    if not items:
        raise FileNotFoundError(f"no pictures ({', '.join(IMAGE_SUFFIXES)}) in {root}")
    everything = ImageList.build(root, items)
    if split is None:
        return everything
    is_val = np.array([_unit_hash(key) < val_fraction for key in map(everything.key, range(len(everything)))])
    return everything._take(is_val if split == "val" else ~is_val)


def scan_images(folder: Path) -> Iterator[tuple[str, str]]:
    """(stem, file name) of the pictures directly in `folder`: no look at the files themselves, so a million is fast."""
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, _, suffix = entry.name.rpartition(".")
            if f".{suffix.lower()}" in IMAGE_SUFFIXES and stem and not stem.startswith("."):
                yield stem, entry.name


def _walk(root: Path) -> Iterator[str]:
    seen = set()
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        base = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for _, name in scan_images(Path(folder)):
            yield str(base / name)


def _unit_hash(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
