"""The model benchmark on the tiny preset, and its refusal to time models that disagree."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.bench_model import PARTS, compare, main


def test_models_that_disagree_are_not_timed():
    ones = {"fpn0": torch.ones(4), "text": torch.ones(4)}
    assert compare(ones, ones) == {"fpn0": 0.0, "text": 0.0}
    with pytest.raises(ValueError, match=r"disagree.*'text': 0\.5"):
        compare({**ones, "text": torch.full((4,), 1.5)}, ones)
    with pytest.raises(ValueError, match="nan"):
        compare({**ones, "text": torch.full((4,), float("nan"))}, ones)


def test_wrong_arguments_end_with_2():
    for argv in (["--repeats", "0"], ["--preset", "huge"], ["--side", "ours"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


@pytest.mark.slow
def test_tiny_table(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main(["--preset", "tiny", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "f.json")]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in (*PARTS, "peak GB"))
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["ours"]["seconds"]["trunk"][0] > 0
    assert max(figures["distance"].values()) < 1e-3
