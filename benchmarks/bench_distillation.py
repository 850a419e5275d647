"""Time of what the distillation adds to two models: matching their queries, and the losses with their gradients.

    python benchmarks/bench_distillation.py --threads 1             # full size, about 2 GB
    python benchmarks/bench_distillation.py --preset tiny --at-least 0

One picture of random outputs, 100 queries against 200, maps of 252 against 288, all eight losses forward
and backward, against the same formulas written down for one pair and called for each:

    per pair        every pair resizes its two masks, as the formula of the cost says
    resized once    the loop of someone who noticed, for comparison

All three must choose the same pairs and give the same loss and gradients. `x` = theirs / ours, above 1 is better; the
exit code is 1 if `per pair` is less than `--at-least` times ours.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.measuring import device_name, fastest
from distillation.config import LOSSES, DistillationConfig
from distillation.hungarian import HungarianMatcher, Pair
from distillation.losses import DistillationLoss
from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import choose_device
from sam3.engine.files import write_json

BASELINES = ("per pair", "resized once")
STAGES = ("matching", "losses", "together")
TOLERANCE = 1e-4  # of loss and gradients, by their size; float32 in another order

Query = tuple[Tensor, Tensor, Tensor]  # mask, box, logit
Match = Callable[[dict[str, Any], dict[str, Any]], list[Pair]]
Loss = Callable[[dict[str, Any], dict[str, Any], list[Pair]], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Student's and teacher's number of queries and side of masks and finest features; a quarter is the coarsest."""

    queries: tuple[int, int]
    side: tuple[int, int]
    mask_size: int  # at which masks are matched
    dim: int


