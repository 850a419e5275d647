"""Training: what it writes and says, the documented commands, other modes, where it starts, and that options act."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam3.engine.files import sha256
from sam3.engine.weights import load_weights
from sam3.model.tracker_config import TINY_MEMORY
from stage2 import train_memory_stage2
from stage2.frozen_parts import tracker_meta
from tests.samples import TINY_MAP
from tests.stage1.runs import metrics, model_of
from tests.stage2.runs import Inputs, write_config

VALIDATION = {"val/agreement", *(f"val/{name}{of}" for name in ("j", "f", "jf") for of in ("", "_teacher"))}
WEIGHTS = {"focal": 1.0, "dice": 0.1, "iou": 0.1, "mse": 5.0}  # of the tiny config
# One step without validation.
ONE_STEP = {"TRAIN__MAX_STEPS": 1, "DATA__NUM_VAL_SAMPLES": 0}


def listed(output: Path) -> list[str]:
    """Names of what lies there, but for lock files."""
    return sorted(path.name for path in output.iterdir() if not path.name.startswith("."))


def first_step(output: Path, name: str = "total") -> float:
    return metrics(output, f"train/loss_{name}")[0]


# What a run leaves --------------------------------------------------------------------------------------------------


def test_output_tree(memory_run: Path):
    assert listed(memory_run) == [
        *("ckpt_best.pth", "ckpt_latest.pth", "ckpt_step_2.pth", "ckpt_step_4.pth", "config.yaml", "env.json"),
        *("metrics.jsonl", "tensorboard", "train.log"),
    ]
    assert yaml.safe_load((memory_run / "config.yaml").read_text())["TRAIN"]["MAX_STEPS"] == 4
    assert "--config" in json.loads((memory_run / "env.json").read_text())["argv"]


def test_checkpoints_hold_the_memory_alone_and_say_what_it_belongs_to(memory_run: Path, inputs: Inputs):
    payload = torch.load(memory_run / "ckpt_latest.pth", weights_only=True)
    assert {key.split(".")[0] for key in payload["model"]} == {"memory_attention", "spatial_perceiver"}
    assert (payload["step"], payload["epoch"], payload["validated_step"]) == (4, 0, 4)
    assert payload["meta"]["memory"] == TINY_MEMORY.to_meta()
    assert payload["meta"]["tracker"] == tracker_meta(load_weights(inputs.teacher))
    assert payload["meta"]["teacher"] == {"name": "sam3_tiny.pt", "sha256": sha256(inputs.teacher)}
    assert payload["meta"]["preprocess"]["resize"] == "square"
    assert payload["config"]["DISTILL"]["MSE_WEIGHT"] == 5.0


def test_every_weight_is_trained(memory_run: Path):
    before, after = (model_of(memory_run / f"ckpt_step_{step}.pth") for step in (2, 4))
    assert not [key for key, value in before.items() if torch.equal(value, after[key])]


def test_metrics(memory_run: Path):
    lines = [json.loads(line) for line in (memory_run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss_total" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        total = sum(weight * line[f"train/loss_{name}"] for name, weight in WEIGHTS.items())
        assert line["train/loss_total"] == pytest.approx(total, rel=1e-5)
    assert [line["train/lr"] for line in steps[:2]] == [1e-7, 1e-3]  # one step of warm-up, then the highest
    validations = [line for line in lines if "val/jf" in line]
    assert [line["step"] for line in validations] == [2, 4]
    for line in validations:
        assert {name for name in line if name.startswith("val/")} == VALIDATION
        assert all(0 <= line[name] <= 1 for name in VALIDATION)
        assert line["val/jf"] == pytest.approx((line["val/j"] + line["val/f"]) / 2)
    assert validations[0]["val/jf_teacher"] == validations[1]["val/jf_teacher"]  # the same clips, the same teacher
    best = torch.load(memory_run / "ckpt_best.pth", weights_only=True)["best"]
    assert (best["metric"], best["value"]) == ("val/jf", max(line["val/jf"] for line in validations))


def test_the_log_tells_the_plan(memory_run: Path, inputs: Inputs):
    text = (memory_run / "train.log").read_text()
    perceiver, attention = (
        sum(value.numel() for key, value in model_of(memory_run / "ckpt_latest.pth").items() if key.startswith(part))
        for part in ("spatial_perceiver.", "memory_attention.")
    )
    assert f"EfficientSAM3-Memory-Tiny, {perceiver + attention:,} parameters trained, 0 frozen" in text
    assert f"memory_attention {attention:,}, spatial_perceiver {perceiver:,}" in text
    dense = load_weights(inputs.teacher).tensors
    own = sum(value.numel() for key, value in dense.items() if key.startswith("tracker.transformer.encoder."))
    assert f"{inputs.teacher}, " in text and f"parameters frozen, {own:,} of them memory attention" in text
    assert f"4 train, 1 val in {inputs.frames}, clips of 3 frames, 4 apart" in text
    assert "start        layers of the teacher's, a random Perceiver" in text
    assert "4 in all, effective batch 1 = 1 x 1 processes x 1 accumulated" in text
    assert f"{TINY_MAP} fp16 of 5 videos, sam3_tiny.pt" in text


def test_tensorboard_gets_pictures_of_clips(memory_run: Path, inputs: Inputs):
    board = EventAccumulator(str(memory_run / "tensorboard"))
    board.Reload()
    assert VALIDATION | {"train/loss_mse", "train/lr"} <= set(board.Tags()["scalars"])
    (name,) = board.Tags()["images"]
    key = name.removeprefix("val/truth_teacher_student/")
    assert (inputs.frames / key).with_suffix(".jpg").is_file()
    first, second = board.Images(name)
    assert (first.step, second.step) == (2, 4)
    assert (first.height, first.width) == (3 * 64, 2 * 64)  # true, teacher's, student's masks; frames 1 and 2


# Commands -----------------------------------------------------------------------------------------------------------

BASIC = """--config stage2/configs/efficient_memory.yaml
  --output_dir output/stage2_memory
  DATA.SAV_ROOT data/sa-v/extracted_frames
  DATA.USE_PRECOMPUTED True
  DATA.EMBEDDING_DIR output/stage2_embeddings"""
RESUME = """--config stage2/configs/efficient_memory.yaml
  --output_dir output/stage2_memory
  --resume output/stage2_memory/ckpt_latest.pth"""


@pytest.fixture
def place(inputs: Inputs, tmp_path: Path, monkeypatch) -> Path:
    """The working folder, with the document's files where it has them, of the tiny size."""
    for source, name in (
        (inputs.frames, "data/sa-v/extracted_frames"),
        (inputs.embeddings, "output/stage2_embeddings"),
        (inputs.teacher, "sam3_checkpoints/sam3.pt"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documented_commands(place: Path):
    write_config(place, MAX_STEPS=2)
    assert train_memory_stage2.main(shlex.split(BASIC)) == 0
    output = place / "output/stage2_memory"
    assert {"config.yaml", "train.log", "tensorboard", "ckpt_latest.pth", "ckpt_best.pth"} <= set(listed(output))
    assert torch.load(output / "ckpt_latest.pth", weights_only=True)["step"] == 2
    write_config(place, MAX_STEPS=3)
    assert train_memory_stage2.main(shlex.split(RESUME)) == 0
    assert torch.load(output / "ckpt_latest.pth", weights_only=True)["step"] == 3
    assert "ckpt_latest.pth, resumed" in (output / "train.log").read_text()
    assert len(metrics(output, "train/loss_total")) == 3


def test_the_dumped_config_starts_the_same_run(memory_run: Path, tmp_path: Path):
    config = memory_run / "config.yaml"
    assert train_memory_stage2.main(["--config", str(config), "--output_dir", str(tmp_path)]) == 0
    first, again = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (memory_run, tmp_path))
    assert (first.pop("OUTPUT"), again.pop("OUTPUT")) == (str(memory_run), str(tmp_path))
    assert again == first
    assert metrics(tmp_path, "train/loss_total") == metrics(memory_run, "train/loss_total")


def test_a_dry_run_and_a_timing_write_no_weights(inputs: Inputs, tmp_path: Path, capsys):
    output = tmp_path / "run"
    assert inputs.train(output, "--dry-run") == 0
    text = capsys.readouterr().out
    for part in ("4 train, 1 val in", "4 in all, effective batch 1", "0.001 at its highest", "output ", "time "):
        assert part in text
    assert not output.exists()
    assert inputs.train(output, "--throughput") == 0
    assert "clips/s" in capsys.readouterr().out
    assert listed(output) == ["train.log"]


def test_trailing_pairs_and_other_names_of_keys(inputs: Inputs, tmp_path: Path, capsys):
    opts = {"DATA__BATCH_SIZE": None, "TRAIN__BATCH_SIZE": 2, "TRAIN__EFFECTIVE_BATCH": 4, **ONE_STEP}
    assert inputs.train(tmp_path, "--seed", "7", **opts) == 0
    assert "effective batch 4 = 2 x 1 processes x 2 accumulated" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["DATA"]["BATCH_SIZE"], config["SEED"]) == (2, 7)
    assert "BATCH_SIZE" not in config["TRAIN"]
    with pytest.raises(ValueError, match="BATCH_SIZE"):
        inputs.train(tmp_path, "--dry-run", DATA__BATCH_SIZE=3, TRAIN__BATCH_SIZE=2)


