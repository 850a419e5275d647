"""Speed and memory of tracking a long video: memory must not grow with the number of frames.

    python benchmarks/bench_video.py --preset tiny --frames 1000
    python benchmarks/bench_video.py --checkpoint merged.pt --frames 200 --device cuda --dtype bf16

The video is made up as it is read, one moving rectangle per object; without --checkpoint the weights are random. Speed
counts reading and preparing frames, the image encoder, and turning masks to the size of the video. Memory is printed at
a tenth, a quarter, a half and all of the frames: bytes of all living tensors on any device, which say exactly what is
kept, and resident memory of the process (Linux), which the allocator rounds. Ends with 1 if tensors grew by more than
1 % from the first line to the last.
"""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import choose_device
from sam3.engine.files import human_bytes, write_json
from sam3.model.config import PRESETS, Sam3Config
from sam3.model.necks import TrackerNeck
from sam3.model.sam3_video import Sam3VideoModel
from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.tracker_config import TrackerConfig
from sam3.model_loading import build_vit
from sam3.tracker_builder import assemble_tracker, build_video_model
from sam3.transforms import Preprocess
from sam3.video_frames import Pictures, VideoFrames

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
FEWEST_FRAMES = 320  # a tenth of them must have filled the memory: 2 x 16 frames
LARGEST_GROWTH = 1.01


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="take this model instead of random weights")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes without a checkpoint")
    parser.add_argument("--frames", type=int, default=1000, help=f"length of the video, at least {FEWEST_FRAMES}")
    parser.add_argument("--objects", type=int, default=1, help="objects tracked together")
    parser.add_argument("--size", type=int, nargs=2, default=[270, 480], metavar=("H", "W"), help="pixels of a frame")
    parser.add_argument("--memory-selection", action="store_true", help="remember the best of the recent frames")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=AUTOCAST_DTYPES, default="fp32", help="precision of the matrix products")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.frames < FEWEST_FRAMES:
        parser.error(f"--frames must be at least {FEWEST_FRAMES}, else the memory is still filling, got {args.frames}")
    if min(args.objects, args.threads, *args.size) < 1:
        parser.error("--objects, --threads and --size must be at least 1")
    torch.set_num_threads(args.threads)
    lines = measure(args, build_model(args))
    growth = print_table(args, lines)
    if args.json:
        write_json(args.json, {"frames": args.frames, "objects": args.objects, "lines": lines, "growth": growth})
    return 0 if growth <= LARGEST_GROWTH else 1


def build_model(args: Namespace) -> Sam3VideoModel:
    """From the checkpoint, or with random weights."""
    if args.checkpoint:
        return build_video_model(args.checkpoint, args.device)
    torch.manual_seed(0)
    sizes, config = Sam3Config.preset(args.preset), TrackerConfig.preset(args.preset)
    neck = TrackerNeck(build_vit(vars(sizes)), config.dim)
    model = Sam3VideoModel(neck, assemble_tracker(config), Preprocess(config.img_size, "square"))
    return model.to(choose_device(args.device)).eval()


def made_up_video(num_frames: int, height: int, width: int, num_objects: int) -> VideoFrames:
    """Rectangles that move over a gradient; frame i is drawn when it is read."""
    ground = np.linspace(0, 200, width, dtype=np.uint8)

    def load(index: int) -> Tensor:
        pixels = np.tile(ground, (3, height, 1))
        for k in range(num_objects):
            left, top, right, bottom = rectangle(index, k, height, width)
            pixels[:, top:bottom, left:right] = np.array([255, 40 * k % 256, 60])[:, None, None]
        return torch.from_numpy(pixels)

    return VideoFrames(Pictures([f"{i:05d}" for i in range(num_frames)], load), "the made-up video")


def rectangle(index: int, number: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of an object in a frame, pixels."""
    left = (2 * index + 31 * number) % max(width * 3 // 4, 1)
    top = (index + 17 * number) % max(height * 3 // 4, 1)
    return left, top, left + max(width // 4, 1), top + max(height // 4, 1)


def measure(args: Namespace, model: Sam3VideoModel) -> list[dict[str, Any]]:
    """Tracks the video; a dict of `frames`, `frames_per_s`, `tensor_bytes` and `rss_bytes` for each line."""
    predictor = Sam3VideoPredictor(model, AUTOCAST_DTYPES[args.dtype], memory_selection=args.memory_selection)
    marks = {args.frames // 10, args.frames // 4, args.frames // 2, args.frames}
    lines = []
    with predictor.start_session(made_up_video(args.frames, *args.size, args.objects)) as session:
        for k in range(args.objects):
            box = rectangle(0, k, *args.size)
            predictor.add_new_points_or_box(session, 0, k + 1, rel_coordinates=False, box=box)
        since, done = time.perf_counter(), 0
        for masks in predictor.propagate_in_video(session):
            (masks.video_masks > 0).cpu()  # what a user takes, and what waits for the device
            frames = masks.frame_idx + 1
            if frames in marks:
                rate = (frames - done) / (time.perf_counter() - since)
                line = {
                    "frames": frames,
                    "frames_per_s": rate,
                    "tensor_bytes": tensor_bytes(),
                    "rss_bytes": rss_bytes(),
                }
                lines.append(line)
                since, done = time.perf_counter(), frames
    return lines


def tensor_bytes() -> int:
    """Of all living dense tensors, each memory counted once.

    Only plain tensors and parameters: subclasses, as tracing compilers leave them, may own no memory to point to.
    """
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))
    dense = (tensor for tensor in tensors if tensor.device.type != "meta" and tensor.layout == torch.strided)
    storages = [tensor.untyped_storage() for tensor in dense]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def rss_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not tell it this way."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def print_table(args: Namespace, lines: list[dict[str, Any]]) -> float:
    """Prints a line per mark, and returns the ratio of the last to the first one's tensors."""
    source = args.checkpoint.name if args.checkpoint else f"preset {args.preset}"
    print(
        f"{source}, {args.frames} frames of {args.size[0]} x {args.size[1]}, {args.objects} object(s), "
        f"{choose_device(args.device)}, {args.dtype}, {args.threads} threads, torch {torch.__version__}"
    )
    print(f"{'frames':>8}{'frames/s':>12}{'tensors':>14}{'resident':>14}")
    for line in lines:
        resident = "-" if line["rss_bytes"] is None else human_bytes(line["rss_bytes"])
        tensors = human_bytes(line["tensor_bytes"])
        print(f"{line['frames']:>8}{line['frames_per_s']:>12.2f}{tensors:>14}{resident:>14}")
    ratios = []
    for name in ("tensor_bytes", "rss_bytes"):
        first, last = lines[0][name], lines[-1][name]
        ratios.append(float("nan") if first is None else last / first)
    print(f"last / first: tensors {ratios[0]:.4f}, resident {ratios[1]:.4f}")
    return ratios[0]


if __name__ == "__main__":
    run_main(main)
