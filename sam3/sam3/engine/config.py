"""Configuration: commented defaults in code, YAML files that build on each other, overrides, one table of flags.

Order, later wins: defaults -> each file of `BASE` (recursive) -> the file itself -> `--opts` -> flags.
The result is frozen; numbers that follow from it (scaled learning rate, steps per epoch) are computed beside it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from sam3.engine import files
from sam3.engine.settings import read_mapping

# What a flag does: sets one key | sets one key, the second item when the flag stands alone | sets fixed values.
FlagAction = str | tuple[str, Any] | dict[str, Any]

SHARED_FLAGS: dict[str, FlagAction] = {
    "--batch-size": "DATA.BATCH_SIZE",
    "--data-path": "DATA.DATA_PATH",
    "--pretrained": "MODEL.PRETRAINED",
    "--resume": ("MODEL.RESUME", "auto"),
    "--accumulation-steps": "TRAIN.ACCUMULATION_STEPS",
    "--max-steps": "TRAIN.MAX_STEPS",
    "--use-checkpoint": {"TRAIN.USE_CHECKPOINT": True},
    "--use-sync-bn": {"TRAIN.USE_SYNC_BN": True},
    "--disable-amp": {"AMP_ENABLE": False},
    "--only-cpu": {"AMP_ENABLE": False, "DEVICE": "cpu"},
    "--device": "DEVICE",
    "--output": "OUTPUT",
    "--tag": "TAG",
    "--seed": "SEED",
    "--deterministic": {"DETERMINISTIC": True},
    "--use-wandb": {"USE_WANDB": True},
}

SHARED_CHOICES: dict[str, tuple[Any, ...]] = {
    "DATA.RESIZE": ("pad", "square"),
    "MODEL.OUTPUT_STRIDE": (32, 16),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "muon", "sgd"),
    "AMP_DTYPE": ("auto", "bf16", "fp16"),
}


def shared_defaults() -> CfgNode:
    """The keys that mean the same in every stage; a stage adds its own, and deletes those that cannot act in it."""
    c = CfgNode()

    c.DATA = CfgNode()
    c.DATA.BATCH_SIZE = 64  # samples per process and micro-batch
    c.DATA.DATA_PATH = ""  # root folder of the data set
    c.DATA.IMG_SIZE = 1008  # side of the model's square input, pixels
    c.DATA.RESIZE = "pad"  # pad: keep the aspect, zeros right and below | square: squash
    c.DATA.MEAN = [127.5, 127.5, 127.5]  # per channel R, G, B on 0..255
    c.DATA.STD = [127.5, 127.5, 127.5]
    c.DATA.NUM_SAMPLES = -1  # use the first N samples only; -1 uses all
    c.DATA.NUM_WORKERS = 8  # loader processes per training process; 0 loads in the training process
    c.DATA.PREFETCH_FACTOR = 2  # batches prepared ahead by each worker
    c.DATA.PIN_MEMORY = True  # page-locked batches for faster copies; acts on CUDA only

    c.MODEL = CfgNode()
    c.MODEL.NAME = ""  # name of the run in logs
    c.MODEL.BACKBONE = ""  # student, a row of sam3.model_builder.BACKBONES
    c.MODEL.OUTPUT_STRIDE = 32  # pixels per cell of the student's own map; 16: finer and slower, for small pictures
    c.MODEL.PRETRAINED = ""  # weights to start from: a fresh optimizer, epoch 0
    c.MODEL.RESUME = ""  # checkpoint to go on from; "auto" takes the newest in OUTPUT

    c.TRAIN = CfgNode()
    c.TRAIN.EPOCHS = 300
    c.TRAIN.MAX_STEPS = 0  # stop after this many optimizer steps, if sooner than EPOCHS; 0 sets no such limit
    c.TRAIN.WARMUP_EPOCHS = 20  # the learning rate rises linearly over these
    c.TRAIN.BASE_LR = 5e-4  # before SCALE_LR, as the next two
    c.TRAIN.WARMUP_LR = 5e-7  # at step 0
    c.TRAIN.MIN_LR = 5e-6  # at the end (cosine)
    c.TRAIN.SCALE_LR = True  # multiply the three by (samples per optimizer step) / 512
    c.TRAIN.WEIGHT_DECAY = 0.05
    c.TRAIN.CLIP_GRAD = 5.0  # largest L2 norm of all gradients together; 0 does not clip
    c.TRAIN.ACCUMULATION_STEPS = 1  # micro-batches per optimizer step
    c.TRAIN.AUTO_RESUME = True  # go on from the newest checkpoint in OUTPUT, if there is one
    c.TRAIN.MAX_BAD_STEPS = 20  # abort after this many steps in a row with non-finite gradients (each is skipped)
    c.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass: less memory, more time
    c.TRAIN.USE_SYNC_BN = False  # BatchNorm statistics over all processes instead of each its own
    c.TRAIN.AVERAGE_BN = True  # average BatchNorm's running statistics over the processes before each save
    c.TRAIN.EVAL_BN_WHEN_TRAINING = False  # BatchNorm keeps its running statistics while training
    c.TRAIN.FIND_UNUSED_PARAMETERS = False  # DDP: allow parameters that get no gradient in some step
    c.TRAIN.CHANNELS_LAST = False  # memory layout of images and convolutions: N, H, W, C
    c.TRAIN.COMPILE = False  # torch.compile the student
    c.TRAIN.LR_SCHEDULER = CfgNode()
    c.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step
    c.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step only: multiply by DECAY_RATE every so many epochs
    c.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1
    c.TRAIN.OPTIMIZER = CfgNode()
    c.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw | muon (AdamW but for hidden matrices) | sgd (Nesterov)
    c.TRAIN.OPTIMIZER.EPS = 1e-8  # adamw, muon
    c.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)  # adamw, muon
    c.TRAIN.OPTIMIZER.MATRIX_LR = 1.0  # muon: learning rate of hidden matrices, times that of all else
    c.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd

    c.AMP_ENABLE = True
    c.AMP_DTYPE = "auto"  # auto: bf16 where the accelerator has it, else fp16; on the CPU float32 | bf16 | fp16
    c.DEVICE = "auto"  # auto: cuda, else mps, else cpu | cpu | cuda | cuda:N | mps
    c.OUTPUT = ""  # folder of everything the run writes
    c.TAG = "default"  # label of the run
    c.SAVE_FREQ = 1  # a checkpoint every N epochs; the last epoch is always saved
    c.SAVE_STEPS = 0  # besides, a checkpoint every N optimizer steps; 0 saves none in mid-epoch
    c.KEEP_LAST = 0  # keep the newest N checkpoints (and the best one); 0 keeps all
    c.PRINT_FREQ = 10  # optimizer steps between log lines
    c.SEED = 0
    c.DETERMINISTIC = False  # refuse operations whose result varies from run to run (slower)
    c.TENSORBOARD = True  # write event files below OUTPUT
    c.USE_WANDB = False  # log to Weights & Biases as well
    return c


def load_config(
    defaults: CfgNode,
    cfg_file: str | Path | None = None,
    opts: Sequence[str] = (),
    flag_values: Mapping[str, Any] | None = None,
    *,
    retired: Mapping[str, str] | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
    aliases: Mapping[str, str] | None = None,
    opts_name: str = "--opts",
) -> CfgNode:
    """Merge all sources over a copy of `defaults` and freeze the result.

    cfg_file: YAML, or JSON as `dump_config` writes it. opts: `KEY VALUE` pairs or `KEY=VALUE` items.
    flag_values: dotted key -> value, from `flag_values_from`. retired: dotted key (or a whole node) -> why it cannot be
    set, as a clause that follows "cannot be set:". choices: dotted key -> allowed values, besides SHARED_CHOICES.
    aliases: other name of a key -> its name in the config. opts_name: what messages call the place of `opts`.
    Raises ValueError for an unknown or retired key, a wrong type or choice, a BASE cycle, or a key that one source sets
    by two names to two values, naming the source.
    """
    config = defaults.clone()
    config.defrost()
    merge = _Merge(config, defaults, retired or {}, aliases or {})
    if cfg_file:
        for path, content in _read_chain(Path(cfg_file)):
            merge.node(content, "", str(path))
    for key, value in _parse_opts(opts, opts_name):
        merge.key(key, value, opts_name)
    for key, value in (flag_values or {}).items():
        merge.key(key, value, "the flags")
    _check_choices(config, {**SHARED_CHOICES, **(choices or {})})
    config.freeze()
    return config


def to_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain dicts, lists, numbers and strings."""
    return {key: _plain(value) for key, value in config.items()}


