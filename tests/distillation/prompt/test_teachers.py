"""Teachers from our files and other packages: the same features, no gradients, and errors that say what to do."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn

from distillation.prompt.config import DistillationSettings, TeacherSettings
from distillation.prompt.hooked import patch_width
from distillation.prompt.hooks import COMPONENTS
from distillation.prompt.prompts import Prompts
from distillation.prompt.teachers import Teacher, build_teacher, build_teachers
from sam3.engine import settings
from sam3.engine.weights import save_weights
from sam3.sam.sam1 import Sam1, build_sam1
from sam3.sam1_files import save_sam1

SIDE = 256
ALL = (*COMPONENTS, "dense_mask_logits")


def losses(*names: str, **prompt_embed) -> DistillationSettings:
    values = {"enable": True, **{name: {"enable": True} for name in names}}
    if prompt_embed:
        values["prompt_embed"].update(prompt_embed)
    return settings.build(DistillationSettings, values, "the test")


def tiny_sam(seed: int = 0) -> Sam1:
    """Random weights, with some in the tables that start as zeros."""
    torch.manual_seed(seed)
    model = build_sam1("vit_tiny").eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers") / "vit_tiny.pt"
    save_sam1(tiny_sam(), path)
    return path


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers") / "mobile_sam.pt"
    torch.manual_seed(0)
    save_sam1(build_sam1("vit_t"), path)
    return path


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def mixed_prompts() -> Prompts:
    """Two points with padding, and a box as two points."""
    points = torch.tensor([[[20.0, 30], [40, 60], [0, 0]], [[10, 12], [100, 90], [0, 0]]])
    return Prompts(points, torch.tensor([[1, 1, -1], [2, 3, -1]]))


def assert_same(found: dict, wanted: dict, tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_features_of_two_pictures_with_a_prompt_each(checkpoint: Path):
    teacher = build_teacher(TeacherSettings("A", 0.7, str(checkpoint)), losses(*ALL), "cpu")
    assert (teacher.name, teacher.weight, teacher.type, teacher.image_size) == ("A", 0.7, "vit_tiny", SIDE)
    found = teacher.features_of(images(), mixed_prompts(), multimask=True)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "encoder_patch": (2, 192, 16, 16),
        "prompt_embed": (2, 256, 16, 16),
        "decoder_mask_token": (2, 4, 256),
        "dense_mask_logits": (2, 3, 64, 64),
        "ious": (2, 3),
    }
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    assert teacher.neck_projection().shape == (256, 192, 1, 1) and not teacher.neck_projection().requires_grad


def test_only_what_is_switched_on_is_hooked_and_computed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = build_teacher(TeacherSettings("A", checkpoint=str(checkpoint)), losses("encoder_patch"), "cpu")
    assert list(teacher.hooks) == ["encoder_patch"] and not teacher.needs_decoder
    monkeypatch.setattr(teacher.model, "decode", None)  # must not be asked
    assert list(teacher.features_of(images(1), None, False)) == ["encoder_patch"]
    hooks = [m for m in teacher.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert len(hooks) == 1


def test_one_picture_shares_its_embedding_among_prompts(checkpoint: Path):
    teacher = build_teacher(TeacherSettings("A", checkpoint=str(checkpoint)), losses(*ALL), "cpu")
    found = teacher.features_of(images(1), mixed_prompts(), False)
    assert found["prompt_embed"].shape == (1, 256, 16, 16) and found["decoder_mask_token"].shape == (2, 4, 256)


def test_a_teacher_gives_no_gradient_and_keeps_no_graph(checkpoint: Path):
    teacher = build_teacher(TeacherSettings("A", checkpoint=str(checkpoint)), losses(*ALL), "cpu")
    pictures = images().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        found = teacher.features_of(pictures, mixed_prompts(), False)
        weight = torch.ones(1, requires_grad=True)
        sum((value * weight).sum() for value in found.values()).backward()  # targets may be part of a student's graph
    assert pictures.grad is None and all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert_same(found, teacher.features_of(images(), mixed_prompts(), False))  # autocast changes nothing


def test_a_teacher_is_no_part_of_the_student(checkpoint: Path):
    student = nn.Module()
    student.teachers = [build_teacher(TeacherSettings("A", checkpoint=str(checkpoint)), losses(*ALL), "cpu")]
    student.teacher = student.teachers[0]
    assert not list(student.parameters()) and not student.state_dict()
    student.train()
    assert not any(module.training for module in student.teacher.model.modules())


def test_meta_says_which_file_it_was(checkpoint: Path):
    from sam3.engine.files import sha256

    teacher = build_teacher(TeacherSettings("A", checkpoint=str(checkpoint)), losses("encoder_patch"), "cpu")
    assert teacher.meta == {
        "name": "A",
        "type": "vit_tiny",
        "backend": "native",
        "checkpoint": "vit_tiny.pt",
        "bytes": checkpoint.stat().st_size,
        "sha256": sha256(checkpoint),
    }


def test_mobile_sam_takes_the_size_of_the_training(mobile: Path):
    settings = TeacherSettings("M", checkpoint=str(mobile))
    assert build_teacher(settings, losses("encoder_patch"), "cpu").image_size == 1024
    teacher = build_teacher(settings, losses("encoder_patch"), "cpu", image_size=128)
    assert teacher.type == "vit_t"
    found = teacher.features_of(torch.zeros(1, 3, 128, 128), None, False)
    assert found["encoder_patch"].shape == (1, 256, 8, 8)  # that of the neck
    with pytest.raises(ValueError, match=r"teacher M takes pictures \(B, 3, 128, 128\), got \(1, 3, 64, 64\)"):
        teacher.encode(torch.zeros(1, 3, 64, 64))


# What cannot work ----------------------------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_an_error_unless_it_is_optional(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    missing = tmp_path / "sam_vit_h.pth"
    with pytest.raises(FileNotFoundError, match=rf"teacher A has no checkpoint {missing}.*scripts/download_sam1.py"):
        build_teacher(TeacherSettings("A", checkpoint=str(missing)), losses("encoder_patch"))
    optional = TeacherSettings("A", checkpoint=str(missing), optional=True)
    with caplog.at_level(logging.WARNING):
        assert build_teacher(optional, losses("encoder_patch")) is None
    assert "teacher A is left out" in caplog.text
    with pytest.raises(ValueError, match="none of the optional teachers"):
        build_teachers([optional], losses("encoder_patch"))


def test_those_that_are_there_are_built(tmp_path: Path, checkpoint: Path):
    optional = TeacherSettings("A", checkpoint=str(tmp_path / "no.pt"), optional=True)
    there = TeacherSettings("B", checkpoint=str(checkpoint))
    assert [teacher.name for teacher in build_teachers([optional, there], losses("encoder_patch"), "cpu")] == ["B"]


def write_cfg(path: Path, **model) -> str:
    path.write_text(yaml.safe_dump({"model": model}))
    return str(path)


def test_cfg_and_file_have_to_agree(tmp_path: Path, checkpoint: Path):
    fitting = write_cfg(tmp_path / "a.yaml", type="vit_tiny", image_size=SIDE, checkpoint=str(checkpoint))
    assert build_teacher(TeacherSettings("A", cfg=fitting), losses("encoder_patch"), "cpu").type == "vit_tiny"
    for changed, message in (
        ({"type": "vit_h", "image_size": SIDE}, r"b\.yaml says type vit_h, but .*vit_tiny\.pt holds type vit_tiny"),
        ({"type": "vit_tiny", "image_size": 1024}, r"256 pixels.* but image size 1024 was asked for"),
    ):
        cfg = write_cfg(tmp_path / "b.yaml", checkpoint=str(checkpoint), **changed)
        with pytest.raises(ValueError, match=message):
            build_teacher(TeacherSettings("A", cfg=cfg), losses("encoder_patch"))
    with pytest.raises(
        ValueError, match=r"teachers\[\]\.type says vit_b, but .*a\.yaml says vit_tiny; make them agree"
    ):
        build_teacher(TeacherSettings("A", cfg=fitting, type="vit_b"), losses("encoder_patch"))
    with pytest.raises(ValueError, match=r"model\.image_size says 512, but .*a\.yaml says 256"):
        build_teacher(TeacherSettings("A", cfg=fitting), losses("encoder_patch"), image_size=512)
    with pytest.raises(ValueError, match="teacher A has no checkpoint; set it"):
        build_teacher(TeacherSettings("A"), losses("encoder_patch"))


def test_files_of_another_kind_and_incomplete_ones_are_refused(tmp_path: Path):
    save_weights(tmp_path / "other.pt", {"head.weight": torch.zeros(2)}, entry=None)
    with pytest.raises(ValueError, match=r"other\.pt is no file of a SAM-1 model: found 1 entries below head"):
        build_teacher(TeacherSettings("A", checkpoint=str(tmp_path / "other.pt")), losses("encoder_patch"))
    tensors = tiny_sam().state_dict()
    del tensors["mask_decoder.iou_token.weight"]
    save_weights(tmp_path / "cut.pt", tensors, entry=None)
    with pytest.raises(ValueError, match=r"1 missing: mask_decoder\.iou_token\.weight"):
        build_teacher(TeacherSettings("A", checkpoint=str(tmp_path / "cut.pt")), losses("encoder_patch"))


# Other packages ------------------------------------------------------------------------------------------------------


def hf_names(key: str) -> str:
    """Of our entries in a `SamModel`."""
    for ours, theirs in {
        "image_encoder.patch_embed.proj.": "vision_encoder.patch_embed.projection.",
        "image_encoder.neck.0.": "vision_encoder.neck.conv1.",
        "image_encoder.neck.1.": "vision_encoder.neck.layer_norm1.",
        "image_encoder.neck.2.": "vision_encoder.neck.conv2.",
        "image_encoder.neck.3.": "vision_encoder.neck.layer_norm2.",
        "image_encoder.blocks.": "vision_encoder.layers.",
        "image_encoder.": "vision_encoder.",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
        "prompt_encoder.point_embeddings.": "prompt_encoder.point_embed.",
        "prompt_encoder.mask_downscaling.0.": "prompt_encoder.mask_embed.conv1.",
        "prompt_encoder.mask_downscaling.1.": "prompt_encoder.mask_embed.layer_norm1.",
        "prompt_encoder.mask_downscaling.3.": "prompt_encoder.mask_embed.conv2.",
        "prompt_encoder.mask_downscaling.4.": "prompt_encoder.mask_embed.layer_norm2.",
        "prompt_encoder.mask_downscaling.6.": "prompt_encoder.mask_embed.conv3.",
        "mask_decoder.output_upscaling.0.": "mask_decoder.upscale_conv1.",
        "mask_decoder.output_upscaling.1.": "mask_decoder.upscale_layer_norm.",
        "mask_decoder.output_upscaling.3.": "mask_decoder.upscale_conv2.",
        "mask_decoder.transformer.norm_final_attn.": "mask_decoder.transformer.layer_norm_final_attn.",
    }.items():
        if key.startswith(ours):
            key = theirs + key[len(ours) :]
            break
    if key.startswith("vision_encoder.layers."):
        key = key.replace(".norm1.", ".layer_norm1.").replace(".norm2.", ".layer_norm2.")
    if key.startswith("mask_decoder.transformer.layers."):
        key = key.replace(".norm", ".layer_norm")
    if "hypernetworks" in key or "iou_prediction_head" in key:
        key = key.replace("layers.0.", "proj_in.").replace("layers.2.", "proj_out.").replace("layers.1.", "layers.0.")
    return key


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_sam` as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    vision = {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "window_size": 14,
    }
    config = transformers.SamConfig(
        vision_config={**vision, "mlp_dim": 768, "global_attn_indexes": [1, 3]},
        prompt_encoder_config={"image_size": SIDE, "image_embedding_size": 16},
        mask_decoder_config={"layer_norm_eps": 1e-5},  # as in the original; theirs differs, which random weights show
    )
    model = transformers.SamModel(config)
    tensors = {hf_names(key): tensor for key, tensor in tiny_sam().state_dict().items()}
    tied = "shared_image_embedding.positional_embedding"
    tensors["prompt_encoder.shared_embedding.positional_embedding"] = tensors[tied]
    model.load_state_dict(tensors, strict=True)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tap", ["input_keys", "output_keys"])
def test_transformers_gives_the_features_of_our_own_model(checkpoint: Path, hf_folder: Path, tap: str):
    wanted = losses(*ALL, tap=tap)
    ours = build_teacher(TeacherSettings("A", checkpoint=str(checkpoint)), wanted, "cpu")
    theirs = build_teacher(TeacherSettings("B", checkpoint=str(hf_folder), backend="transformers"), wanted, "cpu", SIDE)
    assert theirs.hooks["encoder_patch"][1] == "vision_encoder.layers.2"
    torch.testing.assert_close(theirs.neck_projection(), ours.neck_projection())
    boxes = Prompts(boxes=torch.tensor([[10.0, 12, 100, 90], [0, 0, 50, 40]]))
    for prompts in (mixed_prompts(), boxes):
        for count in (1, 2):  # pictures for two prompts
            pair = [t.features_of(images(count), prompts, True) for t in (theirs, ours)]
            assert_same(*pair, tolerance=1e-4)
    assert_same(*(t.features_of(images(1), Prompts(), False) for t in (theirs, ours)), tolerance=1e-4)
    assert theirs.meta["checkpoint"] == hf_folder.name and len(theirs.meta["sha256"]) == 64


def test_widths_are_found_in_half_precision_too(hf_folder: Path):
    named = TeacherSettings("B", checkpoint=str(hf_folder), backend="transformers", dtype="bf16")
    teacher = build_teacher(named, losses(*ALL), "cpu", SIDE)
    assert patch_width(teacher.model, None, "B") == 192


def test_folders_of_other_models_are_refused(tmp_path: Path, hf_folder: Path):
    settings = TeacherSettings("B", checkpoint=str(tmp_path / "no such/folder"), backend="transformers")
    with pytest.raises(FileNotFoundError, match="neither a folder of transformers nor a name at the hub"):
        build_teacher(settings, losses("encoder_patch"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"cannot load a SamModel from .*type 'bert', not sam"):
        build_teacher(TeacherSettings("B", checkpoint=str(tmp_path), backend="transformers"), losses("encoder_patch"))
    with pytest.raises(ValueError, match=r"says type vit_h, but .* holds type vit_192"):
        cfg = write_cfg(tmp_path / "h.yaml", type="vit_h", checkpoint=str(hf_folder))
        build_teacher(TeacherSettings("B", cfg=cfg, backend="transformers"), losses("encoder_patch"))


class PackagesDecoder(nn.Module):
    """Called as that of the package: keywords, and each embedding repeated for all prompts."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        for name, child in decoder.named_children():
            setattr(self, name, child)
        self.__dict__["ours"] = decoder

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        repeated = torch.repeat_interleave(image_embeddings, len(sparse_prompt_embeddings), dim=0)
        result = self.ours(repeated, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output)
        return result.masks, result.ious


