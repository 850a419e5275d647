"""Frames of a video file by number, exact whatever the order of access, through OpenCV.

OpenCV's own frame numbers are guesses after a seek (it divides time by the mean frame rate), so a frame is known here
by its time stamp: all of them are listed once when the file is opened, and every seek is checked against the list.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

# Frames up to this far ahead are reached by decoding what lies between; a seek decodes from a keyframe, often farther.
LONGEST_SKIP = 100
# How far before a frame to aim when a seek lands behind it, which happens with variable frame rates.
SEEK_MARGINS = (0, 16, 64, 256)
TIME_TOLERANCE_MS = 1e-3

# FFmpeg writes a line per damaged packet to stderr; what matters of it is in the errors raised here.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

logger = logging.getLogger(__name__)


class VideoFile:
    """A decoder of the video file `path`; turned upright where the file says how.

    Opening decodes the whole file once (several hundred frames a second at 848 x 480), since no header tells how many
    frames will really come. Raises FileNotFoundError, or ValueError if the file is no video, has no frames, or ends
    well before the number its header promises. Damage that costs no frame goes unseen: FFmpeg patches it up.

    names: frame numbers from 0, five digits at least. fps: mean frames per second, None if the file does not say.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no video {self.path}; check the path")
        self._reopen()
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else None
        self._times_ms = self._list_times()  # (frames,)
        self._times_identify = bool((np.diff(self._times_ms) > TIME_TOLERANCE_MS).all())
        self.names = tuple(f"{i:05d}" for i in range(len(self._times_ms)))
        self._reopen()

    def _reopen(self) -> None:
        self._capture = cv2.VideoCapture(str(self.path))
        self._current = -1  # the frame that the decoder holds
        if not self._capture.isOpened():
            raise ValueError(
                f"cannot open video {self.path} ({self.path.stat().st_size} bytes): no video, damaged, or of a codec "
                "that OpenCV lacks; fetch it again, or give a folder of its frames as 00000.jpg, 00001.jpg, ..."
            )

    def _list_times(self) -> np.ndarray:
        promised = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        times = []
        while self._capture.grab():
            times.append(self._capture.get(cv2.CAP_PROP_POS_MSEC))
        missing = promised - len(times)
        if not times or missing > 1 + len(times) // 20:  # some formats only estimate their number
            raise ValueError(
                f"video {self.path} is damaged: {len(times)} of its {promised} frames can be decoded; fetch it again"
            )
        if missing > 0:
            logger.warning("%s: its header promises %d frames, it has %d", self.path, promised, len(times))
        return np.array(times)

    def read(self, index: int, lookback: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Frames up to `index` with their numbers, the wanted one last: uint8 `(3, H, W)` RGB.

        After a step back there are up to `lookback` of them, so that walking backwards need not seek each time.
        """
        first = index if index > self._current else max(0, index - lookback + 1)
        for wanted in range(first, index + 1):
            self._decode_to(wanted)
            done, pixels = self._capture.retrieve()
            if not done:
                raise self._lost(wanted)
            rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            yield wanted, torch.from_numpy(rgb).permute(2, 0, 1)

    def close(self) -> None:
        self._capture.release()

    def _decode_to(self, index: int) -> None:
        if not self._current <= index <= self._current + LONGEST_SKIP:
            self._seek(index)
        while self._current < index:
            if not self._capture.grab():
                raise self._lost(index)
            self._current += 1

    def _seek(self, index: int) -> None:
        """Bring the decoder to a frame not after `index`; to the start where nothing nearer can be trusted."""
        for margin in SEEK_MARGINS if self._times_identify else ():
            if margin >= index:
                break
            self._capture.set(cv2.CAP_PROP_POS_MSEC, self._times_ms[index - margin])
            if not self._capture.grab():
                break
            time = self._capture.get(cv2.CAP_PROP_POS_MSEC)
            landed = int(np.abs(self._times_ms - time).argmin())
            if landed <= index and abs(self._times_ms[landed] - time) <= TIME_TOLERANCE_MS:
                self._current = landed
                return
        self._capture.release()
        self._reopen()

    def _lost(self, index: int) -> ValueError:
        return ValueError(
            f"frame {index} of {self.path} can no longer be decoded, though it could when the video was opened; "
            "check that the file was not changed meanwhile"
        )
