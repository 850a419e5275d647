"""The geometry benchmark on the tiny preset, and its refusal to time steps that compute different things."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench_geometry import compare, main


def test_steps_that_disagree_are_not_timed():
    found = {"ours": {"loss": 2.0, "tolerance": 1e-3}, "baseline": {"loss": 2.001, "tolerance": 1e-3}}
    compare("repvit_m0_9", found)
    compare("repvit_m0_9", {"ours": found["ours"]})
    for loss in (2.01, float("nan")):
        with pytest.raises(ValueError, match="repvit_m0_9: the losses are"):
            compare("repvit_m0_9", {**found, "baseline": {"loss": loss}})


def test_wrong_arguments_end_with_2():
    for argv in (["--prompts", "0"], ["--preset", "huge"], ["--students", "resnet"], ["--side", "ours"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


@pytest.mark.slow
def test_tiny_table(tmp_path, capsys):
    sizes = ["--batch-size", "1", "--prompts", "4", "--chunk", "2", "--repeats", "1", "--threads", "1"]
    argv = ["--preset", "tiny", "--students", "efficientvit_b0", *sizes, "--device", "cpu"]
    assert main([*argv, "--json", str(tmp_path / "f.json")]) == 0
    out = capsys.readouterr().out
    assert "1 picture(s) with 4 prompts each, 2 at once" in out and "efficientvit_b0" in out
    sides = json.loads((tmp_path / "f.json").read_text())["students"]["efficientvit_b0"]
    assert sides["ours"]["loss"] == pytest.approx(sides["baseline"]["loss"], rel=1e-3)
    assert all(side["step_s"] > 0 and side["peak_gib"] > 0 for side in sides.values())
