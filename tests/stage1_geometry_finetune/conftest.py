"""A finished geometry fine-tuning, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage1 import convert_stage1_weights
from tests.stage1_geometry_finetune.runs import Inputs


@pytest.fixture(scope="session")
def inputs(teacher_file: Path, sa1b: Path, exported: Path, trained: Path) -> Inputs:
    """Files that fit together; to be left as they are."""
    return Inputs(teacher_file, sa1b, exported, trained / "ckpt_epoch_1.pth")


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    """The student of `inputs` merged into its teacher."""
    path = tmp_path_factory.mktemp("merged") / "efficient_sam3_efficientvit_s.pt"
    arguments = ["--student-ckpt", str(inputs.start), "--sam3-ckpt", str(inputs.teacher), "--output", str(path)]
    assert convert_stage1_weights.main(arguments) == 0
    return path


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    """Output folder of two epochs of fine-tuning with TensorBoard; to be left as it is."""
    output = tmp_path_factory.mktemp("tune")
    assert inputs.tune(output, TRAIN__EPOCHS=2, TENSORBOARD=True) == 0
    return output
