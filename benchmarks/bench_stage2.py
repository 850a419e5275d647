"""Time and memory of a training step of Stage 2, beside keeping all activations.

    python benchmarks/bench_stage2.py --frames 8 --objects 1        # full size
    python benchmarks/bench_stage2.py --preset tiny

A step is forward, backward and AdamW on one clip that is made up: stored trunk maps, an object in all frames; second
neck, teacher and student with random weights. `ours` computes each frame's steps again in the backward pass
(TRAIN.USE_CHECKPOINT True), the baseline keeps what they need. Each runs in a process of its own, so that its peak
memory is its own: resident memory of the process, or what was allocated on a CUDA device. No table is printed unless
their losses agree. ratio = ours / baseline, below 1 is better.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import measure_apart, measure_training
from sam3.engine.batch import to_device
from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import choose_device
from sam3.engine.files import write_json
from sam3.model.config import Sam3Config
from sam3.model.necks import PassThroughTrunk, TrackerNeck
from sam3.model.sam3_video import Sam3VideoModel
from sam3.model.tracker_config import TINY_MEMORY, TRACKER_PRESETS, MemoryConfig, TrackerConfig
from sam3.tracker_builder import assemble_tracker, build_memory
from sam3.transforms import Preprocess
from stage2.data.batch import PRESENT, ClipBatch
from stage2.model import MemoryDistiller
from stage2.rollout import Rollout

SIDES = ("ours", "baseline")
OPTIONS = ("preset", "frames", "objects", "repeats", "threads", "device", "amp_dtype")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=TRACKER_PRESETS, default="full", help="size of the tracker")
    parser.add_argument("--frames", type=int, default=8, help="frames of the clip")
    parser.add_argument("--objects", type=int, default=1, help="objects in it")
    parser.add_argument("--repeats", type=int, default=1, help="timed steps, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--amp-dtype", choices=("auto", "bf16", "fp16", "off"), default="auto", help="autocast")
    parser.add_argument("--no-baseline", action="store_true", help="measure ours only")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--side", choices=SIDES, help="measure one side (used for the processes)")
    parser.add_argument("--result", type=Path, help="where --side puts its figures")
    args = parser.parse_args(argv)
    for name, least in (("frames", 2), ("objects", 1), ("repeats", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if args.side:
        if args.result is None:
            parser.error("--side needs --result")
        torch.set_num_threads(args.threads)
        torch.save(measure(args), args.result)
        return 0
    sides = SIDES[:1] if args.no_baseline else SIDES
    results = {side: measure_apart(__file__, side, ["--side", side], args, OPTIONS) for side in sides}
    if not args.no_baseline:
        compare(results)
    print_table(args, results)
    if args.json:
        write_json(args.json, {name: getattr(args, name) for name in OPTIONS} | {"sides": results})
    return 0


def compare(found: dict[str, dict[str, Any]]) -> None:
    """ValueError if the two sides computed different losses."""
    ours, baseline = (found[side]["loss"] for side in SIDES)
    if not abs(ours - baseline) <= found["ours"]["tolerance"] * abs(baseline):
        raise ValueError(f"the losses are {ours} and {baseline}, so the times mean nothing")


def print_table(args: Namespace, results: dict[str, dict[str, Any]]) -> None:
    ours, baseline = results["ours"], results.get("baseline")
    print(
        f"preset {args.preset}, one clip of {args.frames} frames with {args.objects} object(s), {ours['device']}, "
        f"autocast {ours['autocast']}, {args.threads} threads, torch {torch.__version__}, fastest of {args.repeats}, "
        f"{ours['trained']:,} parameters trained"
    )
    print(f"{'':<10}{'ours':>10}{'baseline':>10}{'ratio':>8}")
    for name, unit in (("step_s", "step s"), ("peak_gib", "peak GiB")):
        line = f"{unit:<10}{ours[name]:>10.2f}"
        if baseline is not None:
            line += f"{baseline[name]:>10.2f}{ours[name] / baseline[name]:>8.2f}"
        print(line)


def measure(args: Namespace) -> dict[str, Any]:
    """Runs the steps of one side: `step_s`, `peak_gib`, `loss` of the first step, `trained` parameters."""
    config, device = TrackerConfig.preset(args.preset), choose_device(args.device)
    width = Sam3Config.preset(args.preset).vit_dim
    distiller = build_distiller(config, width, device, args)
    batch = to_device(make_batch(config, width, args.frames, args.objects), device)
    return measure_training(distiller, batch, device, args.amp_dtype, args.repeats)


def build_distiller(config: TrackerConfig, width: int, device: torch.device, args: Namespace) -> MemoryDistiller:
    """Teacher and student with random weights, the same on both sides; `width` is the trunk's."""
    torch.manual_seed(0)
    neck = TrackerNeck(PassThroughTrunk(width), config.dim)
    model = Sam3VideoModel(neck, assemble_tracker(config), Preprocess(config.img_size, "square")).to(device)
    memory = build_memory(config, TINY_MEMORY if args.preset == "tiny" else MemoryConfig())
    memory.attention.init_from_teacher(model.tracker.transformer.encoder)
    return MemoryDistiller(Rollout(model, recompute=args.side == "ours"), memory).to(device).train()


def make_batch(config: TrackerConfig, width: int, num_frames: int, num_objects: int) -> ClipBatch:
    """Noise for trunk maps; each object is a box that stays where it is, and is prompted by it."""
    generator = torch.Generator().manual_seed(1)
    grid, side = config.grid, config.img_size
    masks = torch.zeros(num_objects, num_frames, 4 * grid, 4 * grid, dtype=torch.bool)
    masks[:, :, grid : 2 * grid, grid : 3 * grid] = True
    corners = torch.tensor([[side / 4, side / 4], [side * 3 / 4, side / 2]])
    return ClipBatch(
        keys=["noise"],
        images=None,
        sizes=torch.tensor([[side, side]]),
        embeddings=torch.randn(1, num_frames, width, grid, grid, generator=generator).half(),
        clip_of_object=torch.zeros(num_objects, dtype=torch.long),
        masks=masks,
        states=torch.full((num_objects, num_frames), PRESENT),
        kinds=["box"] * num_objects,
        points=corners.expand(num_objects, 2, 2),
        labels=torch.tensor([2, 3]).expand(num_objects, 2),
    )


if __name__ == "__main__":
    run_main(main)
