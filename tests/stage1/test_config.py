"""The config: every shipped file loads with its program, every key of the defaults is read, every other is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sam3.backbones.student import BACKBONES
from sam3.engine.config import leaf_keys
from stage1 import config as stage1_config
from tests.stage1.runs import ROOT

CONFIGS = ROOT / "stage1/configs"
TEACHER = CONFIGS / "teacher/sam_vit_huge_sa1b.yaml"
STUDENT = CONFIGS / "es_rv_m.yaml"


def load(file: Path, *opts: str, flags=stage1_config.FLAGS):
    arguments = ["--cfg", str(file), *(["--opts", *opts] if opts else [])]
    config = stage1_config.load(stage1_config.make_parser("", flags).parse_args(arguments), flags)
    stage1_config.refuse_idle_keys(config)
    return config


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("es_*.yaml")), ids=lambda file: file.stem)
def test_students_load(file: Path):
    config = load(file)
    assert config.MODEL.BACKBONE in BACKBONES and not config.DISTILL.SAVE_TEACHER_EMBED
    assert file.stem in config.OUTPUT


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("teacher/*.yaml")), ids=lambda file: file.stem)
def test_teachers_load(file: Path):
    config = load(file, flags=stage1_config.EXPORT_FLAGS)
    assert config.DISTILL.SAVE_TEACHER_EMBED
    assert stage1_config.embedding_folder(config, Path("out")) == Path("out/embeddings")


def test_every_key_is_read_somewhere():
    """A key that no code reads would be accepted and do nothing."""
    files = [*(ROOT / "stage1").rglob("*.py"), *(ROOT / "sam3/sam3/engine").glob("*.py")]
    read = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert not [key for key in leaf_keys(stage1_config.stage1_defaults()) if key.rsplit(".", 1)[-1] not in read]


def test_keys_of_other_programs_are_refused_with_a_reason():
    for key, reason in stage1_config.RETIRED.items():
        with pytest.raises(ValueError, match=rf"^{key} \(in --opts\) cannot be set: ") as error:
            load(STUDENT, key, "0")
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("file", "key", "value", "reason"),
    [
        (STUDENT, "DISTILL.STORE_DTYPE", "int8", "acts only in the export"),
        (STUDENT, "DISTILL.TEACHER_CHECKPOINT", "x.pt", "acts only with DISTILL.TEACHER online"),
        (STUDENT, "DATA.VAL_FRACTION", "0.3", "acts only with DATA.DATASET folder"),
        (STUDENT, "TRAIN.LR_SCHEDULER.DECAY_RATE", "0.5", "acts only with LR_SCHEDULER.NAME step"),
        (STUDENT, "TRAIN.OPTIMIZER.MOMENTUM", "0.5", "acts only with OPTIMIZER.NAME sgd"),
        (TEACHER, "TRAIN.BASE_LR", "1e-4", "acts in training only"),
        (TEACHER, "TRAIN.EPOCHS", "3", "acts in training only"),
        (TEACHER, "MODEL.BACKBONE", "repvit_m1_1", "acts in training only"),
        (TEACHER, "MODEL.OUTPUT_STRIDE", "16", "acts in training only"),
        (TEACHER, "DISTILL.TEACHER", "online", "acts in training only"),
        (TEACHER, "EVAL_MODE", "True", "acts in training only"),
    ],
)
def test_keys_that_cannot_act_in_this_run_are_refused(file: Path, key: str, value: str, reason: str):
    with pytest.raises(ValueError, match=rf"^{key} is .*, but it {reason}"):
        load(file, key, value)


def test_the_output_stride_is_one_of_two():
    assert load(STUDENT, "MODEL.OUTPUT_STRIDE", "16").MODEL.OUTPUT_STRIDE == 16
    with pytest.raises(ValueError, match=r"^MODEL\.OUTPUT_STRIDE is 8; choose one of 32, 16"):
        load(STUDENT, "MODEL.OUTPUT_STRIDE", "8")


def test_conditions_are_met():
    load(STUDENT, "TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.LR_SCHEDULER.DECAY_RATE", "0.5")
    load(STUDENT, "DISTILL.TEACHER", "online", "DISTILL.TEACHER_CHECKPOINT", "x.pt")
    load(TEACHER, "DISTILL.STORE_DTYPE", "int8")


def test_local_rank_must_be_the_launchers(monkeypatch: pytest.MonkeyPatch):
    parser = stage1_config.make_parser("")
    monkeypatch.setenv("LOCAL_RANK", "1")
    stage1_config.load(parser.parse_args(["--cfg", str(STUDENT), "--local-rank", "1"]))
    with pytest.raises(ValueError, match="--local-rank is 0, but LOCAL_RANK in the environment is 1"):
        stage1_config.load(parser.parse_args(["--cfg", str(STUDENT), "--local_rank", "0"]))