# Where it starts, and evaluation ------------------------------------------------------------------------------------


def test_pretrained_weights_are_a_start(memory_run: Path, inputs: Inputs, tmp_path: Path):
    path = memory_run / "ckpt_latest.pth"
    still = {"TRAIN__LR": 0.0, "TRAIN__WARMUP_LR": 0.0, "TRAIN__MIN_LR": 0.0, "TRAIN__WEIGHT_DECAY": 0.0}
    assert inputs.train(tmp_path, MODEL__PRETRAINED=path, **still, **ONE_STEP) == 0
    payload = torch.load(tmp_path / "ckpt_latest.pth", weights_only=True)
    assert payload["step"] == 1  # of a new run
    assert all(torch.equal(value, payload["model"][key]) for key, value in model_of(path).items())
    assert first_step(tmp_path) < first_step(memory_run)
    assert f"start        {path}" in (tmp_path / "train.log").read_text()


def test_evaluation_prints_the_metrics_of_a_checkpoint(memory_run: Path, inputs: Inputs, tmp_path: Path, capsys):
    for i, step in enumerate((2, 4)):
        path = memory_run / f"ckpt_step_{step}.pth"
        assert inputs.train(tmp_path, "--eval", "--resume", str(path)) == 0
        text = capsys.readouterr().out
        assert f"{path}: val/agreement " in text
        assert all(f"{name} {metrics(memory_run, name)[i]:.5g}" in text for name in VALIDATION)
    assert listed(tmp_path) == ["train.log"]


