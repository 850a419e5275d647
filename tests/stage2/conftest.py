"""A small SA-V with embeddings of its frames, and a finished Stage-2 training, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stage2.runs import Inputs, embed, make_frames


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> Inputs:
    """Files that fit together, of 5 videos, one of them to validate on; to be left as they are."""
    folder = tmp_path_factory.mktemp("sav")
    frames = make_frames(folder)
    return Inputs(teacher_file, frames, embed(teacher_file, frames, folder / "embeddings"))


@pytest.fixture(scope="session")
def memory_run(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    """Output folder of 4 steps, validated and kept after every other one; to be left as it is."""
    output = tmp_path_factory.mktemp("train")
    steps = {"TRAIN__VAL_INTERVAL": 2, "TRAIN__SAVE_INTERVAL": 2}
    assert inputs.train(output, TENSORBOARD=True, **steps) == 0
    return output
