"""Writes a teacher's features of whole data sets: each picture goes through it once, with all its prompts.

What is written appears whole or not at all, so the same command goes on after any interruption.

Letters: `C` channels, the width of all SAMs' embeddings.
"""

from __future__ import annotations

import logging
import platform
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillation.prompt.extract_data import ExtractSettings, Picture, PicturesWithPrompts, sam_preprocess
from distillation.prompt.hooked import patch_width
from distillation.prompt.layouts import PromptSource
from distillation.prompt.projection import make_projection
from distillation.prompt.store_format import (
    FAILED_FILE,
    FORMAT_VERSION,
    IOUS,
    KIND,
    META_FILE,
    PROMPT_SETTINGS,
    SCRIPT,
    WIDTH,
    PromptRecord,
    bytes_per_picture,
    differences,
    is_complete,
    is_per_prompt,
    read_meta,
    write_features,
)
from distillation.prompt.teachers import DENSE, Teacher
from sam3.engine import log
from sam3.engine.distributed import World
from sam3.engine.files import free_bytes, human_bytes, require_free_space, write_json, write_text
from sam3.engine.loader import build_loader, once_sampler
from sam3.engine.locks import FileLock
from sam3.engine.signals import StoppedBySignal, StopSignals

NUM_COUNTED = 1000  # pictures whose masks are counted to estimate the space
NUM_NAMED = 20  # failed pictures in the summary on the screen
MAX_WAITING = 2  # pictures that wait to be written while the teacher sees the next

logger = logging.getLogger("sam3.distillation")


def encoder_projection(teacher: Teacher, settings: ExtractSettings) -> tuple[nn.Module, int]:
    """What patch features go through before they are stored, and how many channels they have then.

    ValueError if the teacher has no neck that could bring them to C channels.
    """
    if "encoder_patch" not in settings.components:
        return nn.Identity(), WIDTH
    neck = teacher.neck_projection()
    channels = patch_width(teacher.model, settings.hooks.get("encoder_patch"), teacher.name)
    if settings.enc_projection == "none":
        return nn.Identity(), channels
    return make_projection("neck", channels, WIDTH, neck).to(teacher.device), WIDTH


def describe(teacher: Teacher, settings: ExtractSettings, encoder_channels: int) -> dict[str, Any]:
    """meta.json: all that the features depend on and, under `computed_in` and `tools`, where they were made."""
    data = settings.dataset
    if data.mode == "everything":
        prompts = {"source": "grid"}
    elif settings.prompts == "none":
        prompts = {"source": "none"}
    else:
        drawn = {name: getattr(data, name) for name in PROMPT_SETTINGS}
        prompts = {"source": settings.prompts, "seed": settings.seed, **drawn}
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "teacher": teacher.meta,
        "dtype": "float16" if settings.half else "float32",
        "mode": data.mode,
        "grid_points": data.grid_points if data.mode == "everything" else None,
        "image_size": teacher.image_size,
        "components": list(settings.components),
        "enc_projection": settings.enc_projection,
        "encoder_channels": encoder_channels,
        "tap": teacher.embed_tap or settings.tap,
        "multimask": settings.multimask,
        "hooks": teacher.hooks,
        "prompts": prompts,
        "computed_in": {"dtype": str(teacher.dtype).removeprefix("torch."), "device": teacher.device.type},
        "tools": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def extract(
    teacher: Teacher,
    sources: Mapping[str, PromptSource],
    folder: Path,
    settings: ExtractSettings,
    dry_run: bool = False,
) -> int:
    """Write to `folder` what it lacks of the splits' pictures.

    teacher: has the components of the settings and their tap. sources: split -> its pictures. dry_run: only report.

    Returns 0 if all are there, 1 if pictures failed: they are listed in FAILED_FILE of their split.

    Raises:
        ValueError: a folder that was begun with another teacher or other settings, naming what differs.
        OSError: too little space, or a disk that refuses; what was written is kept.
        StoppedBySignal: after the pictures under way were written.
    """
    projection, channels = encoder_projection(teacher, settings)
    meta = describe(teacher, settings, channels)
    with ExitStack() as held:
        require_same(folder, meta)
        if not dry_run:
            folder.mkdir(parents=True, exist_ok=True)
            for split in sources:
                held.enter_context(FileLock(folder / f".{split}.lock", f"writing {folder / split}"))
            _claim(folder, sources, meta)
        todo = {split: _pending(folder / split, source, meta, settings) for split, source in sources.items()}
        needed = _report_plan(folder, sources, todo, meta, settings)
        if dry_run:
            return 0
        require_free_space(folder, needed, f"the features of {sum(map(len, todo.values()))} pictures")
        signals = held.enter_context(StopSignals())
        failed = {}
        for split, keys in todo.items():
            pictures = PicturesWithPrompts(sources[split], keys, settings, teacher.image_size)
            failed[split] = _extract_split(teacher, projection, pictures, folder / split, meta, settings, signals)
    return _finish(folder, todo, failed)


