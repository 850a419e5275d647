"""Stage 2, step 1: the trunk sees every frame once, and what it gives, before the neck, is stored for all epochs.

    python stage2/save_video_embeddings_stage2.py --data_dir data/sa-v/extracted_frames \
        --output_dir output/stage2_embeddings --batch_size 8
    torchrun --nproc_per_node=4 stage2/save_video_embeddings_stage2.py ...

Video i goes to process i mod the number of processes. The same command goes on after any interruption, with any number
of processes: videos with metadata are passed over, whole frames of the others are kept. A frame of SAM3 takes 10.6 MB
in fp16, so look at the plan first: --dry-run. The trunk may also be a student's, in a merged checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sam3.engine import amp, distributed, log
from sam3.engine.batch import to_device
from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import World
from sam3.engine.dry_run import repeated, seconds_per_iteration
from sam3.engine.files import free_bytes, human_bytes, require_free_space, write_text
from sam3.engine.hub import SAM3_FOLDER, download_sam3
from sam3.engine.loader import PictureLoader, build_loader
from sam3.engine.sampler import EpochSampler
from sam3.engine.sav import VideoFolder, list_videos
from sam3.engine.signals import StoppedBySignal, StopSignals
from sam3.engine.stage_config import teacher_meta
from sam3.engine.video_embeddings import DTYPES, SAVE_FORMATS, VideoEmbeddingWriter, video_meta
from stage2.data.frames import FrameBatch, FrameDataset, frame_key
from stage2.trunk import FrozenTrunk, load_trunk

RELEASED = SAM3_FOLDER / "sam3.pt"
FAILED_FILE = "failed_frames.txt"
TIMEOUT = timedelta(days=14)  # the processes meet again only at the end, where the fastest waits for the slowest
logger = logging.getLogger("sam3.stage2")


@dataclass
class Export:
    """One process's share. videos: those that lack frames; missing: the numbers of these frames, per video.

    failures: (frame or video, reason) of what cannot be done. num_videos, num_frames: of the share, with what is there.
    """

    args: argparse.Namespace
    world: World
    trunk: FrozenTrunk
    writer: VideoEmbeddingWriter
    videos: list[VideoFolder] = field(default_factory=list)
    missing: list[np.ndarray] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    num_videos: int = 0
    num_frames: int = 0

    @property
    def num_missing(self) -> int:
        return sum(map(len, self.missing))

    def loader(self, batch_size: int) -> PictureLoader[FrameBatch]:
        """The missing frames in batches, each once; those that cannot be read are in `skipped`."""
        dataset = FrameDataset(self.videos, self.missing, self.trunk.preprocess)
        batches = EpochSampler(len(dataset), batch_size, shuffle=False, drop_last=False, padding=False)
        return build_loader(dataset, batches, self.args.num_workers, self.world.device)

    def embed(self, batch: FrameBatch) -> Tensor:
        """What the trunk gives for a batch, `(B, C, G, G)`."""
        batch = to_device(batch, self.world.device)
        precision = self.args.amp_dtype
        dtype = amp.resolve_amp_dtype(precision != "fp32", precision, self.world.device)
        with amp.autocast(self.world.device, dtype):
            return self.trunk(batch.images, batch.sizes)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, default=Path("data/sa-v/extracted_frames"), help="folder of videos: <video>/00000.jpg")
    add("--output_dir", type=Path, default=Path("output/stage2_embeddings"), help="where the embeddings go")
    add("--checkpoint", type=Path, default=RELEASED,
        help="whose trunk: sam3.pt (this default is fetched if it is not there) or a merged student")  # fmt: skip
    add("--batch_size", type=int, default=8, help="frames a batch, per process")
    add("--image_size", type=int, help="side of the trunk's input in pixels; only checked, the checkpoint sets it")
    add("--dtype", choices=DTYPES, default="fp16", help="of the stored values")
    add("--save_format", choices=SAVE_FORMATS, default="pt", help="torch or numpy files")
    add("--frame_stride", type=int, default=1,
        help="store only frames whose number it divides; SA-V has masks for every 4th, so 4 is enough")  # fmt: skip
    add("--videos_file", type=Path, help="names of the videos to do, one a line (default: all)")
    add("--max_videos", type=int, help="do only the first so many of them")
    add("--num_workers", type=int, default=4, help="processes that read and resize frames, per process")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp_dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="precision of the trunk's matrix products; auto is bf16 or fp16 on a GPU, fp32 on the CPU")  # fmt: skip
    add("--ignore_free_space", action="store_true", help="begin even if the disk looks too small")
    add("--dry-run", action="store_true", help="check everything, print the plan and the time it takes, write nothing")
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("frame_stride", 1), ("max_videos", 1), ("num_workers", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if args.save_format == "npy" and args.dtype == "bf16":
        parser.error("numpy has no bf16: take --save_format pt, or --dtype fp16 or fp32")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every frame asked for is stored, else 1. Raises ValueError, FileNotFoundError, OSError."""
    args = parse_args(argv)
    with distributed.start(args.device, timeout=TIMEOUT) as world:
        log.setup(None if args.dry_run else args.output_dir, world.rank)
        export = prepare(args, world)
        return dry_run(export) if args.dry_run else save(export)


