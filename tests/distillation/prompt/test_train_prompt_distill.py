"""The program: every mode with teachers that run and with stored features, resuming, exporting, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.sam1_files import load_sam1
from scripts import extract_teacher_features, train_prompt_distill
from tests.distillation.prompt.runs import LOSSES, PROGRAM, SIDE, settings, train, write_config
from tests.stage1.runs import assert_same_weights, finish, metrics, start

MODES = {
    "point": {"dataset__prompt_mode": "point"},
    "box": {"dataset__prompt_mode": "box"},
    "mixed": {"dataset__prompt_mode": "mixed"},
    "everything": {"dataset__mode": "everything", "everything__match_iou_threshold": 0.0, "train__batch_size": 1},
}


@pytest.fixture(scope="module")
def stored(models: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of both teachers, of prompts in point mode and of the grid: `<mode>/<teacher>`."""
    root = tmp_path_factory.mktemp("stored")
    for mode in ("point", "everything"):
        for name, model in (("SAM-H", "vit"), ("MobileSAM_orig", "mobile")):
            arguments = [
                *("--teacher_name", name, "--teacher_cfg", models / f"{model}.yaml"),
                *("--teacher_ckpt", models / f"{model}.pt", "--dataset_base_dir", photos, "--device", "cpu"),
                *("--output_base_dir", root / mode / name, "--splits", "train", "--num_workers", 0),
            ]
            if mode == "everything":
                arguments += ["--mode", "everything", "--grid_points", 3]
                arguments += ["--components", "enc_patch", "prompt_embed", "mask_token", "dense_logits"]
            else:
                arguments += ["--prompt_mode", "point"]
            assert extract_teacher_features.main([str(argument) for argument in arguments]) == 0
    return root


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_with_all_losses_in_the_log(models: Path, photos: Path, tmp_path: Path, mode: str, capsys):
    output = tmp_path / "run"
    assert train(settings(models, photos, output, **MODES[mode], train__tensorboard=True), "--max-steps", "2") == 0
    names = [f"train/distill/{name}" for name in LOSSES]
    names += [f"train/distill/{name}/{teacher}" for name in LOSSES for teacher in ("SAM-H", "MobileSAM_orig")]
    names += ["train/task/bce", "train/task/focal", "train/task/dice", "train/task/iou", "train/task_loss"]
    names += ["train/dist_loss", "train/dist_loss_scaled", "train/total_loss", "train/lambda_coef", "lr/group0"]
    for name in names:
        values = metrics(output, name)
        assert len(values) == 2 and all(map(math.isfinite, values)), name
    assert 0 <= metrics(output, "val/iou")[-1] <= metrics(output, "val/dice")[-1] <= 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "step 1/2" in line)
    assert [
        word for word in ("enc", "pe", "tok", "dense", "dist", "task", "bce", "total") if f" {word} " not in line
    ] == []
    assert any("tfevents" in path.name for path in output.rglob("*"))


def test_the_export_loads_strictly_and_holds_the_best_student(models: Path, photos: Path, tmp_path: Path):
    output = tmp_path / "run"
    assert train(settings(models, photos, output)) == 0
    exported, start_weights = (
        load_sam1(output / "mobile_sam.pt", "vit_t", SIDE),
        load_sam1(models / "mobile.pt", "vit_t"),
    )
    assert len(exported.state_dict()) == 439
    best = torch.load(output / "ckpt_best.pth", weights_only=True)["model"]
    for key, tensor in exported.state_dict().items():
        assert torch.equal(tensor, best[f"student.{key}"]), key
    moved = [k for k, v in exported.state_dict().items() if not torch.equal(v, start_weights.state_dict()[k])]
    assert any(key.startswith("image_encoder.neck") for key in moved) and not any(".head." in key for key in moved)
    assert not any("running_" in key for key in moved)  # freeze_bn
    assert {k for k in best if not k.startswith("student.")} == {
        "objective.distill_projections.SAM-H.weight",
        "objective.distill_projections.SAM-H.bias",
    }
    other = tmp_path / "other.pt"
    assert train_prompt_distill.main(["--export", str(output / "ckpt_best.pth"), "--output", str(other)]) == 0
    again = load_sam1(other, "vit_t", SIDE).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in exported.state_dict().items())


