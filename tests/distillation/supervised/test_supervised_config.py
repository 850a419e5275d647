"""The keys of the training from scratch: what is refused, and where the flags go."""

from __future__ import annotations

from pathlib import Path

import pytest
from yacs.config import CfgNode

from distillation.supervised import config as supervised_config
from distillation.supervised.set_loss import SetWeights

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A file that changes nothing."""
    path = tmp_path / "plain.yaml"
    path.write_text("{}\n")
    return path


def load(*words: object) -> CfgNode:
    return supervised_config.load(supervised_config.make_parser("").parse_args(["--cfg", *map(str, words)]))


def test_defaults_and_flags(plain: Path):
    config = load(plain, "--max-steps", 700, "--batch-size", 3, "--seed", 5, "--eval", "--opts", "LOSS.score", 4)
    assert (config.TRAIN.MAX_STEPS, config.DATA.BATCH_SIZE, config.SEED, config.EVAL_MODE) == (700, 3, 5, True)
    assert supervised_config.set_weights(config) == SetWeights(score=4)
    assert supervised_config.set_weights(load(plain)) == SetWeights()


@pytest.mark.parametrize("phase", ["words", "closeup", "image"])
def test_the_shipped_configs(phase: str):
    config = load(ROOT / f"configs/tiny_sam3_{phase}.yaml")
    assert phase == config.PHASE and config.is_frozen()


def test_weights_come_from_the_config(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text("LOSS: {score: 4.0, one_to_many: 0}\n")
    weights = supervised_config.set_weights(load(path))
    assert weights == SetWeights(score=4.0, one_to_many=0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATA.SCENES", 1, "DATA.SCENES"),
        ("LOSS.focal", 1, "LOSS.focal"),
        ("DATA.RESIZE", "pad", "pictures are made as the model takes them"),
        ("MODEL.BACKBONE", "repvit_m1_1", "the model is SAM3 itself"),
        ("TRAIN.COMPILE", True, "shapes differ from batch to batch"),
        ("PHASE", "dream", "PHASE"),
        ("MODEL.PRESET", "huge", "MODEL.PRESET"),
        ("DATA.PROMPTS", 0, "DATA.PROMPTS"),
        ("DATA.CLICK_EVERY", 0, "DATA.CLICK_EVERY"),
        ("LOSS.COPIES", 0, "LOSS.COPIES"),
        ("LOSS.CLICK_WEIGHT", -1.0, "LOSS.CLICK_WEIGHT"),
        ("LOSS.MASK_SHARE", 0.0, "LOSS.MASK_SHARE is a share above 0 and up to 1, got 0.0"),
        ("LOSS.MASK_SHARE", 1.5, "LOSS.MASK_SHARE is a share above 0 and up to 1, got 1.5"),
        ("DATA.MIX.text", -0.1, "DATA.MIX wants shares from 0"),
        ("DATA.MIX.sound", 1.0, "DATA.MIX.sound"),
        ("LOSS.mask_dice", -2.0, "must not be negative: mask_dice"),
    ],
)
def test_what_cannot_work_is_refused(plain: Path, key: str, value: object, message: str):
    with pytest.raises((ValueError, KeyError), match=message):
        load(plain, "--opts", key, value)


def test_every_minimum_is_one_of_its_keys():
    """A name that no key has would be checked nowhere."""
    config = supervised_config.defaults()
    for key in supervised_config.MINIMA:
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]
