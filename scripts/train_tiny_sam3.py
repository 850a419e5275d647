"""Trains the tiny SAM3 from scratch on made-up scenes, for people without SAM3's weights and for tests.

    python scripts/train_tiny_sam3.py                         # all phases, on two cores or on one GPU
    torchrun --nproc_per_node 2 scripts/train_tiny_sam3.py --phase words
    python scripts/train_tiny_sam3.py --phase image --eval --resume sam3_checkpoints/sam3_tiny.safetensors
    python scripts/train_tiny_sam3.py --export output/tiny_sam3/tracker/ckpt_latest.pth --to sam3_tiny.safetensors

Four phases, each from where the last one ended: `words`, the trunk and the text encoder on names of objects;
`closeup`, the detector and the click head on scenes of half the size, which is cheap; `image`, the same on whole
scenes; `tracker`, the memory on clips. Then the weights are written in the layout of sam3.pt, in half precision, and
measured on held-out scenes and clips; a page beside them says what came out.

Each phase has a config, configs/tiny_sam3_<phase>.yaml. Scenes, prompts and order follow from the seed. What was
stopped goes on when the same command is given again, and ends where it would have ended.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from distillation.supervised import config as image_config
from distillation.supervised import run as image_run
from distillation.supervised.card import training_record, write_card
from sam3.engine import cli, distributed, log, weights
from sam3.engine.files import human_bytes
from sam3.engine.log import MetricLog
from sam3.engine.training_run import run_stage
from stage2.supervised import config as tracker_config
from stage2.supervised import run as tracker_run

PHASES = ("words", "closeup", "image", "tracker")
MEASURED = ("image", "tracker")  # the phases whose validation says what the file is worth
FOLDER = Path("output/tiny_sam3")
TARGET = Path("sam3_checkpoints/sam3_tiny.safetensors")
ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger("sam3.tiny")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = outer_parser().parse_known_args(argv)
    if args.export:
        if args.to is None:
            raise ValueError(f"--export writes a file: name it with --to, such as --to {TARGET.name}")
        count = export(args.export, args.to)
        print(f"{args.to}: {count} entries, {human_bytes(args.to.stat().st_size)}")
        return 0
    if args.phase == "all":
        return train_all(full_parser().parse_args(argv))
    config, run = parts(args.phase)
    parser = config.make_parser(__doc__)
    if "--cfg" not in rest:
        rest = ["--cfg", str(config_file(args.configs, args.phase)), *rest]
    return run_stage(["--phase", args.phase, *rest], parser, config.load, run.build_run)


def outer_parser() -> argparse.ArgumentParser:
    """What decides which of the programs this is; the phases have flags of their own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_outer_arguments(parser)
    return parser


def full_parser() -> argparse.ArgumentParser:
    """Of `--phase all`."""
    parser = cli.make_parser(__doc__)
    parser.epilog = "A single phase takes more: --phase image --help"
    add_outer_arguments(parser)
    parser.set_defaults(to=TARGET)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the phases' folders")
    parser.add_argument("--seed", type=int, default=1, help="of weights, scenes and prompts")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--processes", type=int, help="that share a batch; left out: two on a CPU, else one")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    return parser


def add_outer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", choices=("all", *PHASES), default="all", help="all: one after the other")
    parser.add_argument("--configs", type=Path, default=ROOT / "configs", help="folder of tiny_sam3_<phase>.yaml")
    parser.add_argument("--export", type=Path, metavar="CHECKPOINT", help="write its weights as a file, and end")
    parser.add_argument("--to", type=Path, help="file to write, its page lies beside it; to be named for --export")


def parts(phase: str) -> tuple[ModuleType, ModuleType]:
    """Modules of a phase: of its settings, and of its run."""
    if phase == "tracker":
        return tracker_config, tracker_run
    return image_config, image_run


def config_file(folder: Path, phase: str) -> Path:
    return folder / f"tiny_sam3_{phase}.yaml"


# All phases -----------------------------------------------------------------------------------------------------------


def train_all(args: argparse.Namespace) -> int:
    """Each phase in processes of its own, then the file and its page. Returns the exit code."""
    log.setup()
    start: list[str] = []
    for phase in PHASES:
        folder = args.output / phase
        flags = ["--phase", phase, "--configs", str(args.configs), "--output", str(folder), *start]
        flags += ["--seed", str(args.seed), "--device", args.device]
        if args.dry_run:
            flags.append("--dry-run")
        if code := subprocess.run(command(flags, processes(args)), check=False).returncode:
            logger.error(f"phase {phase} ended with exit code {code}; the same command goes on from its checkpoint")
            return code
        if args.dry_run:
            continue  # the next phases would start from weights that are not there yet
        start = ["--pretrained", str(folder / "ckpt_latest.pth")]
    if args.dry_run:
        return 0
    records = {phase: training_record(args.output / phase) for phase in PHASES}
    draft = args.to.with_stem(f".{args.to.stem}-unmeasured")  # the suffix says what format it is
    try:
        export(args.output / PHASES[-1] / "ckpt_latest.pth", draft)
        figures = {phase: measure(phase, draft, args) for phase in MEASURED}
        draft.replace(args.to)
    finally:
        draft.unlink(missing_ok=True)
    page = write_card(args.to, figures, records)
    print(page.read_text())
    return 0


def processes(args: argparse.Namespace) -> int:
    if args.processes is not None:
        return args.processes
    return 2 if distributed.choose_device(args.device).type == "cpu" else 1


def command(flags: Sequence[str], count: int) -> list[str]:
    """This program with `flags`, as `count` processes."""
    if count == 1:
        return [sys.executable, str(Path(__file__).resolve()), *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    return [*torchrun, "--nproc_per_node", str(count), str(Path(__file__).resolve()), *flags]


def measure(phase: str, path: Path, args: argparse.Namespace) -> Mapping[str, float]:
    """What a phase's validation says about a file."""
    config, run = parts(phase)
    flags = ["--cfg", str(config_file(args.configs, phase)), "--device", args.device]
    settings = config.load(config.make_parser(__doc__).parse_args(flags))
    with distributed.start(settings.DEVICE) as world:
        whole = run.build_run(settings, world, Path(settings.OUTPUT), True)
        whole.load_weights(path)
        whole.distiller.eval()
        return whole.make_validator(MetricLog(None))(0, 0)


# The file -------------------------------------------------------------------------------------------------------------


def export(path: Path, target: Path) -> int:
    """Write a checkpoint's weights, float32 as float16; what else there is, such as the complex rotary tables, stays.

    Returns the number of entries. ValueError for numbers that float16 does not have.
    """
    found = weights.load_weights(path)
    tensors = {}
    for key, tensor in found.tensors.items():
        if key.startswith(("detector.", "tracker.")):
            tensors[key] = tensor.half() if tensor.dtype == torch.float32 else tensor
            if not torch.isfinite(tensors[key]).all():
                raise ValueError(f"{key} of {path} reaches {tensor.abs().max():.3g}, float16 holds up to 65504 only")
    known = {"preset": found.meta["preset"]} if "preset" in found.meta else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    weights.save_weights(target, tensors, {"trained": {"on": "generated scenes", **known}})
    return len(tensors)


if __name__ == "__main__":
    cli.run_main(main)
