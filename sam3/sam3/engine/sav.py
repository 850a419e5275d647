"""SA-V, training part: `<root>/<video>/00000.jpg ...` with `<video>_manual.json` and `<video>_auto.json` beside them.

A frame is known by the number in its file's name, never by its place in a list: a folder may hold every frame or every
fourth one. Masks exist for every fourth frame. Nothing is read before it is asked for, so that listing 50,000 videos
costs one look at one folder.

Letters: `H W` rows and columns of a frame.
Source: Ravi et al., SAM 2: Segment Anything in Images and Videos, 2024 (the data set and its files).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sam3.engine.sa1b import decode_runs, naming_damage, run_lengths, whole_side

KINDS = ("manual", "auto")
ANNOTATION_STEP = 4  # frames from one annotated frame to the next
FRAME_SUFFIXES = (".jpg", ".jpeg")
SHOWN = 5  # names printed of a long list


@dataclass(frozen=True)
class VideoFolder:
    """A folder of pictures named by their numbers, such as 00000.jpg, 00004.jpg. Listed at the first use."""

    name: str
    folder: Path
    suffixes: tuple[str, ...] = FRAME_SUFFIXES

    @cached_property
    def _listing(self) -> tuple[np.ndarray, int, str]:
        """Numbers int32 ascending, digits and suffix of the names. An array, because SA-V has 17 million frames."""
        try:
            with os.scandir(self.folder) as entries:
                parts = [entry.name.rpartition(".") for entry in entries if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"no folder {self.folder} with the frames of {self.name}; check the path"
            ) from error
        files = [(stem, dot + suffix) for stem, dot, suffix in parts if dot + suffix.lower() in self.suffixes]
        if not files:
            raise FileNotFoundError(f"no frames ({', '.join(self.suffixes)}) in {self.folder}; extract or fetch them")
        digits, suffix = min(len(stem) for stem, _ in files), files[0][1]
        for stem, other in files:
            # A name that its own number does not give back could not be found again, or is there twice.
            if not (stem.isascii() and stem.isdigit()) or stem + other != f"{int(stem):0{digits}d}{suffix}":
                raise ValueError(
                    f"{self.folder} holds {stem}{other}, wanted frames named alike by their numbers, such as "
                    "00000.jpg; rename it or take it out"
                )
        return np.array(sorted(int(stem) for stem, _ in files), dtype=np.int32), digits, suffix

    @property
    def numbers(self) -> tuple[int, ...]:
        """Frame numbers, ascending. FileNotFoundError if there are none, ValueError for names that are no numbers."""
        return tuple(self._listing[0].tolist())

    def __len__(self) -> int:
        return len(self._listing[0])

    def path(self, number: int) -> Path:
        """File of frame `number`. FileNotFoundError if it is not there."""
        numbers, digits, suffix = self._listing
        place = int(np.searchsorted(numbers, number))
        if place == len(numbers) or numbers[place] != number:
            raise FileNotFoundError(
                f"no frame {number} of {self.name} in {self.folder}, which holds {len(numbers)} from {numbers[0]} to "
                f"{numbers[-1]}; extract or fetch it"
            )
        return self.folder / f"{number:0{digits}d}{suffix}"

    def require(self, numbers: Iterable[int], source: Path) -> None:
        """Raises FileNotFoundError, naming `source` which annotates them, if any of `numbers` is not here."""
        numbers = list(numbers)
        there = set(self.numbers)
        if missing := [number for number in numbers if number not in there]:
            raise FileNotFoundError(
                f"{source} annotates {len(numbers)} frames, but {shown(missing)} of them are not in {self.folder}; "
                "extract or fetch the video again"
            )


def list_videos(root: str | Path, names: Sequence[str] | None = None) -> list[VideoFolder]:
    """The folders directly below `root`, sorted by name; with `names` those, in that order. Frames are not looked at.

    Raises FileNotFoundError if there is no video, or naming those of `names` that are missing; ValueError for names
    that are no plain folder names.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}; make it with data/extract_sav_frames.py, or set DATA.SAV_ROOT to where it is"
        )
    with os.scandir(root) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if names is None:
        names = found
        if not names:
            raise FileNotFoundError(f"no videos in {root}; wanted folders of frames: run data/extract_sav_frames.py")
    require_plain_names(names, root)
    there = set(found)
    if missing := [name for name in names if name not in there]:
        raise FileNotFoundError(f"of {len(names)} videos asked for, {shown(missing)} are not in {root}")
    return [VideoFolder(name, root / name) for name in names]


def require_plain_names(names: Iterable[str], source: Path) -> None:
    """Raises ValueError if one of `names`, which `source` gives, would lead out of the folder it is looked up in."""
    for name in names:
        if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} in {source} is not the plain name of a video")


