"""Files of a store of teacher features: what they are called, what they hold, how they are written.

    <folder>/meta.json                           which teacher, of pictures and prompts in which form
    <folder>/<split>/<key>_enc_patch.npy         (C', G, G)
    <folder>/<split>/<key>_prompt_embed.npy      (C, G, G), or (P, C, G, G) if it was taken behind block 0
    <folder>/<split>/<key>_mask_token.npy        (P, 4, C)
    <folder>/<split>/<key>_dense_logits.npy      (P, K, 4G, 4G)
    <folder>/<split>/<key>_prompts.npz           the prompts, what they are of, the predicted IoUs

All `.npy` of a folder are float16 or all are float32. The prompts are written last, so a picture that has them has all.

Letters: `P` prompts of a picture, `S` side of the square it fills, `G` = S / 16, `C` = 256, `C'` channels of the
encoder's features (256 behind the projection), `K` masks of a prompt (1, or 3 with multimask).
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillation.prompt.prompts import Prompts
from sam3.engine.embedding_format import meta_differences
from sam3.engine.files import atomic_path

FORMAT_VERSION = 1
KIND = "teacher features for prompt distillation"
META_FILE = "meta.json"
FAILED_FILE = "failed.txt"  # beside the features of a split: a line for each picture that failed, its key first
PROMPT_SETTINGS = ("prompt_mode", "min_points", "max_points", "max_bbox_shift")  # how prompts are drawn from masks
PROMPTS_FILE = "prompts.npz"
FILES = {  # loss that a component is for -> end of its file name, also its name on the command line
    "encoder_patch": "enc_patch",
    "prompt_embed": "prompt_embed",
    "decoder_mask_token": "mask_token",
    "dense_mask_logits": "dense_logits",
}
IOUS = "ious"  # (P, K), beside the prompts: says which of several masks is the teacher's best
DTYPES = ("float16", "float32")
UNCOMPARED = ("tools", "computed_in")  # fields of meta.json that may differ when a run goes on elsewhere
PATCH, WIDTH, TOKENS = 16, 256, 4  # pixels of a cell, C, mask tokens: the same in all SAMs
NUM_MULTIMASK = 3
MASKS_PER_CELL = 4  # side of the low-resolution masks, in cells
HEADER_BYTES = 128  # of an .npy file
SCRIPT = "scripts/extract_teacher_features.py"


@dataclass(frozen=True)
class PromptRecord:
    """The prompts of a picture, as stored.

    mask_names: of the objects they are of, one a prompt; [""] if the picture was seen without a prompt; empty for a
        grid. input_size: rows and columns of the picture in the square; original_size: of its file. ious: float32
        `(P, K)`, the teacher's estimates.
    """

    prompts: Prompts
    mask_names: list[str]
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    ious: Tensor

    def __len__(self) -> int:
        """P"""
        return len(self.ious)


def feature_path(folder: Path, key: str, component: str) -> Path:
    """folder: of the split."""
    return folder / f"{key}_{FILES[component]}.npy"


def prompts_path(folder: Path, key: str) -> Path:
    """folder: of the split."""
    return folder / f"{key}_{PROMPTS_FILE}"


def is_per_prompt(component: str, meta: Mapping[str, Any]) -> bool:
    """Whether a component has a row for each prompt, and so is of use with these prompts only."""
    if component == "prompt_embed":
        return meta["tap"] == "output_keys"
    return component != "encoder_patch"


def shape_of(component: str, meta: Mapping[str, Any], num_prompts: int) -> tuple[int, ...]:
    """What a component of a picture with `num_prompts` prompts has to look like."""
    grid = meta["image_size"] // PATCH
    rows = (num_prompts,) if is_per_prompt(component, meta) else ()
    masks = NUM_MULTIMASK if meta["multimask"] else 1
    return {
        "encoder_patch": (meta["encoder_channels"], grid, grid),
        "prompt_embed": (*rows, WIDTH, grid, grid),
        "decoder_mask_token": (num_prompts, TOKENS, WIDTH),
        "dense_mask_logits": (num_prompts, masks, MASKS_PER_CELL * grid, MASKS_PER_CELL * grid),
        IOUS: (num_prompts, masks),
    }[component]


def bytes_per_picture(meta: Mapping[str, Any], num_prompts: int) -> int:
    """Of the feature files of a picture with `num_prompts` prompts, headers included."""
    size = np.dtype(meta["dtype"]).itemsize
    return sum(HEADER_BYTES + size * math.prod(shape_of(name, meta, num_prompts)) for name in meta["components"])


def write_features(
    folder: Path, key: str, meta: Mapping[str, Any], features: Mapping[str, Tensor], record: PromptRecord
) -> None:
    """Write a picture's components and prompts to `folder`, that of the split; each file is whole or absent.

    Raises ValueError, before anything is written, if a feature is not finite (in the stored type) or misshapen;
    OSError if the disk refuses.
    """
    arrays = {}
    for component in meta["components"]:
        array = features[component].to(getattr(torch, meta["dtype"])).contiguous().numpy()
        if array.shape != (wanted := shape_of(component, meta, len(record))):
            raise ValueError(f"{component} of {key} has shape {array.shape}, wanted {wanted}")
        if not np.isfinite(array).all():
            raise ValueError(f"{component} holds values that are not finite in {meta['dtype']}")
        arrays[component] = array
    if not record.ious.isfinite().all():
        raise ValueError("the predicted IoUs hold values that are not finite")
    last = prompts_path(folder, key)
    last.unlink(missing_ok=True)  # while the others change, the picture does not count as done
    for component, array in arrays.items():
        with atomic_path(feature_path(folder, key, component)) as path, path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    with atomic_path(last) as path, path.open("wb") as file:
        np.savez(file, **_to_arrays(record))


def is_complete(folder: Path, key: str, meta: Mapping[str, Any]) -> bool:
    """Whether a picture has all files of `meta`'s components in the right shape and type, and whole."""
    try:
        record = read_record(prompts_path(folder, key), meta)
        for component in meta["components"]:
            open_array(feature_path(folder, key, component), meta["dtype"], shape_of(component, meta, len(record)))
    except (FileNotFoundError, ValueError):
        return False
    return True


