"""A stage in small through `run_stage`: train, go on, refuse, evaluate, time, plan."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from yacs.config import CfgNode

from sam3.engine import stage_config
from sam3.engine.config import SHARED_FLAGS, flag_values_from, load_config, shared_defaults
from sam3.engine.distributed import World
from sam3.engine.loader import loader_from_config, once_sampler, train_sampler
from sam3.engine.training_run import TrainingRun, place, run_stage
from sam3.engine.weights import load_strict, load_weights
from tests.engine.toy_pictures import ToyBatch, ToyPictures

FLAGS = {**SHARED_FLAGS, "--eval": {"EVAL_MODE": True}, "--throughput": {"THROUGHPUT_MODE": True}}


class ToyDistiller(nn.Module):
    """The student guesses a picture's number from one of its pixels; its bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(1, 1)
        nn.init.zeros_(self.student.weight)
        nn.init.zeros_(self.student.bias).requires_grad_(False)

    def forward(self, batch: ToyBatch) -> dict[str, Tensor]:
        pixel = batch.images[:, 0, 0, :1].float() / 8
        error = (self.student(pixel) - pixel).square().mean()
        return {"total": error, "mse": error}


def defaults() -> CfgNode:
    config = shared_defaults()
    config.MODEL.NAME, config.MODEL.BACKBONE = "toy", "linear"
    config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS, config.DATA.DATA_PATH = 2, 0, "toys"
    config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.TRAIN.BASE_LR = 2, 0, 0.1
    config.TRAIN.SCALE_LR, config.TENSORBOARD, config.PRINT_FREQ = False, False, 1
    config.EVAL_MODE = config.THROUGHPUT_MODE = False
    config.VAL, config.LACKING = True, 0
    return config


def load(args: argparse.Namespace) -> CfgNode:
    return load_config(defaults(), args.cfg, args.opts, flag_values_from(args, FLAGS))


BUILT: list[bool] = []  # what each call of `build` was told about `dry_run`


def build(config: CfgNode, world: World, output: Path, dry_run: bool) -> TrainingRun:
    BUILT.append(dry_run)
    pictures = ToyPictures(8)
    sampler = train_sampler(config, len(pictures), world)
    distiller = ToyDistiller()
    place(distiller, distiller.student, config, world.device)

    def make_validator(metrics):
        def validate(epoch: int, step: int) -> dict[str, float]:
            batches = loader_from_config(config, pictures, once_sampler(8, 4, world), world.device)
            seen = sum(len(batch) for batch in batches)
            return {"val/weight": distiller.student.weight.item(), "val/pictures": float(seen)}

        return validate

    def load(path: Path) -> None:
        load_strict(distiller.student, load_weights(path).tensors, source=path)

    return TrainingRun(
        config,
        world,
        output,
        distiller,
        saved=distiller.student,
        sampler=sampler,
        make_loader=lambda: loader_from_config(config, pictures, sampler, world.device),
        make_validator=make_validator if config.VAL else None,
        load_weights=load,
        start_from=(lambda: load(config.MODEL.PRETRAINED)) if config.MODEL.PRETRAINED else None,
        meta={"backbone": config.MODEL.BACKBONE},
        resume_keys=("SEED",),
        lines={"pictures": "8 toys"},
        project="toys",
        best_metric="val/weight",
        best_mode="max",
        config_name="config.yaml",
        left_out={"no annotation": [f"toy_{8 + i}" for i in range(config.LACKING)]} if config.LACKING else {},
    )


def run(output: Path, *flags: str, **opts) -> int:
    config = output.parent / "toy.yaml"
    config.write_text("SEED: 3\n")
    pairs = [str(item) for key, value in opts.items() for item in (key.replace("__", "."), value)]
    arguments = ["--cfg", str(config), "--output", str(output), *flags, *(["--opts", *pairs] if pairs else [])]
    return run_stage([*arguments], stage_config.make_parser("A toy.", FLAGS, defaults()), load, build)


def recorded(output: Path, name: str) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def weight(path: Path) -> Tensor:
    return torch.load(path, weights_only=True)["model"]["weight"]


def test_a_run_writes_its_files_and_learns(tmp_path: Path):
    output = tmp_path / "run"
    assert run(output) == 0
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "ckpt_epoch_0.pth",
        "ckpt_epoch_1.pth",
        "ckpt_best.pth",
        "config.yaml",
        "env.json",
        "metrics.jsonl",
    }
    assert yaml.safe_load((output / "config.yaml").read_text())["SEED"] == 3
    assert recorded(output, "val/pictures") == [8, 8]
    first, last = recorded(output, "val/weight")
    assert 0 < first < last
    assert torch.equal(weight(output / "ckpt_best.pth"), weight(output / "ckpt_epoch_1.pth"))  # the larger weight
    payload = torch.load(output / "ckpt_epoch_1.pth", weights_only=True)
    assert payload["meta"] == {"backbone": "linear"} and payload["model"].keys() == {"weight", "bias"}


