"""What the configs of stages share beyond their keys: parser, checks, and what the keys stand for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from sam3.engine import cli, distributed
from sam3.engine.config import FlagAction, add_config_arguments, flag_values_from, get, leaf_keys, load_config
from sam3.engine.files import sha256
from sam3.transforms import Preprocess

# Dotted key -> (does the condition hold under which it acts?, the condition as a clause that follows "acts only").
Conditions = Mapping[str, tuple[Callable[[CfgNode], bool], str]]


def _adamw(c: CfgNode) -> bool:
    return c.TRAIN.OPTIMIZER.NAME in ("adamw", "muon")


def _step(c: CfgNode) -> bool:
    return c.TRAIN.LR_SCHEDULER.NAME == "step"


# Of the keys that every stage has.
CONDITIONS: Conditions = {
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": (_step, "with LR_SCHEDULER.NAME step"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": (_step, "with LR_SCHEDULER.NAME step"),
    "TRAIN.OPTIMIZER.EPS": (_adamw, "with OPTIMIZER.NAME adamw or muon"),
    "TRAIN.OPTIMIZER.BETAS": (_adamw, "with OPTIMIZER.NAME adamw or muon"),
    "TRAIN.OPTIMIZER.MATRIX_LR": (lambda c: c.TRAIN.OPTIMIZER.NAME == "muon", "with OPTIMIZER.NAME muon"),
    "TRAIN.OPTIMIZER.MOMENTUM": (lambda c: c.TRAIN.OPTIMIZER.NAME == "sgd", "with OPTIMIZER.NAME sgd"),
}
# Smallest values of shared numbers that nothing else checks before data are read or a model is built.
MINIMA = {
    "DATA.BATCH_SIZE": 1,
    "DATA.IMG_SIZE": 1,
    "DATA.NUM_WORKERS": 0,
    "DATA.PREFETCH_FACTOR": 1,
    "DISTILL.EMBED_DIM": 1,
    "DISTILL.EMBED_SIZE": 1,
    "TRAIN.ACCUMULATION_STEPS": 1,
    "TRAIN.BASE_LR": 0,
    "TRAIN.WARMUP_LR": 0,
    "TRAIN.MIN_LR": 0,
    "TRAIN.WARMUP_EPOCHS": 0,
    "TRAIN.WEIGHT_DECAY": 0,
}


def make_parser(
    description: str, flags: Mapping[str, FlagAction], defaults: CfgNode, trailing: bool = False
) -> argparse.ArgumentParser:
    """A parser with `--cfg`, `--opts`, the flags of a table, and `--local-rank`; see `check_local_rank`.

    trailing: with `--config` and KEY VALUE pairs at the end in place of the first two.
    """
    parser = cli.make_parser(description)
    add_config_arguments(parser, flags, defaults, trailing)
    # torchrun's environment tells the rank; old launchers pass this flag as well
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def load(args: argparse.Namespace, defaults: CfgNode, flags: Mapping[str, FlagAction], **rules: Any) -> CfgNode:
    """What `make_parser` has parsed -> frozen config. rules: of `sam3.engine.config.load_config`, such as `retired`.

    Raises ValueError as it does, and see `check_local_rank`.
    """
    check_local_rank(args)
    return load_config(defaults, args.cfg, opts=args.opts, flag_values=flag_values_from(args, flags), **rules)


def check_local_rank(args: argparse.Namespace) -> None:
    """ValueError if `--local-rank` was given and is not what the environment says."""
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if args.local_rank not in (None, own):
        raise ValueError(
            f"--local-rank is {args.local_rank}, but LOCAL_RANK in the environment is {own}; start with torchrun"
        )


def refuse_idle_keys(
    config: CfgNode,
    defaults: CfgNode,
    conditions: Conditions,
    *,
    unused: Mapping[str, str] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> None:
    """ValueError for a key that is not at its default but cannot act in this run.

    unused: keys or groups of keys that cannot act in this program -> why, as a clause that follows "but it".
    constants: values of idle keys that are accepted beside their defaults.
    """
    idle = {key: f"acts only {when}" for key, (holds, when) in conditions.items() if not holds(config)}
    for group, reason in (unused or {}).items():
        idle |= dict.fromkeys((key for key in leaf_keys(defaults) if f"{key}.".startswith(f"{group}.")), reason)
    for key, reason in idle.items():
        value, default = get(config, key), get(defaults, key)
        if value not in (default, (constants or {}).get(key, default)):
            raise ValueError(f"{key} is {value!r}, but it {reason}; leave it out")


def check_minima(config: CfgNode, minima: Mapping[str, float]) -> None:
    """ValueError for a number below its minimum."""
    for key, least in minima.items():
        if not (value := get(config, key)) >= least:  # so that NaN is refused too
            raise ValueError(f"{key} is {value}, but must be at least {least}")


def check_numbers(config: CfgNode) -> None:
    """ValueError for a shared number below its minimum, or a picture side that is no multiple of the grid's."""
    check_minima(config, MINIMA)
    img_size, grid = config.DATA.IMG_SIZE, config.DISTILL.EMBED_SIZE
    if img_size % grid:
        raise ValueError(
            f"DATA.IMG_SIZE (={img_size}) must be a multiple of DISTILL.EMBED_SIZE (={grid}); "
            f"SAM3 takes IMG_SIZE 1008 with EMBED_SIZE 72, 14 pixels a cell"
        )


def build_preprocess(config: CfgNode) -> Preprocess:
    """The pre-processing that teacher and student share."""
    return Preprocess(
        img_size=config.DATA.IMG_SIZE,
        resize=config.DATA.RESIZE,
        mean=tuple(config.DATA.MEAN),
        std=tuple(config.DATA.STD),
    )


def teacher_meta(path: str | Path, key: str) -> dict[str, str]:
    """`{"name", "sha256"}` of a teacher's checkpoint, for stores and student checkpoints; all processes must call it.

    The main process reads the file. Raises FileNotFoundError on each that lacks it; key: the config key to set then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no teacher checkpoint {path}; fetch it with python scripts/download_sam3.py, or set {key}"
        )
    digest = distributed.broadcast_object(sha256(path) if distributed.is_main() else None)
    return {"name": path.name, "sha256": digest}


def output_folder(config: CfgNode) -> Path:
    """`OUTPUT`, or `OUTPUT/TAG` when a tag other than `default` is given."""
    if not config.OUTPUT:
        raise ValueError("no output folder: set OUTPUT in the config file or pass --output")
    folder = Path(config.OUTPUT)
    return folder if config.TAG == "default" else folder / config.TAG
