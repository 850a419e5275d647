"""Settings as frozen dataclasses: read from YAML, JSON or JSONC, checked by their type hints, set by `a.b=value`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any, TypeVar

import json5
import yaml

Settings = TypeVar("Settings")
UNIONS = (types.UnionType, typing.Union)  # `X | None`, and the same with a Literal


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Keys and values of a `.json` or `.jsonc` file, with comments or without, else of a YAML file; {} if it is empty.

    Raises FileNotFoundError, or ValueError for a file that cannot be parsed or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        values = _parse_json(text) if path.suffix in (".json", ".jsonc") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        kind = path.suffix[1:] or "yaml"
        raise ValueError(f"{path} cannot be parsed: not valid {kind}: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted keys and values")
    return values


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json5.loads(text)  # knows comments, and says better what is wrong


def build(cls: type[Settings], values: Mapping[str, Any], source: str, path: str = "") -> Settings:
    """The dataclass `cls` of nested mappings, lists and numbers. source: where they are from, for messages.

    Raises ValueError for an unknown key, naming the nearest known one, for a missing one, and for values of another
    type than the hints.
    Hints may be numbers, strings, `Literal`, `X | None`, `tuple[X, ...]`, `dict[str, X]` and dataclasses.
    """
    check_keys(cls, values, source, path)
    missing = dataclasses.MISSING
    required = [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]
    if absent := [f"{path}{name}" for name in required if name not in values]:
        raise ValueError(f"{source} lacks {', '.join(absent)}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: coerce(f"{path}{key}", value, hints[key], source) for key, value in values.items()})


def check_keys(cls: type, values: Mapping[str, Any], source: str, path: str = "") -> None:
    """ValueError if `values` has a key that is no field of the dataclass `cls`."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            hint = f", did you mean {path}{near[0]}?" if near else f"; {cls.__name__} knows {some}"
            raise ValueError(f"{source} has the unknown key {f'{path}{key}'!r}{hint}")


def coerce(name: str, value: Any, hint: Any, source: str = "the configuration") -> Any:
    """The value of setting `name` as the type `hint` says; YAML's `1e-4` is a string, JSON has lists for tuples."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    optional = types.NoneType in kinds
    if value is None and optional:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    kind, arguments = kinds[0], typing.get_args(kinds[0])  # a union of several has plain kinds only
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return build(kind, value, source, f"{name}.")
        if isinstance(value, kind):
            return value
        wanted = "keys and values"
    elif typing.get_origin(kind) is typing.Literal:
        if value in arguments and type(value) in {type(argument) for argument in arguments}:
            return value
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, arguments))}")
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(coerce(f"{name}[{i}]", item, arguments[0], source) for i, item in enumerate(value))
        wanted = "a list"
    elif typing.get_origin(kind) is dict:
        if isinstance(value, Mapping):
            return {str(key): coerce(f"{name}.{key}", item, arguments[1], source) for key, item in value.items()}
        wanted = "keys and values"
    else:
        converted = _plain(value, kinds)
        if converted is not None:
            return converted
        wanted = " or ".join(f"a {kind.__name__}" for kind in kinds)
    raise ValueError(f"{name} is {value!r}; wanted {wanted}{' or null' if optional else ''}")


def _plain(value: Any, kinds: Sequence[type]) -> Any:
    """The value as one of these plain types; None if it is of none of them."""
    for kind in kinds:
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    return None


def require_at_least(least: float, settings: Any, names: Iterable[str], path: str = "") -> None:
    """ValueError unless each of these fields of `settings` is None or a finite number of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"{path}{name} must be at least {least} and finite, got {value}")


def override(values: dict[str, Any], pairs: Sequence[str], source: str = "--opts") -> None:
    """Set `a.b=value`, the value in YAML, in nested mappings; `a.0.b` reaches into lists. ValueError if it cannot."""
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{source} takes key=value, got {pair!r}")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ValueError(f"{source} {pair!r} is not valid YAML: {' '.join(str(error).split())}") from error
        _put(values, key.split("."), value, f"{source} {pair}")


def _put(values: Any, keys: Sequence[str], value: Any, source: str) -> None:
    *parents, last = keys
    for key in parents:
        values = values[_index(values, key, source)] if isinstance(values, list) else values.setdefault(key, {})
        if not isinstance(values, (MutableMapping, MutableSequence)):
            raise ValueError(f"{source}: {key} holds {values!r}, nothing can be set below it")
    values[_index(values, last, source) if isinstance(values, list) else last] = value


def _index(values: list[Any], key: str, source: str) -> int:
    if not key.isdecimal() or int(key) >= len(values):
        raise ValueError(f"{source}: wanted an index below {len(values)} of the list, got {key!r}")
    return int(key)


def to_plain(settings: Any) -> dict[str, Any]:
    """Mappings, lists, numbers and strings only; `build` gives the same settings back."""
    return _lists(dataclasses.asdict(settings))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
