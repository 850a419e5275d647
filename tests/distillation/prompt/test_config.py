"""Settings of prompt distillation: the user's blocks as they stand, in both languages, and what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillation.prompt.config import (
    EpochSettings,
    LossWeights,
    PromptDistillConfig,
    load_config,
)
from distillation.prompt.model_file import load_model_file
from distillation.prompt.remarks import remarks

ROOT = Path(__file__).parents[3]
SNIPPET = """
"distillation": {
  "enable": true,
  "lambda_coef": 1.0,
  "encoder_patch":      { "enable": true,  "w_l2": 1.0, "w_cos": 1.0 },
  "prompt_embed":       { "enable": true,  "w_mse": 0.7, "w_cos": 0.3 },
  "decoder_mask_token": { "enable": true,  "w_kl": 1.0, "temperature": 0.5 },
  "dense_mask_logits":  { "enable": true,  "w_kl": 0.6, "w_focal": 0.4, "gamma": 2.0 }
},
"teachers": [
  { "name": "SAM-H",          "weight": 0.7, "checkpoint": "weights/sam_vit_h_4b8939.pth" },
  { "name": "MobileSAM_orig", "weight": 0.3, "checkpoint": "weights/mobile_sam.pt" }
]
"""
SNIPPET_YAML = """
distillation:
  enable: true
  lambda_coef: 1.0
  encoder_patch:      {enable: true, w_l2: 1.0, w_cos: 1.0}
  prompt_embed:       {enable: true, w_mse: 0.7, w_cos: 0.3}
  decoder_mask_token: {enable: true, w_kl: 1.0, temperature: 0.5}
  dense_mask_logits:  {enable: true, w_kl: 0.6, w_focal: 0.4, gamma: 2.0}
teachers:
  - {name: SAM-H,          weight: 0.7, checkpoint: weights/sam_vit_h_4b8939.pth}
  - {name: MobileSAM_orig, weight: 0.3, checkpoint: weights/mobile_sam.pt}
