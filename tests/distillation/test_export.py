"""The exported student: size on disk, half precision, fused form, and files that are something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from distillation.export import export_student, is_student_file, load_student, read_student_meta
from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from sam3.engine.weights import load_weights, save_weights
from tests.distillation.slim import OUTPUTS, PROMPTS, inputs, tiny_student

META = {"prompts": list(PROMPTS), "phase": 2}
SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


@torch.no_grad()
def distance(a: EfficientSAM3, b: EfficientSAM3) -> float:
    """The largest relative difference of an output."""
    ours, theirs = a(*inputs()), b(*inputs())
    return max(((ours[name] - theirs[name]).norm() / ours[name].norm()).item() for name in OUTPUTS)


@SUFFIXES
def test_float32_comes_back_bit_by_bit(tmp_path: Path, suffix: str):
    student = tiny_student()
    export_student(student, tmp_path / f"s{suffix}", META, half=False)
    loaded = load_student(tmp_path / f"s{suffix}", "cpu")
    assert not loaded.training
    assert loaded.config == student.config
    assert loaded.preprocess == student.preprocess
    for (name, a), b in zip(student.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype, name
    assert distance(student, loaded) == 0


@SUFFIXES
def test_half_is_half_the_size_and_nearly_the_same(tmp_path: Path, suffix: str):
    student, path = tiny_student(), tmp_path / f"s{suffix}"
    export_student(student, path, META)
    statistics = [t for name, t in student.state_dict().items() if name.endswith(("running_mean", "running_var"))]
    counters = [t for name, t in student.state_dict().items() if name.endswith("num_batches_tracked")]
    numbers = 2 * sum(p.numel() for p in student.parameters()) + 4 * sum(t.numel() for t in statistics)
    overhead = path.stat().st_size - numbers - 8 * len(counters)
    assert 0 < overhead < 600 * len(student.state_dict())
    loaded = load_student(path, "cpu")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert 0 < distance(student, loaded) < 1e-2


def test_half_of_the_full_student_has_201_megabytes():
    """By arithmetic: 2 bytes per parameter, 4 per statistic, at most 600 per tensor for its name and place."""
    with torch.device("meta"):
        tensors = EfficientSAM3(EfficientSAM3Config.preset("full")).state_dict()
    statistics = sum(t.numel() for name, t in tensors.items() if name.endswith(("running_mean", "running_var")))
    size = 2 * 100_268_590 + 4 * statistics
    assert 200e6 < size < size + 400 * len(tensors) < 202e6


@pytest.mark.slow
@SUFFIXES
def test_full_size_file(tmp_path: Path, suffix: str):
    path = tmp_path / f"student_fp16{suffix}"
    export_student(EfficientSAM3(EfficientSAM3Config.preset("full")), path, META)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    assert 200e6 <= path.stat().st_size <= 202e6
    loaded = load_student(path, "cpu")
    assert sum(p.numel() for p in loaded.parameters()) == 100_268_590


@SUFFIXES
def test_the_fused_form_gives_the_same_answers(tmp_path: Path, suffix: str):
    student, path = tiny_student(), tmp_path / f"s{suffix}"
    before = list(student.state_dict())
    export_student(student, path, META, half=False, fuse=True)
    loaded = load_student(path, "cpu")
    assert read_student_meta(path)["fused"] is loaded.vision.fused is True
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.vision.backbone.modules())
    assert distance(student, loaded) < 1e-4
    assert list(student.state_dict()) == before  # the student itself can still be trained
    again = tmp_path / f"again{suffix}"
    export_student(loaded, again, META, half=False)
    assert distance(load_student(again, "cpu"), loaded) == 0


def test_fused_in_half_precision(tmp_path: Path):
    student, path = tiny_student(), tmp_path / "s.safetensors"
    export_student(student, path, META, fuse=True)
    assert distance(student, load_student(path, "cpu")) < 2e-2


@SUFFIXES
def test_meta_says_what_the_file_is(tmp_path: Path, suffix: str):
    student, path = tiny_student(), tmp_path / f"s{suffix}"
    export_student(student, path, META)
    meta = read_student_meta(path)
    assert meta == {
        "kind": "distilled_student",
        "student": student.config.to_meta(),
        "preprocess": student.preprocess.to_meta(),
        "fused": False,
        **META,
    }
    assert is_student_file(path)


def test_training_mode_and_device_of_the_student_stay(tmp_path: Path):
    student = tiny_student().train()
    export_student(student, tmp_path / "s.pt", META, fuse=True)
    assert student.encoder.training
    assert not student.vision.fused


def test_a_large_variance_survives_half_precision(tmp_path: Path):
    student = tiny_student()
    norm = student.vision.adapters[0][1]
    norm.running_var.fill_(1e6)  # float16 ends at 65504
    export_student(student, tmp_path / "s.pt", META)
    assert load_student(tmp_path / "s.pt", "cpu").vision.adapters[0][1].running_var[0] == 1e6


def test_weights_beyond_half_precision_are_refused(tmp_path: Path):
    student = tiny_student()
    with torch.no_grad():
        student.text.projection.weight[0, 0] = 1e6
        with pytest.raises(ValueError, match=r"text.projection.weight.*1e\+06.*half=False"):
            export_student(student, tmp_path / "s.pt", META)
        export_student(student, tmp_path / "s.pt", META, half=False)
        student.text.projection.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"text.projection.weight.*earlier checkpoint"):
            export_student(student, tmp_path / "t.pt", META, half=False)
    assert not (tmp_path / "t.pt").exists()


def test_other_files_are_refused_with_one_message(tmp_path: Path, teacher_file: Path):
    assert not is_student_file(teacher_file)
    for read in (load_student, read_student_meta):
        with pytest.raises(ValueError, match=r"sam3_tiny.pt is no exported student.*train_distill.py"):
            read(teacher_file)
        with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
            read(tmp_path / "missing.pt")


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    student, path = tiny_student(), tmp_path / "s.safetensors"
    export_student(student, path, META)
    file = load_weights(path)
    other = replace(student.config, dim=32).to_meta()
    lacking = {name: tensor for name, tensor in file.tensors.items() if name != "text.projection.bias"}
    for tensors, meta, message in (
        (lacking, file.meta, r"1 missing: text.projection.bias"),
        (file.tensors, {**file.meta, "student": other}, r"misshapen"),
        (file.tensors, {**file.meta, "student": {"dim": 64}}, r"not those of this version.*export it again"),
        (file.tensors, {**file.meta, "student": None}, r"NoneType"),
        (file.tensors, {**file.meta, "preprocess": {}}, r"contradicts itself"),
        (file.tensors, {**file.meta, "fused": True}, r"unexpected"),
    ):
        save_weights(tmp_path / "bad.pt", tensors, meta)
        with pytest.raises(ValueError, match=message) as caught:
            load_student(tmp_path / "bad.pt", "cpu")
        assert "bad.pt" in str(caught.value)


def test_other_suffixes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"student\.onnx"):
        export_student(tiny_student(), tmp_path / "student.onnx", META)
