"""The native teacher against `Sam3Image` and `Sam3Processor` with the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from distillation.config import DistillationConfig
from distillation.teachers.build import build_teacher, describe_teacher
from distillation.teachers.native import NativeTeacher
from sam3.engine.files import sha256
from sam3.engine.weights import load_weights, save_weights
from sam3.model.data_misc import FindStage
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model, encode_phrase, encode_phrases
from tests.parity.fill import image
from tests.samples import TINY_MAP

PROMPTS = torch.tensor([3, 1])
OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


@pytest.fixture(scope="module")
def config(teacher_file: Path) -> DistillationConfig:
    return DistillationConfig(teacher_model_name=str(teacher_file), image_size=224)


@pytest.fixture(scope="module")
def teacher(config: DistillationConfig) -> NativeTeacher:
    return build_teacher(config, "cpu")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([torch.from_numpy(image(224, 224, seed)).permute(2, 0, 1) / 127.5 - 1 for seed in (0, 1)])


def test_outputs_are_those_of_the_image_model(teacher, config, images):
    model = build_sam3_image_model(config.teacher, device="cpu")
    with torch.no_grad():
        pairs = FindStage(torch.arange(2), PROMPTS)
        wanted = model(images, list(config.prompts), pairs)
        levels = model.backbone.forward_image(images)["backbone_fpn"]
    found = teacher(images, PROMPTS, features=True)
    torch.testing.assert_close(found["pred_masks"], wanted["pred_masks"])
    torch.testing.assert_close(found["pred_boxes"], wanted["pred_boxes_xyxy"])
    torch.testing.assert_close(found["pred_logits"], wanted["pred_logits"][..., 0])
    torch.testing.assert_close(found["presence_logits"], wanted["presence_logit_dec"])
    torch.testing.assert_close(found["semantic_seg"], wanted["semantic_seg"])
    assert found["encoder_output"].shape == (2, 256, 64) and found["encoder_hw"] == (16, 16)
    torch.testing.assert_close(found["encoder_output"][1], wanted["encoder_hidden_states"][:, 1])
    assert len(found["fpn_features"]) == 3
    for mine, theirs in zip(found["fpn_features"], levels, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert set(teacher(images, PROMPTS, features=False)) == set(OUTPUTS)


def test_scores_and_boxes_are_those_of_the_processor(teacher, config):
    processor = Sam3Processor(build_sam3_image_model(config.teacher, device="cpu"), confidence_threshold=0.4)
    picture = image(90, 130, seed=3)
    state = processor.set_text_prompt(config.prompts[2], processor.set_image(Image.fromarray(picture)))
    fitted, size = processor.preprocess.fit(torch.from_numpy(picture).permute(2, 0, 1))
    normalised = processor.preprocess.normalise(fitted[None], torch.tensor([size]))
    found = teacher(normalised, torch.tensor([2]), features=False)
    scores = (found["pred_logits"].sigmoid() * found["presence_logits"].sigmoid())[0]
    kept = scores > 0.4
    assert 0 < kept.sum() < 20
    torch.testing.assert_close(scores[kept], state["scores"])
    torch.testing.assert_close(
        found["pred_boxes"][0, kept] * torch.tensor([130, 90, 130, 90]), state["boxes"], atol=1e-3, rtol=1e-4
    )


def test_presence_is_clamped(config, images):
    sure = NativeTeacher(config, "cpu")
    with torch.no_grad():
        sure.heads.transformer.decoder.presence_token_head.layers[-1].bias.fill_(500)
    assert sure(images, PROMPTS, features=False)["presence_logits"].tolist() == [[10], [10]]


def test_it_stays_as_it_is(teacher, images):
    before = teacher(images.clone().requires_grad_(), PROMPTS, features=True)
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        after = teacher(images, PROMPTS, features=True)
        again = teacher.forward_from_trunk(teacher.embed(images), PROMPTS, features=True)
    for name in (*OUTPUTS, "encoder_output"):
        assert not before[name].requires_grad and before[name].grad_fn is None
        assert torch.equal(before[name], after[name]) and torch.equal(before[name], again[name])
    assert not any("language_backbone" in name for name, _ in teacher.named_parameters())
    assert 49408 not in {p.shape[0] for p in teacher.parameters()}  # entries of the text encoder's vocabulary


def test_heads_alone_go_on_from_a_stored_map(teacher, config, images):
    heads = build_teacher(config, "cpu", with_trunk=False)
    assert heads.trunk is None and heads.meta == teacher.meta
    maps = teacher.embed(images)
    assert tuple(maps.shape[1:]) == teacher.trunk_shape == heads.trunk_shape == TINY_MAP
    wanted = teacher(images, PROMPTS, features=False)
    found = heads.forward_from_trunk(maps, PROMPTS, features=False)
    assert all(torch.equal(found[name], wanted[name]) for name in OUTPUTS)
    rounded = heads.forward_from_trunk(maps.half(), PROMPTS, features=False)
    torch.testing.assert_close(rounded["pred_masks"], wanted["pred_masks"], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("name", "dtype", "error"), [("fp16", torch.float16, 0.01), ("bf16", torch.bfloat16, 0.08)])
def test_half_precision_stays_close(teacher, config, images, name, dtype, error):
    half = build_teacher(DistillationConfig.from_dict({**config.to_dict(), "teacher_dtype": name}), "cpu")
    assert half.dtype == dtype
    found, wanted = half(images, PROMPTS, features=True), teacher(images, PROMPTS, features=True)
    for key in (*OUTPUTS, "encoder_output"):
        assert (found[key].float() - wanted[key]).norm() < error * wanted[key].norm(), key


def test_it_says_who_it_is(teacher, config):
    assert teacher.meta == describe_teacher(config)
    assert teacher.meta == {
        "backend": "native",
        "name": "sam3_tiny.pt",
        "sha256": sha256(config.teacher),
        "trunk_shape": list(TINY_MAP),
    }
    assert (teacher.image_size, teacher.dim, teacher.num_queries) == (224, 64, 20)
    assert (teacher.dtype, teacher.trunk.patch_embed.proj.weight.dtype) == (torch.float32, torch.float32)  # CPU: auto


def test_what_cannot_teach_is_refused(config, teacher_file, tmp_path):
    tensors = load_weights(teacher_file).tensors

    def build(path: Path, size: int = 224) -> None:
        build_teacher(DistillationConfig(teacher_model_name=str(path), image_size=size), "cpu")

    with pytest.raises(FileNotFoundError, match=r"no teacher checkpoint .*gone\.pt; .* --teacher-backend hf"):
        build(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match=r"made for pictures of 224 px, but image_size is 1008; set image_size 224"):
        build(teacher_file, 1008)
    trunk = "detector.backbone.vision_backbone.trunk."
    student = {key: value for key, value in tensors.items() if not key.startswith(trunk)}
    save_weights(tmp_path / "student.pt", {**student, f"{trunk}model.head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"student\.pt has a student in the place of SAM3's trunk.* wanted sam3\.pt"):
        build(tmp_path / "student.pt")
    heads = ("detector.transformer.", "detector.dot_prod_scoring.")
    save_weights(tmp_path / "trunk.pt", {key: value for key, value in tensors.items() if not key.startswith(heads)})
    with pytest.raises(ValueError, match=r"trunk\.pt: .* no tensor 'transformer\.decoder.*; wanted the full sam3"):
        build(tmp_path / "trunk.pt")


def test_phrases_are_encoded_together(teacher_file):
    phrases = ["all objects", "a red car"]
    together = encode_phrases(teacher_file, phrases)
    assert together["language_features"].shape == (32, 2, 64) and together["language_mask"].shape == (2, 32)
    for column, phrase in enumerate(phrases):
        alone = encode_phrase(teacher_file, phrase)
        torch.testing.assert_close(together["language_features"][:, column], alone["language_features"][:, 0])
        assert torch.equal(together["language_mask"][column], alone["language_mask"][0])
    for wrong, message in (([], "non-empty list"), ("car", "non-empty list"), (["car", " "], "a phrase, got ' '")):
        with pytest.raises(ValueError, match=message):
            encode_phrases(teacher_file, wrong)