"""
TEACHER = {"name": "T", "checkpoint": "t.pt"}


def config(**blocks) -> PromptDistillConfig:
    return PromptDistillConfig.from_dict(blocks)


def test_the_snippet_means_the_same_in_json_jsonc_and_yaml(tmp_path: Path):
    texts = {
        "a.json": "{" + SNIPPET + "}",
        "a.jsonc": '{ // added to an existing file\n "train": {"lr": 1e-5},' + SNIPPET + "}",
        "a.yaml": SNIPPET_YAML + "train: {lr: 1e-5}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    first, *others = (load_config(tmp_path / name) for name in texts)
    assert all(other == first for other in others)
    assert first.distillation.losses == (*("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits"),)
    assert first.teacher_weights == {"SAM-H": 0.7, "MobileSAM_orig": 0.3}
    assert first.distillation.decoder_mask_token.temperature == 0.5
    assert first.train.lr == 1e-5 and not remarks(first)
    assert PromptDistillConfig.from_dict(first.to_dict()) == first


@pytest.mark.parametrize("mode", ["point", "box", "mixed", "everything"])
def test_the_ready_configurations_are_of_their_mode(mode: str):
    ready = load_config(ROOT / f"configs/prompt_{mode}.yaml")
    data = ready.dataset
    assert (data.mode if mode == "everything" else data.prompt_mode) == mode
    assert len(ready.distillation.losses) == 4 and not remarks(ready)


@pytest.mark.parametrize(
    ("name", "type"), [("sam_vith", "vit_h"), ("sam_vitl", "vit_l"), ("sam_vitb", "vit_b"), ("mobile_sam", "vit_t")]
)
def test_the_model_files_name_type_and_checkpoint(name: str, type: str):
    model = load_model_file(ROOT / f"configs/{name}.yaml")
    assert model.type == type and model.checkpoint.startswith("weights/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {type: vit_h, embed_dim: 1024}", r"embed_dim is 1024, but vit_h has 1280"),
        ("model: {type: vit_t, patch_size: 14}", "patch_size is 14"),
        ("model: {type: vit_x}", "choose one of vit_h"),
        ("model: {name: SAM}", "no model file"),
        ("type: vit_h", "no model file"),
        ("model: {type: vit_h, chekpoint: a}", "did you mean model.checkpoint"),
    ],
)
def test_wrong_model_files_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model_file(tmp_path / "m.yaml")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"distillation": {"enable": True, "encoder_patch": {"enable": True, "w_l3": 1}}}, "w_l3.*did you mean"),
        ({"distillation": {"enable": True, "encoder_pach": {}}}, "encoder_pach.*encoder_patch"),
        ({"distillation": {"enable": True, "encoder_patch": {"enable": True}}}, "no teachers"),
        ({"distillation": {"lambda_coef": -1}}, "lambda_coef must be at least 0"),
        ({"distillation": {"decoder_mask_token": {"temperature": 0}}}, "temperature must be above 0"),
        ({"distillation": {"hooks": {"student": {"dense_mask_logits": "x"}}}}, "unknown component"),
        ({"teachers": [TEACHER, TEACHER]}, "different names, got T"),
        ({"teachers": [{"name": "a/b", "checkpoint": "t.pt"}]}, "'a/b'; wanted letters"),
        ({"teachers": [{"checkpoint": "t.pt"}]}, "teachers"),
        ({"teachers": [{**TEACHER, "name": "mse"}]}, "part of a loss"),
        ({"dataset": {"min_points": 4}}, "max_points 3 is below"),
        (
            {
                "dataset": {"mode": "everything"},
                "distillation": {"prompt_embed": {"enable": True, "tap": "output_keys"}},
            },
            "input_keys",
        ),
        ({"model": {"image_size": 1000}}, "multiple of 64"),
        ({"stage_schedule": [{"name": "a", "start_epoch": 2, "end_epoch": 2}]}, "wanted 0 <= start_epoch"),
        (
            {"stage_schedule": [{"name": n, "start_epoch": s, "end_epoch": 5} for n, s in (("a", 0), ("b", 4))]},
            "share epochs",
        ),
        ({"train": {"loss_weights": dict.fromkeys(("bce", "focal", "dice", "iou"), 0)}}, "nothing would be learnt"),
    ],
)
def test_what_cannot_work_is_refused(blocks: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**blocks)


def test_weights_that_do_not_add_up_are_used_with_a_warning():
    settings = config(
        teachers=[{**TEACHER, "weight": 0.5}, {**TEACHER, "name": "U", "weight": 0.3}],
        distillation={"enable": True, "prompt_embed": {"enable": True, "w_mse": 1.0, "w_cos": 0.3}},
    )
    first, second = remarks(settings)
    assert "add up to 0.8, not 1" in first and "w_mse 1 and w_cos 0.3" in second
    assert settings.teacher_weights == {"T": 0.5, "U": 0.3}


def test_missing_weights_are_equal_and_weights_can_be_normalised():
    teachers = [TEACHER, {**TEACHER, "name": "U"}]
    assert config(teachers=teachers).teacher_weights == {"T": 0.5, "U": 0.5}
    given = [{**TEACHER, "weight": 3}, {**TEACHER, "name": "U", "weight": 1}]
    normalised = config(teachers=given, distillation={"normalize_teacher_weights": True})
    assert normalised.teacher_weights == {"T": 0.75, "U": 0.25}


def test_nothing_is_distilled_unless_block_and_loss_are_switched_on():
    one = {"encoder_patch": {"enable": True}}
    assert not config(distillation={"enable": False, **one}, teachers=[TEACHER]).distills
    assert config(distillation={"enable": True, **one}, teachers=[TEACHER]).distillation.losses == ("encoder_patch",)
    empty = config(distillation={"enable": True, "encoder_patch": {"w_l2": 2}})
    assert not empty.distills and "plain fine-tuning" in remarks(empty)[0]
    assert not config(distillation={"enable": True, "lambda_coef": 0, **one}, teachers=[TEACHER]).distills


def test_a_stage_replaces_weights_for_its_epochs_only():
    settings = config(
        distillation={"enable": True, "lambda_coef": 2.0, "encoder_patch": {"enable": True}},
        teachers=[TEACHER],
        train={"epochs": 6, "loss_weights": {"focal": 15}},
        stage_schedule=[
            {"name": "warm", "start_epoch": 0, "end_epoch": 2, "distillation": False},
            {"name": "late", "start_epoch": 4, "end_epoch": 6, "lambda_coef": 0.5, "loss_weights": {"bce": 0}},
        ],
    )
    base = LossWeights(focal=15.0)
    assert settings.at(0) == settings.at(1) == EpochSettings(base, 0.0)
    assert settings.at(2) == settings.at(3) == EpochSettings(base, 2.0)
    assert settings.at(5) == EpochSettings(LossWeights(bce=0.0, focal=15.0), 0.5)
    assert settings.distills


def test_frozen_parts_are_trained_from_their_epoch_on():
    freeze = config(freeze={"freeze_image_encoder": True, "unfreeze_epoch": 3}).freeze
    assert freeze.parts(2) == ("image_encoder",) and freeze.parts(3) == ()
    assert config(freeze={"freeze_mask_decoder": True}).freeze.parts(99) == ("mask_decoder",)


def test_keys_that_cannot_act_are_remarked_on():
    single = config(train={"loss_weights": {"cls": 1}}, everything={"match_iou_threshold": 0.5})
    assert [text.partition(" act")[0] for text in remarks(single)] == [
        "train.loss_weights.cls",
        "the settings of `everything`",
    ]
    grid = config(
        dataset={"mode": "everything"},
        teachers=[{**TEACHER, "weight": 1}, {**TEACHER, "name": "U", "weight": 0}],
        distillation={"enable": True, "dense_mask_logits": {"enable": True, "mask_select": "all"}},
    )
    first, second = remarks(grid)
    assert "mask_select has no effect" in first and "teacher U has weight 0" in second
    only = {**dict.fromkeys(("bce", "focal", "dice", "iou"), 0), "cls": 1}
    with pytest.raises(ValueError, match="nothing would be learnt"):
        config(train={"loss_weights": only})
    assert config(train={"loss_weights": only}, dataset={"mode": "everything"}).train.loss_weights.cls == 1
