"""Distils all outputs and features of SAM3 into a 100.3M-parameter student with 100 queries.

    python train_distill.py --phase all --data data/sa1b --teacher sam3_checkpoints/sam3.pt
    torchrun --nproc_per_node 8 train_distill.py --phase 1
    python train_distill.py --phase 1 --resume auto
    python train_distill.py --write-cache trunk --cache-dir cache/trunk
    python train_distill.py --verify --config configs/distillation_tiny.yaml --data data/sample-sa1b

Phase 1 aligns features and outputs, phase 2 refines the outputs. Settings are those of distillation/config.py:
defaults < --config file < --opts < flags.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distillation import config as settings
from distillation.config import DistillationConfig, Phase
from distillation.trainer import DistillationTrainer, export_checkpoint, phase_folder, write_teacher_cache
from distillation.verify import verify
from sam3.engine import checkpoint, distributed, log
from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import World
from sam3.engine.rng import seed_everything

# Flag -> the setting that it stands for.
FLAGS = {
    "data": "sa1b_dir",
    "teacher": "teacher_model_name",
    "teacher_backend": "teacher_backend",
    "teacher_mode": "teacher_mode",
    "cache_dir": "cache_dir",
    "batch_size": "batch_size",
    "grad_accum": "grad_accum_steps",
    "num_train": "num_train",
    "num_val": "num_val",
    "num_workers": "num_workers",
    "image_size": "image_size",
    "device": "device",
    "student_precision": "student_precision",
    "strict_memory": "strict_memory",
    "output": "checkpoint_dir",
}
DEBUG_STEPS = 10


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    defaults = DistillationConfig()
    add = parser.add_argument

    def add_setting(*flags: str, **options: object) -> None:
        """A flag whose default stands in the settings, where files may change it."""
        name = FLAGS[flags[0].lstrip("-").replace("-", "_")]
        options["help"] = f"{options['help']} (default: {getattr(defaults, name)})"
        add(*flags, default=argparse.SUPPRESS, **options)

    add("--phase", choices=("1", "2", "all"), default="1", help="all: 1, then 2")
    add_setting("--data", "--sa1b-dir", dest="data", metavar="DIR", help="SA-1B: sa_*.jpg and sa_*.json")
    add_setting("--teacher", metavar="NAME_OR_PATH", help="file, folder or hub name; auto: the backend's usual one")
    add_setting("--teacher-backend", choices=settings.BACKENDS, help="native: sam3.pt; hf: transformers")
    add_setting("--teacher-mode", choices=settings.MODES, help="where its outputs come from")
    add_setting("--cache-dir", metavar="DIR", help="folder of the cached modes")
    add("--init", "--student-ckpt", dest="init", default="", metavar="PATH", help="weights to start from")
    add("--epochs", type=int, help="of the phase (default: 5 or 10)")
    add("--lr", type=float, help="highest learning rate of the phase (default: 1e-4 or 5e-5)")
    add("--warmup", type=int, metavar="STEPS", help="of the phase (default: 500 or 0)")
    add_setting("--grad-accum", type=int, metavar="N", help="forward passes per optimizer step")
    add_setting("--batch-size", type=int, metavar="N", help="pictures per forward pass")
    add_setting("--num-train", type=int, metavar="N", help="pictures to train on, the first ones")
    add_setting("--num-val", type=int, metavar="N", help="pictures to validate on, the last ones")
    add_setting("--num-workers", type=int, metavar="N", help="processes that decode; None: 4 with CUDA, else 0")
    add_setting("--image-size", type=int, metavar="PX", help="side of the square input")
    add_setting("--device", help="auto, cpu, cuda, cuda:1, mps")
    add_setting("--student-precision", choices=settings.PRECISIONS, help="of its matrix products")
    add("--no-grad-ckpt", action="store_true", help="keep activations: more memory, less time")
    add_setting("--strict-memory", action="store_true", help="fail above the memory budget")
    add_setting("--output", metavar="DIR", help="checkpoints; TensorBoard goes to the setting log_dir")
    add("--resume", default="", metavar="PATH|auto", help="go on from a checkpoint, or from the newest")
    add("--max-steps", type=int, default=0, metavar="N", help="stop after N further optimizer steps")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--validate", action="store_true", help="validate once, print a table, and end")
    mode.add_argument("--verify", action="store_true", help="run the checks of the method; exit code 0 or 1")
    mode.add_argument("--debug", action="store_true", help=f"{DEBUG_STEPS} steps, no checkpoints")
    mode.add_argument("--write-cache", choices=("trunk", "outputs"), help="store what the teacher gives, and end")
    mode.add_argument("--export", metavar="FILE", help="write the checkpoint --init as FILE (.pt, .safetensors), fp16")
    mode.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    add("--config", metavar="FILE", help="settings, YAML or JSON")
    add("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="see distillation/config.py")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where flags do not go together."""
    if args.phase == "all":
        for name in ("epochs", "lr", "warmup", "max_steps", "validate", "resume", "init", "dry_run", "debug"):
            given = getattr(args, name) != parser.get_default(name)
            if given and (name, args.resume) != ("resume", "auto"):
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} is for one phase; give --phase 1 or 2, or --opts phase1_... phase2_...")
    if args.resume and args.init:
        parser.error("--resume goes on with a run and --init starts one; give one of them")
    if args.debug and (args.resume or args.max_steps):
        parser.error(f"--debug begins anew and makes {DEBUG_STEPS} steps; leave --resume and --max-steps out")
    if args.export and not args.init:
        parser.error("--export needs the checkpoint as --init PATH")
    if args.max_steps < 0:
        parser.error(f"--max-steps must not be negative, got {args.max_steps}")


