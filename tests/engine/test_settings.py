"""Settings as dataclasses: types, unknown and missing keys, files with comments, overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from sam3.engine.settings import build, override, read_mapping, require_at_least, to_plain


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] | None = None
    names: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    label: str
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    resume: bool | str = False
    limit: int | None = None


def test_nested_values_become_dataclasses_and_go_back():
    values = {"label": "x", "inner": {"rate": "1e-4", "kind": "b", "names": {"p": 2}}, "many": [{"rate": 2}, {}]}
    built = build(Outer, values, "test")
    assert built == Outer("x", Inner(1e-4, "b", {"p": 2}), (Inner(2.0), Inner()))
    assert isinstance(built.many[0].rate, float)
    assert build(Outer, to_plain(built), "test") == built


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["test lacks label"]),
        ({"label": "x", "iner": {}}, ["'iner'", "did you mean inner?"]),
        ({"label": "x", "inner": {"rat": 1}}, ["'inner.rat'", "inner.rate"]),
        ({"label": "x", "zzz": 1}, ["'zzz'", "Outer knows label, inner"]),
        ({"label": 1}, ["label is 1", "a str"]),
        ({"label": "x", "inner": 3}, ["inner is 3", "keys and values"]),
        ({"label": "x", "inner": {"rate": "fast"}}, ["inner.rate is 'fast'", "a float"]),
        ({"label": "x", "inner": {"rate": True}}, ["inner.rate is True"]),
        ({"label": "x", "inner": {"kind": "c"}}, ["inner.kind is 'c'", "a, b"]),
        ({"label": "x", "inner": {"names": {"p": "q"}}}, ["inner.names.p is 'q'"]),
        ({"label": "x", "many": {}}, ["many is {}", "a list"]),
        ({"label": "x", "many": [{"rate": None}]}, ["many[0].rate is None"]),
        ({"label": "x", "resume": 1}, ["resume is 1", "a bool or a str"]),
        ({"label": "x", "limit": 1.5}, ["limit is 1.5", "a int or null"]),
    ],
)
def test_what_is_wrong_is_named_with_its_path(values: dict, words: list[str]):
    with pytest.raises(ValueError) as refusal:
        build(Outer, values, "test")
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_json_may_have_comments_and_yaml_may_be_empty(tmp_path: Path):
    for name in ("a.json", "a.jsonc"):
        (tmp_path / name).write_text('{ // why\n "a": [1, 2,], /* more */ "b": 1e-4 }')
        assert read_mapping(tmp_path / name) == {"a": [1, 2], "b": 1e-4}
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_mapping(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": }', r"a\.json cannot be parsed: not valid json"),
        ("a.yaml", "a: [", r"a\.yaml cannot be parsed: not valid yaml"),
        ("a.yaml", "[1]", "holds a list"),
        ("a.yaml", b"\xff\xfe\x00", "cannot be parsed"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str | bytes, message: str):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_mapping(tmp_path / name)


def test_overrides_reach_into_mappings_and_lists():
    values = {"many": [{"rate": 1}]}
    override(values, ["inner.rate=2", "many.0.rate=1e-3", "label=", "limit=null"])
    assert values == {"many": [{"rate": "1e-3"}], "inner": {"rate": 2}, "label": "", "limit": None}
    for pair, message in (
        ("many.1.rate=2", "index below 1"),
        ("label.x=2", "nothing can be set below"),
        ("rate", "takes key=value"),
        ("a=[", "not valid YAML"),
    ):
        with pytest.raises(ValueError, match=message):
            override(values, [pair])


def test_numbers_have_a_least_value():
    require_at_least(0, Inner(0.0), ["rate", "kind"])  # None is no number
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"inner\.rate must be at least 0"):
            require_at_least(0, Inner(bad), ["rate"], "inner.")
