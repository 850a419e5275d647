"""Loading whole models: sizes from the file, strict keys, students recognised, no needless copies."""

from __future__ import annotations

import shutil

import pytest
import torch

from sam3 import model_builder, tracker_builder
from sam3.backbones.student import StudentTrunk
from sam3.engine import hub
from sam3.engine.weights import load_weights, save_weights
from sam3.model.config import Sam3Config
from sam3.model.vitdet import ViT
from sam3.model_builder import (
    assemble_image_model,
    build_efficientsam3_image_model,
    build_sam3_heads,
    build_sam3_image_model,
    build_student,
    build_teacher_trunk,
    encode_phrase,
)
from sam3.transforms import Preprocess
from scripts.make_tiny_sam3 import make_model
from tests.samples import TINY_MAP

TRUNK = "detector.backbone.vision_backbone.trunk."


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A tiny checkpoint in the layout of sam3.pt, with an entry of the tracker."""
    model = make_model(Sam3Config.preset("tiny"), seed=0)
    found = {f"detector.{key}": tensor for key, tensor in model.state_dict().items()}
    return {**found, "tracker.no_mem_embed": torch.zeros(1, 1, 64)}


@pytest.fixture(scope="module")
def tiny(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    save_weights(path, tensors)
    return path


def with_student(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a tiny checkpoint with a student in the trunk's place, and the meta that belong to them."""
    torch.manual_seed(0)
    student = build_student("efficientvit_b0", embed_dim=TINY_MAP[0], embed_size=16)
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(TRUNK)}
    kept |= {f"{TRUNK}model.{key}": tensor for key, tensor in student.state_dict().items()}
    meta = {"embed_size": 16, "preprocess": Preprocess(img_size=224, resize="pad").to_meta()}
    return kept, meta


@pytest.fixture(scope="module")
def merged(tensors, tmp_path_factory):
    """The same with a student in the trunk's place."""
    kept, meta = with_student(tensors)
    path = tmp_path_factory.mktemp("merged") / "merged.pt"
    save_weights(path, kept, meta)
    return path


def run(model, size: int = 224):
    with torch.inference_mode():
        return model(torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size), ["a dog"])


def test_every_tensor_is_the_files(tiny, tensors):
    model = build_sam3_image_model(tiny, device="cpu", with_sam2_neck=True)
    assert not model.training
    own = model.state_dict()
    assert len(own) == len(tensors) - 1
    assert all(torch.equal(own[key.removeprefix("detector.")], t) for key, t in tensors.items() if "tracker" not in key)
    assert model.preprocess == Preprocess(img_size=224, resize="square")
    out = run(model)
    assert out["pred_masks"].shape == (1, 20, 64, 64)
    assert torch.isfinite(out["pred_logits"]).all()


@pytest.mark.parametrize("layout", ["ddp", "image model alone", "safetensors", "no second neck"])
def test_other_layouts_give_the_same_model(tiny, tensors, tmp_path, layout: str):
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pt")
    kept = dict(tensors)
    if layout == "ddp":
        kept = {f"module.{key}": t for key, t in tensors.items()}
    elif layout == "image model alone":
        kept = {key.removeprefix("detector."): t for key, t in tensors.items() if key.startswith("detector.")}
    elif layout == "no second neck":
        kept = {key: t for key, t in tensors.items() if ".sam2_convs." not in key}
    save_weights(path, kept)
    found = run(build_sam3_image_model(path, device="cpu"))
    torch.testing.assert_close(found["pred_logits"], run(build_sam3_image_model(tiny, device="cpu"))["pred_logits"])