def dump_config(config: Mapping[str, Any], path: str | Path) -> None:
    """Write all keys as JSON, or as YAML if `path` ends so; `--cfg` with that file starts the same run."""
    if Path(path).suffix in (".yaml", ".yml"):
        files.write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))
    else:
        files.write_json(path, to_dict(config))


def get(config: CfgNode, key: str) -> Any:
    """Value of a dotted key such as `DATA.BATCH_SIZE`; KeyError if there is none."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def remove(config: CfgNode, key: str) -> None:
    """Take a dotted key or group out of unfrozen defaults, if it is there."""
    *groups, name = key.split(".")
    node: Any = config
    for group in groups:
        node = node.get(group, {})
    node.pop(name, None)


# Flags -------------------------------------------------------------------------------------------------------------


def add_config_arguments(
    parser: argparse.ArgumentParser, flags: Mapping[str, FlagAction], defaults: CfgNode, trailing: bool = False
) -> None:
    """Add `--cfg`, `--opts` and the flags of a table, in both spellings (`--batch-size`, `--batch_size`).

    trailing: the file is called `--config`, and KEY VALUE pairs need no `--opts` before them; parse such arguments with
    `parse_intermixed_args`.
    """
    if trailing:
        text = "YAML file, or the config.yaml of a run"
        parser.add_argument("--config", "--cfg", dest="cfg", metavar="FILE", required=True, help=text)
        parser.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys to override")
    else:
        parser.add_argument("--cfg", metavar="FILE", required=True, help="YAML file, or the config.json of a run")
        parser.add_argument(
            "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to override"
        )
    group = parser.add_argument_group("shorthands for config keys")
    for flag, action in flags.items():
        names = list(dict.fromkeys([flag, "--" + flag[2:].replace("-", "_")]))
        if isinstance(action, dict):
            text = ", ".join(f"{key} {value}" for key, value in action.items())
            group.add_argument(*names, action="store_true", help=f"sets {text}")
            continue
        key, alone = action if isinstance(action, tuple) else (action, None)
        default = get(defaults, key)
        kind = type(default) if type(default) in (int, float) else str
        group.add_argument(
            *names,
            type=kind,
            metavar=key.rsplit(".", 1)[-1],
            help=f"sets {key}" + (f"; alone: {alone}" if alone is not None else ""),
            **({} if alone is None else {"nargs": "?", "const": alone}),
        )


def flag_values_from(namespace: argparse.Namespace, flags: Mapping[str, FlagAction]) -> dict[str, Any]:
    """Dotted key -> value for each flag that was given; 0 and the empty string count as given.

    Raises ValueError if two flags ask for different values of one key.
    """
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for flag, action in flags.items():
        value = getattr(namespace, flag[2:].replace("-", "_"))
        if value is None or (isinstance(action, dict) and not value):
            continue
        pairs = action if isinstance(action, dict) else {action[0] if isinstance(action, tuple) else action: value}
        for key, wanted in pairs.items():
            if key in values and values[key] != wanted:
                raise ValueError(f"{given[key]} sets {key} to {values[key]!r}, but {flag} sets it to {wanted!r}")
            values[key], given[key] = wanted, flag
    return values


# Reading and merging -----------------------------------------------------------------------------------------------


def _read_chain(path: Path, trail: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The file with all it builds on, bases first."""
    resolved = path.resolve()
    if resolved in trail:
        cycle = " -> ".join(str(p) for p in (*trail[trail.index(resolved) :], resolved))
        raise ValueError(f"BASE leads back to itself: {cycle}")
    content = read_mapping(path)
    bases = content.pop("BASE", None) or []
    chain: list[tuple[Path, dict[str, Any]]] = []
    for base in [bases] if isinstance(bases, str) else bases:
        if base:
            chain += _read_chain(path.parent / base, (*trail, resolved))
    return [*chain, (path, content)]


