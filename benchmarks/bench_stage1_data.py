"""How fast Stage 1's data path is, beside plain code for the same job. Makes its own data in a temporary folder.

    python benchmarks/bench_stage1_data.py --images 48

Three comparisons, each the median of interleaved repeats from a warm page cache:
  loader   pictures per second: batches in the main process, ready to go to the device, with `--workers` workers. The
           baseline decodes with Pillow, resizes in float32, parses the JSON and builds its boxes and points, slices
           records out of bytes, ships lists of numpy arrays, and stacks and casts them in the main process, as the
           public code does. Ours is `build_loader`; its batches hold uint8 and float16, cast on the device.
  read     store records per second, beside a bare `readinto` loop over the same file in the same order.
  write    store records per second, beside plain sequential writing; both push to the disk at the same intervals.

Exit code 1 if a requirement is missed: loader >= 6x, read >= 0.9x, write >= 0.9x.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset

from sam3.engine.embedding_writer import SYNC_BYTES, EmbeddingWriter
from sam3.engine.embeddings import EmbeddingReader, RecordLayout, store_meta
from sam3.engine.files import human_bytes
from sam3.engine.loader import build_loader
from sam3.engine.sa1b import list_sa1b
from sam3.engine.sampler import EpochSampler
from sam3.transforms import Preprocess
from stage1.data.dataset import Stage1Dataset

REQUIRED = {"loader": 6.0, "read": 0.9, "write": 0.9}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--width", type=int, default=2250)
    parser.add_argument("--annotations", type=int, default=100, help="objects per picture")
    parser.add_argument("--grid", type=int, default=72, help="side of the embedding")
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--img-size", type=int, default=1008)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to put the data; it is removed afterwards")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="bench_stage1_", dir=args.folder))
    try:
        make_pictures(folder, args)
        ratios = {
            "write": bench_write(folder, args),
            "read": bench_read(folder, args),
            "loader": bench_loader(folder, args),
        }
    finally:
        shutil.rmtree(folder)
    missed = [f"{name} {ratios[name]:.2f} < {REQUIRED[name]}" for name in ratios if ratios[name] < REQUIRED[name]]
    print("all requirements met" if not missed else f"missed: {', '.join(missed)}")
    return 1 if missed else 0


# ---------------------------------------------------------------------------------------------------------- data


def make_pictures(folder: Path, args: argparse.Namespace) -> None:
    """SA-1B layout; pictures of smooth structure plus noise, about as hard to decode as photos of their size."""
    images, annotations = folder / "images" / "train", folder / "annotations" / "train"
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    draw = np.random.default_rng(0)
    objects = [annotation(number, args.height, args.width, draw) for number in range(args.annotations)]
    for number in range(args.images):
        coarse = torch.from_numpy(draw.uniform(0, 255, (1, 3, 24, 36)).astype(np.float32))
        picture = F.interpolate(coarse, (args.height, args.width), mode="bicubic")[0]
        picture += torch.from_numpy(draw.standard_normal((1, args.height, args.width), dtype=np.float32)) * 4.5
        pixels = picture.clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(images / f"sa_{number}.jpg", quality=88)
        info = {"image_id": number, "width": args.width, "height": args.height, "file_name": f"sa_{number}.jpg"}
        (annotations / f"sa_{number}.json").write_text(json.dumps({"image": info, "annotations": objects}))
    size = (images / "sa_0.jpg").stat().st_size
    json_size = (annotations / "sa_0.json").stat().st_size
    print(f"{args.images} pictures {args.height}x{args.width}, {human_bytes(size)} each, JSON {human_bytes(json_size)}")


def annotation(number: int, height: int, width: int, draw: np.random.Generator) -> dict[str, Any]:
    """One object: a wavy ellipse."""
    rows, columns = np.ogrid[:height, :width]
    y, x = draw.uniform(0.2, 0.8, 2) * (height, width)
    radius_y, radius_x = draw.uniform(0.03, 0.2, 2) * (height, width)
    distance = ((rows - y) / radius_y) ** 2 + ((columns - x) / radius_x) ** 2
    rle = coco_mask.encode(np.asfortranarray(distance < 1 + 0.2 * np.sin(columns / 9)).astype(np.uint8))
    return {
        "id": number,
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
        "bbox": [float(value) for value in coco_mask.toBbox(rle)],
        "area": int(coco_mask.area(rle)),
        "predicted_iou": 0.93,
        "stability_score": 0.97,
        "crop_box": [0.0, 0.0, float(width), float(height)],
        "point_coords": [[float(x), float(y)]],
    }


def keys_of(args: argparse.Namespace) -> list[str]:
    return [f"sa_{number}" for number in range(args.images)]


# ------------------------------------------------------------------------------------------------------ comparing


def compare(
    name: str,
    unit_count: int,
    baseline: Callable[[], None],
    ours: Callable[[], None],
    repeats: int,
    prepare: Callable[[], None] = lambda: None,
) -> float:
    """Print both rates and their ratio (ours over baseline): medians of interleaved runs, after one of each.

    prepare: runs before each of them, untimed.
    """
    seconds: dict[str, list[float]] = {"baseline": [], "ours": []}
    for repeat in range(repeats + 1):
        for label, run in (("baseline", baseline), ("ours", ours)):
            prepare()
            start = time.perf_counter()
            run()
            if repeat:
                seconds[label].append(time.perf_counter() - start)
    rates = {label: unit_count / statistics.median(times) for label, times in seconds.items()}
    ratio = rates["ours"] / rates["baseline"]
    print(
        f"{name:7s} baseline {rates['baseline']:8.1f}/s   ours {rates['ours']:8.1f}/s   ratio {ratio:.2f} "
        f"(required {REQUIRED[name]})",
        flush=True,
    )
    return ratio


# --------------------------------------------------------------------------------------------------------- store


def bench_write(folder: Path, args: argparse.Namespace) -> float:
    """Leaves a store of all pictures in `folder/store`."""
    layout = RecordLayout((args.channels, args.grid, args.grid))
    meta = store_meta(layout.shape)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(min(8, args.images), *layout.shape, generator=generator).half()
    keys, store, plain = keys_of(args), folder / "store", folder / "plain.bin"
    records = [memoryview(record.numpy()).cast("B") for record in batch]  # the same memory that ours writes

    def write_plain() -> None:
        unsynced = 0
        with plain.open("wb", buffering=0) as file:
            for number in range(len(keys)):
                unsynced += file.write(records[number % len(records)])
                if unsynced >= SYNC_BYTES:
                    os.fsync(file.fileno())
                    unsynced = 0
            os.fsync(file.fileno())

    def write_store() -> None:
        with EmbeddingWriter(store, meta) as writer:
            for start in range(0, len(keys), len(batch)):
                some = keys[start : start + len(batch)]
                writer.add_batch(some, range(len(some)), batch[: len(some)])

    def remove() -> None:
        plain.unlink(missing_ok=True)
        shutil.rmtree(store, ignore_errors=True)

    ratio = compare("write", len(keys), write_plain, write_store, 2 * args.repeats, prepare=remove)
    plain.unlink(missing_ok=True)
    return ratio


def bench_read(folder: Path, args: argparse.Namespace) -> float:
    reader = EmbeddingReader(folder / "store")
    keys = keys_of(args)
    order = random.Random(0).sample(range(len(keys)), len(keys))
    room = reader.allocate(1)
    buffer = bytearray(reader.layout.record_bytes)

    def read_plain() -> None:
        with (folder / "store" / "rank0-values.bin").open("rb", buffering=0) as file:
            for line in order:
                file.seek(line * len(buffer))
                file.readinto(buffer)

    def read_store() -> None:
        for line in order:
            reader.read_into(keys[line], room.data[0])

    return compare("read", len(keys), read_plain, read_store, 5 * args.repeats)  # short


# -------------------------------------------------------------------------------------------------------- loader


class PlainDataset(Dataset):
    """One sample at a time, the way most code does it: everything parsed, everything in float32."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.size, self.keys = folder, args.img_size, keys_of(args)
        self.shape = (args.channels, args.grid, args.grid)
        self.record_bytes = RecordLayout(self.shape).record_bytes
        lines = (folder / "store" / "rank0-keys.txt").read_text().split()
        self.lines = {key: line for line, key in enumerate(lines)}
        self.values = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple:
        key = self.keys[index]
        if self.values is None:
            self.values = (self.folder / "store" / "rank0-values.bin").open("rb")
        self.values.seek(self.lines[key] * self.record_bytes)
        record = self.values.read(self.record_bytes)
        seed, embedding = np.frombuffer(record[:4], np.int32)[0], np.frombuffer(record[4:], np.float16).copy()

        with Image.open(self.folder / "images" / "train" / f"{key}.jpg") as file:
            picture = np.asarray(file.convert("RGB"))
        image = torch.from_numpy(picture.transpose(2, 0, 1).copy()).float()
        height, width = image.shape[1:]
        scale = self.size / max(height, width)
        rows, columns = int(height * scale + 0.5), int(width * scale + 0.5)
        image = F.interpolate(image[None], (rows, columns), mode="bilinear", align_corners=False, antialias=True)[0]
        image = (image - 127.5) / 127.5
        image = F.pad(image, (0, self.size - columns, 0, self.size - rows))

        document = json.loads((self.folder / "annotations" / "train" / f"{key}.json").read_text())
        ratio = torch.tensor([columns / width, rows / height])
        boxes = torch.stack([torch.tensor(entry["bbox"]) for entry in document["annotations"]]).float()
        boxes[:, 2:] += boxes[:, :2]
        points = torch.stack([torch.tensor(entry["point_coords"]) for entry in document["annotations"]])
        annotations = {"boxes": boxes * ratio.repeat(2), "points": points * ratio, "info": document["image"]}
        return image, annotations, embedding, seed, torch.tensor([3, rows, columns])


