"""The Stage 2 benchmark on the tiny preset: both sides compute the same, and its refusal to time what does not."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from benchmarks.bench_stage2 import OPTIONS, SIDES, compare, main, make_batch, print_table
from benchmarks.measuring import measure_apart
from sam3.model.tracker_config import TrackerConfig

FIGURES = {"device": "cpu", "autocast": "off", "trained": 140_272, "tolerance": 1e-3}


def test_wrong_arguments_end_with_2():
    wrong = (["--frames", "1"], ["--objects", "0"], ["--repeats", "0"], ["--preset", "huge"], ["--amp-dtype", "fp8"])
    for argv in (*wrong, ["--side", "ours"], ["--side", "theirs"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def test_steps_that_disagree_are_not_timed():
    found = {"ours": {"loss": 2.0, "tolerance": 1e-3}, "baseline": {"loss": 2.001, "tolerance": 1e-3}}
    compare(found)
    for loss in (2.01, float("nan")):
        with pytest.raises(ValueError, match=r"the losses are 2\.0 and"):
            compare({**found, "baseline": {"loss": loss}})


def test_objects_of_the_clip():
    """Boxes of a quarter of the rows and half of the columns, in all frames, prompted by their corners."""
    config = TrackerConfig.preset("tiny")
    batch = make_batch(config, width=32, num_frames=3, num_objects=2)
    assert batch.embeddings.shape == (1, 3, 32, config.grid, config.grid)
    assert batch.masks.shape == (2, 3, 4 * config.grid, 4 * config.grid)
    assert batch.masks.flatten(2).sum(-1).tolist() == [[2 * config.grid**2] * 3] * 2
    side = config.img_size
    assert batch.points.tolist() == [[[side / 4, side / 4], [3 * side / 4, side / 2]]] * 2


def test_ratios_of_the_table(capsys):
    args = Namespace(preset="tiny", frames=3, objects=1, repeats=2, threads=1)
    ours, baseline = {**FIGURES, "step_s": 3.0, "peak_gib": 1.0}, {**FIGURES, "step_s": 2.0, "peak_gib": 4.0}
    print_table(args, {"ours": ours, "baseline": baseline})
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "3 frames with 1 object(s)" in head and "140,272 parameters trained" in head
    assert [line.split() for line in lines] == [
        ["step", "s", "3.00", "2.00", "1.50"],
        ["peak", "GiB", "1.00", "4.00", "0.25"],
    ]
    print_table(args, {"ours": ours})
    assert [line.split()[2:] for line in capsys.readouterr().out.splitlines()[2:]] == [["3.00"], ["1.00"]]


def test_both_sides_compute_the_same(tmp_path):
    """What the two processes do, in this one: the losses agree, and the first step's does not depend on repeats."""
    argv = ["--preset", "tiny", "--frames", "2", "--device", "cpu", "--threads", str(torch.get_num_threads())]
    found = {}
    for side, repeats in zip(SIDES, (2, 1), strict=True):
        path = tmp_path / f"{side}.pt"
        assert main([*argv, "--repeats", str(repeats), "--side", side, "--result", str(path)]) == 0
        found[side] = torch.load(path, weights_only=True)
    assert found["ours"]["loss"] == pytest.approx(found["baseline"]["loss"], rel=1e-3)
    compare(found)
    for side in found.values():
        assert side["step_s"] > 0 and side["peak_gib"] > 0 and side["loss"] > 0
        assert {name: side[name] for name in FIGURES} == FIGURES


def test_a_process_that_fails_is_named(tmp_path, capfd):
    """It gets the flags, the options with dashes and a place for its figures; without these there is no table."""
    program = tmp_path / "program.py"
    program.write_text("import sys; print(*sys.argv[1:], file=sys.stderr); sys.exit(3)\n")
    args = Namespace(preset="tiny", amp_dtype="off")
    with pytest.raises(ValueError, match=r"^measuring the side failed, out of memory"):
        measure_apart(str(program), "the side", ["--side", "ours"], args, ("preset", "amp_dtype"))
    progress, given = capfd.readouterr().err.splitlines()
    assert progress == "measuring the side ..."
    words = given.split()
    assert words[:3] == ["--side", "ours", "--result"]
    assert words[4:] == ["--preset", "tiny", "--amp-dtype", "off"]


@pytest.mark.slow
def test_tiny_table(tmp_path, capsys):
    argv = ["--preset", "tiny", "--frames", "3", "--objects", "2", "--threads", "1", "--device", "cpu"]
    assert main([*argv, "--json", str(tmp_path / "f.json")]) == 0
    captured = capsys.readouterr()
    assert "3 frames with 2 object(s), cpu, autocast off, 1 threads" in captured.out
    assert captured.err.splitlines() == [f"measuring {side} ..." for side in SIDES]
    report = json.loads((tmp_path / "f.json").read_text())
    assert report.keys() == {*OPTIONS, "sides"}
    assert (report["preset"], report["frames"], report["objects"]) == ("tiny", 3, 2)
    sides = report["sides"]
    assert sides["ours"]["loss"] == pytest.approx(sides["baseline"]["loss"], rel=1e-3)
    assert all(side["step_s"] > 0 and side["peak_gib"] > 0 for side in sides.values())