def prepare(args: argparse.Namespace, world: World) -> Export:
    """List what this process has to do; the trunk's weights are not read yet."""
    videos = choose_videos(args)
    fetch_checkpoint(args, world)
    trunk = load_trunk(args.checkpoint, args.image_size)
    meta = video_meta(
        trunk.shape,
        args.dtype,
        args.save_format,
        teacher=teacher_meta(args.checkpoint, "--checkpoint"),
        preprocess=trunk.preprocess.to_meta(),
    )
    export = Export(args, world, trunk, VideoEmbeddingWriter(args.output_dir, meta, args.frame_stride))
    for video in videos[world.rank :: world.size]:
        export.num_videos += 1
        try:
            numbers = [number for number in video.numbers if number % args.frame_stride == 0]
            if not numbers:
                raise ValueError(
                    f"no frame of {video.folder} has a number that --frame_stride {args.frame_stride} divides"
                )
        except (ValueError, OSError) as error:
            export.failures.append((video.name, str(error)))
            continue
        export.num_frames += len(numbers)
        if missing := export.writer.missing(video.name, numbers):
            export.videos.append(video)
            export.missing.append(np.array(missing, dtype=np.int32))  # millions of integers would be large objects
    return export


def choose_videos(args: argparse.Namespace) -> list[VideoFolder]:
    """The videos of all processes, in the order in which they are dealt out."""
    names = None
    if args.videos_file is not None:
        if not args.videos_file.is_file():
            raise FileNotFoundError(f"no file {args.videos_file}; --videos_file holds names of videos, one a line")
        lines = args.videos_file.read_text(encoding="utf-8").splitlines()
        names = list(dict.fromkeys(name for line in lines if (name := line.strip())))
        if not names:
            raise ValueError(f"{args.videos_file} is empty; write names of videos into it, one a line")
    return list_videos(args.data_dir, names)[: args.max_videos]


def fetch_checkpoint(args: argparse.Namespace, world: World) -> None:
    """Bring the released weights if they are asked for and not there; one process of each machine does."""
    if args.checkpoint == RELEASED and not args.dry_run:
        if world.local_rank == 0 and not RELEASED.is_file():
            download_sam3(RELEASED.parent)
        distributed.barrier()


def log_plan(export: Export) -> dict[str, int]:
    """Say what is there, what is to come and what it takes on disk. Returns totals over all processes."""
    args, form = export.args, export.writer.format
    share = {"videos": export.num_videos, "todo": len(export.videos), "frames": export.num_frames}
    total = distributed.sum_over_ranks({**share, "missing": export.num_missing, "failed": len(export.failures)})
    total = {name: int(value) for name, value in total.items()}
    total["bytes"] = total["missing"] * form.file_bytes
    logger.info(f"trunk        {args.checkpoint}, {form.shape} as {form.dtype} in .{form.save_format} files")
    logger.info(f"input        {export.trunk.preprocess}")
    logger.info(
        f"videos       {total['videos']} in {args.data_dir}, {total['todo']} to do, {total['failed']} cannot be done"
    )
    logger.info(f"frames       {total['frames']} (stride {args.frame_stride}), {total['missing']} to do")
    logger.info(
        f"disk         {human_bytes(form.file_bytes)} a frame, {human_bytes(total['bytes'])} to come, "
        f"{human_bytes(free_bytes(args.output_dir))} free in {args.output_dir}"
    )
    return total