def test_parts_may_be_left_out(tiny):
    model = build_sam3_image_model(tiny, device="cpu", enable_text_encoder=False, enable_segmentation=False)
    assert model.segmentation_head is None and model.backbone.language_backbone is None
    assert not [key for key in model.state_dict() if "language" in key or "segmentation" in key or "sam2" in key]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"1 missing: dot_prod_scoring\.hs_proj\.bias"),
        ("unexpected", r"1 unexpected: transformer\.extra"),
        ("misshapen", r"dot_prod_scoring\.hs_proj\.bias \(63,\) instead of \(64,\)"),
        ("foreign", r"below neither 'detector\.' nor 'tracker\.': head\.weight"),
        ("no second neck", r"22 missing: backbone\.vision_backbone\.sam2_convs"),
        ("real tables", "32 instead of|complex"),
    ],
)
def test_whatever_does_not_fit_is_named(tensors, tmp_path, fault: str, message: str):
    changed = dict(tensors)
    if fault == "missing":
        del changed["detector.dot_prod_scoring.hs_proj.bias"]
    elif fault == "unexpected":
        changed["detector.transformer.extra"] = torch.zeros(1)
    elif fault == "misshapen":
        changed["detector.dot_prod_scoring.hs_proj.bias"] = torch.zeros(63)
    elif fault == "foreign":
        changed["head.weight"] = torch.zeros(1)
    elif fault == "no second neck":
        changed = {key: t for key, t in tensors.items() if ".sam2_convs." not in key}
    else:
        changed[f"{TRUNK}blocks.0.attn.freqs_cis"] = tensors[f"{TRUNK}blocks.0.attn.freqs_cis"].real.clone()
    save_weights(tmp_path / "bad.pt", changed)
    with pytest.raises(ValueError, match=message):
        build_sam3_image_model(tmp_path / "bad.pt", device="cpu", with_sam2_neck=True)


