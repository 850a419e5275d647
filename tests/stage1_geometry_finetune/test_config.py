"""The config: every shipped file loads, the documented values are the defaults, what cannot act is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from sam3.backbones.student import BACKBONES
from sam3.engine.config import get, leaf_keys
from stage1_geometry_finetune import config as geometry_config
from tests.stage1.runs import ROOT
from tests.stage1_geometry_finetune.runs import CONFIGS

STUDENT = CONFIGS / "es_rv_m.yaml"
# Of each student: backbone, and the name of its merged model.
STUDENTS = {
    "es_rv_s": ("repvit_m0_9", "repvit_s"),
    "es_rv_m": ("repvit_m1_1", "repvit_m"),
    "es_rv_l": ("repvit_m2_3", "repvit_l"),
    "es_tv_s": ("tiny_vit_5m", "tinyvit_s"),
    "es_tv_m": ("tiny_vit_11m", "tinyvit_m"),
    "es_tv_l": ("tiny_vit_21m", "tinyvit_l"),
    "es_ev_s": ("efficientvit_b0", "efficientvit_s"),
    "es_ev_m": ("efficientvit_b1", "efficientvit_m"),
    "es_ev_l": ("efficientvit_b2", "efficientvit_l"),
}
REFINE = ("DISTILL.DECODE_ITERS", "2", "DISTILL.POINTS_PER_REFINE_ITER", "1")


def parse(file: Path, *arguments: str) -> CfgNode:
    return geometry_config.load(geometry_config.make_parser("").parse_args(["--cfg", str(file), *arguments]))


def load(*opts: str, file: Path = STUDENT) -> CfgNode:
    return parse(file, *(["--opts", *opts] if opts else []))


@pytest.mark.parametrize("name", STUDENTS)
def test_the_nine_students(name: str):
    backbone, merged = STUDENTS[name]
    config = load(file=CONFIGS / f"{name}.yaml")
    assert (backbone, f"output_geometry_finetune/{name}") == (config.MODEL.BACKBONE, config.OUTPUT)
    assert f"output/efficient_sam3_{merged}.pt" == config.MODEL.PRETRAINED
    assert f"{name.upper().replace('_', '-')}-GeometryFinetune" == config.MODEL.NAME


def test_every_shipped_file_loads_and_writes_to_its_own_folder():
    files = sorted(CONFIGS.glob("*.yaml"))
    configs = {file.stem: load(file=file) for file in files}
    students = {name: config for name, config in configs.items() if name.startswith("es_")}
    assert {*STUDENTS, "es_rv_m_edgesam_style", "es_ev_s_tiny"} == students.keys()
    assert all(config.MODEL.BACKBONE in BACKBONES for config in students.values())
    assert {config.OUTPUT for config in students.values()} == {f"output_geometry_finetune/{name}" for name in students}
    assert configs.keys() - students.keys() == {
        "base_geometry_finetune",
        "base_geometry_finetune_edgesam_style",
    }


DOCUMENTED = {
    "DATA.BATCH_SIZE": 4,
    "DATA.DATA_PATH": "data/sa-1b",
    "DATA.DATASET": "sa1b",
    "DATA.IMG_SIZE": 1008,
    "DATA.PIN_MEMORY": True,
    "DATA.NUM_WORKERS": 8,
    "DATA.PREFETCH_FACTOR": 2,
    "DATA.DEBUG": False,
    "DATA.NUM_SAMPLES": -1,
    "DATA.NUM_VAL_SAMPLES": 1000,
    "DATA.FILTER_BY_AREA": [None, None],
    "DATA.SORT_BY_AREA": True,
    "DATA.LOAD_GT_MASK": False,
    "DATA.BOX_JITTER": True,
    "DATA.MASK_NMS": 0.8,
    "MODEL.SAM3_CHECKPOINT": "sam3_checkpoints/sam3.pt",
    "DISTILL.EMBED_DIM": 1024,
    "DISTILL.EMBED_SIZE": 72,
    "DISTILL.TEACHER_EMBED_PATH": "output/stage1_teacher/embeddings",
    "DISTILL.MSE_REDUCTION": "channel_mean",
    "DISTILL.EMBEDDING_LOSS_WEIGHT": 1.5,
    "DISTILL.MASK_BCE_WEIGHT": 1.0,
    "DISTILL.MASK_DICE_WEIGHT": 1.0,
    "DISTILL.MASK_FOCAL_WEIGHT": 0.0,
    "DISTILL.MASK_TARGET": "soft",
    "DISTILL.TEMPERATURE": 1.0,
    "DISTILL.USE_BOX_PROMPTS": True,
    "DISTILL.USE_POINT_PROMPTS": True,
    "DISTILL.MAX_PROMPTS": 16,
    "DISTILL.NO_RAND": False,
    "DISTILL.PROMPT_LAYOUT": "per_object",
    "DISTILL.TEXT_PROMPT": "visual",
    "DISTILL.PROMPT_MIX": False,
    "DISTILL.PROMPT_MIX_PROB_BOX": 0.5,
    "DISTILL.SELECT_BEST_MASK": True,
    "DISTILL.SELECT_BY": "score",
    "DISTILL.DECODE_ITERS": 1,
    "DISTILL.POINTS_PER_REFINE_ITER": 0,
    "DISTILL.POINTS_PER_REFINE_ITER_MIN": 1,
    "DISTILL.POINTS_PER_REFINE_ITER_MAX": 0,
    "DISTILL.ITER_ON_BOX": True,
    "DISTILL.TEACHER_MASK_THRESHOLD": 0.0,
    "TRAIN.EPOCHS": 30,
    "TRAIN.WARMUP_EPOCHS": 2,
    "TRAIN.BASE_LR": 5e-5,
    "TRAIN.WARMUP_LR": 1e-7,
    "TRAIN.MIN_LR": 1e-6,
    "TRAIN.SCALE_LR": False,
    "TRAIN.WEIGHT_DECAY": 0.01,
    "TRAIN.CLIP_GRAD": 1.0,
    "TRAIN.ACCUMULATION_STEPS": 8,
    "TRAIN.AUTO_RESUME": True,
    "TRAIN.EVAL_BN_WHEN_TRAINING": False,
    "TRAIN.FIND_UNUSED_PARAMETERS": False,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.OPTIMIZER.EPS": 1e-8,
    "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
    "AMP_ENABLE": True,
    "TAG": "default",
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 10,
    "SEED": 0,
}


def test_documented_values():
    base = load(file=CONFIGS / "base_geometry_finetune.yaml")
    assert {key: get(base, key) for key in DOCUMENTED} == DOCUMENTED
    assert base.OUTPUT == "output_geometry_finetune"


def test_the_edgesam_style_differs_in_its_prompts_only():
    base, style = load(), load(file=CONFIGS / "es_rv_m_edgesam_style.yaml")
    changed = {key: get(style, key) for key in leaf_keys(style) if get(style, key) != get(base, key)}
    assert changed.pop("MODEL.NAME") != base.MODEL.NAME and changed.pop("OUTPUT") != base.OUTPUT
    assert changed == {
        "DISTILL.MAX_PROMPTS": 1,
        "DISTILL.PROMPT_MIX": True,
        "DISTILL.DECODE_ITERS": 2,
        "DISTILL.POINTS_PER_REFINE_ITER_MAX": 1,
    }


def test_every_key_is_read_somewhere():
    """A key that no code reads would be accepted and do nothing."""
    files = [*(ROOT / "stage1_geometry_finetune").glob("*.py"), *(ROOT / "sam3/sam3/engine").glob("*.py")]
    read = set()
    for file in files:
        if file.name == "config.py":
            continue  # where they are declared and checked
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    keys = leaf_keys(geometry_config.geometry_defaults())
    assert [key for key in keys if key.rsplit(".", 1)[-1] not in read] == ["DATA.DATASET"]  # its one value is checked


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        (("--batch-size", "3"), "DATA.BATCH_SIZE", 3),
        (("--data-path", "d"), "DATA.DATA_PATH", "d"),
        (("--pretrained", "p.pt"), "MODEL.PRETRAINED", "p.pt"),
        (("--resume", "r.pth"), "MODEL.RESUME", "r.pth"),
        (("--sam3-checkpoint", "s.pt"), "MODEL.SAM3_CHECKPOINT", "s.pt"),
        (("--teacher-embed-path", "e"), "DISTILL.TEACHER_EMBED_PATH", "e"),
        (("--accumulation-steps", "2"), "TRAIN.ACCUMULATION_STEPS", 2),
        (("--use-checkpoint",), "TRAIN.USE_CHECKPOINT", True),
        (("--disable-amp",), "AMP_ENABLE", False),
        (("--only-cpu",), "AMP_ENABLE", False),
        (("--only-cpu",), "DEVICE", "cpu"),
        (("--output", "o"), "OUTPUT", "o"),
        (("--tag", "t"), "TAG", "t"),
        (("--eval",), "EVAL_MODE", True),
        (("--throughput",), "THROUGHPUT_MODE", True),
        (("--local_rank", "0"), "TAG", "default"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_documented_flags_in_both_spellings(flag: tuple[str, ...], key: str, value: object):
    name, *rest = flag
    for spelling in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
        assert get(parse(STUDENT, spelling, *rest), key) == value


def test_a_flag_left_out_leaves_the_file_alone():
    """Also those that have another default in the public code."""
    config = parse(STUDENT)
    assert (config.OUTPUT, config.TAG) == ("output_geometry_finetune/es_rv_m", "default")
    assert config.MODEL.PRETRAINED and config.MODEL.SAM3_CHECKPOINT == "sam3_checkpoints/sam3.pt"


def test_local_rank_must_be_the_launchers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    parse(STUDENT, "--local-rank", "1")
    with pytest.raises(ValueError, match="--local-rank is 0, but LOCAL_RANK in the environment is 1"):
        parse(STUDENT, "--local_rank", "0")


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", geometry_config.RETIRED)
def test_keys_of_the_public_code_that_mean_nothing_here_are_refused_with_a_reason(key: str):
    with pytest.raises(ValueError, match=rf"^{key} \(in --opts\) cannot be set: ") as error:
        load(key, "0")
    assert geometry_config.RETIRED[key] in str(error.value)


def test_an_unknown_key_gets_a_suggestion(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown config key DISTILL.MAX_PROMPT in --opts; did you mean DISTILL.MAX_"):
        load("DISTILL.MAX_PROMPT", "3")
    file = tmp_path / "own.yaml"
    file.write_text(f"BASE: ['{STUDENT}']\nDISTILL:\n  TEMPERATUR: 2\n")
    with pytest.raises(ValueError, match=r"unknown config key DISTILL.TEMPERATUR in .*own.yaml; did you mean"):
        load(file=file)


IDLE = {
    ("DATA.MASK_NMS", "0.5"): ("DATA.LOAD_GT_MASK", "True"),
    ("DISTILL.POINT_SOURCE", "mask"): ("DATA.LOAD_GT_MASK", "True"),
    ("DISTILL.PROMPT_MIX_PROB_BOX", "0.3"): ("DISTILL.PROMPT_MIX", "True"),
    ("DISTILL.ITER_ON_BOX", "False"): REFINE,
    ("DISTILL.POINTS_PER_REFINE_ITER", "2"): ("DISTILL.DECODE_ITERS", "2"),
    ("DISTILL.POINTS_PER_REFINE_ITER_MAX", "2"): ("DISTILL.DECODE_ITERS", "2"),
    ("DISTILL.POINTS_PER_REFINE_ITER_MIN", "2"): (
        *("DISTILL.DECODE_ITERS", "2"),
        *("DISTILL.POINTS_PER_REFINE_ITER_MAX", "3"),
    ),
    ("DISTILL.TEACHER_MASK_THRESHOLD", "0.5"): ("DISTILL.MASK_TARGET", "hard"),
    ("TRAIN.LR_SCHEDULER.DECAY_RATE", "0.5"): ("TRAIN.LR_SCHEDULER.NAME", "step"),
    ("TRAIN.OPTIMIZER.MOMENTUM", "0.5"): ("TRAIN.OPTIMIZER.NAME", "sgd"),
    ("TRAIN.OPTIMIZER.MATRIX_LR", "2.0"): ("TRAIN.OPTIMIZER.NAME", "muon"),
}


@pytest.mark.parametrize("pair", IDLE, ids=lambda pair: pair[0])
def test_keys_that_cannot_act_are_refused_until_they_can(pair: tuple[str, str]):
    with pytest.raises(ValueError, match=rf"^{pair[0]} is .*, but it acts only with .*; leave it out"):
        load(*pair)
    load(*pair, *IDLE[pair])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("DISTILL.PROMPT_MIX", "True", "DISTILL.USE_BOX_PROMPTS", "False"), "PROMPT_MIX is True, but it acts only"),
        (("DISTILL.SELECT_BY", "box_iou", "DISTILL.SELECT_BEST_MASK", "False"), "acts only with .*SELECT_BEST_MASK"),
        ((*REFINE, "DISTILL.POINTS_PER_REFINE_ITER_MAX", "1"), "POINTS_PER_REFINE_ITER is 1, but it acts only with"),
        (("DISTILL.USE_BOX_PROMPTS", "False", "DISTILL.USE_POINT_PROMPTS", "False"), "are both False; prompts need"),
        (("DISTILL.SELECT_BY", "box_iou", "DISTILL.PROMPT_LAYOUT", "per_image"), "needs one object a prompt; set DIST"),
        (("DISTILL.SELECT_BY", "mask_iou"), "needs the annotated masks; set DATA.LOAD_GT_MASK True"),
        (("DISTILL.DECODE_ITERS", "2"), "no points are added between the passes; set DISTILL.POINTS_PER_REFINE_ITER"),
        (
            (*REFINE[:2], "DISTILL.POINTS_PER_REFINE_ITER_MIN", "3", "DISTILL.POINTS_PER_REFINE_ITER_MAX", "2"),
            r"_MIN is 3 and _MAX 2; wanted 1 <= MIN <= MAX",
        ),
        ((*REFINE[:2], "DISTILL.POINTS_PER_REFINE_ITER_MAX", "-1"), "POINTS_PER_REFINE_ITER_MAX must be at least 0"),
        ((*REFINE[:2], "DISTILL.POINTS_PER_REFINE_ITER", "-1"), "POINTS_PER_REFINE_ITER must be at least 0, got -1"),
        (("DISTILL.MASK_DICE_WEIGHT", "-1"), r"must be finite, not negative, and not all 0: .*MASK_DICE_WEIGHT -1"),
        (("DISTILL.MASK_BCE_WEIGHT", "1e999"), "loss weights must be finite"),
        (("DISTILL.MAX_PROMPTS", "0"), "DISTILL.MAX_PROMPTS must be at least 1, got 0"),
        (("DISTILL.DECODE_ITERS", "0"), "DISTILL.DECODE_ITERS must be at least 1, got 0"),
        (("DISTILL.PROMPT_CHUNK", "0"), "DISTILL.PROMPT_CHUNK must be at least 1, got 0"),
        (("DISTILL.TEMPERATURE", "0"), "DISTILL.TEMPERATURE divides logits and must be above 0, got 0"),
        (("DISTILL.PROMPT_MIX", "True", "DISTILL.PROMPT_MIX_PROB_BOX", "1.5"), "is a share in 0..1, got 1.5"),
        (("DATA.LOAD_GT_MASK", "True", "DATA.MASK_NMS", "80"), "DATA.MASK_NMS is a share in 0..1, got 80"),
        (("DATA.FILTER_BY_AREA", "[1]"), r"is \[smallest, largest\], numbers or None, got \[1\]"),
        (("DATA.FILTER_BY_AREA", "['a', None]"), r"numbers or None, got \['a', None\]"),
        (("DATA.FILTER_BY_AREA", "[9, 4]"), "but 9 is above 4"),
        (("DATA.IMG_SIZE", "1000"), r"DATA.IMG_SIZE \(=1000\) must be a multiple of DISTILL.EMBED_SIZE \(=72\)"),
        (("DATA.BATCH_SIZE", "0"), "DATA.BATCH_SIZE is 0, but must be at least 1"),
        (("DATA.DATASET", "coco"), "DATA.DATASET is 'coco'; choose one of sa1b"),
        (("DISTILL.MASK_TARGET", "firm"), "DISTILL.MASK_TARGET is 'firm'; choose one of soft, hard"),
        (("DISTILL.SELECT_BY", "luck"), "DISTILL.SELECT_BY is 'luck'; choose one of score, box_iou, mask_iou"),
        (("DISTILL.PROMPT_LAYOUT", "x"), "DISTILL.PROMPT_LAYOUT is 'x'; choose one of per_object, per_image"),
        (("DISTILL.TEXT_PROMPT", "cat"), "DISTILL.TEXT_PROMPT is 'cat'; choose one of visual, none"),
        (("DISTILL.POINT_SOURCE", "x"), "DISTILL.POINT_SOURCE is 'x'; choose one of annotation, mask"),
        (("DISTILL.MSE_REDUCTION", "x"), "DISTILL.MSE_REDUCTION is 'x'; choose one of channel_mean, channel_sum"),
        (("DISTILL.MAX_PROMPTS", "2.5"), "DISTILL.MAX_PROMPTS in --opts is 2.5 of type float, wanted int"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_values_that_cannot_work_are_refused(opts: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        load(*opts)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path):
    zeros = [f"DISTILL.{name} 0" for name in ("EMBEDDING_LOSS_WEIGHT", "MASK_BCE_WEIGHT", "MASK_DICE_WEIGHT")]
    with pytest.raises(ValueError, match="not all 0"):
        load(*" ".join(zeros).split())
    file = tmp_path / "own.yaml"
    for key, message in (("MASK_BCE_WEIGHT", "loss weights must be finite"), ("TEMPERATURE", "must be above 0")):
        file.write_text(f"BASE: ['{STUDENT}']\nDISTILL:\n  {key}: .nan\n")
        with pytest.raises(ValueError, match=message):
            load(file=file)


@pytest.mark.parametrize("weight", ["EMBEDDING_LOSS_WEIGHT", "MASK_BCE_WEIGHT", "MASK_DICE_WEIGHT"])
def test_any_term_can_be_switched_off(weight: str):
    assert load(f"DISTILL.{weight}", "0").DISTILL[weight] == 0


def test_deterministic_is_refused_where_it_cannot_hold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geometry_config, "choose_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))
    assert parse(STUDENT, "--deterministic", "--device", "cpu").DETERMINISTIC
    with pytest.raises(ValueError, match=r"DETERMINISTIC cannot hold here on an accelerator.*train with --device cpu"):
        parse(STUDENT, "--deterministic")
