"""Two small models of the SAM-1 family: what they hold, and that the same seed gives the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distillation.prompt.model_file import load_model_file
from sam3.sam1_files import load_sam1
from scripts.make_tiny_sam1 import main


def test_models_and_their_files_fit_each_other(tmp_path: Path):
    assert main(["--output", str(tmp_path / "a"), "--image-size", "128"]) == 0
    assert main(["--output", str(tmp_path / "b"), "--image-size", "128"]) == 0
    for name, type in (("vit_tiny", "vit_tiny"), ("mobile_sam", "vit_t")):
        stated = load_model_file(tmp_path / f"a/{name}.yaml")
        model = load_sam1(stated.checkpoint, stated.type, stated.image_size)
        assert (model.type, model.image_size) == (type, 128)
        again = load_sam1(tmp_path / f"b/{name}.pt").state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def test_other_sizes_are_refused(tmp_path: Path):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path), "--image-size", "100"])
    assert stop.value.code == 2