def read_meta(folder: Path) -> dict[str, Any] | None:
    """meta.json of a store; None if there is none. ValueError if it is damaged or of another program or version."""
    path = folder / META_FILE
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        kind, version = meta["kind"], meta["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a store of {KIND}: {error!r}; name another folder") from error
    if (kind, version) != (KIND, FORMAT_VERSION):
        raise ValueError(
            f"{path} describes {kind!r}, version {version}; wanted {KIND!r}, version {FORMAT_VERSION}: write the store "
            f"anew, in another folder, with {SCRIPT}"
        )
    return meta


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What tells two meta.json apart, but for the machine they were written on."""
    found, wanted = ({k: v for k, v in meta.items() if k not in UNCOMPARED} for meta in (found, wanted))
    return meta_differences(found, wanted, exact=True)


def read_record(path: Path, meta: Mapping[str, Any]) -> PromptRecord:
    """The file of prompts of a picture. FileNotFoundError; ValueError if it is damaged or does not fit `meta`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        coords, labels, boxes = (arrays[name] for name in ("point_coords", "point_labels", "boxes"))
        points = bool(coords.shape[1])
        record = PromptRecord(
            Prompts(
                torch.from_numpy(coords) if points else None,
                torch.from_numpy(labels) if points else None,
                torch.from_numpy(boxes) if len(boxes) else None,
            ),
            arrays["mask_names"].tolist(),
            tuple(arrays["input_size"].tolist()),
            tuple(arrays["original_size"].tolist()),
            torch.from_numpy(arrays["ious"]),
        )
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, IndexError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); write it again with {SCRIPT}") from error
    count = len(coords)
    if tuple(record.ious.shape) != shape_of(IOUS, meta, count) or len(record.mask_names) not in (0, count):
        raise ValueError(
            f"{path} holds {count} prompts, IoUs {tuple(record.ious.shape)} and {len(record.mask_names)} mask names, "
            f"which do not fit {META_FILE}; write it again with {SCRIPT} --overwrite"
        )
    return record


def _to_arrays(record: PromptRecord) -> dict[str, np.ndarray]:
    prompts, count = record.prompts, len(record)
    none = torch.zeros(count, 0, 2)
    points = none if prompts.points is None else prompts.points.float()
    labels = none[..., 0] if prompts.labels is None else prompts.labels
    boxes = torch.zeros(0, 4) if prompts.boxes is None else prompts.boxes.float()
    return {
        "point_coords": points.numpy(),
        "point_labels": labels.long().numpy(),
        "boxes": boxes.numpy(),
        "mask_names": np.array(record.mask_names, dtype=np.str_),
        "input_size": np.array(record.input_size, dtype=np.int64),
        "original_size": np.array(record.original_size, dtype=np.int64),
        IOUS: record.ious.float().numpy(),
    }


def open_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only memory map. FileNotFoundError; ValueError if it is cut off, damaged, or of other shape or type."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}); write it again with {SCRIPT}") from error
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise ValueError(
            f"{path} holds {array.dtype} {array.shape}, wanted {dtype} {shape}; write it again: {SCRIPT} --overwrite"
        )
    return array
