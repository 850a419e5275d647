"""What lies on disk in a folder of embeddings of video frames.

    <folder>/global_metadata.json      what all videos share: shape, dtype, teacher, pre-processing
    <folder>/<video>/metadata.json     the same and the frames of this video; written last, so it vouches for them
    <folder>/<video>/00012.pt          the tensor of frame 12 and nothing else (`.npy` if that is the save format)

Letters: `C` channels, `G` side of the embedding grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.engine.files import atomic_path

VERSION = 1
GLOBAL_FILE = "global_metadata.json"
VIDEO_FILE = "metadata.json"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SAVE_FORMATS = ("pt", "npy")
SHARED = ("version", "feature_shape", "dtype", "save_format", "image_size", "backbone_stride", "teacher", "preprocess")
FILE_OVERHEAD = 4096  # bytes of a file beside its values: header, zip directory, the rest of the disk's last block
WRITE_COMMAND = "python stage2/save_video_embeddings_stage2.py"


def video_meta(
    shape: Sequence[int],
    dtype: str = "fp16",
    save_format: str = "pt",
    *,
    teacher: Mapping[str, Any],
    preprocess: Mapping[str, Any],
) -> dict[str, Any]:
    """What the embeddings of all videos share, as plain JSON values.

    shape: `(C, G, G)`; dtype: `fp16`, `bf16` or `fp32`; teacher: `{"name", "sha256"}` of the file whose trunk made
    them; preprocess: `Preprocess.to_meta()`. Raises ValueError for what no file can hold.
    """
    image_size = preprocess["img_size"]
    meta = {
        "version": VERSION,
        "feature_shape": list(shape),
        "dtype": dtype,
        "save_format": save_format,
        "image_size": image_size,
        "backbone_stride": image_size // shape[-1],
        "teacher": dict(teacher),
        "preprocess": dict(preprocess),
    }
    FrameFormat.from_meta(meta, "these embeddings")
    return meta


@dataclass(frozen=True)
class FrameFormat:
    """How the embedding of one frame lies in its file. shape: `(C, G, G)`; dtype: a key of `DTYPES`."""

    shape: tuple[int, int, int]
    dtype: str
    save_format: str

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], source: Path | str) -> FrameFormat:
        """The format that a description states; ValueError, naming its `source`, if it is none of ours."""
        missing = [name for name in SHARED if name not in meta]
        if missing or meta["version"] != VERSION:
            what = f"no {', '.join(missing)}" if missing else f"version {meta['version']}, wanted {VERSION}"
            raise ValueError(f"{source} states {what}; write the embeddings again with {WRITE_COMMAND}")
        shape, dtype, save_format = tuple(meta["feature_shape"]), meta["dtype"], meta["save_format"]
        if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"the shape {shape} in {source} must be three positive integers (C, G, G)")
        if dtype not in DTYPES or save_format not in SAVE_FORMATS:
            raise ValueError(f"{source} states {dtype} in .{save_format} files; known: {', '.join(DTYPES)}; .pt, .npy")
        if dtype == "bf16" and save_format == "npy":
            raise ValueError("numpy has no bf16; take save_format pt, or dtype fp16 or fp32")
        return cls(shape, dtype, save_format)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def file_bytes(self) -> int:
        """Disk space of one frame, a little more than it takes."""
        channels, height, width = self.shape
        return channels * height * width * self.torch_dtype.itemsize + FILE_OVERHEAD

    def name(self, number: int) -> str:
        """`00012.pt` for frame 12."""
        return f"{stem(number)}.{self.save_format}"

    def save(self, path: Path, values: Tensor) -> None:
        """Write one frame's `(C, G, G)`, whole or not at all and without the rest of the batch it is a part of.

        Raises OSError, naming the file, if the disk refuses.
        """
        values = values.clone(memory_format=torch.contiguous_format)  # torch.save would write a view's whole storage
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                if self.save_format == "npy":
                    np.save(file, values.numpy())
                else:
                    torch.save(values, file)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns OSError into RuntimeError
            reason = str(error).splitlines()[0]
            raise OSError(
                f"could not write {path}, is the disk full or over quota? {reason}; frames that are written stay, "
                "the same command goes on from there"
            ) from error

    def load(self, path: Path) -> Tensor:
        """One frame's `(C, G, G)`, mapped into memory; what is written to it stays in this process.

        Raises FileNotFoundError, or ValueError naming a file that is damaged or of another shape or type.
        """
        try:
            if self.save_format == "npy":
                values = torch.from_numpy(np.load(path, mmap_mode="c"))
            else:
                values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:  # both libraries report damage with many types
            reason = (str(error).splitlines() or ["it is empty"])[0]
            raise ValueError(f"{path} is damaged ({path.stat().st_size} bytes): {reason}") from error
        if not isinstance(values, Tensor):
            raise ValueError(f"{path} holds a {type(values).__name__}, wanted a tensor")
        if tuple(values.shape) != self.shape or values.dtype != self.torch_dtype:
            raise ValueError(
                f"{path} holds {values.dtype} {tuple(values.shape)}, wanted {self.torch_dtype} {self.shape}"
            )
        return values

    def is_whole(self, path: Path) -> bool:
        """Whether the file at `path` can be read."""
        try:
            self.load(path)
        except (FileNotFoundError, ValueError):
            return False
        return True


def stem(number: int) -> str:
    """Name of a frame's file without suffix: `00012` for 12."""
    return f"{number:05d}"


def shared_fields(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all videos of a folder have in common."""
    return {name: meta[name] for name in SHARED if name in meta}


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`; None if there is no such file. ValueError if it is damaged."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it and run {WRITE_COMMAND} again") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} holds a {type(meta).__name__}; remove it and run {WRITE_COMMAND} again")
    return meta


def complete_videos(folder: str | Path) -> list[str]:
    """Names of the videos whose metadata is written, sorted."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{VIDEO_FILE}"))