def check_space(export: Export, needed: int) -> None:
    """OSError if the disk is too small and nobody said to begin all the same."""
    try:
        require_free_space(export.args.output_dir, needed, "storing the embeddings")
    except OSError as error:
        if not export.args.ignore_free_space:
            hint = (
                "--frame_stride 4, --max_videos and --videos_file take fewer frames, --ignore_free_space begins anyway"
            )
            raise OSError(f"{error}; {hint}") from error
        logger.warning(f"{error}; going on all the same")


def save(export: Export) -> int:
    """Write what is missing; 1 if some of it could not be."""
    world, writer = export.world, export.writer
    check_space(export, log_plan(export)["bytes"])
    fields = {"data_dir": str(export.args.data_dir), "num_gpus": world.size}
    if world.is_main:
        writer.describe(completed=False, **fields)
    distributed.barrier()  # the folder states whose embeddings it holds; now they may come
    with StopSignals() as signals, writer:
        if export.num_missing:
            export.trunk.to(world.device)
            for batch in with_progress(export):
                export.failures += batch.skipped
                if len(batch):
                    writer.add(batch.frames, export.embed(batch))
                if signals.received:
                    raise StoppedBySignal(signals.received, "stopped; the same command goes on from there")
    reason = f"its embedding is NaN or too large for {export.args.dtype}; check the weights, or try --dtype bf16"
    export.failures += [(frame_key(*frame), reason) for frame in writer.rejected]
    return finish(export, fields)


def with_progress(export: Export) -> Iterator[FrameBatch]:
    world = export.world
    return log.progress(
        export.loader(export.args.batch_size),
        desc="embed" if world.size == 1 else f"embed (process {world.rank} of {world.size})",
        unit="frames",
        total=export.num_missing,
        count=lambda batch: len(batch) + len(batch.skipped),
        main=world.is_main,
    )


def finish(export: Export, fields: dict[str, Any]) -> int:
    """Once all processes are done: the global description, and a list of what could not be stored."""
    failures = sorted({failure for share in distributed.gather_objects(export.failures) for failure in share})
    if not export.world.is_main:
        return 1 if failures else 0
    output = export.args.output_dir
    export.writer.describe(completed=not failures, **fields)
    if not failures:
        (output / FAILED_FILE).unlink(missing_ok=True)
        logger.info(f"every frame asked for is stored in {output}")
        return 0
    write_text(output / FAILED_FILE, "".join(f"{key}\t{reason}\n" for key, reason in failures))
    logger.error(
        f"{len(failures)} frames or videos could not be stored, such as {failures[0][0]} ({failures[0][1]}); all are "
        f"listed in {output / FAILED_FILE}, their videos are not complete, the others are"
    )
    return 1


def dry_run(export: Export) -> int:
    """Print the plan and, from a few timed batches, how long it takes; 1 if a video cannot be done."""
    total, device = log_plan(export), export.world.device
    check_space(export, total["bytes"])
    for name, reason in export.failures:
        logger.error(f"cannot be done: {name}: {reason}")
    if export.num_missing:
        # On a CPU a whole batch of the full-size trunk takes many minutes.
        batch_size = 1 if device.type == "cpu" else min(export.args.batch_size, export.num_missing)
        export.trunk.to(device)
        seconds = seconds_per_iteration(repeated(export.loader(batch_size)), export.embed, device)
        rate = distributed.planned_world_size() * batch_size / seconds
        logger.info(
            f"time         {log.duration(total['missing'] / rate)} at {rate:.3g} frames/s by "
            f"{distributed.planned_world_size()} processes on {device.type} (timed with {batch_size} a batch)"
        )
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    run_main(main)