# Options ------------------------------------------------------------------------------------------------------------

# Its sizes, which the tiny config sets, act no more and are put back to their defaults.
WITHOUT_PERCEIVER = {
    "MODEL__PERCEIVER__ENABLED": False,
    **{f"MODEL__PERCEIVER__{key}": value for key, value in (("NUM_LATENTS", 256), ("NUM_LATENTS_2D", 256))},
    **{f"MODEL__PERCEIVER__{key}": value for key, value in (("DIM", 256), ("HEADS", 4), ("DIM_HEAD", 64))},
}


@pytest.mark.parametrize(
    "opts",
    [
        WITHOUT_PERCEIVER,
        {"MODEL__MEMORY_ATTENTION__POOL_SIZE": 1},
        {"MODEL__MEMORY_ATTENTION__NUM_LAYERS": 1},
        {"MODEL__MEMORY_ATTENTION__DROPOUT": 0.5},
        {"DISTILL__SHARE_MEMORY": True},
        {"DISTILL__IOU_TYPE": "score"},
        {"DISTILL__OCCLUSION_WEIGHT": 1.0},
        {"DISTILL__PROMPTS__MASK": 1.0, "DISTILL__PROMPTS__BOX": 0.0, "DISTILL__PROMPTS__CLICK": 0.0},
        {"DISTILL__FOCAL_GAMMA": 0.0},
        {"DATA__MAX_OBJECTS": 1},
        {"DATA__NUM_FRAMES": 2},
        {"SEED": 3},
    ],
    ids=lambda opts: next(iter(opts)),
)
def test_options_act(opts: dict, memory_run: Path, inputs: Inputs, tmp_path: Path):
    assert inputs.train(tmp_path, **opts, **ONE_STEP) == 0
    assert first_step(tmp_path) > 0
    assert first_step(tmp_path) != pytest.approx(first_step(memory_run), rel=1e-6)
    assert bool(metrics(tmp_path, "train/loss_occlusion")) == ("DISTILL__OCCLUSION_WEIGHT" in opts)


