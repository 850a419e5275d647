"""Checkpoints of a run: whole files of plain values, found by number, refused where they do not fit.

A run that counts epochs writes `ckpt_epoch_<e>.pth` at the end of epoch e and `ckpt_epoch_<e>_step_<s>.pth` inside it
after optimizer step s; one that counts steps writes `ckpt_latest.pth` again and again and `ckpt_step_<s>.pth` now and
then. `ckpt_best.pth` is the one with the best validation metric. Contents, the same in all of them and readable with
`torch.load(weights_only=True)`: model, optimizer, scaler (state dicts), epoch, step, samples, epoch_complete, rng (one
state per process), world_size, sampler (what the order of samples depends on), config, meta, best (dicts),
validated_step.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.engine import files

log = logging.getLogger("sam3.checkpoint")

NAME = re.compile(r"ckpt_(?:epoch_(?P<epoch>\d+)(?:_step_(?P<inside>\d+))?|step_(?P<step>\d+))\.pth")
BEST = "ckpt_best.pth"
LATEST = "ckpt_latest.pth"
KEYS = (
    *("model", "optimizer", "scaler", "epoch", "step", "samples", "epoch_complete"),
    *("rng", "world_size", "sampler", "meta"),
)


@dataclass
class Position:
    """Where training stands.

    epoch: the one under way (after the last step of the last one: the number of epochs). step: optimizer steps done.
    samples: how many of the epoch's samples all processes have used together.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0


def position_of(payload: Mapping[str, Any]) -> Position:
    """Where a run goes on that starts from this checkpoint."""
    if payload["epoch_complete"]:
        return Position(payload["epoch"] + 1, payload["step"], 0)
    return Position(payload["epoch"], payload["step"], payload["samples"])


# Writing ------------------------------------------------------------------------------------------------------------


def pack(
    model: Mapping[str, Tensor],
    position: Position,
    *,
    epoch_complete: bool,
    optimizer: Mapping[str, Any] | None = None,
    scaler: Mapping[str, Any] | None = None,
    rng: list[Any] | None = None,
    sampler: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    best: Mapping[str, float] | None = None,
    validated_step: int = 0,
) -> dict[str, Any]:
    """The contents of a checkpoint. `position.epoch` is the epoch under way or just completed.

    validated_step: the optimizer step after which the last validation was done; 0 before the first.
    Raises ValueError if a floating-point tensor of the model holds NaN or infinities, naming it.
    """
    for name, tensor in model.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} holds NaN or infinite values after step {position.step}, so the model is not saved; "
                "go on from the last checkpoint with a lower learning rate, or AMP_ENABLE False"
            )
    return {
        "model": dict(model),
        "optimizer": plain(optimizer or {}),
        "scaler": plain(scaler or {}),
        "epoch": position.epoch,
        "step": position.step,
        "samples": position.samples,
        "epoch_complete": epoch_complete,
        "rng": plain(rng or []),
        "world_size": len(rng or [None]),
        "sampler": plain(sampler or {}),
        "config": plain(config or {}),
        "meta": plain(meta or {}),
        "best": plain(best or {}),
        "validated_step": validated_step,
    }


def file_name(payload: Mapping[str, Any]) -> str:
    """Name of the file for these contents in a run that counts epochs."""
    if payload["epoch_complete"]:
        return f"ckpt_epoch_{payload['epoch']}.pth"
    return f"ckpt_epoch_{payload['epoch']}_step_{payload['step']}.pth"


def step_name(step: int) -> str:
    """Name of the file that a run that counts steps keeps of this one."""
    return f"ckpt_step_{step}.pth"


def save(folder: str | Path, payload: Mapping[str, Any], name: str | None = None) -> Path:
    """Write the file, whole or not at all, as `name` (by default what `file_name` says) and return its path.

    Raises OSError if it cannot be written; an older file of that name is left as it was then.
    """
    path = Path(folder) / (name or file_name(payload))
    with files.atomic_path(path) as temporary:
        try:
            torch.save(payload, temporary)
        except RuntimeError as error:  # what torch's zip writer makes of an OSError
            raise OSError(
                f"could not write {path} ({str(error).splitlines()[0]}), is the disk full? "
                f"{files.human_bytes(files.free_bytes(path))} are free; make room or set KEEP_LAST, and run it again"
            ) from error
    return path


