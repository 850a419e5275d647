"""Students from files: the meta they state, and pictures prepared otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sam3.backbones.student import StudentEncoder, build_student
from sam3.pretrained import load_student_weights
from sam3.transforms import Preprocess

PAD = Preprocess(img_size=224)


def student(seed: int) -> StudentEncoder:
    torch.manual_seed(seed)
    return build_student("efficientvit_b0", 8, 16)


def saved(path: Path, **meta) -> Path:
    torch.save({"model": student(1).state_dict(), "meta": meta}, path)
    return path


def test_weights_arrive_and_meta_is_returned(tmp_path: Path):
    path = saved(tmp_path / "student.pth", backbone="efficientvit_b0", preprocess=PAD.to_meta())
    own, wanted = student(2), student(1).state_dict()
    assert load_student_weights(own, path, PAD) == {"backbone": "efficientvit_b0", "preprocess": PAD.to_meta()}
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in own.state_dict().items())
    assert load_student_weights(own, saved(tmp_path / "silent.pth"), PAD) == {}


@pytest.mark.parametrize(
    "other",
    [Preprocess(448), Preprocess(224, "square"), Preprocess(224, mean=(1, 2, 3)), Preprocess(224, std=(1, 2, 3))],
)
def test_other_pictures_are_refused_before_anything_is_loaded(tmp_path: Path, other: Preprocess):
    path = saved(tmp_path / "student.pth", preprocess=other.to_meta())
    own = student(2)
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    with pytest.raises(ValueError, match="was trained on pictures prepared otherwise") as error:
        load_student_weights(own, path, PAD)
    assert f"found {other}, wanted {PAD}; set DATA.IMG_SIZE" in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items())
    load_student_weights(own, path)  # nobody asked


def test_a_student_of_another_output_stride_is_refused(tmp_path: Path):
    path = saved(tmp_path / "student.pth", output_stride=16)
    with pytest.raises(
        ValueError, match=r"student.pth is of a student with an output stride of 16, wanted 32; set MODEL"
    ):
        load_student_weights(student(2), path)
    fine = build_student("efficientvit_b0", 8, 16, output_stride=16)
    load_student_weights(fine, path)
    load_student_weights(fine, saved(tmp_path / "bare.pth"))
    with pytest.raises(ValueError, match="an output stride of 32, wanted 16"):  # from before there was a choice
        load_student_weights(fine, saved(tmp_path / "old.pth", backbone="efficientvit_b0"))


def test_a_strange_statement_names_the_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"student.pth: preprocess meta has the fields \['size'\]"):
        load_student_weights(student(2), saved(tmp_path / "student.pth", preprocess={"size": 3}), PAD)
