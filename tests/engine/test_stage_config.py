"""What the configs of stages share: checks of keys and numbers, folders, the teacher's identity."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from yacs.config import CfgNode

from sam3.engine import stage_config
from sam3.engine.config import shared_defaults
from sam3.transforms import Preprocess


def defaults() -> CfgNode:
    config = shared_defaults()
    config.DISTILL = CfgNode({"EMBED_DIM": 8, "EMBED_SIZE": 72})
    return config


def changed(key: str, value) -> CfgNode:
    config = defaults()
    config.merge_from_list([key, value])
    return config


@pytest.mark.parametrize(
    ("key", "value", "when"),
    [
        ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 3, "LR_SCHEDULER.NAME step"),
        ("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.5, "LR_SCHEDULER.NAME step"),
        ("TRAIN.OPTIMIZER.MOMENTUM", 0.5, "OPTIMIZER.NAME sgd"),
        ("TRAIN.OPTIMIZER.MATRIX_LR", 2.0, "OPTIMIZER.NAME muon"),
    ],
)
def test_keys_whose_condition_does_not_hold_are_refused(key: str, value, when: str):
    with pytest.raises(ValueError, match=rf"^{key} is {value}, but it acts only with {when}; leave it out$"):
        stage_config.refuse_idle_keys(changed(key, value), defaults(), stage_config.CONDITIONS)


@pytest.mark.parametrize(("key", "value"), [("TRAIN.OPTIMIZER.EPS", 1e-6), ("TRAIN.OPTIMIZER.BETAS", (0.5, 0.9))])
def test_keys_of_adamw_act_with_it_and_with_muon_only(key: str, value):
    config = changed(key, value)
    for name in ("adamw", "muon"):
        config.TRAIN.OPTIMIZER.NAME = name
        stage_config.refuse_idle_keys(config, defaults(), stage_config.CONDITIONS)
    config.TRAIN.OPTIMIZER.NAME = "sgd"
    with pytest.raises(ValueError, match=r"acts only with OPTIMIZER\.NAME adamw or muon"):
        stage_config.refuse_idle_keys(config, defaults(), stage_config.CONDITIONS)


def test_unused_keys_and_groups_accept_defaults_and_constants():
    def check(config: CfgNode) -> None:
        unused = {"TRAIN": "rests", "SEED": "rests too"}
        stage_config.refuse_idle_keys(config, defaults(), {}, unused=unused, constants={"TRAIN.EPOCHS": 1})

    check(defaults())
    check(changed("TRAIN.EPOCHS", 1))
    check(changed("DATA.BATCH_SIZE", 1))
    for key, reason in (("TRAIN.EPOCHS", "rests"), ("TRAIN.OPTIMIZER.MOMENTUM", "rests"), ("SEED", "rests too")):
        with pytest.raises(ValueError, match=rf"^{key} is 2(\.0)?, but it {reason}; leave it out$"):
            check(changed(key, 2.0 if "MOMENTUM" in key else 2))


def test_numbers_that_cannot_work_are_refused():
    stage_config.check_numbers(defaults())
    for key, value, least in (
        ("DATA.BATCH_SIZE", 0, 1),
        ("DATA.NUM_WORKERS", -1, 0),
        ("DISTILL.EMBED_SIZE", 0, 1),
        ("TRAIN.BASE_LR", -1e-3, 0),
        ("TRAIN.MIN_LR", float("nan"), 0),
    ):
        with pytest.raises(ValueError, match=rf"^{key} is {value}, but must be at least {least}$"):
            stage_config.check_numbers(changed(key, value))
    with pytest.raises(ValueError, match=r"IMG_SIZE \(=1000\) must be a multiple of DISTILL.EMBED_SIZE \(=72\)"):
        stage_config.check_numbers(changed("DATA.IMG_SIZE", 1000))


def test_local_rank_must_be_the_launchers(monkeypatch: pytest.MonkeyPatch):
    parser = stage_config.make_parser("", {"--output": "OUTPUT"}, defaults())
    monkeypatch.setenv("LOCAL_RANK", "1")
    for flags in ([], ["--local-rank", "1"], ["--local_rank=1"]):
        stage_config.check_local_rank(parser.parse_args(["--cfg", "x.yaml", *flags]))
    with pytest.raises(ValueError, match="--local-rank is 0, but LOCAL_RANK in the environment is 1"):
        stage_config.check_local_rank(parser.parse_args(["--cfg", "x.yaml", "--local_rank", "0"]))


def test_folder_and_preprocess_follow_the_keys():
    config = changed("OUTPUT", "out")
    assert stage_config.output_folder(config) == Path("out")
    config.TAG = "second"
    assert stage_config.output_folder(config) == Path("out/second")
    with pytest.raises(ValueError, match="pass --output"):
        stage_config.output_folder(defaults())
    assert stage_config.build_preprocess(changed("DATA.RESIZE", "square")) == Preprocess(1008, "square")


def test_a_teacher_is_its_name_and_digest(tmp_path: Path):
    file = tmp_path / "teacher.pt"
    file.write_bytes(b"weights")
    wanted = {"name": "teacher.pt", "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert stage_config.teacher_meta(file, "MODEL.RESUME") == wanted
    with pytest.raises(FileNotFoundError, match=r"no teacher checkpoint .*none.pt; .* or set MODEL.RESUME$"):
        stage_config.teacher_meta(tmp_path / "none.pt", "MODEL.RESUME")