def features_of(
    teacher: Teacher, projection: nn.Module, picture: Picture, meta: Mapping[str, Any], points_per_batch: int
) -> tuple[dict[str, Tensor], PromptRecord]:
    """All components of a picture as `meta` wants them, on the CPU; the image encoder runs once."""
    device, dtype = teacher.device, getattr(torch, meta["dtype"])
    images = sam_preprocess(teacher.image_size).normalise(picture.images.to(device), picture.sizes)
    encoded = teacher.encode(images)
    features = {}
    if "encoder_patch" in encoded.features:
        with torch.no_grad():
            features["encoder_patch"] = projection(encoded.features["encoder_patch"])[0].to(dtype).cpu()
    parts: dict[str, list[Tensor]] = {}
    prompts = picture.prompts.to(device)
    for start in range(0, len(prompts) if teacher.needs_decoder else 0, points_per_batch):
        rows = slice(start, start + points_per_batch)
        decoded = teacher.decode(encoded.embedding, prompts[rows], meta["multimask"])
        for name, value in {**decoded.features, DENSE: decoded.masks}.items():
            if name in meta["components"] and (start == 0 or is_per_prompt(name, meta)):
                parts.setdefault(name, []).append(value.to(dtype).cpu())
        parts.setdefault(IOUS, []).append(decoded.ious.cpu())
    joined = {name: torch.cat(values) for name, values in parts.items()}
    num_masks = 3 if meta["multimask"] else 1
    ious = joined.pop(IOUS, torch.zeros(len(prompts), num_masks))
    features |= {name: value if is_per_prompt(name, meta) else value[0] for name, value in joined.items()}
    height, width = picture.sizes[0].tolist()
    return features, PromptRecord(picture.prompts, picture.mask_names, (height, width), picture.original_size, ious)


def require_same(folder: Path, meta: Mapping[str, Any]) -> None:
    """ValueError if `folder` was begun with another teacher or other settings, naming what differs."""
    found = read_meta(folder)
    if found is not None and (faults := differences(found, meta)):
        raise ValueError(
            f"the features in {folder} were begun otherwise ({'; '.join(faults)}); go on as they were begun, choose "
            "another --output_base_dir, or remove that folder"
        )


