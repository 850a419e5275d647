"""Training: what it writes and says, other modes, where it starts, and that options act."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam3.backbones.student import build_student
from sam3.engine.files import sha256
from stage1_geometry_finetune import train_geometry_finetune
from tests.samples import TINY_MAP
from tests.stage1.runs import metrics, model_of
from tests.stage1_geometry_finetune.runs import CONFIGS, Inputs

VALIDATION = {
    *("val/mse", "val/cosine", "val/mask_iou"),
    *("val/box_iou", "val/box_iou_annotated", "val/box_iou_annotated_teacher", "val/box_score"),
    *("val/point_iou", "val/point_iou_annotated", "val/point_iou_annotated_teacher", "val/point_score"),
}
# One step without validation.
ONE_STEP = {"TRAIN__MAX_STEPS": 1, "DATA__NUM_VAL_SAMPLES": 0}


def first_step(output: Path, name: str = "total") -> float:
    return metrics(output, f"train/loss_{name}")[0]


# What a run leaves --------------------------------------------------------------------------------------------------


def test_output_tree(tuned: Path):
    names = {path.name for path in tuned.iterdir()}
    assert {"config.json", "env.json", "log_rank0.txt", "metrics.jsonl"} <= names
    assert {name for name in names if name.endswith(".pth")} == {
        "ckpt_epoch_0.pth",
        "ckpt_epoch_1.pth",
        "ckpt_best.pth",
    }
    assert json.loads((tuned / "config.json").read_text())["TRAIN"]["EPOCHS"] == 2
    assert "--cfg" in json.loads((tuned / "env.json").read_text())["argv"]


def test_checkpoints_hold_the_student_alone_and_say_what_it_belongs_to(tuned: Path, inputs: Inputs):
    payload = torch.load(tuned / "ckpt_epoch_1.pth", weights_only=True)
    student = build_student("efficientvit_b0", *TINY_MAP[:2]).state_dict()
    assert list(payload["model"]) == [f"student_trunk.{key}" for key in student]
    assert len(payload["model"]) == 194
    stage1 = torch.load(inputs.start, weights_only=True)["meta"]
    assert payload["meta"] == stage1
    assert payload["meta"]["teacher"] == {"name": "sam3_tiny.pt", "sha256": sha256(inputs.teacher)}
    assert (payload["meta"]["backbone"], payload["meta"]["embed_dim"], payload["meta"]["embed_size"]) == (
        *("efficientvit_b0", *TINY_MAP[:2]),
    )
    assert (payload["epoch"], payload["step"]) == (1, 8)
    assert payload["config"]["DISTILL"]["EMBEDDING_LOSS_WEIGHT"] == 1.5


def test_every_weight_moves_away_from_the_start(tuned: Path, inputs: Inputs):
    before, after = model_of(inputs.start), model_of(tuned / "ckpt_epoch_1.pth")
    same = [key for key, value in before.items() if torch.equal(value, after[f"student_trunk.{key}"])]
    assert not same


def test_every_epoch_is_validated_and_the_best_is_kept(tuned: Path):
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "val/mse" in line]
    assert [line["step"] for line in validations] == [4, 8]
    for line in validations:
        assert {name for name in line if name.startswith("val/")} == VALIDATION
        assert all(0 <= line[name] <= 1 for name in VALIDATION - {"val/mse", "val/cosine"})
        assert line["val/mask_iou"] == pytest.approx((line["val/box_iou"] + line["val/point_iou"]) / 2)
    best = torch.load(tuned / "ckpt_best.pth", weights_only=True)["best"]
    assert best["metric"] == "val/mask_iou"
    assert best["value"] == max(line["val/mask_iou"] for line in validations)
    steps = [line for line in lines if "train/loss_total" in line]
    assert len(steps) == 8
    for line in steps:
        total = 1.5 * line["train/loss_mse"] + line["train/loss_bce"] + line["train/loss_dice"]
        assert line["train/loss_total"] == pytest.approx(total, rel=1e-5)


def test_the_log_counts_parameters_and_pictures(tuned: Path, inputs: Inputs):
    text = (tuned / "log_rank0.txt").read_text()
    assert "ES-EV-S-GeometryFinetune (efficientvit_b0), 778,128 parameters trained, 0 frozen" in text
    for part in ("student backbone 0.68M", "student head 0.10M", "neck ", "geometry encoder ", "segmentation head "):
        assert part in text
    assert "trained 0.78M, frozen 0.98M" in text
    assert "8 train, 3 val in" in text and "4 an epoch, 2 epochs, effective batch 2" in text
    assert f"start        {inputs.start}" in text and f"{inputs.teacher}, frozen" in text


def test_tensorboard_gets_pictures_of_prompts_and_masks(tuned: Path):
    (events,) = tuned.glob("*/*/events.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert VALIDATION | {"train/loss_bce"} <= set(board.Tags()["scalars"])
    wanted = {f"val/{kind}_teacher_student/sa_{i}" for kind in ("box", "point") for i in (9, 10, 11)}
    assert set(board.Tags()["images"]) == wanted
    (first, second) = board.Images("val/box_teacher_student/sa_9")  # after each epoch
    assert (first.step, second.step) == (4, 8)
    # sa_9 has 106 x 130 pixels: fitted to 224 columns, and shown three times
    assert (first.height, first.width) == (183, 3 * 224)


def test_the_dumped_config_starts_the_same_run(tuned: Path, tmp_path: Path):
    arguments = ["--cfg", str(tuned / "config.json"), "--output", str(tmp_path), "--max-steps", "2"]
    assert train_geometry_finetune.main([*arguments, "--opts", "DATA.NUM_VAL_SAMPLES", "0"]) == 0
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (tuned, tmp_path))
    assert (again["OUTPUT"], again["TRAIN"].pop("MAX_STEPS"), again["DATA"].pop("NUM_VAL_SAMPLES")) == (
        *(str(tmp_path), 2, 0),
    )
    again["OUTPUT"] = first["OUTPUT"]
    assert (first["TRAIN"].pop("MAX_STEPS"), first["DATA"].pop("NUM_VAL_SAMPLES")) == (0, 1000)
    assert again == first
    # the rate sinks faster over two steps, but only after the first
    assert metrics(tmp_path, "train/loss_total") == metrics(tuned, "train/loss_total")[:2]


# Other modes --------------------------------------------------------------------------------------------------------


def test_evaluate_prints_the_metrics_of_a_checkpoint(tuned: Path, inputs: Inputs, tmp_path: Path, capsys):
    for epoch, flag in enumerate(("--resume", "--pretrained")):
        path = tuned / f"ckpt_epoch_{epoch}.pth"
        assert inputs.tune(tmp_path, "--eval", flag, str(path)) == 0
        values = {name: metrics(tuned, name)[epoch] for name in VALIDATION}
        text = capsys.readouterr().out
        assert f"{path}: val/mse {values['val/mse']:.5g}" in text
        assert all(f"{name} {value:.5g}" in text for name, value in values.items())
    assert not list(tmp_path.glob("ckpt*"))


def test_evaluate_takes_stage_1_weights_or_the_newest(tuned: Path, inputs: Inputs, tmp_path: Path, capsys):
    assert inputs.tune(tmp_path, "--eval") == 0
    assert f"{inputs.start}: val/mse " in capsys.readouterr().out
    shutil.copy(tuned / "ckpt_epoch_1.pth", tmp_path)
    assert inputs.tune(tmp_path, "--eval", "--resume") == 0
    assert f"{tmp_path / 'ckpt_epoch_1.pth'}: val/mse " in capsys.readouterr().out


def test_dry_run_and_throughput_save_nothing(inputs: Inputs, tmp_path: Path, capsys):
    output, opts = tmp_path / "run", {"DATA__BATCH_SIZE": 1, "DISTILL__MAX_PROMPTS": 1}
    assert inputs.tune(output, "--dry-run", **opts) == 0
    text = capsys.readouterr().out
    assert "8 an epoch, 1 epochs, effective batch 1" in text and "time " in text and "frozen 0.98M" in text
    assert not output.exists()
    assert inputs.tune(output, "--throughput", **opts) == 0
    assert "images/s" in capsys.readouterr().out
    assert [path.name for path in output.iterdir()] == ["log_rank0.txt"]


# Where it starts ----------------------------------------------------------------------------------------------------


def test_a_merged_model_starts_as_its_student_does(tuned: Path, merged: Path, inputs: Inputs, tmp_path: Path):
    opts = {**ONE_STEP, "MODEL__PRETRAINED": None}
    assert inputs.tune(tmp_path / "merged", "--pretrained", str(merged), **opts) == 0
    assert first_step(tmp_path / "merged") == first_step(tuned)
    assert inputs.tune(tmp_path / "stage1", "--pretrained", str(inputs.start), **opts) == 0
    assert first_step(tmp_path / "stage1") == first_step(tuned)
    # what this stage wrote is a start, too: an optimizer without memory and step 1 again
    assert inputs.tune(tmp_path / "own", "--pretrained", str(tuned / "ckpt_epoch_1.pth"), **opts) == 0
    assert first_step(tmp_path / "own") < first_step(tuned)
    assert torch.load(tmp_path / "own/ckpt_epoch_0_step_1.pth", weights_only=True)["step"] == 1


def test_without_a_start_there_is_a_warning(inputs: Inputs, tmp_path: Path, capsys):
    assert inputs.tune(tmp_path, MODEL__PRETRAINED="", **ONE_STEP) == 0
    assert "MODEL.PRETRAINED is empty: the student starts from random weights" in capsys.readouterr().out


def test_a_store_of_the_public_code_is_enough(inputs: Inputs, tuned: Path, tmp_path: Path, capsys):
    store = tmp_path / "export/embeddings"
    store.mkdir(parents=True)
    for name in ("rank0-keys.txt", "rank0-values.bin"):
        shutil.copy(inputs.exported / "embeddings" / name, store)
    public = dataclasses.replace(inputs, exported=tmp_path / "export")
    assert public.tune(tmp_path / "run", **ONE_STEP) == 0
    assert first_step(tmp_path / "run") == first_step(tuned)
    assert "does not say which SAM3 file it was made from" in capsys.readouterr().out


# Options ------------------------------------------------------------------------------------------------------------

REFINE = {"DISTILL__DECODE_ITERS": 2, "DISTILL__POINTS_PER_REFINE_ITER": 2}


@pytest.mark.parametrize(
    "opts",
    [
        {"DISTILL__PROMPT_LAYOUT": "per_image", "DISTILL__TEXT_PROMPT": "none"},
        {"DISTILL__SELECT_BY": "mask_iou", "DATA__LOAD_GT_MASK": True},
        {"DISTILL__SELECT_BY": "box_iou"},
        {"DISTILL__SELECT_BEST_MASK": False},
        {"DISTILL__MASK_TARGET": "hard", "DISTILL__MASK_FOCAL_WEIGHT": 2.0},
        {"DISTILL__POINT_SOURCE": "mask", "DATA__LOAD_GT_MASK": True},
        {"DISTILL__USE_BOX_PROMPTS": False},
        {"DISTILL__USE_POINT_PROMPTS": False},
        {"DISTILL__PROMPT_MIX": True, **REFINE},
        {"DISTILL__TEMPERATURE": 2.0},
        {"DISTILL__MSE_REDUCTION": "channel_sum", "DISTILL__EMBEDDING_LOSS_WEIGHT": 0.0015},
        {"DATA__BOX_JITTER": False},
        {"AMP_DTYPE": "bf16"},
        {"SEED": 3},
    ],
    ids=lambda opts: next(iter(opts)),
)
def test_options_act(opts: dict, tuned: Path, inputs: Inputs, tmp_path: Path):
    assert inputs.tune(tmp_path, **opts, **ONE_STEP) == 0
    assert first_step(tmp_path) > 0
    assert first_step(tmp_path) != pytest.approx(first_step(tuned), rel=1e-6)
    assert bool(metrics(tmp_path, "train/loss_focal")) == ("DISTILL__MASK_FOCAL_WEIGHT" in opts)


@pytest.mark.parametrize(
    "opts",
    [{"TRAIN__USE_CHECKPOINT": False}, {"DISTILL__PROMPT_CHUNK": 1}, {"TRAIN__CHANNELS_LAST": True}],
    ids=lambda opts: next(iter(opts)),
)
def test_options_that_cost_memory_or_time_change_no_loss(opts: dict, tuned: Path, inputs: Inputs, tmp_path: Path):
    assert inputs.tune(tmp_path, **opts, **ONE_STEP) == 0
    assert first_step(tmp_path) == pytest.approx(first_step(tuned), rel=1e-4)


def test_a_weight_of_zero_switches_a_term_off(inputs: Inputs, tmp_path: Path):
    opts = {"DISTILL__EMBEDDING_LOSS_WEIGHT": 0, "DISTILL__MASK_BCE_WEIGHT": 0, **ONE_STEP}
    assert inputs.tune(tmp_path, **opts) == 0
    assert first_step(tmp_path) == pytest.approx(first_step(tmp_path, "dice"))


def test_the_edgesam_style_trains(inputs: Inputs, tmp_path: Path):
    tiny = {
        "MODEL__BACKBONE": "efficientvit_b0",
        "MODEL__OUTPUT_STRIDE": 16,
        "DATA__IMG_SIZE": 224,
        "DISTILL__EMBED_DIM": TINY_MAP[0],
        "DISTILL__EMBED_SIZE": 16,
        "DISTILL__MAX_PROMPTS": None,
    }
    cfg = CONFIGS / "es_rv_m_edgesam_style.yaml"
    opts = {**tiny, "TRAIN__ACCUMULATION_STEPS": 2, "DATA__NUM_VAL_SAMPLES": 1}
    assert inputs.tune(tmp_path, cfg=cfg, **opts) == 0
    assert len(metrics(tmp_path, "train/loss_total")) == 2
    config = json.loads((tmp_path / "config.json").read_text())["DISTILL"]
    assert (config["MAX_PROMPTS"], config["PROMPT_MIX"], config["DECODE_ITERS"]) == (1, True, 2)
    assert metrics(tmp_path, "val/mask_iou")
