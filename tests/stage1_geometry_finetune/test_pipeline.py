"""The commands of the user's document, from a Stage-1 student to a prediction of the tuned model, at the tiny size.

They run in an empty folder with the files where the document has them, so that paths are those of the document.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from sam3.engine.merge import STUDENT_TRUNK
from sam3.engine.weights import load_weights
from tests.samples import TINY_MAP
from tests.stage1.runs import ROOT, free_port, model_of
from tests.stage1_geometry_finetune.runs import CONFIGS, Inputs

pytestmark = pytest.mark.slow

# The document's commands, but for what says which machine they run on, and its first epochs for all thirty.
SINGLE = """bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh
  CFG=stage1_geometry_finetune/configs/es_rv_m.yaml
  DATA_PATH=data/sa-1b
  OUTPUT=output_geometry_finetune/es_rv_m
  BATCH_SIZE=4
  GPUS=0"""
SEVERAL = """bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh
  CFG=stage1_geometry_finetune/configs/es_rv_m.yaml
  DATA_PATH=data/sa-1b
  OUTPUT=output_geometry_finetune/es_rv_m
  BATCH_SIZE=4
  GPUS=2 DEVICE=cpu"""
DIRECT = """python stage1_geometry_finetune/train_geometry_finetune.py
  --cfg stage1_geometry_finetune/configs/es_rv_m.yaml
  --data-path data/sa-1b
  --pretrained output/efficient_sam3_repvit_m.pt
  --sam3-checkpoint sam3_checkpoints/sam3.pt
  --teacher-embed-path output/stage1_teacher/embeddings
  --output output_geometry_finetune"""
CONVERT = """python stage1_geometry_finetune/convert_geometry_finetune.py
  --finetune-ckpt output_geometry_finetune/es_rv_m/ckpt_epoch_1.pth
  --pretrained output/efficient_sam3_repvit_m.pt
  --output output/efficient_sam3_repvit_m_geometry.pt"""

WRITTEN = {"config.json", "log_rank0.txt", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs, merged: Path) -> Path:
    """A working folder with the document's inputs, of the tiny size, and a config of the document's name."""
    root = tmp_path_factory.mktemp("place")
    for source, name in (
        (inputs.data, "data/sa-1b"),
        (inputs.exported / "embeddings", "output/stage1_teacher/embeddings"),
        (inputs.teacher, "sam3_checkpoints/sam3.pt"),
        (merged, "output/efficient_sam3_repvit_m.pt"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(source)
    tiny = {
        "BASE": [str(CONFIGS / "base_geometry_finetune.yaml")],
        "DATA": {"IMG_SIZE": 224, "NUM_WORKERS": 1},
        "MODEL": {
            "BACKBONE": "efficientvit_b0",
            "OUTPUT_STRIDE": 16,
            "PRETRAINED": "output/efficient_sam3_repvit_m.pt",
        },
        "DISTILL": {"EMBED_DIM": TINY_MAP[0], "EMBED_SIZE": 16, "MAX_PROMPTS": 1},
        "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1, "ACCUMULATION_STEPS": 1},
        "OUTPUT": "output_geometry_finetune/es_rv_m",
    }
    config = root / "stage1_geometry_finetune/configs/es_rv_m.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(tiny))
    return root


def run(command: str, place: Path) -> str:
    """Its output; programs are those of the repository, `python` is the interpreter of this test."""
    words = [str(ROOT / word) if word.endswith((".sh", ".py")) else word for word in shlex.split(command)]
    words[0] = sys.executable if words[0] == "python" else words[0]
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_users_commands(place: Path, inputs: Inputs, tmp_path: Path):
    output = place / "output_geometry_finetune/es_rv_m"
    run(f"{SINGLE} --dry-run", place)
    assert not output.exists()
    assert "2 processes x 1 accumulated" not in run(SINGLE, place)
    assert {"config.json", "log_rank0.txt", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth"} <= {
        p.name for p in output.iterdir()
    }

    text = run(CONVERT, place)
    merged, result = (place / f"output/efficient_sam3_repvit_m{suffix}.pt" for suffix in ("", "_geometry"))
    lines = text.splitlines()
    for wanted in (
        *("Student encoder keys extracted: 194", "Keys matched in pretrained: 194"),
        *("Replaced 194 weights in pretrained model", "=== Verification ===", "Total keys in output: 795"),
        *("Image encoder weights replaced: 194", "✓ All weights successfully replaced!"),
        "Output saved to: output/efficient_sam3_repvit_m_geometry.pt",
    ):
        assert wanted in lines
    before, after = load_weights(merged).tensors, load_weights(result).tensors
    student = model_of(output / "ckpt_epoch_1.pth")
    assert all(torch.equal(after[k.replace("student_trunk", STUDENT_TRUNK)], value) for k, value in student.items())
    assert all(torch.equal(after[k], value) for k, value in before.items() if not k.startswith(STUDENT_TRUNK))

    image = next((inputs.data / "images/val").glob("*.jpg"))
    paths = f"--checkpoint {result} --image {image} --output {tmp_path}/out.png --json {tmp_path}/out.json"
    run(f"python scripts/predict.py {paths} --box 10 10 60 60 --threshold 0 --device cpu", place)
    assert Image.open(tmp_path / "out.png").size == Image.open(image).size
    assert json.loads((tmp_path / "out.json").read_text())


def test_the_users_command_for_several_gpus(place: Path):
    shutil.rmtree(place / "output_geometry_finetune", ignore_errors=True)
    assert "effective batch 8 = 4 x 2 processes x 1 accumulated" in run(SEVERAL, place)
    assert (place / "output_geometry_finetune/es_rv_m/ckpt_epoch_1.pth").exists()


def test_the_users_python_command(place: Path):
    shutil.rmtree(place / "output_geometry_finetune", ignore_errors=True)
    run(DIRECT, place)
    assert {path.name for path in (place / "output_geometry_finetune").iterdir()} >= WRITTEN