def prune(folder: str | Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` numbered checkpoints; 0 keeps all. Those without a number always stay."""
    if keep_last > 0:
        for path in listed(folder)[keep_last:]:
            path.unlink()


def remove_leftovers(folder: str | Path) -> None:
    """Remove what a killed process left of a file it was writing."""
    for path in Path(folder).glob(".ckpt_*.pth.*.tmp"):
        path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """`value` built of tensors, numbers, strings, None, lists, tuples and dicts only; TypeError for anything else."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}")


# Finding and reading ------------------------------------------------------------------------------------------------


def listed(folder: str | Path) -> list[Path]:
    """The folder's numbered checkpoints, newest first; the end of an epoch is newer than any step inside it."""
    found = []
    for path in Path(folder).glob("ckpt_*.pth"):
        if match := NAME.fullmatch(path.name):
            epoch, step = int(match["epoch"] or -1), float(match["inside"] or match["step"] or "inf")
            found.append((epoch, step, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest(folder: str | Path) -> Path | None:
    """The newest checkpoint that can be read, or None; unreadable ones are passed over with a warning.

    In a run that counts steps the latest and the best compete with the numbered ones, by the step that they hold.
    """
    numbered, latest, best = listed(folder), Path(folder) / LATEST, Path(folder) / BEST
    counts_steps = latest.is_file() or (bool(numbered) and numbered[0].name.startswith("ckpt_step_"))
    groups = [[latest], [best], numbered] if counts_steps else [numbered]
    found = [path for group in groups if (path := _first_readable(group))]
    return max(found, key=lambda path: load(path)["step"], default=None)


def _first_readable(paths: Iterable[Path]) -> Path | None:
    for path in paths:
        if not path.is_file():
            continue
        try:
            load(path)
        except ValueError as error:
            log.warning(f"passed over: {error}")
            continue
        return path
    return None


def resume_path(output: str | Path, resume: str, auto_resume: bool) -> Path | None:
    """The checkpoint that a run goes on from, or None.

    With auto_resume, or `resume` "auto", the newest in `output`; it wins over the path `resume`, so that the same
    command can be given again after an interruption. ValueError if "auto" finds none.
    With several processes, let the main one look and `broadcast_object` what it finds.
    """
    explicit = Path(resume) if resume and resume != "auto" else None
    found = newest(output) if auto_resume or resume == "auto" else None
    if found and explicit and found.resolve() != explicit.resolve():
        log.info(f"going on from {found}, not from {explicit}; TRAIN.AUTO_RESUME False would take the latter")
    if resume == "auto" and not found:
        raise ValueError(f"nothing to resume: no readable checkpoint in {output}")
    return found or explicit


def load(path: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint, tensors mapped from the file on the CPU.

    FileNotFoundError if it is absent; ValueError if it is cut short, holds code, or is not a training checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; every machine of the run must see the same file")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason})") from error
    missing = [key for key in KEYS if not isinstance(payload, dict) or key not in payload]
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint to resume from, it lacks {', '.join(missing)}; "
            "to start from its weights give it as MODEL.PRETRAINED"
        )
    return payload


def check_fits(
    payload: Mapping[str, Any],
    path: str | Path,
    *,
    meta: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    config_keys: Iterable[str] = (),
    way_out: str = "set TRAIN.AUTO_RESUME False",
) -> None:
    """Refuse a checkpoint of another run.

    meta: every entry must stand in the checkpoint's meta with the same value (nested dicts entry by entry). The `name`
    of a file whose `sha256` is on both sides may differ.
    config_keys: dotted keys whose values must be the same in the checkpoint's config and in `config`.
    way_out: how not to resume it, for the message.
    Raises ValueError naming each difference with both values.
    """
    differences = [
        f"{name} is {_show(found)} there and {_show(wanted)} here"
        for name, found, wanted in _differences({**META_BEFORE, **payload["meta"]}, plain(meta or {}), "")
    ]
    for key in config_keys:
        found, wanted = _lookup(payload.get("config", {}), key), _lookup(config or {}, key)
        if plain_lists(found) != plain_lists(wanted):
            differences.append(f"{key} is {_show(found)} there and {_show(wanted)} here")
    if differences:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(differences)}. "
            f"Restore the setting, choose another --output, or {way_out}"
        )


def plain_lists(value: Any) -> Any:
    """`value` with tuples turned into lists, as JSON does."""
    if isinstance(value, Mapping):
        return {key: plain_lists(item) for key, item in value.items()}
    return [plain_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


_ABSENT = object()
META_BEFORE = {"output_stride": 32}  # entries that older checkpoints lack -> what those were made with


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    result = []
    found = found if isinstance(found, Mapping) else {}
    if "sha256" in wanted and "sha256" in found:
        wanted = {key: value for key, value in wanted.items() if key != "name"}
    for key, value in wanted.items():
        other = found.get(key, _ABSENT)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            result += _differences(other, value, f"{prefix}{key}.")
        elif other is _ABSENT or plain_lists(other) != plain_lists(value):
            result.append((f"{prefix}{key}", other, value))
    return result


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
