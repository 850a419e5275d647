"""What training refuses, and what it says then; data with gaps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.engine.weights import load_weights, save_weights
from scripts import make_tiny_sam3
from stage2 import config as stage2_config
from stage2 import convert_memory_weights_stage2
from stage2.data.sources import split_videos
from tests.samples import write_sav_video
from tests.stage1.runs import metrics
from tests.stage2.runs import TINY, Inputs, embed

ONE_STEP = {"TRAIN__MAX_STEPS": 1, "DATA__NUM_VAL_SAMPLES": 0}


def refused(inputs: Inputs, output: Path, message: str, *flags: str, error: type = ValueError, **opts) -> None:
    """The run ends with the message, and leaves no file but its log."""
    with pytest.raises(error, match=message):
        inputs.train(output, *flags, **opts)
    left = {path.name for path in output.iterdir()} if output.exists() else set()
    assert left <= {"train.log", ".train.lock"}


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another SAM3 of the same sizes."""
    path = tmp_path_factory.mktemp("other") / "sam3.pt"
    assert make_tiny_sam3.main(["--output", str(path), "--seed", "2"]) == 0
    return path


@pytest.fixture
def copy(inputs: Inputs, tmp_path: Path) -> Inputs:
    """Data that may be damaged."""
    frames = shutil.copytree(inputs.frames, tmp_path / "frames")
    return replace(inputs, frames=frames, embeddings=shutil.copytree(inputs.embeddings, tmp_path / "embeddings"))


# The teacher --------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_missing_or_has_no_tracker(inputs: Inputs, tmp_path: Path):
    gone = replace(inputs, teacher=tmp_path / "gone.pt")
    refused(
        gone, tmp_path / "run", r"no teacher checkpoint .*gone.pt; .*MODEL.SAM3_CHECKPOINT", error=FileNotFoundError
    )
    tensors = load_weights(inputs.teacher).tensors
    image_model = {key: value for key, value in tensors.items() if not key.startswith("tracker.")}
    save_weights(tmp_path / "image.pt", image_model)
    lacking = replace(inputs, teacher=tmp_path / "image.pt")
    refused(
        lacking, tmp_path / "run", r"image.pt has no tracker \(tracker.\*\), which video needs; give the full sam3.pt"
    )


def test_a_teacher_with_a_compressed_memory(memory_run: Path, inputs: Inputs, tmp_path: Path):
    merged = tmp_path / "merged.pt"
    paths = ["--stage2_weights", memory_run / "ckpt_latest.pth", "--sam3_weights", inputs.teacher]
    assert convert_memory_weights_stage2.main(list(map(str, [*paths, "--output_path", merged, "--no_verify"]))) == 0
    refused(
        replace(inputs, teacher=merged), tmp_path / "run", r"merged.pt has a compressed memory already, so it is no"
    )


def test_embeddings_of_another_model(inputs: Inputs, other_teacher: Path, tmp_path: Path):
    other = replace(inputs, teacher=other_teacher)
    refused(other, tmp_path / "run", r"embeddings.*teacher.sha256")


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_teacher_is_not_resumed(
    memory_run: Path, inputs: Inputs, other_teacher: Path, tmp_path: Path
):
    other = Inputs(other_teacher, inputs.frames, embed(other_teacher, inputs.frames, tmp_path / "embeddings"))
    path = str(memory_run / "ckpt_latest.pth")
    refused(other, tmp_path / "run", r"ckpt_latest.pth belongs to another run: .*teacher.sha256", "--resume", path)
    refused(other, tmp_path / "run", "memory of another kind: tracker.sha256", "--eval", "--resume", path)
    # its weights are a start like any other
    assert other.train(tmp_path / "run", MODEL__PRETRAINED=path, **ONE_STEP) == 0


def test_weights_of_another_memory_are_no_start(memory_run: Path, inputs: Inputs, tmp_path: Path):
    path, output = memory_run / "ckpt_latest.pth", tmp_path / "run"
    message = "memory of another kind: memory.pool_size is 2 there and 1 here; set the MODEL keys as its config.yaml"
    pool = {"MODEL__MEMORY_ATTENTION__POOL_SIZE": 1}
    refused(inputs, output, message, MODEL__PRETRAINED=path, **pool)
    refused(inputs, output, message, "--eval", "--resume", str(path), **pool)
    save_weights(tmp_path / "other.pt", {"backbone.model.weight": torch.ones(2)})
    refused(
        inputs, output, "other.pt does not fit MemoryDistiller: .* missing", MODEL__PRETRAINED=tmp_path / "other.pt"
    )
    refused(inputs, output, "gone.pt", error=FileNotFoundError, MODEL__PRETRAINED=tmp_path / "gone.pt")
    refused(inputs, output, "no checkpoint in .* to evaluate", "--eval")


