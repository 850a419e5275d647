"""A run of the tracker's training: resumed exactly, checkpoints that hold the whole model, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sam3.engine import checkpoint
from sam3.engine.weights import load_weights, save_weights
from sam3.model_builder import build_sam3_video_predictor
from stage2.supervised import config as supervised_config
from stage2.supervised import run
from tests.engine.processes import fork, join
from tests.stage2.supervised.clips import tracker, train

FROZEN = "detector.backbone.vision_backbone.trunk."


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, image_model: Path) -> Path:
    """Output folder of 3 steps; to be left as it is."""
    output = tmp_path_factory.mktemp("tracker")
    assert train(image_model, output) == 0
    return output


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(finished: Path, image_model: Path, tmp_path: Path):
    assert train(image_model, tmp_path / "kept", TRAIN__SAVE_INTERVAL=1) == 0
    first = tmp_path / "kept/ckpt_step_1.pth"
    assert train(image_model, tmp_path / "resumed", "--resume", str(first)) == 0
    before, wanted, found = map(
        checkpoint.load, (first, finished / "ckpt_latest.pth", tmp_path / "resumed/ckpt_latest.pth")
    )
    assert found["step"] == wanted["step"] == 3
    assert found["epoch"] == 1  # a clip of 3 frames after two of 2
    assert all(torch.equal(tensor, found["model"][key]) for key, tensor in wanted["model"].items())
    assert not all(torch.equal(tensor, before["model"][key]) for key, tensor in wanted["model"].items())


def test_a_checkpoint_holds_the_whole_model(finished: Path, image_model: Path):
    payload, start = checkpoint.load(finished / "ckpt_best.pth"), load_weights(image_model).tensors
    assert set(payload["model"]) == set(start)
    assert payload["meta"] == {"phase": "tracker", "preset": "tiny"}
    changed = {key for key, tensor in payload["model"].items() if not torch.equal(tensor, start[key])}
    assert all(key.startswith(("tracker.", "detector.backbone.vision_backbone.sam2_convs.")) for key in changed)
    assert len(changed) > 200
    predictor = build_sam3_video_predictor(finished / "ckpt_best.pth", device="cpu")
    weight = "maskmem_backbone.out_proj.weight"
    assert torch.equal(predictor.model.tracker.state_dict()[weight], payload["model"][f"tracker.{weight}"])


def test_validation_says_how_clips_are_tracked(finished: Path):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    values = next(line for line in lines if "val/target" in line)
    scores = {f"val/{name}_{kind}" for name in ("j", "f", "jf") for kind in ("click", "mask")}
    assert {name for name in values if name.startswith("val/")} == {
        *scores,
        *("val/click_iou", "val/presence", "val/absence", "val/target"),
    }
    assert values["val/target"] == values["val/jf_click"]
    assert all(0 <= values[name] <= 1 for name in scores)
    train_lines = [line for line in lines if "train/loss_total" in line]
    assert len(train_lines) == 3
    names = ("focal", "dice", "iou", "score", "occlusion")
    assert all(line[f"train/loss_{name}"] >= 0 for line in train_lines for name in names)


def test_evaluation_and_plan(finished: Path, image_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train(image_model, finished, "--eval") == 0
    assert "ckpt_latest.pth: val/" in (told := capsys.readouterr().out)
    assert "val/target" in told
    assert train(image_model, tmp_path / "none", "--dry-run") == 0
    assert "made on the fly, of 2, then 3 frames of 224 px" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_checkpoints_of_the_image_phases_can_be_evaluated(
    image_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """They hold heads for outlines, which no SAM3 has."""
    tensors = {**load_weights(image_model).tensors, "outlines.turn.weight": torch.zeros(3, 64)}
    torch.save({"model": tensors}, tmp_path / "image.pth")
    assert train(image_model, tmp_path / "out", "--eval", "--resume", str(tmp_path / "image.pth")) == 0
    assert "val/target" in capsys.readouterr().out


def _train(argv: list[str]) -> int:
    weights, output = map(Path, argv)
    return train(weights, output, DATA__NUM_CLIPS=8, TRAIN__MAX_STEPS=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
def test_two_processes(image_model: Path, tmp_path: Path):
    assert join(fork(_train, [str(image_model), str(tmp_path)], 2), timeout_s=120) == [0, 0]
    payload = checkpoint.load(tmp_path / "ckpt_latest.pth")
    assert payload["step"] == 2
    assert payload["samples"] == 4


def test_weights_come_from_checkpoints_and_from_files_of_half_precision(
    image_model: Path, finished: Path, tmp_path: Path
):
    model, latest = tracker(image_model), checkpoint.load(finished / "ckpt_latest.pth")["model"]
    run.take_image_model(model, finished / "ckpt_latest.pth")
    assert all(torch.equal(tensor, latest[key]) for key, tensor in model.state_dict().items())
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in latest.items()}
    save_weights(tmp_path / "half.safetensors", halves)
    run.take_image_model(model, tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    key = "tracker.maskmem_tpos_enc"
    assert torch.equal(model.state_dict()[key], latest[key].half().float())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("MODEL.PRETRAINED=", r"MODEL\.PRETRAINED is empty, but the tracker is trained on a finished image model"),
        ("DATA.NUM_FRAMES=[4,1]", r"DATA\.NUM_FRAMES lists frames of a clip, each at least 2, got \[4, 1\]"),
        ("DATA.NUM_FRAMES=[]", r"DATA\.NUM_FRAMES lists frames of a clip"),
        ("DATA.PROMPTS.MASK=0.5", r"DATA\.PROMPTS.* add up to 1, got \(0\.5, 0\.25, 0\.5\)"),
        ("DATA.TIME_REVERSAL=1.5", r"DATA\.TIME_REVERSAL is a share, at most 1, got 1\.5"),
        ("DATA.MAX_OBJECTS=0", r"DATA\.MAX_OBJECTS is 0, but must be at least 1"),
        ("LOSS.FOCAL=-1.0", r"LOSS\.FOCAL must be at least 0, got -1"),
        ("DATA.IMG_SIZE=112", r"DATA\.IMG_SIZE .*cannot be set: it follows from MODEL\.PRESET"),
        ("PHASE=image", r"PHASE is 'image'; choose one of tracker"),
        ("TRAIN.CHANNELS_LAST=True", r"TRAIN\.CHANNELS_LAST .*cannot be set: "),
        ("TRAIN.OPTIMIZER.MATRIX_LR=2.0", r"TRAIN\.OPTIMIZER\.MATRIX_LR is 2\.0, but it acts only with .* muon"),
    ],
)
def test_settings_that_cannot_work(image_model: Path, setting: str, message: str):
    arguments = ["--cfg", str(image_model.parent / "c.yaml"), "--opts", setting]
    with pytest.raises(ValueError, match=message):
        supervised_config.load(supervised_config.make_parser("").parse_args(arguments))


def test_without_an_image_model(image_model: Path, tmp_path: Path):
    missing = tmp_path / "image.pth"
    with pytest.raises(FileNotFoundError, match=rf"no image model {missing}; train it with python scripts/train_tiny"):
        train(image_model, tmp_path / "out", "--pretrained", str(missing))
    assert train(image_model, tmp_path / "out", "--pretrained", str(missing), "--dry-run") == 0
