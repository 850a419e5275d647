"""Sizes read from tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sam3.backbones.student import StudentTrunk, build_student
from sam3.model.config import Sam3Config, without_vit
from sam3.model_builder import assemble_image_model
from tests.model import golden


def tensors_of(config: Sam3Config, trunk=None, **options):
    with torch.device("meta"):
        return assemble_image_model(config, trunk, **options).state_dict()


@pytest.mark.parametrize("preset", ["full", "tiny"])
def test_presets_are_read_back(preset: str):
    config = Sam3Config.preset(preset)
    assert Sam3Config.from_tensors(tensors_of(config)) == config


def test_text_heads_follow_the_rule_of_clip():
    assert Sam3Config.from_tensors(tensors_of(golden.CONFIG)) == replace(golden.CONFIG, text_heads=1)


def test_numbers_of_the_presets():
    full, tiny = Sam3Config.preset("full"), Sam3Config.preset("tiny")
    assert (full.grid, tiny.grid) == (72, 16)
    assert full.vit_mlp_dim == int(1024 * 4.625) and tiny.vit_mlp_dim == 4 * tiny.vit_dim
    assert full.text_heads == 16 and tiny.text_heads == 1


def test_student_in_place_of_the_vit():
    tiny = Sam3Config.preset("tiny")
    with torch.device("meta"):
        trunk = StudentTrunk(build_student("efficientvit_b0", embed_dim=tiny.vit_dim, embed_size=16))
    tensors = tensors_of(tiny, trunk)
    assert Sam3Config.from_tensors(tensors, img_size=224) == without_vit(tiny)
    assert Sam3Config.from_tensors(tensors).grid == 72  # the released sizes, where nothing says otherwise
    assert Sam3Config.from_tensors(tensors, img_size=256, patch_size=16).grid == 16


def test_files_without_optional_parts():
    tensors = tensors_of(Sam3Config.preset("tiny"), enable_text_encoder=False, enable_segmentation=False)
    config = Sam3Config.from_tensors(tensors)
    assert config.fusion_layers == 2 and config.text_width == Sam3Config.text_width


def test_errors_say_what_is_missing():
    tensors = tensors_of(Sam3Config.preset("tiny"))
    with pytest.raises(ValueError, match="unknown SAM3 preset 'huge'; known: full, tiny"):
        Sam3Config.preset("huge")
    with pytest.raises(ValueError, match="224 px, not 1008 px"):
        Sam3Config.from_tensors(tensors, img_size=1008)
    without = {key: t for key, t in tensors.items() if key != "transformer.decoder.query_embed.weight"}
    with pytest.raises(ValueError, match=r"no tensor 'transformer\.decoder\.query_embed\.weight'"):
        Sam3Config.from_tensors(without)
    odd = dict(tensors)
    odd["backbone.vision_backbone.trunk.pos_embed"] = torch.empty(1, 64, 96, device="meta")
    with pytest.raises(ValueError, match="63 entries, which is not a square grid"):
        Sam3Config.from_tensors(odd)