def test_a_file_that_is_not_sam3(tmp_path):
    save_weights(tmp_path / "other.pt", {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"other\.pt is no SAM3 checkpoint"):
        build_sam3_image_model(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        build_sam3_image_model(tmp_path / "nowhere.pt")


def test_merged_student_is_recognised_by_both_builders(merged):
    for build in (build_sam3_image_model, build_efficientsam3_image_model):
        model = build(merged, device="cpu")
        trunk = model.backbone.vision_backbone.trunk
        assert isinstance(trunk, StudentTrunk) and not trunk.training
        assert model.preprocess == Preprocess(img_size=224, resize="pad")
        out = run(model)
        assert out["pred_masks"].shape == (1, 20, 64, 64)
    stored = load_weights(merged).tensors
    own = model.state_dict()
    assert all(torch.equal(own[key.removeprefix("detector.")], t) for key, t in stored.items() if "model." in key)


def test_a_student_in_a_half_precision_file_runs_in_float32(merged, tmp_path):
    found = load_weights(merged)
    half = {k: t if "trunk.model." in k or not t.is_floating_point() else t.half() for k, t in found.tensors.items()}
    save_weights(tmp_path / "half.pt", half, found.meta)
    model = build_sam3_image_model(tmp_path / "half.pt", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert run(model)["pred_masks"].isfinite().all()


def test_foreign_preprocess_meta_names_the_file(merged, tmp_path):
    found = load_weights(merged)
    save_weights(tmp_path / "odd.pt", found.tensors, {"preprocess": {"img_size": 224}})
    with pytest.raises(ValueError, match=r"odd\.pt: preprocess meta has the fields"):
        build_sam3_image_model(tmp_path / "odd.pt", device="cpu")


def test_builders_refuse_the_other_kind_of_file(tiny, merged):
    with pytest.raises(ValueError, match="no student in the place of SAM3's trunk"):
        build_efficientsam3_image_model(tiny)
    with pytest.raises(ValueError, match=r"holds the student ES-EV-S .*wanted sam3\.pt"):
        build_teacher_trunk(merged)


def test_teacher_trunk_reads_only_the_trunk(tiny, tensors, tmp_path):
    only = {key: t for key, t in tensors.items() if key.startswith(TRUNK)}
    save_weights(tmp_path / "trunk.pt", only)
    image = torch.randn(1, 3, 224, 224)
    maps = []
    for path in (tiny, tmp_path / "trunk.pt"):
        trunk = build_teacher_trunk(path, device="cpu")
        assert isinstance(trunk, ViT) and not trunk.training
        assert not any(parameter.requires_grad for parameter in trunk.parameters())
        maps.append(trunk(image)[-1])
    assert maps[0].shape == (1, *TINY_MAP)
    assert torch.equal(*maps)
    whole = build_sam3_image_model(tiny, device="cpu").backbone.vision_backbone.trunk
    with torch.no_grad():
        torch.testing.assert_close(whole(image)[-1], maps[0])
    half = build_teacher_trunk(tiny, device="cpu", dtype=torch.bfloat16)
    assert half(image.bfloat16())[-1].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def heads(tiny):
    return build_sam3_heads(tiny, device="cpu")


def test_heads_take_a_grid_and_are_the_models(tiny, heads):
    whole = build_sam3_image_model(tiny, device="cpu")
    assert not any(module.training for module in heads.modules())
    assert not any(parameter.requires_grad for parameter in heads.parameters())
    grid = torch.randn(1, *TINY_MAP)
    with torch.inference_mode():
        found = heads.backbone.forward_image(grid)["backbone_fpn"]
        wanted = [conv(grid) for conv in whole.backbone.vision_backbone.convs[:3]]
    assert [tuple(level.shape) for level in found] == [(1, 64, 64, 64), (1, 64, 32, 32), (1, 64, 16, 16)]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    own, all_weights = heads.state_dict(), whole.state_dict()
    assert all(torch.equal(tensor, all_weights[key]) for key, tensor in own.items())
    left_out = {key for key in all_weights if key not in own}
    assert all(key.startswith(("backbone.vision_backbone.trunk.", "backbone.language_backbone.")) for key in left_out)
    assert heads.preprocess == whole.preprocess


def test_heads_read_nothing_else_of_the_file(tiny, heads, monkeypatch):
    """The weights are the mapped ones, and of the others no value is asked for: their tensors have none."""

    def load_without_the_rest(path):
        file = load_weights(path)
        unread = (TRUNK, "detector.backbone.language_backbone.", "detector.backbone.vision_backbone.sam2_convs.")
        file.tensors = {k: t.to("meta") if k.startswith((*unread, "tracker.")) else t for k, t in file.tensors.items()}
        files.append(file)
        return file

    files = []
    monkeypatch.setattr(model_builder, "load_weights", load_without_the_rest)
    own = build_sam3_heads(tiny, device="cpu").state_dict()
    stored = files[0].tensors
    assert own.keys() == heads.state_dict().keys()
    assert [key for key, tensor in own.items() if tensor.data_ptr() != stored[f"detector.{key}"].data_ptr()] == []


def test_heads_of_a_merged_file_are_the_same(heads, merged):
    found = build_sam3_heads(merged, device="cpu")
    assert found.preprocess == Preprocess(img_size=224, resize="pad")
    own = heads.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in found.state_dict().items())
    assert len(own) == len(found.state_dict())


def test_heads_of_half_precision_run_in_float32(tensors, tmp_path):
    save_weights(tmp_path / "half.pt", {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()})
    found = build_sam3_heads(tmp_path / "half.pt", device="cpu")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (("detector.segmentation_head.",), r"lacks SAM3's segmentation head; wanted the full sam3\.pt"),
        (("detector.geometry_encoder.",), "lacks SAM3's geometry encoder;"),
        (("detector.transformer.", "detector.dot_prod_scoring."), "lacks SAM3's fusion encoder, decoder, scoring;"),
        (("detector.backbone.vision_backbone.convs.",), "lacks SAM3's neck;"),
        (("detector.backbone.vision_backbone.convs.2.conv_1x1.",), r"no tensor '.*convs\.2\.conv_1x1\.weight'"),
        (("detector.geometry_encoder.cls_embed.",), r"1 missing: geometry_encoder\.cls_embed\.weight"),
    ],
)
def test_missing_heads_are_named(tensors, tmp_path, prefixes, message):
    save_weights(tmp_path / "cut.pt", {key: t for key, t in tensors.items() if not key.startswith(prefixes)})
    with pytest.raises(ValueError, match=message):
        build_sam3_heads(tmp_path / "cut.pt", device="cpu")