def collate_lists(samples: list[tuple]) -> list[list]:
    return [list(column) for column in zip(*samples, strict=True)]


def bench_loader(folder: Path, args: argparse.Namespace) -> float:
    plain_dataset = PlainDataset(folder, args)
    order = {"num_samples": args.images, "batch_size": args.batch_size, "drop_last": False}
    plain = DataLoader(
        plain_dataset,
        batch_sampler=EpochSampler(**order),
        num_workers=args.workers,
        collate_fn=collate_lists,
        persistent_workers=True,
    )
    dataset = Stage1Dataset(
        list_sa1b(folder, "train"),
        Preprocess(img_size=args.img_size),
        EmbeddingReader(folder / "store", expect={"shape": [args.channels, args.grid, args.grid]}),
    )
    loader = build_loader(dataset, EpochSampler(**order), args.workers)

    def run_plain() -> None:
        count = 0
        for images, _, embeddings, _, _ in plain:
            stacked = torch.from_numpy(np.stack(embeddings)).float().reshape(-1, *plain_dataset.shape)
            count += len(torch.stack(images)) if len(stacked) == len(images) else 0
        assert count == args.images

    def run_ours() -> None:
        assert sum(len(batch) for batch in loader) == args.images

    return compare("loader", args.images, run_plain, run_ours, args.repeats)


if __name__ == "__main__":
    sys.exit(main())
