"""Students from the files of this stage, our own and the published ones."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sam3.backbones.student import build_student
from sam3.engine.weights import load_weights, same_bytes
from sam3.pretrained import load_student_weights
from tests.manifests import manifest_tensors
from tests.stage1_geometry_finetune.public_files import public_tensors, write_public


@pytest.fixture
def student():
    return build_student("efficientvit_b0", 16, 6)


def other_weights(student) -> dict[str, torch.Tensor]:
    return {key: tensor + 1 for key, tensor in student.state_dict().items()}


def test_the_public_layout_has_1901_keys():
    counts = Counter(key.split(".")[0] for key in public_tensors(manifest_tensors("es_rv_m")))
    assert counts == {
        "student_trunk": 653,
        "sam3": 839,
        "frozen_convs": 22,
        "geometry_encoder": 76,
        "transformer": 283,
        "segmentation_head": 28,
    }
    assert counts.total() == 1901


def test_load_student_weights_reads_public_files(tmp_path, student):
    wanted = other_weights(student)
    write_public(tmp_path / "ckpt_epoch_29.pth", wanted)
    load_student_weights(student, tmp_path / "ckpt_epoch_29.pth")
    assert all(same_bytes(tensor, wanted[key]) for key, tensor in student.state_dict().items())


def test_load_student_weights_reads_our_checkpoints(tmp_path, student):
    wanted = other_weights(student)
    torch.save({"model": {f"student_trunk.{key}": t for key, t in wanted.items()}}, tmp_path / "ckpt_epoch_0.pth")
    load_student_weights(student, tmp_path / "ckpt_epoch_0.pth")
    assert all(same_bytes(tensor, wanted[key]) for key, tensor in student.state_dict().items())


def test_another_student_in_a_public_file_is_named(tmp_path, student):
    write_public(tmp_path / "public.pth", manifest_tensors("es_rv_m", full=True))
    with pytest.raises(ValueError, match=r"weights of ES-RV-M \(repvit_m1_1\), but the student is ES-EV-S"):
        load_student_weights(student, tmp_path / "public.pth")


def test_a_public_file_that_lacks_a_tensor_is_refused(tmp_path, student):
    wanted = other_weights(student)
    del wanted["head.0.weight"]
    write_public(tmp_path / "public.pth", wanted)
    with pytest.raises(ValueError, match=r"1 missing: head.0.weight"):
        load_student_weights(student, tmp_path / "public.pth")


def test_the_public_configuration_becomes_a_plain_dict(tmp_path, student):
    write_public(tmp_path / "public.pth", other_weights(student))
    found = load_weights(tmp_path / "public.pth").payload
    assert found["config"] == {"MODEL": {"BACKBONE": "repvit_m1_1"}, "DISTILL": {"EMBED_DIM": 1024}}
    assert isinstance(found["config"], dict) and type(found["config"]).__module__ == "collections"
    assert found["epoch"] == 29
