"""Embeddings of video frames: written by threads behind the trunk, read through a memory map.

`video_embedding_format` says what lies on disk.

Letters: `B` frames, `C` channels, `G` side of the embedding grid.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.engine.embedding_format import meta_differences
from sam3.engine.files import write_json
from sam3.engine.video_embedding_format import (
    DTYPES,
    GLOBAL_FILE,
    SAVE_FORMATS,
    VIDEO_FILE,
    WRITE_COMMAND,
    FrameFormat,
    complete_videos,
    read_metadata,
    shared_fields,
    stem,
    video_meta,
)

__all__ = ["DTYPES", "SAVE_FORMATS", "VideoEmbeddingWriter", "VideoEmbeddings", "complete_videos", "video_meta"]

logger = logging.getLogger(__name__)


# Reading --------------------------------------------------------------------------------------------------------------


class VideoEmbeddings:
    """Embeddings of the complete videos in a folder. Cheap to pickle; workers may share it.

    shape: what `(C, G, G)` must be. expect: fields the description must have, such as `{"teacher": {"sha256": ...}}`.
    Raises FileNotFoundError if there are none; ValueError, naming what differs, for those of another model.
    """

    def __init__(
        self, folder: str | Path, shape: Sequence[int] | None = None, expect: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder)
        source = self.folder / GLOBAL_FILE
        meta = read_metadata(source)
        if meta is None:
            raise FileNotFoundError(
                f"no video embeddings in {self.folder} (there is no {GLOBAL_FILE}); write them with {WRITE_COMMAND} "
                f"--output_dir {self.folder}, or set DATA.EMBEDDING_DIR"
            )
        self.meta = meta
        wanted = dict(expect or {}) | ({"feature_shape": list(shape)} if shape is not None else {})
        if differences := meta_differences(meta, wanted):
            raise ValueError(
                f"the embeddings in {self.folder} are not what this run needs ({'; '.join(differences)}); write others "
                f"with {WRITE_COMMAND}, or change the config"
            )
        self.format = FrameFormat.from_meta(meta, source)
        self.videos = tuple(complete_videos(self.folder))
        if not self.videos:
            raise FileNotFoundError(f"no video in {self.folder} is complete yet; let {WRITE_COMMAND} finish one")
        if not meta.get("completed"):
            logger.warning("%s: its export has not ended; %d videos are complete", self.folder, len(self.videos))
        self._numbers: dict[str, tuple[int, ...]] = {}

    def numbers(self, video: str) -> tuple[int, ...]:
        """Frames of `video` that are stored, by their numbers in the original video, ascending."""
        if video not in self._numbers:
            path = self.folder / video / VIDEO_FILE
            meta = read_metadata(path)
            if meta is None:
                raise FileNotFoundError(
                    f"no complete embeddings of video {video!r} in {self.folder}; add them with {WRITE_COMMAND}"
                )
            if differences := meta_differences(meta, shared_fields(self.meta)):
                raise ValueError(
                    f"{path} is of another run than {GLOBAL_FILE} ({'; '.join(differences)}); remove the folder "
                    f"{video} and run {WRITE_COMMAND} again"
                )
            self._numbers[video] = tuple(sorted(int(name) for name in meta["frames"]))
        return self._numbers[video]

    def read(self, video: str, number: int) -> Tensor:
        """The embedding of frame `number` of `video`, `(C, G, G)` in its stored type, mapped into memory.

        Raises FileNotFoundError or ValueError, naming the file, for a frame that is not stored or is damaged.
        """
        numbers = self.numbers(video)
        path = self.folder / video / self.format.name(number)
        if number not in numbers:
            raise FileNotFoundError(
                f"frame {number} of video {video!r} is not stored in {self.folder} ({len(numbers)} frames from "
                f"{numbers[0]} to {numbers[-1]} are); run {WRITE_COMMAND} with a --frame_stride that divides {number}"
            )
        again = f"run {WRITE_COMMAND} again, which makes the frames that are missing"
        try:
            return self.format.load(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the embedding {path} is gone; {again}") from error
        except ValueError as error:
            raise ValueError(f"the embedding {error}; remove that file and {again}") from error


# Writing --------------------------------------------------------------------------------------------------------------


class VideoEmbeddingWriter:
    """Writes frames in the background and each video's metadata after its last frame. A context manager.

    meta: from `video_meta`; a folder begun with other values is refused, naming them. Building it and `missing` only
    read. No two processes may be given the same video. At most `2 * num_threads` batches wait to be written; what goes
    wrong in a thread is raised by the next call made here.
    """

    def __init__(self, folder: str | Path, meta: Mapping[str, Any], frame_stride: int = 1, num_threads: int = 4):
        self.folder, self.meta, self.frame_stride = Path(folder), dict(meta), frame_stride
        self.format = FrameFormat.from_meta(meta, "these embeddings")
        self.rejected: list[tuple[str, int]] = []  # (video, number) of embeddings that are not finite
        begun = read_metadata(self.folder / GLOBAL_FILE)
        self._begun = begun is not None
        self._refuse_others(begun, self.folder)
        self._numbers: dict[str, np.ndarray] = {}  # of the videos that are to be completed: all that were asked for
        self._left: dict[str, int] = {}  # how many of them are still to be written
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(2 * num_threads)
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="video-embeddings")

    def _refuse_others(self, found: Mapping[str, Any] | None, where: Path) -> None:
        if found is not None and (differences := meta_differences(shared_fields(found), self.meta, exact=True)):
            raise ValueError(
                f"the embeddings in {where} are of another run ({'; '.join(differences)}); choose another "
                "--output_dir, or remove them"
            )

    def missing(self, video: str, numbers: Sequence[int]) -> list[int]:
        """Those of the frames `numbers` that `video` lacks; from now on it counts as complete once it has them all.

        A frame is taken as there if the video's metadata and the folder list it, or if its file is whole. (Without a
        global description nobody knows what made a file that no metadata lists, so it is made again.)
        """
        folder = self.folder / video
        meta = read_metadata(folder / VIDEO_FILE)
        self._refuse_others(meta, folder)
        files = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208
        listed = set(meta["frames"]) if meta else set()

        def stored(number: int) -> bool:
            name = self.format.name(number)
            return name in files and (stem(number) in listed or (self._begun and self.format.is_whole(folder / name)))

        left = [number for number in numbers if not stored(number)]
        if left or not listed.issuperset(map(stem, numbers)):
            self._numbers[video], self._left[video] = np.array(numbers, dtype=np.int32), len(left)
        return left

    def describe(self, completed: bool, **fields: Any) -> None:
        """Write the global description: before the first frame, so that no other model's join them, and at the end.

        One process does. completed: whether all videos asked for are there. fields: further entries of the file.
        """
        state = {"completed": completed, "num_videos": len(complete_videos(self.folder))}
        write_json(self.folder / GLOBAL_FILE, {**fields, "frame_stride": self.frame_stride, **state, **self.meta})

    def add(self, frames: Sequence[tuple[str, int]], values: Tensor) -> None:
        """Queue the embeddings `(B, C, G, G)`, on any device, of `frames`: (video, number), each a `missing` one and
        once. Does not wait for a GPU.

        One that is NaN or beyond the stored type's range is not written but noted in `rejected`.
        """
        if tuple(values.shape) != (len(frames), *self.format.shape):
            raise ValueError(f"{len(frames)} frames come as {tuple(values.shape)}, wanted (B, *{self.format.shape})")
        self._slots.acquire()  # here, so that no more batches than that hold memory
        self._raise_error()
        values = values.detach().to(self.format.torch_dtype)
        finite = values.isfinite().flatten(1).all(1)
        copied = None
        if values.is_cuda:
            values, finite = values.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pool.submit(self._store, list(frames), values.cpu(), finite.cpu(), copied)

    def _store(
        self, frames: list[tuple[str, int]], values: Tensor, finite: Tensor, copied: torch.cuda.Event | None
    ) -> None:
        """In a thread: write a batch that `copied` says has reached the CPU."""
        try:
            if copied is not None:
                with torch.cuda.device(copied.device):  # a new thread would wake GPU 0 otherwise
                    copied.synchronize()
            for row, (video, number) in enumerate(frames):
                if not finite[row]:
                    logger.warning(
                        "%s of %s: the embedding is NaN or too large for %s", stem(number), video, values.dtype
                    )
                    self.rejected.append((video, number))
                    continue
                self.format.save(self.folder / video / self.format.name(number), values[row])
                with self._lock:
                    self._left[video] -= 1
                    complete = not self._left[video]
                if complete:
                    self._complete(video)
        except BaseException as error:  # raised again by the next call
            self._error = self._error or error
        finally:
            self._slots.release()

    def _complete(self, video: str) -> None:
        path = self.folder / video / VIDEO_FILE
        earlier = (read_metadata(path) or {"frames": []})["frames"]
        numbers = sorted({*self._numbers[video].tolist(), *(int(name) for name in earlier)})
        fields = {"video_name": video, "num_frames": len(numbers), "frame_stride": self.frame_stride, "completed": True}
        write_json(path, {**fields, **self.meta, "frames": [stem(number) for number in numbers]})

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until all that was added is written. Raises what went wrong in the background."""
        self._pool.shutdown()
        self._raise_error()

    def __enter__(self) -> VideoEmbeddingWriter:
        for video, left in self._left.items():
            if not left:  # an earlier run was killed between the last frame and the metadata
                self._complete(video)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            if second is not error:
                logger.exception("writing the embeddings failed as well")  # the first error goes on