def test_it_goes_on_where_it_was_and_not_with_another_run(tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole) == 0
    assert run(parts, SAVE_STEPS=3) == 0
    for name in ("ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "ckpt_epoch_1_step_6.pth"):
        (parts / name).unlink()
    before = (parts / "config.yaml").read_text()
    with pytest.raises(ValueError, match="SEED is 3 there and 4 here"):
        run(parts, "--seed", "4")
    with pytest.raises(ValueError, match="backbone is 'linear' there and 'other' here"):
        run(parts, MODEL__BACKBONE="other")
    assert (parts / "config.yaml").read_text() == before
    assert run(parts) == 0
    assert torch.equal(weight(whole / "ckpt_epoch_1.pth"), weight(parts / "ckpt_epoch_1.pth"))


def test_without_validation_there_is_no_best(tmp_path: Path):
    assert run(tmp_path / "run", VAL=False) == 0
    assert not (tmp_path / "run/ckpt_best.pth").exists()
    with pytest.raises(ValueError, match="no val split in toys to evaluate on"):
        run(tmp_path / "run", "--eval", VAL=False)


def test_evaluation_takes_the_one_that_is_named_or_the_newest_or_the_start(tmp_path: Path, capsys):
    output = tmp_path / "run"
    for flags in ([], ["--resume"], ["--resume", "--pretrained", str(output / "ckpt_epoch_0.pth")]):
        with pytest.raises(ValueError, match=r"no checkpoint in .*run to evaluate; pass one with"):
            run(output, "--eval", *flags)
    assert run(output) == 0
    values = recorded(output, "val/weight")
    first, last = (output / f"ckpt_epoch_{epoch}.pth" for epoch in (0, 1))
    for folder, flags, taken, value in (
        (output, [], last, values[1]),
        (output, ["--resume", str(first)], first, values[0]),
        (output, ["--resume", str(first), "--pretrained", str(last)], first, values[0]),
        (output, ["--resume", "--pretrained", str(first)], last, values[1]),
        (output, ["--pretrained", str(first)], last, values[1]),
        (tmp_path / "other", ["--pretrained", str(first)], first, values[0]),
    ):
        capsys.readouterr()
        assert run(folder, "--eval", *flags) == 0
        text = capsys.readouterr().out
        assert f"{taken}: val/weight {value:.5g}, val/pictures 8" in text
        passed_over = f"evaluating {last}, not {first}; --resume {first} evaluates the latter"
        assert (passed_over in text) == (folder == output and flags[-2:] == ["--pretrained", str(first)])


# Where it starts ----------------------------------------------------------------------------------------------------


def test_weights_to_start_from_are_needed_only_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture):
    start, output = tmp_path / "start.pt", tmp_path / "run"
    torch.save({"model": {"weight": torch.full((1, 1), 0.5), "bias": torch.zeros(1)}}, start)
    assert run(output, "--pretrained", str(start), SAVE_STEPS=2) == 0
    assert recorded(output, "train/loss_mse")[0] < recorded_of_another_start(tmp_path)
    assert f"start        {start}\n" in capsys.readouterr().out
    whole = weight(output / "ckpt_epoch_1.pth")
    for name in ("ckpt_epoch_1.pth", "ckpt_epoch_1_step_6.pth"):
        (output / name).unlink()
    start.unlink()
    assert run(output, "--dry-run", "--pretrained", str(start)) == 0
    assert run(output, "--throughput", "--pretrained", str(start)) == 0
    assert run(output, "--pretrained", str(start)) == 0
    assert torch.equal(weight(output / "ckpt_epoch_1.pth"), whole)
    assert f"start        {output / 'ckpt_epoch_0.pth'}, resumed\n" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"start\.pt"):
        run(output, "--pretrained", str(start), TRAIN__AUTO_RESUME=False)


def recorded_of_another_start(tmp_path: Path) -> float:
    assert run(tmp_path / "from zero", TRAIN__MAX_STEPS=1) == 0
    return recorded(tmp_path / "from zero", "train/loss_mse")[0]


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--throughput"]])
def test_a_start_that_is_missing_is_found_before_anything_is_written(flags: list[str], tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        run(tmp_path / "run", "--pretrained", str(tmp_path / "nothing.pt"), *flags)
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {"log_rank0.txt", ".train.lock"}


# The plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_is_printed_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "run"
    assert run(output, "--dry-run", TRAIN__ACCUMULATION_STEPS=2, TRAIN__MAX_STEPS=3) == 0
    text = capsys.readouterr().out
    assert "student      toy (linear), 1 parameters trained, 1 frozen" in text
    assert "pictures     8 toys" in text
    assert "steps        2 an epoch, 2 epochs, effective batch 4 = 2 x 1 processes x 2 accumulated" in text
    assert "rate         0.1 at its highest, cosine" in text
    assert "for 2 checkpoints" in text and "time         0:00:0" in text
    assert "start        random weights" in text
    assert not output.exists()
    assert BUILT[-1]  # so that a stage, too, can keep from writing


def test_pictures_left_out_are_listed_as_long_as_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "run"
    assert run(output, "--dry-run", LACKING=2) == 0
    text = capsys.readouterr().out
    assert "left out     2 (no annotation)\n" in text and "left_out.txt" not in text
    assert run(output, LACKING=2, TRAIN__MAX_STEPS=1) == 0
    assert not BUILT[-1]
    assert "left out     2 (no annotation); see left_out.txt in the output" in capsys.readouterr().out
    assert (output / "left_out.txt").read_text() == "toy_8\tno annotation\ntoy_9\tno annotation\n"
    assert run(output, "--dry-run") == 0
    assert (output / "left_out.txt").exists()
    assert run(output, TRAIN__MAX_STEPS=2) == 0
    assert not (output / "left_out.txt").exists()


def test_throughput_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(tmp_path / "run", "--throughput") == 0
    assert "ms for 2 images on 1 processes" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("ckpt*"))
