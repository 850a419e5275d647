"""Stage 2's config: documented values are the defaults, documented commands parse, what cannot act is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from yacs.config import CfgNode

from sam3.engine.config import dump_config, get, leaf_keys
from sam3.model.tracker_config import MemoryConfig
from stage2 import config as stage2_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "stage2/configs"
FULL = CONFIGS / "efficient_memory.yaml"
FRAMES = ("DATA.USE_PRECOMPUTED", "False")

# Of the user's document and, below, of the papers that it names.
DOCUMENTED = {
    "DATA.SAV_ROOT": "data/sa-v/extracted_frames",
    "DATA.USE_PRECOMPUTED": True,
    "DATA.NUM_FRAMES": 8,
    "DATA.FRAME_SKIP": 4,
    "MODEL.PERCEIVER.NUM_LATENTS": 256,
    "MODEL.PERCEIVER.NUM_LATENTS_2D": 256,
    "MODEL.PERCEIVER.DEPTH": 2,
    "MODEL.MEMORY_ATTENTION.NUM_LAYERS": 2,
    "MODEL.MEMORY_ATTENTION.POOL_SIZE": 2,
    "TRAIN.LR": 3e-4,
    "TRAIN.MAX_STEPS": 130_000,
    "TRAIN.WARMUP_STEPS": 15_000,
    "DATA.BATCH_SIZE": 4,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.WEIGHT_DECAY": 0.1,
    "TRAIN.CLIP_GRAD": 0.1,
    "TRAIN.AMP": True,
    "TRAIN.EFFECTIVE_BATCH": 256,
    "TRAIN.ACCUMULATION_STEPS": 0,
    "DISTILL.FOCAL_WEIGHT": 20.0,
    "DISTILL.DICE_WEIGHT": 1.0,
    "DISTILL.IOU_WEIGHT": 1.0,
    "DISTILL.MSE_WEIGHT": 1.0,
    "DISTILL.FOCAL_ALPHA": 0.25,
    "DISTILL.FOCAL_GAMMA": 2.0,
    "DISTILL.OCCLUSION_WEIGHT": 0.0,
    "DATA.DATASET": "sav",
    "DATA.MAX_OBJECTS": 3,
    "DATA.NUM_WORKERS": 8,
    "DATA.TRAIN_SPLIT": 0.95,
    "DATA.VAL_SPLIT": 0.05,
    "MODEL.PERCEIVER.ENABLED": True,
    "MODEL.PERCEIVER.USE_SELF_ATTN": True,
    "MODEL.MEMORY_ATTENTION.DIM_FEEDFORWARD": 2048,
    "MODEL.MEMORY_ATTENTION.DROPOUT": 0.0,
    "TRAIN.WARMUP_LR": 1e-7,
    "TRAIN.MIN_LR": 1e-5,
    "TRAIN.LOG_INTERVAL": 100,
    "TRAIN.VAL_INTERVAL": 5000,
    "TRAIN.SAVE_INTERVAL": 10_000,
    "TRAIN.OPTIMIZER.EPS": 1e-8,
    "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
    "TRAIN.AUTO_RESUME": True,
    "AUG.AFFINE.DEGREES": 25.0,
    "AUG.AFFINE.SHEAR": 20.0,
    "AUG.GRAYSCALE": 0.05,
    "SEED": 42,
}


def parse(*words: str) -> CfgNode:
    return stage2_config.load(stage2_config.make_parser("").parse_intermixed_args(words))


def load(*pairs: str, file: Path = FULL) -> CfgNode:
    return parse("--config", str(file), "--output_dir", "out", *pairs)


def test_documented_values_are_the_defaults_and_the_shipped_file_keeps_them():
    defaults, full = stage2_config.stage2_defaults(), load()
    assert {key: get(defaults, key) for key in DOCUMENTED} == DOCUMENTED
    changed = {key for key in leaf_keys(full) if get(full, key) != get(defaults, key)}
    assert changed == {"OUTPUT"}


def test_every_shipped_file_loads():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert FULL in files
    for file in files:
        assert parse("--config", str(file)).OUTPUT


def test_the_documented_commands():
    config = parse(
        *("--config", str(FULL), "--output_dir", "output/stage2_memory"),
        *("DATA.SAV_ROOT", "data/sa-v/extracted_frames"),
        *("DATA.USE_PRECOMPUTED", "True"),
        *("DATA.EMBEDDING_DIR", "output/stage2_embeddings"),
    )
    resumed = parse(
        *("--config", str(FULL), "--output_dir", "output/stage2_memory"),
        *("--resume", "output/stage2_memory/ckpt_latest.pth"),
    )
    assert resumed.MODEL.RESUME == "output/stage2_memory/ckpt_latest.pth"
    assert {key for key in leaf_keys(config) if get(config, key) != get(resumed, key)} == {"MODEL.RESUME"}


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("--output-dir", "o"), "OUTPUT", "o"),
        (("--seed", "7"), "SEED", 7),
        (("--device", "cpu"), "DEVICE", "cpu"),
        (("--eval",), "EVAL_MODE", True),
        (("--throughput",), "THROUGHPUT_MODE", True),
        (("--local_rank", "0"), "TAG", "default"),
        (("TRAIN.USE_CHECKPOINT", "True"), "TRAIN.USE_CHECKPOINT", True),
        (("TRAIN.AMP=False",), "TRAIN.AMP", False),
        (("TRAIN.LR", "1e-4", "--seed", "7", "TRAIN.MIN_LR", "0"), "TRAIN.MIN_LR", 0.0),
    ],
)
def test_flags_and_pairs(words: tuple[str, ...], key: str, value: object):
    assert get(parse("--config", str(FULL), *words), key) == value


@pytest.mark.parametrize("key", ["DATA.BATCH_SIZE", "TRAIN.BATCH_SIZE"])
def test_the_batch_size_has_two_names(key: str):
    assert load(key, "2").DATA.BATCH_SIZE == 2
    with pytest.raises(ValueError, match=r"two names of one key, but the command line sets them to 2 and 3"):
        load("TRAIN.BATCH_SIZE", "2", "DATA.BATCH_SIZE", "3")


def test_the_written_config_starts_the_same_run(tmp_path: Path):
    config = load(
        *FRAMES, "AUG.ENABLED", "True", "AUG.HFLIP", "0.1", "DATA.KINDS", "['manual']", "TRAIN.BATCH_SIZE", "3"
    )
    dump_config(config, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config


def test_the_memory_follows_the_keys():
    assert stage2_config.memory_config(load()) == MemoryConfig()
    values = {"NUM_LATENTS": 8, "NUM_LATENTS_2D": 16, "DEPTH": 1, "DIM": 32, "HEADS": 2, "DIM_HEAD": 8}
    pairs = [word for name, value in values.items() for word in (f"MODEL.PERCEIVER.{name}", str(value))]
    pairs += ["MODEL.PERCEIVER.USE_SELF_ATTN", "False"]
    attention = {"NUM_LAYERS": 3, "POOL_SIZE": 4, "DIM_FEEDFORWARD": 128, "DROPOUT": 0.1}
    pairs += [word for name, value in attention.items() for word in (f"MODEL.MEMORY_ATTENTION.{name}", str(value))]
    memory = stage2_config.memory_config(load(*pairs))
    assert list(asdict(memory).values()) == [True, 8, 16, 1, 32, 2, 8, False, 3, 128, 4, 0.1]
    assert not stage2_config.memory_config(load("MODEL.PERCEIVER.ENABLED", "False")).perceiver


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", stage2_config.RETIRED)
def test_keys_that_mean_nothing_here_are_refused_with_a_reason(key: str):
    with pytest.raises(ValueError, match=rf"^{key} \(in the command line\) cannot be set: ") as error:
        load(key, "0")
    assert stage2_config.RETIRED[key] in str(error.value)
    assert key not in leaf_keys(stage2_config.stage2_defaults())


IDLE = {
    ("AUG.ENABLED", "True"): FRAMES,
    ("DATA.SA1B_RATIO", "0.1"): FRAMES,
    ("AUG.HFLIP", "0.1"): (*FRAMES, "AUG.ENABLED", "True"),
    ("AUG.FRAME_JITTER.CONTRAST", "0.1"): (*FRAMES, "AUG.ENABLED", "True"),
    ("TRAIN.EFFECTIVE_BATCH", "32"): (),
    ("TRAIN.MIN_LR", "0"): (),
    ("DISTILL.IOU_TYPE", "score"): (),
    ("DISTILL.FOCAL_GAMMA", "1"): (),
    ("DISTILL.SHARE_MEMORY", "True"): (),
    ("MODEL.PERCEIVER.DIM", "64"): (),
}
STOPS = {
    "TRAIN.EFFECTIVE_BATCH": ("TRAIN.ACCUMULATION_STEPS", "2"),
    "TRAIN.MIN_LR": ("TRAIN.LR_SCHEDULER.NAME", "linear"),
    "DISTILL.IOU_TYPE": ("DISTILL.IOU_WEIGHT", "0"),
    "DISTILL.FOCAL_GAMMA": ("DISTILL.FOCAL_WEIGHT", "0"),
    "DISTILL.SHARE_MEMORY": ("DISTILL.MSE_WEIGHT", "0"),
    "MODEL.PERCEIVER.DIM": ("MODEL.PERCEIVER.ENABLED", "False"),
}


@pytest.mark.parametrize("pair", IDLE, ids=lambda pair: pair[0])
def test_keys_that_cannot_act_are_refused_until_they_can(pair: tuple[str, str]):
    with pytest.raises(ValueError, match=rf"^{pair[0]} is .*, but it acts only with .*; leave it out"):
        load(*pair, *STOPS.get(pair[0], ()))
    load(*pair, *IDLE[pair])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("DATA.NUM_FRAMES", "1"), "DATA.NUM_FRAMES is 1, but must be at least 2"),
        (
            ("DATA.FRAME_SKIP", "6"),
            "DATA.FRAME_SKIP must be a multiple of 4, because SA-V has masks for every 4th frame",
        ),
        (("DATA.FRAME_SKIP", "0"), "DATA.FRAME_SKIP is 0, but must be at least 1"),
        (("DATA.EMBEDDING_DIR", ""), "DATA.EMBEDDING_DIR is empty: set it to the folder that stage2/save_video"),
        (
            ("AUG.ENABLED", "True"),
            "acts only with DATA.USE_PRECOMPUTED False, because embeddings are of the pictures as",
        ),
        (("DATA.KINDS", "[]"), r"DATA.KINDS is \[\]; choose one or both of manual, auto"),
        (("DATA.KINDS", "['hand']"), r"DATA.KINDS is \['hand'\]"),
        (("DATA.KINDS", "['auto', 'auto']"), r"choose one or both"),
        (("DATA.KINDS", "[['auto']]"), r"choose one or both"),
        (("DATA.TRAIN_SPLIT", "0.98"), r"with DATA.VAL_SPLIT \(=0.05\) at most 1"),
        (("DATA.TRAIN_SPLIT", "0"), r"DATA.TRAIN_SPLIT \(=0.0\) must be above 0"),
        (("DATA.SUBSET", "0"), "DATA.SUBSET is the share of the videos to use, above 0, got 0.0"),
        (("DATA.SUBSET", "10"), "DATA.SUBSET is a share in 0..1, got 10.0"),
        (("DATA.TIME_REVERSAL", "-0.1"), "DATA.TIME_REVERSAL is a share in 0..1"),
        (("DISTILL.PROMPTS.MASK", "0.6"), "DISTILL.PROMPTS must add up to 1: MASK 0.6, BOX 0.25, CLICK 0.25"),
        (("DISTILL.FOCAL_WEIGHT", "-1"), "loss weights must be finite, not negative, and not all 0: .*FOCAL_WEIGHT -1"),
        (("DISTILL.MSE_WEIGHT", "1e999"), "loss weights must be finite"),
        (("DISTILL.IOU_TYPE", "box"), "DISTILL.IOU_TYPE is 'box'; choose one of mask, score"),
        (("MODEL.PERCEIVER.NUM_LATENTS_2D", "200"), "must be a square number, 196 or 225, got 200"),
        (("MODEL.PERCEIVER.NUM_LATENTS", "0"), "MODEL.PERCEIVER.NUM_LATENTS is 0, but must be at least 1"),
        (("MODEL.MEMORY_ATTENTION.POOL_SIZE", "0"), "POOL_SIZE is 0, but must be at least 1"),
        (("MODEL.MEMORY_ATTENTION.DROPOUT", "1"), "DROPOUT is a share in 0..1, below 1, got 1.0"),
        (("TRAIN.MAX_STEPS", "100"), r"WARMUP_STEPS \(=15000\) must not be above TRAIN.MAX_STEPS \(=100\)"),
        (("TRAIN.MAX_STEPS", "0"), "TRAIN.MAX_STEPS is 0, but must be at least 1"),
        (("TRAIN.LR", "-1"), "TRAIN.LR is -1.0, but must be at least 0"),
        (("TRAIN.BATCH_SIZE", "0"), "DATA.BATCH_SIZE is 0, but must be at least 1"),
        (("TRAIN.LR_SCHEDULER.NAME", "step"), "choose one of cosine, linear"),
        (("DATA.DATASET", "davis"), "DATA.DATASET is 'davis'; choose one of sav"),
        (("TRAIN.LR",), "the command line takes KEY VALUE pairs, but 'TRAIN.LR' has no value"),
        (("TRAIN.LRS", "3"), "unknown config key TRAIN.LRS in the command line; did you mean TRAIN.LR"),
        (("MODEL.PERCEIVER", "3"), "is a group of keys, but got '3'; set one of its keys"),
        (("DATA.NUM_FRAMES", "8.5"), "DATA.NUM_FRAMES in the command line is 8.5 of type float, wanted int"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_values_that_cannot_work_are_refused(pairs: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        load(*pairs)


def test_numbers_that_are_none_are_refused(tmp_path: Path):
    file = tmp_path / "own.yaml"
    for text, message in (
        ("TRAIN:\n  LR: .nan\n", "TRAIN.LR is nan"),
        ("AUG:\n  ENABLED: True\n  HFLIP: .nan\nDATA:\n  USE_PRECOMPUTED: False\n", "AUG.HFLIP is a share in 0..1"),
        ("DISTILL:\n  DICE_WEIGHT: .nan\n", "loss weights must be finite"),
        ("MODEL:\n  MEMORY_ATTENTION:\n    DROPOUT: .nan\n", "DROPOUT is a share"),
        ("DATA:\n  TRAIN_SPLIT: .nan\n", "DATA.TRAIN_SPLIT"),
    ):
        file.write_text(f"BASE: ['{FULL}']\n{text}")
        with pytest.raises(ValueError, match=message):
            load(file=file)