def load_config(args: argparse.Namespace) -> DistillationConfig:
    """Settings from all sources; ValueError for what cannot work."""
    given = {setting: getattr(args, flag) for flag, setting in FLAGS.items() if hasattr(args, flag)}
    for name in ("epochs", "lr", "warmup"):
        if getattr(args, name) is not None:
            given[f"phase{args.phase}_{name}"] = getattr(args, name)
    if args.no_grad_ckpt:
        given["gradient_checkpointing"] = False
    if args.debug:
        given = {"grad_accum_steps": 2, "log_every_steps": 1, "tensorboard": False, "keep_last": 0} | given
    return settings.load_config(args.config, args.opts, **given)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    config = load_config(args)
    phases = [config.phase(number) for number in (settings.PHASES if args.phase == "all" else [int(args.phase)])]
    if args.debug:
        phases = [replace(phase, epochs=1) for phase in phases]
    if args.verify:
        return verify(config)
    if args.export:
        return export_checkpoint(args.init, Path(args.export))
    with distributed.start(config.device) as world:
        seed_everything(config.seed + world.rank)
        if args.write_cache:
            log.setup(None, world.rank)
            return write_teacher_cache(config, args.write_cache, world)
        for phase in phases:
            if code := run_phase(args, config, phase, world, sys.argv[1:] if argv is None else argv):
                return code
            gc.collect()  # the parts of a trainer know each other; the next one brings a teacher of its own
    return 0


def run_phase(
    args: argparse.Namespace, config: DistillationConfig, phase: Phase, world: World, argv: Sequence[str]
) -> int:
    """Train, validate or plan one phase. Returns the exit code."""
    writes = not (args.dry_run or args.validate or args.debug)
    log.setup(phase_folder(config, phase.number) if writes else None, world.rank)
    resume = args.resume
    if args.phase == "all" and resume and not checkpoint.listed(phase_folder(config, phase.number)):
        resume = ""  # this phase has not begun
    trainer = DistillationTrainer(
        config,
        phase,
        world,
        init=args.init,
        resume=resume,
        max_steps=DEBUG_STEPS if args.debug else args.max_steps,
        saves=not args.debug,
    )
    if args.dry_run:
        return trainer.dry_run()
    return trainer.validate() if args.validate else trainer.train(argv)


if __name__ == "__main__":
    run_main(main)