def shown(names: Sequence[Any]) -> str:
    """`3 (a, b, c)`, with the first SHOWN only."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(map(str, names[:SHOWN]))}{more})"


@dataclass
class Masklets:
    """The objects of one video.

    height, width: of its frames, in pixels; numbers: frames with annotations, ascending, as numbers of the original
    video; ids: `manual/3` or `auto/0`, one for each object; sources: the files, for messages.
    """

    height: int
    width: int
    numbers: tuple[int, ...]
    ids: tuple[str, ...]
    sources: tuple[Path, ...]
    _entries: dict[int, list[Any]] = field(repr=False)  # frame number -> one RLE or None for each object

    @property
    def num_objects(self) -> int:
        return len(self.ids)

    def mask(self, number: int, index: int) -> np.ndarray | None:
        """Object `index` in frame `number`: bool `(H, W)`, all False where it is absent; None where nobody looked.

        ValueError names an RLE that is damaged or of another size than the video.
        """
        runs = self._runs(number, index)
        return None if runs is None else decode_runs(runs, self.height, self.width)

    def area(self, number: int, index: int) -> int | None:
        """Pixels of object `index` in frame `number`, 0 where it is absent; None where nobody looked."""
        runs = self._runs(number, index)
        return None if runs is None else int(runs[1::2].sum())

    def visible(self, number: int) -> list[int]:
        """Objects known to be in frame `number`."""
        return [index for index in range(self.num_objects) if self.area(number, index)]

    def _runs(self, number: int, index: int) -> np.ndarray | None:
        name = self.ids[index]
        rle = self._entries[number][index] if number in self._entries else None
        if rle is None:
            return None
        try:
            return run_lengths(rle, self.height, self.width)
        except Exception as error:  # whatever a damaged entry leads to
            raise ValueError(
                f"the mask of object {name} in frame {number} of {self.sources[0].parent} cannot be decoded: {error}; "
                "fetch the annotations again"
            ) from error


def masklet_path(video: VideoFolder, kind: str) -> Path:
    """Where the annotations of `kind` (manual or auto) lie."""
    return video.folder / f"{video.name}_{kind}.json"


def read_masklets(video: VideoFolder, kinds: Sequence[str] = KINDS) -> Masklets:
    """The objects of `video`: those of all `kinds` for which there is a file, in that order.

    Raises FileNotFoundError if there is none, or if annotated frames are missing; ValueError naming a file that is
    damaged, of another video, or at odds with the other one about the size.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds {sorted(unknown)} are unknown; choose from {', '.join(KINDS)}")
    sources = tuple(path for path in (masklet_path(video, kind) for kind in kinds) if path.is_file())
    if not sources:
        wanted = " or ".join(str(masklet_path(video, kind)) for kind in kinds)
        raise FileNotFoundError(f"no {wanted}; copy it there (data/extract_sav_frames.py does), or leave the video out")
    parts = [_read_part(path, path.stem.removeprefix(f"{video.name}_"), video.name) for path in sources]
    height, width = parts[0].size
    if other := next((part.size for part in parts if part.size != (height, width)), None):
        raise ValueError(f"{sources[0]} states {height} x {width} pixels, {sources[1]} {other[0]} x {other[1]}")
    numbers = tuple(ANNOTATION_STEP * i for i in range(max(len(part.rows) for part in parts)))
    video.require(numbers, sources[0])
    entries = {number: [rle for part in parts for rle in part.row(i)] for i, number in enumerate(numbers)}
    return Masklets(height, width, numbers, tuple(name for part in parts for name in part.ids), sources, entries)


@dataclass
class _Part:
    """One annotation file. size: (H, W); rows: for each annotated frame one RLE or None per object, or None for all."""

    size: tuple[int, int]
    ids: list[str]
    rows: list[list[Any] | None]

    def row(self, index: int) -> list[Any]:
        row = self.rows[index] if index < len(self.rows) else None
        return [None] * len(self.ids) if row is None else row


def _read_part(path: Path, kind: str, name: str) -> _Part:
    with naming_damage(path):
        document = json.loads(path.read_bytes())
        if document.get("video_id", name) != name:
            raise ValueError(f"it is of the video {document['video_id']!r}, wanted {name!r}")
        size = whole_side("video_height", document["video_height"]), whole_side("video_width", document["video_width"])
        ids = [f"{kind}/{number}" for number in document["masklet_id"] or []]
        if document.get("masklet_num", len(ids)) != len(ids):
            raise ValueError(f"its masklet_num is {document['masklet_num']}, but it has {len(ids)} masklet_id")
        rows = document["masklet"] or []
        for i, row in enumerate(rows):
            if row is not None and len(row) != len(ids):
                raise ValueError(
                    f"entry {i} of its masklet has {len(row)} masks, wanted one of each of {len(ids)} objects"
                )
        most = (int(document.get("video_frame_count", ANNOTATION_STEP * len(rows))) - 1) // ANNOTATION_STEP + 1
        if len(rows) > most:
            raise ValueError(f"its masklet has {len(rows)} frames, but its video_frame_count allows {most}")
    return _Part(size, ids, rows)