PRESETS = {
    "full": Sizes(queries=(100, 200), side=(252, 288), mask_size=144, dim=256),
    "tiny": Sizes(queries=(6, 10), side=(28, 32), mask_size=16, dim=8),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="size of the outputs")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the fastest counts")
    parser.add_argument("--at-least", type=float, default=10.0, help="ratio below which the exit code is 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    torch.set_num_threads(args.threads)
    figures, code = run_losses(args)
    if args.json:
        options = {name: getattr(args, name) for name in ("preset", "repeats", "threads")}
        write_json(args.json, {**options, "torch": torch.__version__, **figures})
    return code


def run_losses(args: Namespace) -> tuple[dict[str, Any], int]:
    """Figures in ms of each side and stage, and the exit code."""
    sizes, device = PRESETS[args.preset], choose_device(args.device)
    student = make_outputs(sizes, 0, device)
    teacher = make_outputs(sizes, 1, device)
    config = DistillationConfig()
    matcher, loss = HungarianMatcher(mask_size=sizes.mask_size), DistillationLoss(config.loss_weights)
    sides: dict[str, tuple[Match, Loss]] = {
        "ours": (matcher, lambda *given: loss(*given, with_features=True)["total_loss"]),
        "per pair": (lambda *given: plain_match(*given, sizes.mask_size), plain_loss),
        "resized once": (lambda *given: plain_match(*given, sizes.mask_size, resize_once=True), plain_loss),
    }
    found: dict[str, dict[str, Any]] = {}
    for _ in range(args.repeats):  # in turn, so that a busy machine is busy for all
        for name, side in sides.items():
            ms = found[name]["ms"] if name in found else {}
            found[name] = measure(*side, student, teacher, device)
            found[name]["ms"] = {stage: min(spent, ms.get(stage, spent)) for stage, spent in found[name]["ms"].items()}
    for name in BASELINES:
        check_same(found["ours"], found[name], name)
    times = {name: figures["ms"] for name, figures in found.items()}
    ratio = times["per pair"]["together"] / times["ours"]["together"]
    print(
        "{} of {} queries, maps of {} against {}, ".format(*sizes.queries, *sizes.side)
        + f"matched at {sizes.mask_size}, {device_name(device)}, {args.threads} threads, torch {torch.__version__}, "
        f"fastest of {args.repeats}; x = theirs / ours, above 1 is better"
    )
    print_table(times)
    if ratio < args.at_least:
        print(f"{ratio:.1f} times as fast as per pair; wanted at least {args.at_least:g}")
    return {"device": device_name(device), "ms": times, "ratio": ratio}, int(ratio < args.at_least)


def make_outputs(sizes: Sizes, side: int, device: torch.device) -> dict[str, Any]:
    """Random common outputs of one picture; side: 0 student, with gradients, 1 teacher."""
    generator = torch.Generator().manual_seed(side)
    queries, edge, dim = sizes.queries[side], sizes.side[side], sizes.dim

    def noise(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device).requires_grad_(side == 0)

    corner = torch.rand(1, queries, 2, generator=generator) / 2
    size = torch.rand(1, queries, 2, generator=generator) / 2
    return {
        "pred_masks": noise(1, queries, edge, edge, scale=4),
        "pred_boxes": torch.cat((corner, corner + size), -1).to(device).requires_grad_(side == 0),
        "pred_logits": noise(1, queries, scale=2),
        "presence_logits": noise(1, 1),
        "semantic_seg": noise(1, 1, edge, edge, scale=4),
        "fpn_features": tuple(noise(1, dim, edge // k, edge // k) for k in (1, 2, 4)),
        "encoder_output": noise(1, (edge // 4) ** 2, dim),
        "encoder_hw": (edge // 4, edge // 4),
    }


def measure(
    match: Match, loss: Loss, student: dict[str, Any], teacher: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """`ms` of each stage, the `pairs`, the `loss` and its `gradients`, of one run."""
    leaves = [leaf for leaf in _flat(student) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        leaf.grad = None
    found: dict[str, Any] = {}

    def matching() -> None:
        found["pairs"] = match(student, teacher)

    def losses() -> None:
        total = loss(student, teacher, found["pairs"])
        total.backward()
        found["loss"] = total.item()

    ms = {stage.__name__: 1000 * fastest(stage, 1, device)[0] for stage in (matching, losses)}
    ms["together"] = sum(ms.values())
    return {**found, "ms": ms, "gradients": [leaf.grad for leaf in leaves]}


def check_same(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    """ValueError if the two sides computed different things."""
    for found, wanted in zip(ours["pairs"], theirs["pairs"], strict=True):
        if not all(map(torch.equal, found, wanted)):
            raise ValueError(f"{name} matches other queries, so the times mean nothing")
    if not abs(ours["loss"] - theirs["loss"]) <= TOLERANCE * abs(theirs["loss"]):
        raise ValueError(f"the losses are {ours['loss']} and, {name}, {theirs['loss']}, so the times mean nothing")
    for found, wanted in zip(ours["gradients"], theirs["gradients"], strict=True):
        if not (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
            raise ValueError(f"{name} gives other gradients, so the times mean nothing")


def print_table(times: dict[str, dict[str, float]]) -> None:
    print(f"{'ms':<10}{'ours':>10}" + "".join(f"{name:>14}{'x':>7}" for name in BASELINES))
    for stage in STAGES:
        ours = times["ours"][stage]
        theirs = (times[name][stage] for name in BASELINES)
        print(f"{stage:<10}{ours:>10.1f}" + "".join(f"{other:>14.1f}{other / ours:>7.2f}" for other in theirs))


# The formulas, one pair at a time -------------------------------------------------------------------------------------


@torch.no_grad()
def plain_match(
    student: dict[str, Any], teacher: dict[str, Any], mask_size: int, resize_once: bool = False
) -> list[Pair]:
    """The assignment of least cost of each picture, every cost computed on its own."""
    pairs = []
    for b in range(len(student["pred_masks"])):
        ours, theirs = queries_of(student, b), queries_of(teacher, b)
        prepare = partial(probabilities, size=mask_size)
        if resize_once:
            prepare = cache(prepare)
        costs = [[plain_cost(one, other, prepare).item() for other in theirs] for one in ours]
        chosen = linear_sum_assignment(costs)
        pairs.append(tuple(torch.from_numpy(rows).to(student["pred_masks"].device) for rows in chosen))
    return pairs


def queries_of(outputs: dict[str, Any], b: int) -> list[Query]:
    """Mask, box and logit of each query of picture b."""
    return list(zip(*(outputs[name][b].unbind() for name in ("pred_masks", "pred_boxes", "pred_logits")), strict=True))


def plain_cost(ours: Query, theirs: Query, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    p, q = prepare(ours[0]), prepare(theirs[0])
    overlap = (p * q).sum()
    iou = overlap / (p.sum() + q.sum() - overlap + 1e-6)
    box = (ours[1] - theirs[1]).abs().mean()
    return 1 - iou + box + (ours[2].sigmoid() - theirs[2].sigmoid()).abs()


def plain_loss(student: dict[str, Any], teacher: dict[str, Any], pairs: list[Pair]) -> Tensor:
    """The weighted sum of the eight terms with their usual weights, the first four pair by pair."""
    terms: dict[str, list[Tensor]] = {name: [] for name in LOSSES}
    for b, (rows, columns) in enumerate(pairs):
        ours, theirs = queries_of(student, b), queries_of(teacher, b)
        of_pairs = [plain_pair_terms(ours[i], theirs[j]) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]
        for name in of_pairs[0]:
            terms[name].append(torch.stack([found[name] for found in of_pairs]).mean())
        terms["semantic_seg_loss"].append(plain_mask_loss(student["semantic_seg"][b, 0], teacher["semantic_seg"][b, 0]))
    terms["presence_loss"].append(F.mse_loss(student["presence_logits"], teacher["presence_logits"]))
    for ours, theirs in zip(student["fpn_features"], teacher["fpn_features"], strict=True):
        terms["fpn_feature_loss"].append(F.mse_loss(_resized(ours, theirs.shape[-2:]), theirs))
    ours, theirs = (
        side["encoder_output"].transpose(1, 2).unflatten(2, side["encoder_hw"]) for side in (student, teacher)
    )
    terms["encoder_feature_loss"].append(F.mse_loss(_resized(ours, theirs.shape[-2:]), theirs))
    weights = DistillationConfig().loss_weights
    return sum(weights[name] * torch.stack(values).mean() for name, values in terms.items())


def plain_pair_terms(ours: Query, theirs: Query) -> dict[str, Tensor]:
    return {
        "mask_loss": plain_mask_loss(ours[0], theirs[0]),
        "box_l1_loss": (ours[1] - theirs[1]).abs().mean(),
        "box_giou_loss": 1 - plain_giou(ours[1], theirs[1]),
        "logit_loss": F.binary_cross_entropy_with_logits(ours[2], theirs[2].sigmoid()),
    }


def probabilities(logits: Tensor, size: int) -> Tensor:
    """`(h, w)` logits -> `(size, size)` in 0..1."""
    return _resized(logits[None, None], (size, size))[0, 0].sigmoid()


def plain_mask_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """Dice + BCE of two maps of logits."""
    logits, target = _resized(ours[None, None], theirs.shape)[0, 0], theirs.sigmoid()
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return dice + F.binary_cross_entropy_with_logits(logits, target)


def plain_giou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Generalised IoU of two boxes xyxy."""
    width = (torch.minimum(ours[2], theirs[2]) - torch.maximum(ours[0], theirs[0])).clamp(min=0)
    height = (torch.minimum(ours[3], theirs[3]) - torch.maximum(ours[1], theirs[1])).clamp(min=0)
    inter = width * height
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (ours, theirs)) - inter
    low, high = torch.minimum(ours[:2], theirs[:2]), torch.maximum(ours[2:], theirs[2:])
    hull = (high - low).prod()
    return inter / (union + 1e-7) - (hull - union) / (hull + 1e-7)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _flat(outputs: dict[str, Any]) -> list[Any]:
    """All values, those of tuples one by one."""
    return [leaf for value in outputs.values() for leaf in (value if isinstance(value, tuple) else (value,))]


if __name__ == "__main__":
    run_main(main)
