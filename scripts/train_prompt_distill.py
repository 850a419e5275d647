"""Fine-tune MobileSAM on points, boxes, both, or a grid of points, with distillation from one or several SAM teachers.

    python scripts/train_prompt_distill.py --config configs/prompt_mixed.yaml
    torchrun --nproc_per_node 8 scripts/train_prompt_distill.py --config configs/prompt_box.yaml
    python scripts/train_prompt_distill.py --config configs/prompt_box.yaml --opts train.lr=1e-4 teachers.0.weight=0.5
    python scripts/train_prompt_distill.py --config configs/prompt_mixed.yaml --resume auto
    python scripts/train_prompt_distill.py --export logs/ckpt_best.pth --output mobile_sam.pt

Settings, their defaults and meaning: distillation/prompt/config.py; the blocks `distillation` and `teachers` go into
any configuration. Teachers run beside the student, or their features come from scripts/extract_teacher_features.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distillation.prompt.config import PromptDistillConfig, load_config
from distillation.prompt.remarks import remarks
from distillation.prompt.trainer import PromptTrainer, export_checkpoint
from sam3.engine import distributed, log
from sam3.engine.cli import make_parser, run_main
from sam3.engine.rng import seed_everything

logger = logging.getLogger("sam3.distillation")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.export:
        log.setup()
        export_checkpoint(args.export, args.output)
        return 0
    config = load(args)
    with distributed.start(config.train.device) as world:
        output = Path(config.model.save_path)
        log.setup(None if args.dry_run or args.validate else output, world.rank)
        for message in remarks(config):
            logger.warning(message)
        seed_everything(config.train.seed + world.rank)
        trainer = PromptTrainer(config, world, args.max_steps)
        if args.dry_run:
            return trainer.dry_run()
        return trainer.validate() if args.validate else trainer.train(sys.argv[1:] if argv is None else argv)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--config", metavar="FILE", help="settings, YAML, JSON or JSONC; needed unless --export is given"
    )
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as train.lr=1e-4")
    parser.add_argument("--resume", default="", metavar="PATH|auto", help="go on from a checkpoint, or from the newest")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps (default: train.device)")
    parser.add_argument(
        "--max-steps", type=int, default=0, metavar="N", help="end with optimizer step N; 0: train.epochs"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    mode.add_argument("--validate", action="store_true", help="validate once, and end")
    mode.add_argument("--export", metavar="CHECKPOINT", help="write its student in the published layout, and end")
    parser.add_argument(
        "--output", metavar="FILE", help="of --export (default: mobile_sam.pt, for a ViT sam_<type>.pt)"
    )
    args = parser.parse_args(argv)
    if not args.config and not args.export:
        parser.error("--config is needed; see configs/prompt_mixed.yaml")
    if args.output and not args.export:
        parser.error("--output is for --export; a run's folder is --opts model.save_path=DIR")
    if args.export and (args.config or args.opts or args.resume):
        parser.error("--export takes all it needs from the checkpoint; leave --config, --opts and --resume out")
    if args.max_steps < 0:
        parser.error(f"--max-steps must not be negative, got {args.max_steps}")
    return args


def load(args: argparse.Namespace) -> PromptDistillConfig:
    """Settings from the file, --opts and flags."""
    config = load_config(args.config, args.opts)
    given = {"device": args.device, "resume": args.resume or None}
    return replace(config, train=replace(config.train, **{k: v for k, v in given.items() if v is not None}))


if __name__ == "__main__":
    run_main(main)
