"""Time and memory of a step of geometry fine-tuning, beside computing all masks and keeping all activations.

    python benchmarks/bench_geometry.py --students efficientvit_b0 --batch-size 1 --prompts 2    # about 5 GB
    python benchmarks/bench_geometry.py --preset tiny

A step is forward, backward and AdamW on one batch that is made up, with random weights in the frozen heads; reading
data takes no part. `ours` computes the mask of the selected query only and computes the frozen path's activations again
in the backward pass (DISTILL.SELECT_BEST_MASK and TRAIN.USE_CHECKPOINT True). The baseline computes the masks of all
queries, for teacher and student, then keeps the selected one, and recomputes nothing. Both take the same number of
prompts at once (DISTILL.PROMPT_CHUNK). Each runs in a process of its own, so that its peak memory is its own: resident
memory of the process, or what was allocated on a CUDA device. No table is printed unless their losses agree.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import measure_apart, measure_training
from sam3.backbones.student import BACKBONES, build_student
from sam3.engine.batch import to_device
from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import choose_device
from sam3.engine.embeddings import EmbeddingBatch
from sam3.engine.files import write_json
from sam3.model.config import PRESETS, Sam3Config
from sam3.model.necks import PassThroughTrunk
from sam3.model_builder import assemble_image_model
from sam3.transforms import Preprocess
from stage1_geometry_finetune.data import GeometryBatch
from stage1_geometry_finetune.frozen_path import FrozenPath
from stage1_geometry_finetune.model import GeometryDistiller

SIDES = ("ours", "baseline")
OPTIONS = ("preset", "batch_size", "prompts", "chunk", "repeats", "threads", "device", "amp_dtype")


class AllMasks(FrozenPath):
    """The baseline: the masks of all queries, of which the asked ones are kept."""

    def masks(self, out: dict[str, Any], queries: Tensor | None = None) -> Tensor:
        every = super().masks(out)  # (R, Q, M, M)
        return every.gather(1, queries[..., None, None].expand(-1, -1, *every.shape[2:]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="size of the frozen heads and the pictures")
    parser.add_argument("--students", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="backbones")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures")
    parser.add_argument("--prompts", type=int, default=16, help="boxes, with a point each, of a picture")
    parser.add_argument("--chunk", type=int, default=4, help="prompts through the frozen heads at once")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--amp-dtype", choices=("auto", "bf16", "fp16", "off"), default="auto", help="autocast")
    parser.add_argument("--no-baseline", action="store_true", help="measure ours only")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--side", choices=SIDES, help="measure one side of one student (used for the processes)")
    parser.add_argument("--result", type=Path, help="where --side puts its figures")
    args = parser.parse_args(argv)
    for name in ("batch_size", "prompts", "chunk", "repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.side:
        if args.result is None or len(args.students) != 1:
            parser.error("--side needs --result and one of --students")
        torch.set_num_threads(args.threads)
        torch.save(measure(args), args.result)
        return 0
    sides = SIDES[:1] if args.no_baseline else SIDES
    results = {student: {side: run_side(student, side, args) for side in sides} for student in args.students}
    for student, found in results.items():
        compare(student, found)
    print_table(args, results)
    if args.json:
        options = {name: getattr(args, name) for name in ("preset", "batch_size", "prompts", "chunk", "threads")}
        write_json(args.json, {**options, "torch": torch.__version__, "students": results})
    return 0


def run_side(student: str, side: str, args: Namespace) -> dict[str, Any]:
    """Measures in a fresh process."""
    flags = ["--side", side, "--students", student]
    return measure_apart(__file__, f"{student}, {side}", flags, args, OPTIONS)


def compare(student: str, found: dict[str, dict[str, Any]]) -> None:
    """ValueError if the two sides computed different losses."""
    if len(found) < 2:
        return
    ours, baseline = (found[side]["loss"] for side in SIDES)
    tolerance = found["ours"]["tolerance"]
    if not abs(ours - baseline) <= tolerance * abs(baseline):
        raise ValueError(f"{student}: the losses are {ours} and {baseline}, so the times mean nothing")


def print_table(args: Namespace, results: dict[str, dict[str, Any]]) -> None:
    first = next(iter(results.values()))["ours"]
    print(
        f"preset {args.preset}, {args.batch_size} picture(s) with {args.prompts} prompts each, {args.chunk} at once, "
        f"{first['device']}, autocast {first['autocast']}, {args.threads} threads, torch {torch.__version__}, fastest "
        f"of {args.repeats}; ratio = ours / baseline, below 1 is better"
    )
    head = f"{'student':<18}{'trained':>10}{'step s':>10}{'baseline':>10}{'ratio':>8}"
    print(head + f"{'peak GiB':>10}{'baseline':>10}{'ratio':>8}")
    for student, sides in results.items():
        ours, baseline = sides["ours"], sides.get("baseline")
        line = f"{student:<18}{ours['trained'] / 1e6:>9.2f}M"
        for name in ("step_s", "peak_gib"):
            other = None if baseline is None else baseline[name]
            line += f"{ours[name]:>10.2f}" + (
                f"{'-':>10}{'-':>8}" if other is None else f"{other:>10.2f}{ours[name] / other:>8.2f}"
            )
        print(line)


def measure(args: Namespace) -> dict[str, Any]:
    """Runs the steps of one side: `step_s`, `peak_gib`, `loss` of the first step, `trained` parameters."""
    config, device = Sam3Config.preset(args.preset), choose_device(args.device)
    distiller = build_distiller(args, config, device)
    batch = to_device(make_batch(config, args.batch_size, args.prompts), device)
    return measure_training(distiller, batch, device, args.amp_dtype, args.repeats)


def build_distiller(args: Namespace, config: Sam3Config, device: torch.device) -> GeometryDistiller:
    """The student before the heads, both with random weights, the same on both sides."""
    torch.manual_seed(0)
    heads = assemble_image_model(config, PassThroughTrunk(config.vit_dim), enable_text_encoder=False)
    text = {
        "language_features": torch.randn(config.context_length, 1, config.dim),
        "language_mask": torch.arange(config.context_length)[None] > 2,  # as many tokens as "visual" has
    }
    student = build_student(args.students[0], config.vit_dim, config.grid)
    path = FrozenPath if args.side == "ours" else AllMasks
    distiller = GeometryDistiller(
        student,
        path(heads.to(device), text),
        Preprocess(img_size=config.img_size),
        chunk=args.chunk,
        use_checkpoint=args.side == "ours",
    )
    return distiller.to(device).train()


def make_batch(config: Sam3Config, count: int, prompts: int) -> GeometryBatch:
    """Noise for pictures and teacher grids, boxes of a fifth to a half of the side with points in their middle."""
    generator = torch.Generator().manual_seed(1)
    side, grid = config.img_size, config.grid
    corners = 0.5 * torch.rand(count, prompts, 2, generator=generator)
    sides = 0.2 + 0.3 * torch.rand(count, prompts, 2, generator=generator)
    boxes = torch.cat((corners, corners + sides), dim=-1)
    grids = torch.randn(count, config.vit_dim, grid, grid, generator=generator).half()
    return GeometryBatch(
        images=torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
        sizes=torch.tensor([[side, side]] * count),
        keys=[str(i) for i in range(count)],
        boxes=boxes,
        targets=boxes,
        points=corners + sides / 2,
        point_labels=torch.ones(count, prompts, dtype=torch.long),
        prompt_mask=torch.zeros(count, prompts, dtype=torch.bool),
        kinds=[["both"] * prompts for _ in range(count)],
        embeddings=EmbeddingBatch(grids, torch.zeros(count, dtype=torch.int64)),
    )


if __name__ == "__main__":
    run_main(main)