# Data ---------------------------------------------------------------------------------------------------------------


def test_no_videos_and_no_embeddings(inputs: Inputs, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "gone"):
        refused(replace(inputs, frames=tmp_path / folder), tmp_path / "run", folder, error=FileNotFoundError)
        message = rf"{folder}.*save_video_embeddings_stage2.py"
        refused(replace(inputs, embeddings=tmp_path / folder), tmp_path / "run", message, error=FileNotFoundError)


def test_videos_without_embeddings_are_listed(copy: Inputs, tmp_path: Path):
    for name in ("sav_000002", "sav_000005"):
        shutil.rmtree(copy.embeddings / name)
    message = (
        r"2 of 5 videos have no embeddings in .*save_video_embeddings_stage2.py.*: sav_000002, sav_000005; give them "
        r"what they lack, or leave them out with DATA.SKIP_BAD_VIDEOS True"
    )
    refused(copy, tmp_path / "run", message)
    assert copy.train(tmp_path / "run", DATA__SKIP_BAD_VIDEOS=True, **ONE_STEP) == 0
    lines = (tmp_path / "run/left_out.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["sav_000002", "sav_000005"]
    assert "left out     2 (no embeddings in" in (tmp_path / "run/train.log").read_text()


def test_videos_without_annotations_are_listed(copy: Inputs, tmp_path: Path):
    for path in (copy.frames / "sav_000003").glob("*.json"):
        path.unlink()
    refused(copy, tmp_path / "run", r"1 of 5 videos have no annotations \(manual, auto\) in .*: sav_000003; give them")


def test_a_damaged_file_stops_training_unless_it_may_be_skipped(copy: Inputs, tmp_path: Path, capsys):
    damaged = sorted(copy.embeddings.glob("*/00004.pt"))
    assert len(damaged) == 5
    for path in damaged[:4]:
        path.write_bytes(path.read_bytes()[:100])
    output = tmp_path / "run"
    opts = {"DATA__TIME_REVERSAL": 0.0, "DATA__NUM_FRAMES": 2, "DATA__NUM_VAL_SAMPLES": 0, "DATA__TRAIN_SPLIT": 1.0}
    opts |= {"DATA__VAL_SPLIT": 0.0}
    with pytest.raises(ValueError, match=r"00004.pt"):
        copy.train(output, **opts)
    assert copy.train(output, DATA__SKIP_BAD_VIDEOS=True, **opts) == 0  # the same command, with what it was told
    assert len(metrics(output, "train/loss_total")) == 4


def test_stored_frames_must_serve_the_clips(inputs: Inputs, tmp_path: Path):
    embed(inputs.teacher, inputs.frames, tmp_path / "embeddings", "--frame_stride", "8")
    sparse = replace(inputs, embeddings=tmp_path / "embeddings")
    refused(sparse, tmp_path / "run", r"FRAME_SKIP.*8")


def test_few_videos_make_batches_of_any_size(inputs: Inputs, tmp_path: Path):
    assert inputs.train(tmp_path, DATA__BATCH_SIZE=6, TRAIN__EFFECTIVE_BATCH=6, DATA__NUM_FRAMES=2, **ONE_STEP) == 0
    assert "1 an epoch, 1 in all, effective batch 6" in (tmp_path / "train.log").read_text()
    assert len(metrics(tmp_path, "train/loss_total")) == 1


def test_a_val_split_without_objects_to_follow(teacher_file: Path, tmp_path: Path):
    """The steps are done and saved before that shows; the same command then goes on to the validation."""
    frames, names = tmp_path / "frames", ["sav_000000", "sav_000001"]
    config = stage2_config.load(stage2_config.make_parser("").parse_args(["--config", str(TINY)]))
    for name in names:
        seen = name in split_videos(names, config)[0]
        write_sav_video(frames, name, np.full((3, 1, 30, 40), seen), 12, every=4)
    inputs = Inputs(teacher_file, frames, embed(teacher_file, frames, tmp_path / "embeddings"))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no clip of the val split could be used; see the log, or set DATA.NUM_VAL"
        ):
            inputs.train(tmp_path / "run", TRAIN__MAX_STEPS=1)
    assert len(metrics(tmp_path / "run", "train/loss_total")) == 1
    assert inputs.train(tmp_path / "run", TRAIN__MAX_STEPS=1, DATA__NUM_VAL_SAMPLES=0) == 0
