"""A stage that counts steps, in small, through `run_stage`, with Stage 2's arguments and names of files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from yacs.config import CfgNode

from sam3.engine import recipe, stage_config
from sam3.engine.config import flag_values_from, load_config, shared_defaults
from sam3.engine.distributed import World
from sam3.engine.loader import loader_from_config, train_sampler
from sam3.engine.training_run import TrainingRun, run_stage
from tests.engine.test_loop import assert_same
from tests.engine.test_training_run import ToyDistiller, recorded
from tests.engine.toy_pictures import ToyPictures

FLAGS = {
    "--output-dir": "OUTPUT",
    "--resume": "MODEL.RESUME",
    "--seed": "SEED",
    "--eval": {"EVAL_MODE": True},
    "--throughput": {"THROUGHPUT_MODE": True},
}


def defaults() -> CfgNode:
    c = shared_defaults()
    recipe.step_keys(c)
    del c.MODEL["BACKBONE"], c.DATA["DATA_PATH"]
    c.MODEL.NAME, c.DATA.BATCH_SIZE, c.DATA.NUM_WORKERS = "toy", 2, 0
    c.TRAIN.LR, c.TRAIN.MAX_STEPS, c.TRAIN.EFFECTIVE_BATCH = 0.1, 6, 4
    c.TRAIN.VAL_INTERVAL, c.TRAIN.SAVE_INTERVAL, c.TRAIN.LATEST_INTERVAL, c.TRAIN.LOG_INTERVAL = 4, 3, 1, 1
    c.EVAL_MODE = c.THROUGHPUT_MODE = False
    c.VAL = True
    return c


def load(args: argparse.Namespace) -> CfgNode:
    return load_config(
        defaults(),
        args.cfg,
        args.opts,
        flag_values_from(args, FLAGS),
        retired=recipe.STEP_RETIRED,
        aliases={"TRAIN.BATCH_SIZE": "DATA.BATCH_SIZE"},
        opts_name="the command line",
    )


def build(config: CfgNode, world: World, output: Path, dry_run: bool) -> TrainingRun:
    clips = ToyPictures(8)
    sampler = train_sampler(config, recipe.samples_per_epoch(config, len(clips)), world)
    distiller = ToyDistiller()

    def load_weights(path: Path) -> None:
        distiller.student.load_state_dict(torch.load(path, weights_only=True)["model"])

    return TrainingRun(
        config,
        world,
        output,
        distiller,
        saved=distiller.student,
        sampler=sampler,
        make_loader=lambda: loader_from_config(config, clips, sampler, world.device),
        make_validator=(lambda metrics: lambda epoch, step: {"val/w": distiller.student.weight.item()})
        if config.VAL
        else None,
        load_weights=load_weights,
        start_from=None,
        meta={"memory": "toy"},
        resume_keys=("SEED",),
        lines={"clips": "8 toys"},
        project="toys",
        best_metric="val/w",
        best_mode="max",
        config_name="config.yaml",
        make_recipe=recipe.by_steps,
        unit="clips",
        data="toys/frames",
        fresh="the teacher's layers",
        tensorboard_folder="tensorboard",
    )


def run(output: Path, *arguments: str) -> int:
    config = output.parent / "toy.yaml"
    config.write_text("SEED: 3\nTRAIN:\n  BATCH_SIZE: 2\n")
    words = ["--config", str(config), "--output_dir", str(output), *arguments]
    parser = stage_config.make_parser("A toy.", FLAGS, defaults(), trailing=True)
    return run_stage(words, parser, load, build, log_file="train.log")


def payload(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_files_of_a_run(tmp_path: Path):
    output = tmp_path / "run"
    assert run(output, "DATA.PREFETCH_FACTOR", "3") == 0
    assert {path.name for path in output.iterdir()} == {
        *("config.yaml", "env.json", "metrics.jsonl", "train.log", "tensorboard", ".train.lock"),
        *("ckpt_latest.pth", "ckpt_best.pth", "ckpt_step_3.pth", "ckpt_step_6.pth"),
    }
    assert list((output / "tensorboard").glob("events.*"))
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert (config["DATA"]["BATCH_SIZE"], config["DATA"]["PREFETCH_FACTOR"], config["SEED"]) == (2, 3, 3)
    assert "BATCH_SIZE" not in config["TRAIN"]
    first, last = recorded(output, "val/w")
    assert 0 < first < last
    assert len(recorded(output, "train/clips_per_s")) == 6
    text = (output / "train.log").read_text()
    assert "start        the teacher's layers" in text
    assert "steps        2 an epoch, 6 in all, effective batch 4 = 2 x 1 processes x 2 accumulated" in text
    assert "rate         0.1 at its highest, cosine" in text
    assert "student      toy, 1 parameters trained" in text
    assert json.loads((output / "env.json").read_text())["argv"][-2:] == ["DATA.PREFETCH_FACTOR", "3"]


def test_the_written_config_starts_the_same_run(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(first, "TRAIN.LR", "0.2") == 0
    parser = stage_config.make_parser("A toy.", FLAGS, defaults(), trailing=True)
    words = ["--config", str(first / "config.yaml"), "--output_dir", str(second)]
    assert run_stage(words, parser, load, build, log_file="train.log") == 0
    assert_same(payload(first / "ckpt_latest.pth"), payload(second / "ckpt_latest.pth"))


@pytest.mark.parametrize("name", ["ckpt_step_3.pth", "ckpt_best.pth", "ckpt_latest.pth"])
def test_resume_by_path_in_another_folder(tmp_path: Path, name: str):
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert run(whole) == 0
    assert run(other, "--resume", str(whole / name), "DATA.PREFETCH_FACTOR", "3") == 0
    if name == "ckpt_step_3.pth":
        assert_same(payload(whole / "ckpt_latest.pth"), payload(other / "ckpt_latest.pth"))
        assert f"start        {whole / name}, resumed" in (other / "train.log").read_text()
    else:  # of the last step: nothing is left to train
        assert not (other / "ckpt_latest.pth").exists()


def test_the_newest_readable_file_is_found(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole) == 0 and run(cut) == 0
    for name in ("ckpt_best.pth", "ckpt_step_6.pth"):
        (cut / name).unlink()
    content = (cut / "ckpt_latest.pth").read_bytes()
    (cut / "ckpt_latest.pth").write_bytes(content[: len(content) // 2])
    assert run(cut) == 0
    text = (cut / "train.log").read_text()
    assert "passed over" in text and f"{cut / 'ckpt_step_3.pth'}, resumed" in text
    assert_same(payload(whole / "ckpt_latest.pth"), payload(cut / "ckpt_latest.pth"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SEED"], "the command line takes KEY VALUE pairs, but 'SEED' has no value"),
        (["SEDE", "3"], "unknown config key SEDE in the command line; did you mean SEED?"),
        (["TRAIN.BATCH_SIZE", "2", "DATA.BATCH_SIZE", "3"], "but the command line sets them to 2 and 3; leave one out"),
        (["TRAIN.EPOCHS", "2"], "TRAIN.EPOCHS .* cannot be set: the run's length is TRAIN.MAX_STEPS"),
    ],
)
def test_pairs_that_cannot_be(tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_pairs_may_stand_between_flags(tmp_path: Path):
    run(tmp_path / "run", "TRAIN.MAX_STEPS", "1", "--seed", "5", "DATA.BATCH_SIZE=4")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["TRAIN"]["MAX_STEPS"], config["SEED"], config["DATA"]["BATCH_SIZE"]) == (1, 5, 4)


def test_evaluation_plan_and_timing(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "run"
    assert run(output, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "for 4 checkpoints" in text and "time         0:00:0" in text and "clips        8 toys" in text
    assert run(output, "--dry-run", "KEEP_LAST", "1") == 0
    assert "for 3 checkpoints" in capsys.readouterr().out
    assert not output.exists()
    assert run(output) == 0
    capsys.readouterr()
    assert run(output, "--eval") == 0
    assert f"{output / 'ckpt_latest.pth'}: val/w {recorded(output, 'val/w')[-1]:.5g}" in capsys.readouterr().out
    assert run(output, "--throughput") == 0
    assert "clips/s: " in (text := capsys.readouterr().out) and "ms for 2 clips on 1 processes" in text
    with pytest.raises(ValueError, match="no val split in toys/frames to evaluate on"):
        run(output, "--eval", "VAL", "False")