@pytest.mark.parametrize(
    "opts", [{"TRAIN__USE_CHECKPOINT": True}, {"DATA__NUM_WORKERS": 2}], ids=lambda o: next(iter(o))
)
def test_options_that_cost_memory_or_time_change_no_loss(opts: dict, memory_run: Path, inputs: Inputs, tmp_path: Path):
    assert inputs.train(tmp_path, **opts, **ONE_STEP) == 0
    assert first_step(tmp_path) == pytest.approx(first_step(memory_run), rel=1e-6)


def test_without_perceiver_the_attention_is_all_that_is_trained(inputs: Inputs, tmp_path: Path, capsys):
    assert inputs.train(tmp_path, **WITHOUT_PERCEIVER, **ONE_STEP) == 0
    assert "start        layers of the teacher's\n" in capsys.readouterr().out
    assert {key.split(".")[0] for key in model_of(tmp_path / "ckpt_latest.pth")} == {"memory_attention"}


def test_a_weight_of_zero_switches_a_term_off(inputs: Inputs, tmp_path: Path):
    off = {"DISTILL__MSE_WEIGHT": 0.0, "DISTILL__FOCAL_WEIGHT": 0.0, "DISTILL__IOU_WEIGHT": 0.0}
    assert inputs.train(tmp_path, **off, **ONE_STEP) == 0
    assert first_step(tmp_path) == pytest.approx(0.1 * first_step(tmp_path, "dice"))
    assert not metrics(tmp_path, "train/loss_mse")


# Pictures -----------------------------------------------------------------------------------------------------------

PICTURES = {"DATA__USE_PRECOMPUTED": False, "DATA__EMBEDDING_DIR": None}


def test_frames_through_the_trunk_are_as_good_as_stored_ones(memory_run: Path, inputs: Inputs, tmp_path: Path, capsys):
    assert inputs.train(tmp_path, TRAIN__MAX_STEPS=1, **PICTURES) == 0
    assert "frames through the trunk in each step" in capsys.readouterr().out
    for name in ("focal", "dice", "iou", "mse", "total"):  # stored as fp16
        assert first_step(tmp_path, name) == pytest.approx(first_step(memory_run, name), rel=1e-2)
    assert metrics(tmp_path, "val/jf_teacher") == pytest.approx(metrics(memory_run, "val/jf_teacher")[:1], rel=1e-2)
    assert not any(key.startswith(("neck", "rollout")) for key in model_of(tmp_path / "ckpt_latest.pth"))


def test_augmentation_changes_what_is_seen(memory_run: Path, inputs: Inputs, tmp_path: Path):
    assert inputs.train(tmp_path, AUG__ENABLED=True, TRAIN__MAX_STEPS=1, **PICTURES) == 0
    assert first_step(tmp_path) != pytest.approx(first_step(memory_run), rel=1e-2)
    teacher = metrics(memory_run, "val/jf_teacher")[:1]  # validation shows clips as they are
    assert metrics(tmp_path, "val/jf_teacher") == pytest.approx(teacher, rel=1e-2)


def test_still_pictures_are_mixed_in(sa1b: Path, inputs: Inputs, tmp_path: Path, capsys):
    stills = {"DATA__SA1B_ROOT": sa1b, "DATA__SA1B_RATIO": 1.0}
    assert inputs.train(tmp_path, **stills, **PICTURES, **ONE_STEP) == 0
    assert "100% of the clips of 8 still pictures" in capsys.readouterr().out
    assert first_step(tmp_path) > 0