def test_segment_anything_gives_the_features_of_our_own_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def build(checkpoint: None) -> nn.Module:
        model = nn.Module()
        sam = build_sam1("vit_tiny").eval()
        model.image_encoder, model.prompt_encoder = sam.image_encoder, sam.prompt_encoder
        model.image_encoder.img_size = SIDE
        model.mask_decoder = PackagesDecoder(sam.mask_decoder)
        return model

    package = ModuleType("segment_anything")
    package.sam_model_registry = {"vit_tiny": build}
    monkeypatch.setitem(sys.modules, "segment_anything", package)
    ours, theirs = (
        build_teacher(TeacherSettings("A", checkpoint=str(checkpoint), backend=backend), losses(*ALL), "cpu")
        for backend in ("native", "segment_anything")
    )
    assert isinstance(theirs, Teacher) and theirs.backend == "segment_anything"
    for count in (1, 2):
        pair = [t.features_of(images(count), mixed_prompts(), True) for t in (theirs, ours)]
        assert_same(*pair, tolerance=1e-5)
    package.sam_model_registry = {"vit_h": build}
    with pytest.raises(ValueError, match="segment_anything knows no vit_tiny, only vit_h; set backend: native"):
        build_teacher(TeacherSettings("A", checkpoint=str(checkpoint), backend="segment_anything"), losses(*ALL))


def test_a_package_that_is_not_installed_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ValueError, match=r"pip install segment-anything, or take the original .*backend: native"):
        build_teacher(TeacherSettings("A", checkpoint=str(checkpoint), backend="segment_anything"), losses(*ALL))