def test_a_phrase_is_encoded_without_the_model(tiny, tensors, merged, tmp_path):
    with torch.inference_mode():
        wanted = build_sam3_image_model(tiny, device="cpu").backbone.forward_text(["visual"])
    for path in (tiny, merged):
        found = encode_phrase(path, "visual")
        assert found["language_features"].shape == (32, 1, 64)
        assert not found["language_features"].requires_grad
        assert all(torch.equal(found[name], wanted[name]) for name in ("language_features", "language_mask"))
    assert (~found["language_mask"]).sum() == 3  # start, the word, end
    kept = {key: t for key, t in tensors.items() if ".language_backbone." not in key}
    save_weights(tmp_path / "mute.pt", kept)
    with pytest.raises(ValueError, match=r"mute\.pt has no text encoder"):
        encode_phrase(tmp_path / "mute.pt", "visual")
    with pytest.raises(ValueError, match="a text prompt is a phrase, got ' '"):
        encode_phrase(tiny, " ")


def test_bfloat16_model_runs_and_keeps_its_tables(tiny):
    model = build_sam3_image_model(tiny, device="cpu", dtype=torch.bfloat16)
    exact = build_sam3_image_model(tiny, device="cpu")
    for key, value in model.state_dict().items():
        assert value.dtype == (torch.complex64 if key.endswith("freqs_cis") else torch.bfloat16)
    assert model.backbone.vision_backbone.trunk.blocks[0].attn.freqs_cis.imag.abs().max() > 0.5
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        a = model.backbone.forward_image(image.bfloat16())["vision_features"]
        b = exact.backbone.forward_image(image)["vision_features"]
    assert torch.nn.functional.cosine_similarity(a.float().flatten(), b.flatten(), dim=0) > 0.99


def test_random_weights_from_a_preset():
    model = build_sam3_image_model(config="tiny", device="cpu", eval_mode=False)
    assert model.training
    assert len(assemble_image_model(Sam3Config.preset("tiny")).state_dict()) == len(model.state_dict())
    with pytest.raises(ValueError, match="unknown SAM3 preset"):
        build_sam3_image_model(config="small")


def test_random_weights_that_nobody_asked_for_are_announced(caplog):
    build_sam3_image_model(config="tiny", device="cpu")
    assert not caplog.records
    build_sam3_image_model(device="meta")  # SAM3's own builder would fetch the released weights here
    assert "the weights are random" in caplog.text


def test_devices():
    assert build_sam3_image_model(config="tiny", device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="device 'gpu' is unknown"):
        build_sam3_image_model(config="tiny", device="gpu")


def test_loading_takes_the_mapped_tensors_over(tiny, monkeypatch):
    files = []
    monkeypatch.setattr(model_builder, "load_weights", lambda path: files.append(load_weights(path)) or files[-1])
    own = build_sam3_image_model(tiny, device="cpu").state_dict()
    stored = {key.removeprefix("detector."): tensor for key, tensor in files[0].tensors.items()}
    assert [key for key, tensor in own.items() if tensor.data_ptr() != stored[key].data_ptr()] == []


def test_hub_is_asked_only_without_a_file(tiny, tmp_path, monkeypatch):
    def fetch(folder):
        asked.append(folder)
        folder.mkdir()
        shutil.copy(tiny, folder / "sam3.pt")

    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download_sam3", fetch)
    build_sam3_image_model(tiny, device="cpu", load_from_HF=True)
    assert not asked
    for _ in range(2):
        build_sam3_image_model(device="cpu", load_from_HF=True)
    assert len(asked) == 1


def test_video_predictors_are_found_here_too():
    assert model_builder.build_sam3_video_predictor is tracker_builder.build_sam3_video_predictor
    assert model_builder.build_efficientsam3_video_predictor is tracker_builder.build_efficientsam3_video_predictor


@pytest.mark.slow
def test_compiled_model_gives_the_same(tiny):
    plain, compiled = (
        build_sam3_image_model(tiny, device="cpu"),
        build_sam3_image_model(tiny, device="cpu", compile=True),
    )
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(run(compiled)["pred_masks"], run(plain)["pred_masks"], atol=1e-3, rtol=1e-3)