def _claim(folder: Path, splits: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write meta.json before the first feature, and clear away what a killed process was about to write."""
    if read_meta(folder) is None:
        if any(next((folder / split).glob("*.np[yz]"), None) for split in splits):
            raise ValueError(
                f"{folder} holds features but no {META_FILE}, so nobody knows whose they are; choose another "
                "--output_base_dir"
            )
        write_json(folder / META_FILE, dict(meta))
    for split in splits:
        for leftover in (folder / split).glob(".*.tmp"):
            leftover.unlink()


def _pending(folder: Path, source: PromptSource, meta: Mapping[str, Any], settings: ExtractSettings) -> list[str]:
    keys = source.keys()[: settings.limit]
    if settings.dataset.mode == "single" and settings.prompts == "masks":
        keys = [key for key in keys if source.count(key)]
    return [key for key in keys if settings.overwrite or not is_complete(folder, key, meta)]


def _report_plan(
    folder: Path,
    sources: Mapping[str, PromptSource],
    todo: Mapping[str, list[str]],
    meta: Mapping[str, Any],
    settings: ExtractSettings,
) -> int:
    """Pictures and space, in the log; returns the bytes that are needed."""
    total = 0
    for split, keys in todo.items():
        counted = keys[:: max(1, len(keys) // NUM_COUNTED)]
        sizes = [bytes_per_picture(meta, _num_prompts(sources[split], key, settings)) for key in counted]
        each = sum(sizes) / max(1, len(sizes))
        total += round(each * len(keys))
        count = len(sources[split].keys()[: settings.limit])
        about = f", about {human_bytes(each)} each, {human_bytes(each * len(keys))} in all" if keys else ""
        logger.info(f"{split}: {count} pictures, {len(keys)} to do{about}")
    logger.info(f"{human_bytes(total)} to write, {human_bytes(free_bytes(folder))} free in {folder}")
    return total


def _num_prompts(source: PromptSource, key: str, settings: ExtractSettings) -> int:
    if settings.dataset.mode == "everything":
        return settings.dataset.grid_points**2
    return 1 if settings.prompts == "none" else max(1, source.count(key))


def _extract_split(
    teacher: Teacher,
    projection: nn.Module,
    pictures: PicturesWithPrompts,
    folder: Path,
    meta: Mapping[str, Any],
    settings: ExtractSettings,
    signals: StopSignals,
) -> list[tuple[str, str]]:
    """All pictures of a split; returns those that failed, and why."""
    failed: list[tuple[str, str]] = []
    with Writer(folder, meta) as writer:
        for picture in _in_order(pictures, settings.dataset.num_workers, teacher.device):
            failed += picture.skipped
            if len(picture):
                features, record = features_of(teacher, projection, picture, meta, settings.points_per_batch)
                writer.add(picture.keys[0], features, record)
            if signals.received:
                raise StoppedBySignal(
                    signals.received, f"stopped while writing {folder}; the same command goes on from there"
                )
    return failed + writer.failed


def _in_order(pictures: PicturesWithPrompts, num_workers: int, device: torch.device) -> Iterator[Picture]:
    if not len(pictures):
        return iter(())
    batches = once_sampler(len(pictures), 1, World(0, 1, 0, device))
    loader = build_loader(pictures, batches, min(num_workers, len(pictures)), device=device)
    return log.progress(loader, desc="teacher", unit="images", total=len(pictures))


class Writer:
    """Writes pictures in a thread while the teacher sees the next; a context manager that waits for the last.

    failed: pictures whose features cannot be stored, such as those that are not finite, and why.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.failed: list[tuple[str, str]] = []
        self.num_written = 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[tuple[str, Future]] = deque()

    def add(self, key: str, features: Mapping[str, Tensor], record: PromptRecord) -> None:
        """Raises OSError if the disk refused this picture or one before it."""
        while len(self._waiting) >= MAX_WAITING:
            self._settle(*self._waiting.popleft())
        task = self._pool.submit(write_features, self.folder, key, self.meta, features, record)
        self._waiting.append((key, task))

    def _settle(self, key: str, task: Future) -> None:
        try:
            task.result()
            self.num_written += 1
        except ValueError as error:
            logger.warning(f"{key} fails: {error}")
            self.failed.append((key, str(error)))
        except OSError as error:
            self._pool.shutdown(cancel_futures=True)
            self._waiting.clear()
            raise OSError(
                error.errno,
                f"cannot write the features of {key} to {self.folder}: {error.strerror or error}; the "
                f"{self.num_written} pictures written so far are whole and stay. Make room, then run the same command",
            ) from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            while self._waiting:
                self._settle(*self._waiting.popleft())
        finally:
            self._pool.shutdown()


def _finish(folder: Path, todo: Mapping[str, list[str]], failed: Mapping[str, list[tuple[str, str]]]) -> int:
    """List what failed, and say what is there."""
    for split, entries in failed.items():
        path = folder / split / FAILED_FILE
        if not entries:
            path.unlink(missing_ok=True)
            logger.info(f"{split}: {len(todo[split])} pictures written, none failed")
            continue
        write_text(path, "".join(f"{key}\t{' '.join(reason.split())}\n" for key, reason in entries))
        shown = "; ".join(f"{key} ({reason})" for key, reason in entries[:NUM_NAMED])
        logger.warning(
            f"{split}: {len(entries)} of {len(todo[split])} pictures failed, listed in {path}: {shown}"
            f"{' ...' if len(entries) > NUM_NAMED else ''}; mend them and run {SCRIPT} again"
        )
    return 1 if any(failed.values()) else 0
