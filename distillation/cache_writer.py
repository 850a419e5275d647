"""Writing a teacher's cache: every picture goes through the teacher once.

What is written appears whole or not at all, and is never written again: the same command goes on after any
interruption, with any number of processes.

Letters: `B` pictures, `S` side of the square, `Q` queries, `K` queries kept, `s` side of their masks.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from distillation.batch import DistillBatch
from distillation.cache import PROMPT_INDEX, SKIPPED_FILE, output_meta, output_path, require_queries, trunk_meta
from distillation.config import DistillationConfig
from distillation.dataset import SA1BDistillDataset
from distillation.teachers.teacher import Teacher
from sam3.engine import distributed, log
from sam3.engine.coverage import require_same_everywhere
from sam3.engine.distributed import World
from sam3.engine.embedding_format import META_FILE
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import meta_differences, plan, read_meta
from sam3.engine.files import free_bytes, human_bytes, require_free_space, write_json, write_text
from sam3.engine.loader import build_loader, once_sampler
from sam3.engine.locks import FileLock
from sam3.engine.signals import StoppedBySignal, StopSignals
from sam3.engine.weights import save_weights

KINDS = ("trunk", "outputs")
FINEST = 4  # side of the teacher's maps, in grids of its trunk
HEADER_BYTES = 1024  # of a file of outputs, at most

logger = logging.getLogger("sam3.distillation")


def write_cache(
    kind: str,
    config: DistillationConfig,
    teacher: Teacher,
    dataset: SA1BDistillDataset,
    world: World,
    *,
    min_queries: int = 1,
    num_workers: int = 0,
) -> int:
    """Write to `config.cache_dir` what the cache lacks of the dataset's pictures; all processes of a run must call it.

    Args:
        kind: `trunk` or `outputs`.
        dataset: shows pictures as they are, to the teacher: `training` False and without caches.
        min_queries: queries of the student, which needs as many of an output cache.
        num_workers: processes that decode pictures.

    Returns:
        0 if all are there, 1 if pictures could not be read: they are listed in `skipped.txt` beside the cache.

    Raises:
        ValueError: settings that cannot work, or a folder that another run began, naming what differs.
        OSError: too little space, or a disk that refuses.
        StoppedBySignal: after the batch under way was written.
    """
    if not config.cache_dir:
        raise ValueError(f"--write-cache {kind} needs a folder (--cache-dir)")
    if config.horizontal_flip:
        raise ValueError("a cache holds pictures as they are; write it with horizontal_flip false")
    if kind not in KINDS:
        raise ValueError(f"no cache of {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "outputs":
        _check_queries(config, teacher, min_queries)
    pictures = dataset.pictures
    require_same_everywhere(pictures, config.sa1b_dir)
    sink: Sink = (TrunkSink if kind == "trunk" else OutputSink)(config, teacher, world)
    skipped: list[tuple[str, str]] = []
    with StopSignals() as signals, sink:
        keys = pictures.keys()
        distributed.barrier()  # every process has repaired what an earlier run left
        todo = set(sink.pending(keys))
        distributed.barrier()  # every process has read the same list; now the cache may grow
        _report_plan(kind, sink, len(keys), len(todo))
        for batch in _batches(config, dataset, todo, world, num_workers):
            skipped += batch.skipped
            if len(batch):
                images = dataset.preprocess.normalise(batch.images.to(world.device), batch.sizes)
                sink.add(batch.keys, images)
            if signals.received:
                raise StoppedBySignal(
                    signals.received, f"stopped while writing {sink.folder}; the same command goes on from there"
                )
    return _finish(Path(config.cache_dir), len(keys), skipped, world)


def keep_best(outputs: Mapping[str, Tensor], count: int, side: int) -> dict[str, Tensor]:
    """Of common outputs (B, Q, ...) the `count` queries with the best scores, sigmoid(logit) sigmoid(presence), best
    first; masks resized to `side` (bilinear, of the logits). Maps are float16, all else float32.
    """
    logits, presence = outputs["pred_logits"].float(), outputs["presence_logits"].float()
    best = (logits.sigmoid() * presence.sigmoid()).topk(count).indices  # (B, K)
    rows = torch.arange(len(best), device=best.device)[:, None]
    masks = outputs["pred_masks"][rows, best].float()
    return {
        "pred_masks": F.interpolate(masks, (side, side), mode="bilinear", align_corners=False).half(),
        "pred_boxes": outputs["pred_boxes"][rows, best].float(),
        "pred_logits": logits[rows, best],
        "presence_logits": presence,
        "semantic_seg": outputs["semantic_seg"].half(),
    }


class Sink(ABC):
    """Where results go; a context manager that leaves all of them on disk."""

    folder: Path

    @abstractmethod
    def pending(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that are not there yet, on every process the same."""

    @abstractmethod
    def num_bytes(self, count: int) -> int:
        """What `count` more pictures take."""

    @abstractmethod
    def add(self, keys: Sequence[str], images: Tensor) -> None:
        """Ask the teacher about normalised pictures (B, 3, S, S) and store what it says."""

    @abstractmethod
    def __exit__(self, *error: Any) -> None: ...

    def __enter__(self) -> Sink:
        return self


