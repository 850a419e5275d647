"""Stage 1, step 1: SAM3's trunk sees every picture once, and what it gives is stored for all students.

    torchrun --nproc_per_node 8 stage1/save_embedding_stage1.py --cfg stage1/configs/teacher/sam_vit_huge_sa1b.yaml \
        --data-path data/sa-1b --output output/stage1_teacher

The store grows by appending, so the same command goes on after any interruption, with any number of processes.
`--check-saved-embed` computes stored embeddings again and compares, `--verify-store` checks the files without a model.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from sam3.engine import amp, distributed, log
from sam3.engine.batch import to_device
from sam3.engine.cli import run_main
from sam3.engine.config import dump_config
from sam3.engine.distributed import World
from sam3.engine.dry_run import repeated, seconds_per_iteration
from sam3.engine.embedding_verify import verify_store
from sam3.engine.embedding_writer import EmbeddingWriter, check_free_space
from sam3.engine.embeddings import EmbeddingReader, list_shards, meta_differences, plan, read_meta, store_meta
from sam3.engine.environment import write_env
from sam3.engine.files import free_bytes, human_bytes, write_text
from sam3.engine.image_list import ImageList
from sam3.engine.loader import loader_from_config, once_sampler
from sam3.engine.signals import StoppedBySignal, StopSignals
from sam3.engine.stage_config import build_preprocess, output_folder, teacher_meta
from stage1 import config as stage1_config
from stage1.data.dataset import Stage1Batch, Stage1Dataset
from stage1.data.listing import list_train_images, list_val_images
from stage1.data.sources import store_fields
from stage1.model import TeacherEncoder, build_teacher

TIMEOUT = timedelta(days=14)  # the processes meet again only at the end, where the fastest waits for the slowest
logger = logging.getLogger("sam3.stage1")


@dataclass
class Export:
    """What every mode of the program needs."""

    config: CfgNode
    world: World
    output: Path
    store: Path
    images: ImageList
    meta: dict[str, Any]

    def teacher(self) -> TeacherEncoder:
        return build_teacher(self.config, self.config.MODEL.RESUME, self.world.device)

    def loader(self, images: ImageList, reader: EmbeddingReader | None = None, batch_size: int | None = None):
        """Batches of `images`, each picture once over all processes; pictures that cannot be read are in `skipped`."""
        dataset = Stage1Dataset(
            images,
            build_preprocess(self.config),
            store=reader,
            augmentation=stage1_config.build_augmentation(self.config),
            seed=self.config.SEED,
            skip_bad=True,
        )
        sampler = once_sampler(len(images), batch_size or self.config.DATA.BATCH_SIZE, self.world)
        return loader_from_config(self.config, dataset, sampler, self.world.device)

    def embed(self, teacher: TeacherEncoder, batch: Stage1Batch) -> Tensor:
        """The teacher's float16 grids of a batch, `(B, C, G, G)`."""
        batch = to_device(batch, self.world.device)
        images = build_preprocess(self.config).normalise(batch.images, batch.sizes)
        dtype = amp.resolve_amp_dtype(self.config.AMP_ENABLE, self.config.AMP_DTYPE, self.world.device)
        with amp.autocast(self.world.device, dtype):
            return teacher(images)


