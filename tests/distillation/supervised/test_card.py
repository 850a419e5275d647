"""The page beside the tiny SAM3's weights, from hand-made records."""

from __future__ import annotations

import json

import pytest

from distillation.supervised.card import TrainingRecord, card, training_record


def write_run(folder, steps):
    """A run's files; steps: (step, ms) of its log lines."""
    folder.mkdir()
    lines = [json.dumps({"step": step, "train/step_ms": ms}) for step, ms in steps]
    lines.insert(1, json.dumps({"step": steps[0][0], "val/target": 0.5}))  # no training step
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    env = {"world_size": 2, "devices": [], "cpu_count": 4, "versions": {"torch": "2.9"}}
    (folder / "env.json").write_text(json.dumps(env))
    return folder


def test_time_is_that_of_the_steps(tmp_path):
    """10 steps of 200 ms and 30 of 100 ms are 5 seconds."""
    record = training_record(write_run(tmp_path / "run", [(10, 200.0), (40, 100.0)]))
    assert (record.steps, record.seconds, record.processes) == (40, pytest.approx(5.0), 2)
    assert (record.device, record.torch) == ("4 CPU cores", "2.9")


def test_a_run_without_steps_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", [(10, 200.0)])
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl tells of no training step"):
        training_record(folder)


def test_what_the_page_says(tmp_path):
    weights = tmp_path / "sam3_tiny.safetensors"
    weights.write_bytes(b"x" * 5_970_000)
    records = {
        "image": TrainingRecord(1000, 1800.0, 2, "2 CPU cores", "2.9"),
        "tracker": TrainingRecord(500, 900.0, 2, "2 CPU cores", "2.9"),
    }
    figures = {"image": {"val/text_iou": 0.8125, "val/rejected": 0.91}, "tracker": {"val/jf_click": 0.75}}
    page = card(weights, figures, records)
    assert "5.97 MB" in page and "0:45:00 of training steps, on 2 CPU cores, torch 2.9" in page
    assert "| image | 1000 | 0:30:00 | 2 |" in page
    assert "| mask IoU per object that a phrase means, 0 for a missed one | 0.812 | 0.75 |" in page
    assert "| absent phrases without any mask | 0.910 | 0.90 |" in page
    assert "| J&F of clips, one click on the first frame | 0.750 | 0.75 |" in page
    assert "exemplar box" not in page  # not measured