class TrunkSink(Sink):
    """A store of embeddings."""

    def __init__(self, config: DistillationConfig, teacher: Teacher, world: World) -> None:
        self.folder, self.teacher = Path(config.cache_dir), teacher
        self.writer = EmbeddingWriter(self.folder, trunk_meta(config, teacher.meta), world.rank, world.size)

    def pending(self, keys: Sequence[str]) -> list[str]:
        return self.writer.pending(keys)

    def num_bytes(self, count: int) -> int:
        return plan(count, self.writer.meta)

    def add(self, keys: Sequence[str], images: Tensor) -> None:
        self.writer.add_batch(keys, [0] * len(keys), self.teacher.embed(images))  # no augmentation, so no seeds

    def __exit__(self, *error: Any) -> None:
        self.writer.__exit__(*error)


class OutputSink(Sink):
    """A file of outputs for each picture. ValueError for a folder that another run began, or writes to just now."""

    def __init__(self, config: DistillationConfig, teacher: Teacher, world: World) -> None:
        self.folder, self.teacher = Path(config.cache_dir), teacher
        self.count, self.side = config.cache_queries, config.cache_mask_size
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / f".rank{world.rank}.lock", f"writing {self.folder}")
        try:
            with distributed.main_first():
                self._claim(output_meta(config, teacher.meta), world)
        except BaseException:
            self._lock.release()
            raise

    def _claim(self, meta: dict[str, Any], world: World) -> None:
        found = read_meta(self.folder)
        if found is None and any(self.folder.glob("*.safetensors")):
            raise ValueError(
                f"{self.folder} holds files but no {META_FILE}, so nobody knows what they are; choose another folder "
                "(--cache-dir)"
            )
        if found is None and world.is_main:
            write_json(self.folder / META_FILE, meta)
            found = meta
        if differences := meta_differences(found or {}, meta, exact=True):
            raise ValueError(
                f"what {self.folder} holds was begun by another run ({'; '.join(differences)}); choose another folder "
                "(--cache-dir), or remove that one"
            )
        if world.is_main:
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while writing
                leftover.unlink()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def pending(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if not _is_whole(output_path(self.folder, key))]

    def num_bytes(self, count: int) -> int:
        maps = self.count * self.side**2 + (FINEST * self.teacher.trunk_shape[-1]) ** 2
        return count * (2 * maps + 4 * (5 * self.count + 1) + HEADER_BYTES)

    def add(self, keys: Sequence[str], images: Tensor) -> None:
        prompts = torch.full((len(keys),), PROMPT_INDEX, dtype=torch.int64, device=images.device)
        kept = keep_best(self.teacher(images, prompts, features=False), self.count, self.side)
        kept = {name: tensor.cpu() for name, tensor in kept.items()}
        for row, key in enumerate(keys):
            save_weights(output_path(self.folder, key), {name: tensor[row] for name, tensor in kept.items()})


