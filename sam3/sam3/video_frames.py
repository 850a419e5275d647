"""Frames of a video, read when they are asked for, from a folder of JPEGs, a video file, a picture, or memory.

Letters: `H W` rows and columns of a frame.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from sam3.engine.image_list import IMAGE_SUFFIXES
from sam3.engine.prefetch import prefetch
from sam3.transforms import read_image, to_rgb

FRAME_NAME = re.compile(r"(\d+)\.jpe?g", re.IGNORECASE)
JPEG_SUFFIXES = (".jpg", ".jpeg")

logger = logging.getLogger(__name__)


class FrameSource(Protocol):
    """Where frames come from. `read` gives frames up to `index`, the wanted one last: uint8 `(3, H, W)` RGB."""

    names: tuple[str, ...]
    fps: float | None

    def read(self, index: int, lookback: int) -> Iterable[tuple[int, Tensor]]: ...
    def close(self) -> None: ...


class Pictures:
    """A source of frames that are pictures of their own; `load(index)` gives one, uint8 `(3, H, W)` RGB."""

    fps = None

    def __init__(self, names: Iterable[str], load: Callable[[int], Tensor]) -> None:
        self.names = tuple(names)
        self._load = load

    def read(self, index: int, lookback: int = 1) -> list[tuple[int, Tensor]]:
        return [(index, self._load(index))]

    def close(self) -> None: ...


class VideoFrames:
    """Frames of one size by number, with the last few kept; memory does not grow with the video.

    Safe to use from several threads. Call `close()`, or use it in a `with` statement.

    title: what errors call the video. height, width: pixels. names: one for each frame, for output files.
    fps: frames per second, None where nothing tells. cache_frames: how many frames are kept; walking backwards
    through a video file takes about one seek per so many frames.
    """

    def __init__(self, source: FrameSource, title: str, cache_frames: int = 16) -> None:
        if cache_frames < 1:
            raise ValueError(f"cache_frames (={cache_frames}) must be at least 1")
        self.title = title
        self.names = source.names
        self.fps = source.fps
        self._source: FrameSource | None = source
        self._cache_frames = cache_frames
        self._cache: OrderedDict[int, Tensor] = OrderedDict()  # the frame used longest ago comes first
        self._lock = threading.Lock()
        ((_, first),) = source.read(0, 1)
        self.height, self.width = first.shape[1:]
        self._keep(0, first)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """Frame `index` (0..len - 1): uint8 `(3, H, W)` RGB, shared with the cache, so not to be written to.

        Raises IndexError outside the video, and ValueError naming the frame if it is damaged, of another size than
        the first, or if the video is closed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {self.title}, which has frames 0 to {len(self) - 1}")
        with self._lock:
            if self._source is None:
                raise ValueError(f"{self.title} is closed; open it again with open_video")
            if index not in self._cache:
                for number, frame in self._source.read(index, self._cache_frames):
                    self._keep(number, frame)
            self._cache.move_to_end(index)
            return self._cache[index]

    def _keep(self, index: int, frame: Tensor) -> None:
        height, width = frame.shape[1:]
        if (height, width) != (self.height, self.width):
            raise ValueError(
                f"frame {self.names[index]} of {self.title} is {width} x {height} pixels, the first frame is "
                f"{self.width} x {self.height}; bring all frames to one size"
            )
        self._cache[index] = frame
        if len(self._cache) > self._cache_frames:
            self._cache.popitem(last=False)

    def read_ahead(self, indices: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """(index, frame) for each of `indices`, the next one read by a thread while the caller works on this one."""
        return prefetch((index, self[index]) for index in indices)

    def close(self) -> None:
        """Free the cache and the file; twice is fine."""
        with self._lock:
            if self._source is not None:
                self._source.close()
            self._source = None
            self._cache.clear()

    def __enter__(self) -> VideoFrames:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_video(video: str | Path | Image.Image | Sequence[Image.Image], cache_frames: int = 16) -> VideoFrames:
    """The frames of `video`: a folder of `<number>.jpg` or `.jpeg`, a video file, a picture file, or Pillow pictures.

    The numbers in a folder order its frames. They may start anywhere and have gaps (every 4th frame, say): names keep
    them, indices count from 0. Raises FileNotFoundError if there is nothing, ValueError if what is there is no video,
    OSError for a video file without OpenCV.
    """
    if isinstance(video, Image.Image):
        video = [video]
    if not isinstance(video, str | Path):
        return VideoFrames(_pictures_in_memory(video), "the list of pictures", cache_frames)
    path = Path(video)
    if not path.exists():
        raise FileNotFoundError(f"no video {path}; give a folder of <number>.jpg frames, a video file or a picture")
    if path.is_dir():
        source = _folder_of_frames(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        source = Pictures([path.stem], lambda _: read_image(path))
    elif find_spec("cv2") is None:
        raise OSError(
            f"reading the video file {path} needs OpenCV: pip install opencv-python, or give a folder of its frames"
        )
    else:
        from sam3.video_file import VideoFile  # the other sources work without OpenCV

        source = VideoFile(path)
    return VideoFrames(source, str(path), cache_frames)


def _folder_of_frames(folder: Path) -> Pictures:
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in JPEG_SUFFIXES and path.name[0] != "."]
    if not pictures:
        raise ValueError(f"no frames in {folder}; wanted files named <number>.jpg or .jpeg")
    if wrong := sorted(path.name for path in pictures if not FRAME_NAME.fullmatch(path.name)):
        raise ValueError(
            f"{len(wrong)} of {len(pictures)} pictures in {folder} bear no number, such as {wrong[0]}; "
            "name the frames 00000.jpg, 00001.jpg, ... and move other pictures away"
        )
    pictures.sort(key=lambda path: (int(path.stem), path.name))
    for first, second in itertools.pairwise(pictures):
        if int(first.stem) == int(second.stem):
            raise ValueError(
                f"{folder} holds frame {int(first.stem)} twice: {first.name} and {second.name}; remove one"
            )
    _warn_of_gaps(folder, [int(path.stem) for path in pictures])
    return Pictures([path.stem for path in pictures], lambda index: read_image(pictures[index]))


def _warn_of_gaps(folder: Path, numbers: list[int]) -> None:
    """A constant step is a choice; an uneven one may be frames that got lost."""
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    if not steps or max(steps) == min(steps):
        return
    place = next(i for i, step in enumerate(steps) if step > min(steps))
    logger.warning(
        "%s: the frame numbers leave gaps, the first between %d and %d; the frames are taken as if they followed "
        "each other", folder, numbers[place], numbers[place + 1],
    )  # fmt: skip


def _pictures_in_memory(pictures: Sequence[Image.Image]) -> Pictures:
    pictures = list(pictures)
    if not pictures:
        raise ValueError("the list of pictures is empty; a video has at least one frame")
    if wrong := [type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image)]:
        raise ValueError(f"the list of pictures holds a {wrong[0]}, wanted Pillow pictures only")
    names = [f"{i:05d}" for i in range(len(pictures))]
    return Pictures(names, lambda index: torch.from_numpy(to_rgb(pictures[index])).permute(2, 0, 1))
