"""Writes frames to a video file: mp4 through OpenCV, animated GIF through Pillow."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from sam3.engine.files import fsync

SUFFIXES = (".mp4", ".gif")
SHORTEST_GIF_FRAME = 2  # hundredths of a second; viewers slow down anything shorter to ten


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float, codec: str = "mp4v") -> int:
    """Write `frames` to `path`, whole or not at all, and return their number.

    Args:
        path: ends in `.mp4` or `.gif`.
        frames: uint8 `(H, W, 3)` RGB, all of one size, drawn one at a time. An mp4 with an odd side repeats its last
            row or column, as its colours are stored for 2 x 2 pixels.
        fps: frames per second. A GIF's frames last a whole number of hundredths of a second, at least two.
        codec: of an mp4, four letters: `mp4v` is in every OpenCV, `avc1` (H.264, which browsers play) in some.

    Raises ValueError for another suffix, no frames, or a frame of another shape or type, and OSError where the file
    cannot be written. A file that was at `path` before is then still there.
    """
    path = Path(path)
    suffix = check_video_path(path)
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps (={fps}) must be a positive number")
    if len(codec) != 4:
        raise ValueError(f"codec {codec!r} is no name of four letters, such as 'mp4v' or 'avc1'")
    checked = _checked(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, since OpenCV tells the format by the suffix, which a temporary name would change.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / f"video{suffix}"
        count = _write_gif(temporary, checked, fps) if suffix == ".gif" else _write_mp4(temporary, checked, fps, codec)
        fsync(temporary)
        temporary.replace(path)
    fsync(path.parent)
    return count


def check_video_path(path: str | Path) -> str:
    """The suffix of `path`, in lower case; ValueError or OSError where `write_video` could not write such a file."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot write the video {path}: wanted a name that ends in {' or '.join(SUFFIXES)}")
    if suffix == ".mp4" and find_spec("cv2") is None:
        raise OSError(f"writing {path} needs OpenCV: pip install opencv-python, or choose a name that ends in .gif")
    return suffix


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same frames; ValueError at the first that is no picture or unlike the first one."""
    size = None
    for i, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(f"frame {i} is {frame.dtype} {frame.shape}, wanted uint8 (H, W, 3) RGB")
        size = size or frame.shape
        if frame.shape != size:
            raise ValueError(f"frame {i} has the shape {frame.shape}, the first one {size}; a video has one size")
        yield frame
    if size is None:
        raise ValueError("no frames to write; a video has at least one")


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float, codec: str) -> int:
    import cv2  # only this format needs it

    first = next(frames)
    height, width = first.shape[:2]
    bottom, right = height % 2, width % 2
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width + right, height + bottom))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {width} x {height} pixels at {fps:g} fps with codec {codec!r}; try 'mp4v'")
    count = 0
    try:
        for frame in itertools.chain([first], frames):
            pixels = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
            writer.write(cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_REPLICATE))
            count += 1
    finally:
        writer.release()
    # OpenCV says nothing where writing fails, on a full disk for example; the index at the end of the file does.
    written = cv2.VideoCapture(str(path))
    if int(written.get(cv2.CAP_PROP_FRAME_COUNT)) != count:
        raise OSError(f"OpenCV did not write all {count} frames to {path.parent}; is the disk full?")
    written.release()
    return count


def _write_gif(path: Path, frames: Iterator[np.ndarray], fps: float) -> int:
    count = 0

    def pictures() -> Iterator[Image.Image]:
        nonlocal count
        for frame in frames:
            count += 1
            yield Image.fromarray(frame).quantize(dither=Image.Dither.NONE)  # dither would flicker and not compress

    following = pictures()
    first = next(following)
    duration_ms = 10 * max(SHORTEST_GIF_FRAME, round(100 / fps))
    first.save(path, save_all=True, append_images=following, duration=duration_ms, loop=0)
    return count