def _parse_opts(opts: Sequence[str], source: str) -> list[tuple[str, str]]:
    """`["A.B", "1", "C=2"]` -> `[("A.B", "1"), ("C", "2")]`."""
    pairs: list[tuple[str, str]] = []
    items = iter(opts)
    for item in items:
        joined = re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", item, flags=re.DOTALL)
        if joined:
            pairs.append((joined[1], joined[2]))
            continue
        value = next(items, None)
        if value is None:
            raise ValueError(f"{source} takes KEY VALUE pairs, but {item!r} has no value")
        pairs.append((item, value))
    return pairs


class _Merge:
    """Sets keys of `config`; the types are those of `defaults`."""

    def __init__(
        self, config: CfgNode, defaults: CfgNode, retired: Mapping[str, str], aliases: Mapping[str, str]
    ) -> None:
        self.config, self.defaults, self.retired, self.aliases = config, defaults, retired, aliases
        self._set_as: dict[tuple[str, str], str] = {}  # (source, key) -> the name by which it was set there

    def node(self, content: Mapping[str, Any], prefix: str, source: str) -> None:
        for key, value in content.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, Mapping) and isinstance(_find(self.defaults, dotted), CfgNode):
                self.node(value, f"{dotted}.", source)
            else:
                self.key(dotted, value, source)

    def key(self, name: str, value: Any, source: str) -> None:
        key = self.aliases.get(name, name)
        parts = key.split(".")
        for i in range(1, len(parts) + 1):
            reason = self.retired.get(".".join(parts[:i]))
            if reason:
                raise ValueError(f"{key} (in {source}) cannot be set: {reason}")
        default = _find(self.defaults, key)
        if default is _ABSENT:
            close = difflib.get_close_matches(key, leaf_keys(self.defaults), n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown config key {key} in {source}{hint}")
        if isinstance(default, CfgNode):
            raise ValueError(f"{key} in {source} is a group of keys, but got {value!r}; set one of its keys")
        node = get(self.config, ".".join(parts[:-1])) if len(parts) > 1 else self.config
        value = _coerce(value, default, name, source)
        other = self._set_as.setdefault((source, key), name)
        if other != name and node[parts[-1]] != value:
            raise ValueError(
                f"{other} and {name} are two names of one key, but {source} sets them to {node[parts[-1]]!r} and "
                f"{value!r}; leave one out"
            )
        node[parts[-1]] = value


_ABSENT = object()


def _find(config: CfgNode, key: str) -> Any:
    try:
        return get(config, key)
    except (KeyError, TypeError, IndexError):
        return _ABSENT


def _coerce(value: Any, default: Any, key: str, source: str) -> Any:
    """`value` in the type of `default`. Text is read as a Python literal, because YAML takes `1e-3` for a text."""
    if isinstance(value, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError):  # then it stays a text, and the type check below speaks
            value = ast.literal_eval(value)
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(default)(value)
    raise ValueError(
        f"{key} in {source} is {value!r} of type {type(value).__name__}, "
        f"wanted {type(default).__name__} as in its default {default!r}"
    )


def leaf_keys(config: CfgNode, prefix: str = "") -> list[str]:
    """All dotted keys that are no groups."""
    keys = []
    for key, value in config.items():
        keys += leaf_keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [f"{prefix}{key}"]
    return keys


def _check_choices(config: CfgNode, choices: Mapping[str, Sequence[Any]]) -> None:
    for key, allowed in choices.items():
        value = _find(config, key)
        if value is not _ABSENT and value not in allowed:
            raise ValueError(f"{key} is {value!r}; choose one of {', '.join(map(str, allowed))}")


def _plain(value: Any) -> Any:
    if isinstance(value, CfgNode):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
