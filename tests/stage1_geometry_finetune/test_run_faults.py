"""Runs that go on where something is gone or broken, and modes that write nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from sam3.engine.checkpoint import newest
from tests.stage1.runs import assert_same_weights, metrics
from tests.stage1_geometry_finetune.runs import Inputs

TWO_EPOCHS = {"TRAIN__EPOCHS": 2}


def empty_annotations(path: Path) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "annotations": []}))


def test_it_goes_on_without_the_weights_it_started_from(tuned: Path, inputs: Inputs, tmp_path: Path):
    output = shutil.copytree(tuned, tmp_path / "run")
    (output / "ckpt_epoch_1.pth").unlink()
    without = dataclasses.replace(inputs, start=tmp_path / "gone.pth")
    assert without.tune(output, **TWO_EPOCHS) == 0
    assert_same_weights(output / "ckpt_epoch_1.pth", tuned / "ckpt_epoch_1.pth")
    assert f"start        {output / 'ckpt_epoch_0.pth'}, resumed" in (output / "log_rank0.txt").read_text()


def test_a_start_that_is_missing_leaves_the_folder_as_it_was(inputs: Inputs, tmp_path: Path):
    without = dataclasses.replace(inputs, start=tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights .*gone.pth to start from"):
        without.tune(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"log_rank0.txt", ".train.lock"}
    with pytest.raises(FileNotFoundError, match=r"no weights .*gone.pth to start from"):
        without.tune(tmp_path / "dry", "--dry-run")
    assert not (tmp_path / "dry").exists()


def test_evaluation_prefers_what_was_trained_to_its_start(tuned: Path, inputs: Inputs, tmp_path: Path, capsys):
    output = shutil.copytree(tuned, tmp_path / "run")
    assert inputs.tune(output, "--eval") == 0
    text, last = capsys.readouterr().out, output / "ckpt_epoch_1.pth"
    assert f"{last}: val/mse {metrics(tuned, 'val/mse')[-1]:.5g}" in text
    assert f"evaluating {last}, not {inputs.start}; --resume {inputs.start} evaluates the latter" in text


def test_a_dry_run_stores_no_text_features(inputs: Inputs, tmp_path: Path):
    teacher = tmp_path / "models" / inputs.teacher.name
    teacher.parent.mkdir()
    shutil.copy(inputs.teacher, teacher)
    moved = dataclasses.replace(inputs, teacher=teacher)
    opts = {"DATA__NUM_VAL_SAMPLES": 0, "DISTILL__MAX_PROMPTS": 1}
    assert moved.tune(tmp_path / "run", "--dry-run", **opts) == 0
    assert list(teacher.parent.iterdir()) == [teacher]
    assert not (tmp_path / "run").exists()
    assert moved.tune(tmp_path / "run", TRAIN__MAX_STEPS=1, **opts) == 0
    assert len(list(teacher.parent.glob("visual_text_*.safetensors"))) == 1


def test_a_teacher_that_was_renamed_is_resumed(tuned: Path, inputs: Inputs, tmp_path: Path):
    output = shutil.copytree(tuned, tmp_path / "run")
    (output / "ckpt_epoch_1.pth").unlink()
    renamed = dataclasses.replace(inputs, teacher=shutil.copy(inputs.teacher, tmp_path / "renamed.pt"))
    assert renamed.tune(output, **TWO_EPOCHS) == 0
    assert_same_weights(output / "ckpt_epoch_1.pth", tuned / "ckpt_epoch_1.pth")


def test_a_bad_val_picture_costs_no_epoch(inputs: Inputs, tmp_path: Path):
    data = shutil.copytree(inputs.data, tmp_path / "data")
    empty_annotations(data / "annotations/val/sa_10.json")
    spoilt = dataclasses.replace(inputs, data=data)
    with pytest.raises(ValueError, match=r"val/sa_10.json lists no objects"):
        spoilt.tune(tmp_path / "run")
    assert newest(tmp_path / "run").name == "ckpt_epoch_0_step_4.pth"
    assert spoilt.tune(tmp_path / "run", DATA__SKIP_BAD_IMAGES=True) == 0
    assert len(metrics(tmp_path / "run", "train/loss_total")) == 4  # no step was done again
    assert len(metrics(tmp_path / "run", "val/mask_iou")) == 1


def test_the_reason_of_a_picture_that_is_left_out_gives_no_advice(inputs: Inputs, tmp_path: Path, capsys):
    data = shutil.copytree(inputs.data, tmp_path / "data")
    empty_annotations(data / "annotations/train/sa_2.json")
    opts = {"DATA__NUM_VAL_SAMPLES": 0, "DATA__SKIP_BAD_IMAGES": True, "DISTILL__MAX_PROMPTS": 1}
    assert dataclasses.replace(inputs, data=data).tune(tmp_path / "run", **opts) == 0
    path = data / "annotations/train/sa_2.json"
    wanted = f"left out (picture 1 that cannot be used): annotation file {path} lists no objects\n"
    assert wanted in capsys.readouterr().out