def make_parser() -> argparse.ArgumentParser:
    parser = stage1_config.make_parser(__doc__, stage1_config.EXPORT_FLAGS)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check-saved-embed", action="store_true", help="compute stored embeddings again and compare")
    mode.add_argument("--verify-store", action="store_true", help="check sizes, checksums and coverage; no model")
    mode.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    parser.add_argument(
        "--check-tolerance",
        type=float,
        default=0.02,
        help="largest mean error that --check-saved-embed accepts, relative to the embeddings' standard deviation",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    config = stage1_config.load(args, stage1_config.EXPORT_FLAGS)
    if not config.DISTILL.SAVE_TEACHER_EMBED:
        raise ValueError(
            f"{args.cfg} has DISTILL.SAVE_TEACHER_EMBED False, so it is a student's config; "
            f"use stage1/configs/teacher/sam_vit_huge_sa1b.yaml"
        )
    stage1_config.refuse_idle_keys(config)
    with distributed.start(config.DEVICE, timeout=TIMEOUT) as world:
        output = output_folder(config)
        log.setup(None if args.dry_run else output, world.rank)
        export = prepare(config, world, output)
        if args.dry_run:
            return dry_run(export)
        if args.verify_store:
            return verify(export)
        if args.check_saved_embed:
            return check(export, args.check_tolerance)
        return save(export, sys.argv[1:] if argv is None else argv)


def prepare(config: CfgNode, world: World, output: Path) -> Export:
    """List the pictures and describe the store, before any model is built."""
    images = list_train_images(config)
    if (val := list_val_images(config)) is not None:
        images = images.joined(val)
    side = config.DISTILL.EMBED_SIZE
    meta = store_meta(
        (config.DISTILL.EMBED_DIM, side, side),
        config.DISTILL.STORE_DTYPE,
        teacher=teacher_meta(config.MODEL.RESUME, "MODEL.RESUME"),
        **store_fields(config),
    )
    return Export(config, world, output, stage1_config.embedding_folder(config, output), images, meta)


def save(export: Export, argv: Sequence[str]) -> int:
    """Write what the store lacks. Returns 0 only if every picture is stored (or skipping bad ones was asked for)."""
    world, skipped = export.world, []
    writer = EmbeddingWriter(export.store, export.meta, world.rank, world.size)
    if world.is_main:  # only now: a run that the store refuses leaves the files of the one that began it
        dump_config(export.config, export.output / "config.json")
        write_env(export.output / "env.json", argv)
    with StopSignals() as signals, writer:
        distributed.barrier()  # every process has repaired its shards
        todo = writer.pending(export.images.keys())
        distributed.barrier()  # every process has read the same list; now the shards may grow
        done = len(export.images) - len(todo)
        logger.info(
            f"{len(export.images)} pictures, {done} stored already, {len(todo)} to do; "
            f"{human_bytes(plan(1, export.meta))} each, {human_bytes(plan(len(todo), export.meta))} in all, "
            f"{human_bytes(free_bytes(export.store))} free in {export.store}"
        )
        if todo:
            check_free_space(export.store, len(todo), export.meta)
            teacher = export.teacher()
            loader = export.loader(export.images.select(todo))
            for batch in _progress(loader, "export", math.ceil(len(todo) / world.size), world):
                skipped += batch.skipped
                if len(batch):
                    writer.add_batch(batch.keys, batch.seeds, export.embed(teacher, batch))
                if signals.received:
                    raise StoppedBySignal(
                        signals.received, f"stopped with {writer.written} records; the same command goes on from there"
                    )
    return _finish(export, skipped)


def _finish(export: Export, skipped: list[tuple[str, str]]) -> int:
    """List what could not be stored, and say what is there."""
    everything = sorted({entry for part in distributed.gather_objects(skipped) for entry in part})
    path = export.output / "skipped.txt"
    if not export.world.is_main:
        return 0
    if not everything:
        path.unlink(missing_ok=True)
        logger.info(f"all {len(export.images)} pictures are stored in {export.store}")
        return 0
    write_text(path, "".join(f"{key}\t{reason}\n" for key, reason in everything))
    logger.warning(
        f"{len(everything)} of {len(export.images)} pictures could not be read, such as {everything[0][0]} "
        f"({everything[0][1]}); all are listed in {path}"
    )
    return 0 if export.config.DATA.SKIP_BAD_IMAGES else 1


def check(export: Export, tolerance: float) -> int:
    """Compute stored embeddings again; 1 if one is missing, not finite or too far from its teacher."""
    reader = EmbeddingReader(export.store, expect=export.meta, verify_crc=_has_checksums(export.store))
    missing = reader.missing(export.images.keys())
    images = export.images.select(set(export.images.keys()) - set(missing))
    if not len(images):
        raise ValueError(f"none of the {len(export.images)} pictures is stored in {export.store}")
    teacher = export.teacher()
    sums = dict.fromkeys(("values", "error", "square", "value", "unreadable"), 0.0)
    largest = 0.0
    for batch in _progress(
        export.loader(images, reader), "check", math.ceil(len(images) / export.world.size), export.world
    ):
        sums["unreadable"] += len(batch.skipped)
        if not len(batch):
            continue
        fresh = export.embed(teacher, batch).double()
        error = (to_device(batch.embeddings, export.world.device).values(torch.float64) - fresh).abs()
        sums["values"] += error.numel()
        sums["error"] += error.sum().item()
        sums["value"] += fresh.sum().item()
        sums["square"] += fresh.square().sum().item()
        largest = max(largest, error.max().item())
    total = distributed.sum_over_ranks(sums)
    largest = max(distributed.gather_objects(largest))
    count = max(total["values"], 1)
    mean_error = total["error"] / count
    scale = math.sqrt(max(total["square"] / count - (total["value"] / count) ** 2, 0))
    good = mean_error <= tolerance * scale and not missing and not total["unreadable"]
    logger.info(
        f"checked {len(images)} of {len(export.images)} pictures: mean error {mean_error:.3g}, largest {largest:.3g}, "
        f"standard deviation of the embeddings {scale:.3g}, relative error {mean_error / max(scale, 1e-12):.3g} "
        f"(accepted: {tolerance:g}); {len(missing)} missing, {int(total['unreadable'])} pictures unreadable: "
        + ("all good" if good else "NOT good")
    )
    for key in missing[:20]:
        logger.info(f"  missing: {key}")
    return 0 if good else 1


def verify(export: Export) -> int:
    """Sizes, checksums, duplicates and coverage of the store, read once by the main process."""
    if not export.world.is_main:
        return 0
    report = verify_store(export.store, export.images.keys(), shape=export.meta["shape"])
    logger.info(str(report))
    return 0 if report.ok else 1


def dry_run(export: Export) -> int:
    """Print the plan: pictures, bytes, and the time from a few timed batches."""
    config, images = export.config, export.images
    if differences := meta_differences(read_meta(export.store) or export.meta, export.meta, exact=True):
        raise ValueError(
            f"the embeddings in {export.store} were begun by another run ({'; '.join(differences)}); "
            f"choose another --output, or remove that one"
        )
    stored = sum(shard.values_path.stat().st_size for shard in list_shards(export.store))
    needed = max(0, plan(len(images), export.meta) - stored)
    processes, device = distributed.planned_world_size(), export.world.device
    teacher = export.teacher()
    # On a CPU a whole batch of the full-size teacher takes many minutes.
    batch_size = 1 if device.type == "cpu" else min(config.DATA.BATCH_SIZE, len(images))
    loader = export.loader(images.head(batch_size * 8), batch_size=batch_size)
    seconds = seconds_per_iteration(repeated(loader), lambda batch: export.embed(teacher, batch), device)
    rate = processes * batch_size / seconds
    free = free_bytes(export.store)
    logger.info(f"teacher      {config.MODEL.RESUME}, grid {export.meta['shape']} as {export.meta['dtype']}")
    logger.info(f"pictures     {len(images)} in {config.DATA.DATA_PATH} (train and val)")
    logger.info(f"processes    {processes} on {device.type}, {config.DATA.BATCH_SIZE} pictures a batch")
    sizes = f"{human_bytes(stored)} there, {human_bytes(needed)} to come, {human_bytes(free)} free"
    logger.info(f"store        {export.store}: {sizes}")
    logger.info(
        f"time         {log.duration(len(images) / rate)} at {rate:.3g} pictures/s (timed with {batch_size} a batch)"
    )
    if needed > free:
        raise OSError(f"{export.store} lacks {human_bytes(needed - free)}; free them or set DISTILL.STORE_DTYPE int8")
    return 0


def _progress(loader: Any, what: str, total: int, world: World) -> Any:
    return log.progress(
        loader,
        desc=what,
        unit="images",
        total=total,
        count=lambda batch: len(batch) + len(batch.skipped),
        main=world.is_main,
    )


def _has_checksums(store: Path) -> bool:
    return any(store.glob("*-crc32.bin"))


if __name__ == "__main__":
    run_main(main)
