"""The converter with a real, tiny model, in process and as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam3.engine.merge import STUDENT_TRUNK, TRUNK
from sam3.engine.weights import save_weights
from sam3.model.config import Sam3Config
from sam3.model_builder import assemble_image_model, build_efficientsam3_image_model, build_student
from stage1_geometry_finetune import convert_geometry_finetune

TEACHER = {"name": "sam3.pt", "sha256": "a" * 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny merged model with an EfficientViT-B0 student, and a checkpoint with other weights of that student."""
    folder = tmp_path_factory.mktemp("tiny")
    config = Sam3Config.preset("tiny")
    sam3 = {f"detector.{k}": t for k, t in assemble_image_model(config, with_sam2_neck=True).state_dict().items()}
    first, second = (build_student("efficientvit_b0", config.vit_dim, config.grid).eval() for _ in range(2))
    preprocess = {"img_size": config.img_size, "resize": "pad", "mean": [127.5] * 3, "std": [127.5] * 3}
    meta = {"backbone": "efficientvit_b0", "embed_size": config.grid, "preprocess": preprocess, "teacher": TEACHER}
    kept = {key: tensor for key, tensor in sam3.items() if not key.startswith(f"{TRUNK}.")}
    student = {f"{STUDENT_TRUNK}.{key}": tensor for key, tensor in first.state_dict().items()}
    save_weights(folder / "merged.pt", kept | student, meta)
    finetuned = {f"student_trunk.{key}": tensor for key, tensor in second.state_dict().items()}
    save_weights(folder / "ckpt_epoch_29.pth", finetuned, meta, payload={"epoch": 29, "step": 7500})
    return folder, config, second


def arguments(folder: Path, output: Path, finetuned: str = "ckpt_epoch_29.pth") -> list[str]:
    paths = {"--finetune-ckpt": folder / finetuned, "--pretrained": folder / "merged.pt", "--output": output}
    return [str(item) for pair in paths.items() for item in pair]


def test_model_gives_the_finetuned_students_embedding(tiny, tmp_path):
    folder, config, student = tiny
    output = tmp_path / "made" / "model.pt"
    assert convert_geometry_finetune.main(arguments(folder, output)) == 0
    model = build_efficientsam3_image_model(output, device="cpu")
    images = torch.rand(1, 3, config.img_size, config.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.backbone.vision_backbone.trunk(images)[-1], student(images))


def test_missing_part_of_the_model_is_refused(tiny, tmp_path):
    folder = tiny[0]
    content = torch.load(folder / "merged.pt", weights_only=True)
    content["model"] = {key: t for key, t in content["model"].items() if "dot_prod_scoring" not in key}
    torch.save(content, tmp_path / "merged.pt")
    command = arguments(folder, tmp_path / "out.pt")
    command[3] = str(tmp_path / "merged.pt")
    with pytest.raises(ValueError, match=r"missing: .*dot_prod_scoring"):
        convert_geometry_finetune.main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["merged.pt"]


def run(command: list[str], **env: str) -> subprocess.CompletedProcess:
    program = [sys.executable, convert_geometry_finetune.__file__, *command]
    return subprocess.run(program, capture_output=True, encoding="utf-8", env={**os.environ, **env})


def test_exit_codes(tiny, tmp_path):
    folder = tiny[0]
    done = run(arguments(folder, tmp_path / "m.pt"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "? All weights successfully replaced!" in done.stdout  # a terminal without the tick
    done = run(arguments(folder, tmp_path / "n.pt", finetuned="merged.pt"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    assert "no student below 'student_trunk.'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
