"""The benchmark of matching and losses, on tiny outputs."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_distillation
from benchmarks.bench_distillation import BASELINES, STAGES, check_same, main

TINY = ["--preset", "tiny", "--repeats", "1", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_wrong_arguments_end_with_2():
    for argv in (["--repeats", "0"], ["--threads", "0"], ["--preset", "huge"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def test_tiny_table(tmp_path, capsys):
    """All three sides agree, or there would be no table."""
    assert main([*TINY, "--at-least", "0", "--json", str(tmp_path / "f.json")]) == 0
    out = capsys.readouterr().out
    assert "6 of 10 queries, maps of 28 against 32" in out and "wanted at least" not in out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == list(STAGES)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures["ms"]) == ["ours", *BASELINES]
    together = [figures["ms"][side]["together"] for side in ("per pair", "ours")]
    assert figures["ratio"] == pytest.approx(together[0] / together[1])


def test_too_slow_ends_with_1(capsys):
    assert main([*TINY, "--at-least", "1e9"]) == 1
    assert "wanted at least 1e+09" in capsys.readouterr().out


def test_sides_that_differ_are_refused(monkeypatch):
    same = {"pairs": [(torch.arange(2), torch.arange(2))], "loss": 2.0, "gradients": [torch.ones(3)]}
    check_same(same, same, "per pair")
    for wrong, told in (
        ({"pairs": [(torch.arange(2), torch.tensor([1, 0]))]}, "matches other queries"),
        ({"loss": 2.1}, "the losses are 2.0 and, per pair, 2.1"),
        ({"loss": float("nan")}, "the losses are"),
        ({"gradients": [torch.tensor([1, 1, 1.1])]}, "other gradients"),
    ):
        with pytest.raises(ValueError, match=told):
            check_same(same, {**same, **wrong}, "per pair")
    plain = bench_distillation.plain_giou
    monkeypatch.setattr(bench_distillation, "plain_giou", lambda *boxes: 0.9 * plain(*boxes))
    with pytest.raises(ValueError, match="so the times mean nothing"):
        main(TINY)