class Pending(Dataset[DistillBatch]):
    """The pictures of a dataset that a cache lacks: each shown, or skipped, but never replaced by another.

    A `sam3.engine.loader.PictureDataset`. indices: their places in the dataset.
    """

    store = None

    def __init__(self, dataset: SA1BDistillDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices, self.preprocess = dataset, indices, dataset.preprocess

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, indices: Sequence[int], epoch: int = 0) -> DistillBatch:
        places = [self.indices[index] for index in indices]
        wanted = [self.dataset.pictures.key(place) for place in places]
        batch = self.dataset.load(places, epoch)
        rows = [row for row, key in enumerate(wanted) if batch.keys[row] == key]
        return dataclasses.replace(
            batch,
            images=batch.images if len(rows) == len(batch) else batch.images[rows],
            prompt_index=batch.prompt_index[rows],
            sizes=batch.sizes[rows],
            keys=[wanted[row] for row in rows],
            skipped=[(key, reason) for key, reason in batch.skipped if key in wanted],
        )

    def read_embeddings(self, batch: DistillBatch, memory: Any = None, pin: bool = False) -> DistillBatch:
        return batch


def _check_queries(config: DistillationConfig, teacher: Teacher, min_queries: int) -> None:
    require_queries(config.cache_queries, min_queries)
    if config.cache_queries > teacher.num_queries:
        raise ValueError(
            f"cache_queries is {config.cache_queries}, but this teacher has {teacher.num_queries} queries; "
            f"set cache_queries {teacher.num_queries} or less"
        )


def _batches(
    config: DistillationConfig, dataset: SA1BDistillDataset, todo: set[str], world: World, num_workers: int
) -> Any:
    """This process's share of the pictures `todo`, and a report of how far it is."""
    if not todo:
        return []
    indices = [index for index, key in enumerate(dataset.pictures.keys()) if key in todo]
    batches = once_sampler(len(indices), config.batch_size, world)
    loader = build_loader(
        Pending(dataset, indices), batches, num_workers, device=world.device, pin_memory=config.pin_memory
    )
    return log.progress(
        loader,
        desc="teacher",
        unit="images",
        total=math.ceil(len(indices) / world.size),
        count=lambda batch: len(batch) + len(batch.skipped),
        main=world.is_main,
    )


def _report_plan(kind: str, sink: Sink, count: int, todo: int) -> None:
    """In the log; OSError if the disk is too small for it."""
    needed = sink.num_bytes(todo)
    logger.info(
        f"cache of {kind}: {count} pictures, {count - todo} there already, {todo} to do; "
        f"{human_bytes(sink.num_bytes(1))} each, {human_bytes(needed)} in all, "
        f"{human_bytes(free_bytes(sink.folder))} free in {sink.folder}"
    )
    require_free_space(sink.folder, needed, f"caching the {kind} of {todo} pictures")


def _finish(folder: Path, count: int, skipped: list[tuple[str, str]], world: World) -> int:
    """List what could not be read, and say what is there."""
    everything = sorted({entry for part in distributed.gather_objects(skipped) for entry in part})
    path = folder / SKIPPED_FILE
    if world.is_main and everything:
        write_text(path, "".join(f"{key}\t{reason}\n" for key, reason in everything))
        logger.warning(
            f"{len(everything)} of {count} pictures could not be read, such as {everything[0][0]} "
            f"({everything[0][1]}); all are listed in {path}"
        )
    elif world.is_main:
        path.unlink(missing_ok=True)
        logger.info(f"all {count} pictures are in {folder}")
    return 1 if everything else 0


def _is_whole(path: Path) -> bool:
    """Whether there is a file as long as its header says; a copied one may have been cut off."""
    try:
        with safetensors.safe_open(path, framework="pt"):
            return True
    except (FileNotFoundError, safetensors.SafetensorError):
        return False
