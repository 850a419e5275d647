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
        ("DATA.IMG_SIZE", 111, "DATA.IMG_SIZE is 111, but .* 112 to 224 px, in multiples of 14"),
        ("DATA.IMG_SIZE", 98, "DATA.IMG_SIZE is 98, but"),
        ("DATA.IMG_SIZE", 238, "DATA.IMG_SIZE is 238, but"),
        (
            "MODEL.PRESET",
            "full",
            r"DATA.IMG_SIZE is 224, but .* 504 to 1008 px, .* \(MODEL.PRESET full\)",
        ),
        ("TRAIN.OPTIMIZER.MATRIX_LR", 2.0, "TRAIN.OPTIMIZER.MATRIX_LR is 2.0, but it acts only with .* muon"),
        ("TRAIN.OPTIMIZER.MOMENTUM", 0.8, "TRAIN.OPTIMIZER.MOMENTUM is 0.8, but it acts only with .* sgd"),
    ],
)
def test_what_cannot_work_is_refused(plain: Path, key: str, value: object, message: str):
    with pytest.raises((ValueError, KeyError), match=message):
        load(plain, "--opts", key, value)


def test_keys_that_cannot_act_are_refused(plain: Path):
    with pytest.raises(ValueError, match=r"TRAIN\.MIN_LR is 0\.1, but it acts only with .*LR_SCHEDULER\.NAME cosine"):
        load(plain, "--opts", "TRAIN.LR_SCHEDULER.NAME", "linear", "TRAIN.MIN_LR", 0.1)
    with pytest.raises(ValueError, match=r"TRAIN\.EFFECTIVE_BATCH is 64, but it acts only with TRAIN\.ACCUMULATION"):
        load(plain, "--opts", "TRAIN.ACCUMULATION_STEPS", 1, "TRAIN.EFFECTIVE_BATCH", 64)
    config = load(plain, "--opts", "TRAIN.OPTIMIZER.NAME", "muon", "TRAIN.OPTIMIZER.MATRIX_LR", 2.0)
    assert config.TRAIN.OPTIMIZER.MATRIX_LR == 2


@pytest.mark.parametrize("size", range(112, 225, 14))
def test_sizes_of_scenes(plain: Path, size: int):
    config = load(plain, "--opts", "DATA.IMG_SIZE", size)
    assert size == config.DATA.IMG_SIZE


def test_every_minimum_is_one_of_its_keys():
    """A name that no key has would be checked nowhere."""
    config = supervised_config.defaults()
    for key in supervised_config.MINIMA:
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]
