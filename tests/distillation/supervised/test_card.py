"""The page beside the tiny SAM3's weights, from hand-made records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillation.supervised.card import TrainingRecord, card, training_record

PLATFORM = "Linux-6.1-x86_64"


def write_run(folder, steps, device="auto", **machine):
    """A run's files; steps: (step, ms) of its log lines. machine: of env.json."""
    folder.mkdir()
    lines = [json.dumps({"step": step, "train/step_ms": ms}) for step, ms in steps]
    lines.insert(1, json.dumps({"step": steps[0][0], "val/target": 0.5}))  # no training step
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    env = {"world_size": 2, "devices": [], "cpu_count": 4, "versions": {"torch": "2.9"}, "platform": PLATFORM}
    (folder / "env.json").write_text(json.dumps(env | machine))
    (folder / "config.yaml").write_text(f"DEVICE: {device}\nSEED: 7\n")
    return folder


def test_time_is_that_of_the_steps(tmp_path):
    """10 steps of 200 ms and 30 of 100 ms are 5 seconds."""
    record = training_record(write_run(tmp_path / "run", [(10, 200.0), (40, 100.0)]))
    assert (record.steps, record.seconds, record.processes) == (40, pytest.approx(5.0), 2)
    assert (record.device, record.torch, record.seed) == ("4 CPU cores", "2.9", 7)


@pytest.mark.parametrize(
    ("device", "machine", "used"),
    [
        ("cpu", {"devices": ["A", "B"]}, "4 CPU cores"),
        ("auto", {"devices": ["A", "B", "C"]}, "A, B"),  # two processes
        ("cuda", {"devices": ["A", "B"], "world_size": 1}, "A"),
        ("cuda:1", {"devices": ["A", "B"], "world_size": 1}, "B"),
        ("mps", {"world_size": 1}, "MPS"),
        ("auto", {"world_size": 1, "platform": "macOS-15.1-arm64-arm-64bit"}, "MPS"),
        ("auto", {"platform": "macOS-15.1-arm64-arm-64bit"}, "4 CPU cores"),  # two processes cannot share MPS
    ],
)
def test_the_device_is_the_one_that_was_used(tmp_path, device, machine, used):
    """Not all that are in the machine."""
    assert training_record(write_run(tmp_path / "run", [(1, 100.0)], device, **machine)).device == used


def test_a_run_without_steps_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", [(10, 200.0)])
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl tells of no training step"):
        training_record(folder)


def test_what_the_page_says(tmp_path):
    weights = tmp_path / "sam3_tiny.safetensors"
    weights.write_bytes(b"x" * 5_970_000)
    records = {
        "image": TrainingRecord(1000, 1800.0, 2, "2 CPU cores", "2.9", 7),
        "tracker": TrainingRecord(500, 900.0, 2, "2 CPU cores", "2.9", 7),
    }
    found = {"val/text_iou": 0.8125, "val/rejected": 0.91, "val/box_found": 0.625}
    page = card(weights, {"image": found, "tracker": {"val/jf_click": 0.75}}, records)
    assert "5.97 MB" in page and "`python scripts/train_tiny_sam3.py --seed 7`" in page
    assert "0:45:00 of training steps, on 2 CPU cores, torch 2.9; validation and start-up come on top" in page
    assert "| image | 1000 | 0:30:00 | 2 |" in page
    assert "| mask IoU per object that a phrase means, 0 for a missed one | 0.812 | 0.75 |" in page
    assert "| absent phrases without any mask | 0.910 | 0.90 |" in page
    assert "| J&F of clips, one click on the first frame | 0.750 | 0.75 |" in page
    assert "| share of these objects with a score above one half | 0.625 |  |" in page
    assert "mask IoU of the object under one exemplar box" not in page  # not measured
    assert "whatever its score" in " ".join(page.split()) and "`set_loss.Targets.doubtful`, `outlines.rivals`" in page


def test_devices_of_phases_are_told_once(tmp_path):
    (weights := Path(tmp_path / "tiny.safetensors")).write_bytes(b"x")
    names = {"words": "A", "closeup": "B", "image": "A"}
    records = {phase: TrainingRecord(1, 1.0, 1, name, "2.9", 1) for phase, name in names.items()}
    assert "of training steps, on A, B, torch 2.9" in card(weights, {"image": {}, "tracker": {}}, records)