@pytest.mark.parametrize("mode", ["point", "everything"])
def test_stored_features_train_as_the_teachers_would(
    models: Path, photos: Path, stored: Path, tmp_path: Path, mode: str
):
    """The stores' patch features are past the teacher's own neck, so teachers that run must project with that, too."""
    common = {**MODES[mode], "distillation__encoder_patch": {"enable": True, "projection": "neck"}}
    if mode == "point":  # the stored prompts are those that epoch 0 draws with seed 0
        common |= {"dataset__prompt_mode": "point"}
    online, offline = tmp_path / "online", tmp_path / "offline"
    assert train(settings(models, photos, online, **common), "--max-steps", "2") == 0
    values = settings(models, photos, offline, **common)
    values["distillation"] |= {"use_precomputed_features": True, "precomputed_root": str(stored / mode)}
    for teacher in values["teachers"]:
        teacher["cfg"] = "there/is/none.yaml"  # no teacher is loaded
    assert train(values, "--max-steps", "2") == 0
    for name in (*(f"train/distill/{loss}" for loss in LOSSES), "train/total_loss"):
        assert metrics(offline, name) == pytest.approx(metrics(online, name), rel=1e-4, abs=1e-6), name


def test_a_killed_run_goes_on_exactly(models: Path, photos: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changed = {"train__epochs": 2, "train__save_every": 1, "train__keep_last": 0}
    assert train(settings(models, photos, whole, **changed)) == 0
    assert train(settings(models, photos, parts, **changed), "--max-steps", "3") == 0
    for path in parts.glob("ckpt_*"):
        if path.name not in ("ckpt_epoch_1_step_3.pth",):
            path.unlink()  # as if it had been killed there
    with pytest.raises(ValueError, match=r"holds a run; go on with it by --resume auto"):
        train(settings(models, photos, parts, **changed))
    assert train(settings(models, photos, parts, **changed), "--resume", "auto") == 0
    last = sorted(path.name for path in whole.glob("ckpt_epoch_1*"))[-1]
    assert_same_weights(whole / last, parts / last)
    with pytest.raises(ValueError, match=r"dataset\.prompt_mode is 'mixed' there and 'box' here"):
        train(settings(models, photos, parts, **changed, dataset__prompt_mode="box"), "--resume", "auto")


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(models: Path, photos: Path, tmp_path: Path):
    output = tmp_path / "run"
    values = settings(models, photos, output, train__epochs=500, train__val_freq=500, train__resume=True)
    config = write_config(tmp_path / "c.yaml", values)
    process = start(PROGRAM, ["--config", str(config)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (output / "metrics.jsonl").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 128 + signal.SIGTERM and "the same command goes on from there" in text, text
    done = int(text.rsplit("after step ", 1)[1].split(";")[0])
    code, text = finish(start(PROGRAM, ["--config", str(config), "--max-steps", str(done + 1)]))
    assert code == 0 and f"after {done}" in text.replace(f"step {done}", f"after {done}"), text


@pytest.mark.slow
def test_two_processes_train_as_one(models: Path, photos: Path, tmp_path: Path):
    """Twice the processes with half the batch each: the same gradients, up to rounding."""
    changed = {"train__epochs": 1, "distillation__encoder_patch": {"enable": True, "projection": "neck"}}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(settings(models, photos, one, **changed, train__batch_size=2)) == 0
    config = write_config(tmp_path / "two.json", settings(models, photos, two, **changed, train__batch_size=1))
    code, text = finish(start(PROGRAM, ["--config", str(config)], processes=2))
    assert code == 0, text
    assert metrics(two, "train/total_loss") == pytest.approx(metrics(one, "train/total_loss"), rel=1e-3)
    first, second = (load_sam1(path / "mobile_sam.pt", "vit_t", SIDE).state_dict() for path in (one, two))
    begin = load_sam1(models / "mobile.pt", "vit_t", SIDE).state_dict()
    for key in ("image_encoder.neck.2.weight", "mask_decoder.mask_tokens.weight"):
        step, apart = (first[key] - begin[key]).abs().mean(), (first[key] - second[key]).abs().mean()
        assert apart < 0.1 * step, key


@pytest.mark.slow
def test_a_grid_is_resumed_exactly_and_trained_by_two_processes(models: Path, photos: Path, tmp_path: Path):
    """With a random part of the grid and parts that are frozen at first, so that gradients differ in kind."""
    changed = {
        **MODES["everything"],
        "train__epochs": 2, "train__save_every": 1, "train__keep_last": 0, "train__loss_weights": {"cls": 0.5},
        "everything__max_points_train": 4, "freeze": {"freeze_image_encoder": True, "unfreeze_epoch": 1},
    }  # fmt: skip
    whole, parts, two = (tmp_path / name for name in ("whole", "parts", "two"))
    assert train(settings(models, photos, whole, **changed)) == 0
    assert train(settings(models, photos, parts, **changed), "--max-steps", "1") == 0
    assert train(settings(models, photos, parts, **changed), "--resume", "auto") == 0
    last = sorted(path.name for path in whole.glob("ckpt_epoch_1*"))[-1]
    assert_same_weights(whole / last, parts / last)
    config = write_config(tmp_path / "two.yaml", settings(models, photos, two, **changed))
    code, text = finish(start(PROGRAM, ["--config", str(config)], processes=2))
    assert code == 0, text
    key = "student.image_encoder.neck.2.weight"
    begin = load_sam1(models / "mobile.pt", "vit_t", SIDE).state_dict()[key.removeprefix("student.")]
    first, second = (torch.load(two / f"ckpt_epoch_{e}.pth", weights_only=True)["model"][key] for e in (0, 1))
    assert torch.equal(first, begin) and not torch.equal(second, begin)


def test_switched_off_trains_bit_for_bit_as_without_the_block(models: Path, photos: Path, tmp_path: Path):
    off, absent = tmp_path / "off", tmp_path / "absent"
    assert train(settings(models, photos, off, distillation__enable=False)) == 0
    assert train(settings(models, photos, absent, distillation={}, teachers=[])) == 0
    assert_same_weights(off / "ckpt_epoch_0.pth", absent / "ckpt_epoch_0.pth")


def test_stages_and_freezing_act_in_their_epochs(models: Path, photos: Path, tmp_path: Path):
    output = tmp_path / "run"
    values = settings(
        models, photos, output,
        train__epochs=2, train__val_freq=2, train__keep_last=0,
        freeze={"freeze_image_encoder": True, "unfreeze_epoch": 1},
        stage_schedule=[{"name": "warm", "start_epoch": 0, "end_epoch": 1, "distillation": False}],
    )  # fmt: skip
    assert train(values) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    distilled = {line["step"]: "train/dist_loss" in line for line in lines if "train/task_loss" in line}
    assert distilled == {1: False, 2: False, 3: True, 4: True}
    begin = load_sam1(models / "mobile.pt", "vit_t", SIDE).state_dict()
    after_one = torch.load(next(output.glob("ckpt_epoch_0*")), weights_only=True)["model"]
    key = "image_encoder.neck.2.weight"
    assert torch.equal(after_one[f"student.{key}"], begin[key])
    assert not torch.equal(
        after_one["student.mask_decoder.mask_tokens.weight"], begin["mask_decoder.mask_tokens.weight"]
    )
    assert not torch.equal(load_sam1(output / "mobile_sam.pt", "vit_t", SIDE).state_dict()[key], begin[key])
    assert len(metrics(output, "val/iou")) == 1  # val_freq


def test_it_ends_when_validation_does_not_improve(models: Path, photos: Path, tmp_path: Path, capsys):
    output = tmp_path / "run"
    values = settings(models, photos, output, train__epochs=9, train__lr=0.0, train__early_stop_patience=2)
    assert train(values, "--max-steps", "4") == 0  # broken off after two epochs
    assert train(values, "--resume", "auto") == 0
    assert len(metrics(output, "val/iou")) == 3 and "no better val/iou since epoch 0" in capsys.readouterr().out


def test_plan_and_validation_leave_no_files(models: Path, photos: Path, tmp_path: Path, capsys):
    output = tmp_path / "run"
    assert train(settings(models, photos, output), "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "SAM-H 0.7, MobileSAM_orig 0.3; run beside the student" in plan
    assert "mixed; 2 pictures with 4 masks, 2 to validate on" in plan
    assert train(settings(models, photos, output), "--validate") == 0
    assert "val/iou" in capsys.readouterr().out and not output.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model__checkpoint_path": "no/such.pt"}, r"no weights no/such\.pt.*download_sam1"),
        ({"model__type": "vit_b"}, "vit_t.*vit_b"),
        ({"model__image_size": 192}, "192"),
        ({"teachers": [{"name": "T", "checkpoint": "no/such.pt"}]}, r"no checkpoint no/such\.pt"),
        ({"dataset__train_dataset": "no/such/train"}, "no/such"),
        ({"distillation__hooks": {"student": {"encoder_patch": "image_encoder.nek"}}}, "image_encoder.neck"),
        (
            {"distillation__hooks": {"student": {"encoder_patch": "image_encoder.norm_head"}}},
            "norm_head.*never fired|never fired.*norm_head",
        ),
        ({"distillation__encoder_patch": {"enable": True, "projection": "none"}}, "192 channels.*256"),
        (
            {"freeze": dict.fromkeys(("freeze_image_encoder", "freeze_prompt_encoder", "freeze_mask_decoder"), True)},
            "all parts of the student are frozen",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(models: Path, photos: Path, tmp_path: Path, changed: dict, message: str):
    values = settings(models, photos, tmp_path / "run", **changed)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(values)
    assert not list((tmp_path / "run").glob("ckpt*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset__mode": "everything"}, "mode: found 'single', wanted 'everything'"),
        ({"dataset__prompt_mode": "box"}, "prompt_mode: found 'point', wanted 'box'"),
        ({"dataset__prompt_mode": "point", "dataset__max_points": 2}, "max_points: found 3, wanted 2"),
        ({"distillation__prompt_embed": {"enable": True, "tap": "output_keys"}}, "tap"),
        ({"model__multimask_output": True}, "multimask"),
        ({"model__image_size": 192}, "image_size: found 128, wanted 192"),
        ({"teachers": [{"name": "Other"}]}, "no teacher features"),
    ],
)
def test_stores_of_another_training_are_refused(
    models: Path, photos: Path, stored: Path, tmp_path: Path, changed: dict, message: str
):
    values = settings(models, photos, tmp_path / "run", **changed)
    values["distillation"] |= {"use_precomputed_features": True, "precomputed_root": str(stored / "point")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(values)


def test_a_store_that_lacks_a_file_or_holds_nan_is_refused(models: Path, photos: Path, stored: Path, tmp_path: Path):
    root = tmp_path / "features"
    shutil.copytree(stored / "point", root)
    values = settings(models, photos, tmp_path / "run", dataset__prompt_mode="point")
    values["distillation"] |= {"use_precomputed_features": True, "precomputed_root": str(root)}
    path = root / "SAM-H/train/a_mask_token.npy"
    tokens = np.load(path)
    np.save(path, np.full_like(tokens, np.nan))
    with pytest.raises(ValueError, match=r"a_mask_token\.npy holds values that are not finite"):
        train(values)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks features of 1 of 2 training pictures: a\."):
        train(values, "--opts", f"model.save_path={tmp_path / 'second'}")
    values["distillation"]["decoder_mask_token"]["enable"] = False
    assert train(values, "--max-steps", "1", "--opts", f"model.save_path={tmp_path / 'third'}") == 0


def test_an_export_of_another_training_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train_prompt_distill.main(["--export", str(tmp_path / "none.pth")])
