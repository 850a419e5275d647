"""The commands of the user's document, from SA-V's videos to a tracked video, at the tiny size.

They run in an empty folder with the files where the document has them, so that paths are those of the document.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import make_sample_sav
from sam3.engine.weights import load_weights
from sam3.video_frames import open_video
from stage1 import convert_stage1_weights
from tests.stage1.runs import ROOT, free_port, model_of
from tests.stage2.runs import write_config

pytestmark = pytest.mark.slow

EXTRACT = "python data/extract_sav_frames.py --source_dir data/sa-v/sav_train"
EMBED = """python stage2/save_video_embeddings_stage2.py
  --data_dir data/sa-v/extracted_frames
  --output_dir output/stage2_embeddings
  --batch_size 8"""
TRAIN = """python stage2/train_memory_stage2.py
  --config stage2/configs/efficient_memory.yaml
  --output_dir output/stage2_memory
  DATA.SAV_ROOT data/sa-v/extracted_frames
  DATA.USE_PRECOMPUTED True
  DATA.EMBEDDING_DIR output/stage2_embeddings"""
RESUME = """python stage2/train_memory_stage2.py
  --config stage2/configs/efficient_memory.yaml
  --output_dir output/stage2_memory
  --resume output/stage2_memory/ckpt_latest.pth"""
MERGE = """python stage2/convert_memory_weights_stage2.py
  --stage2_weights output/stage2_memory/ckpt_best.pth
  --sam3_weights sam3_checkpoints/sam3.pt
  --output_path output/efficient_sam3_memory.pt"""
MERGE_FULL = """python stage2/convert_memory_weights_stage2.py
  --stage2_weights output/stage2_memory/ckpt_best.pth
  --sam3_weights output/efficient_sam3_efficientvit_b0.pt
  --output_path output/efficient_sam3_full.pt"""
# The launchers' own settings, but for the machine they run on.
EMBED_LAUNCHER = "bash stage2/scripts/save_embeddings.sh GPUS=2 DEVICE=cpu --frame_stride 4 --num_workers 1"
TRAIN_LAUNCHER = "bash stage2/scripts/train_memory.sh GPUS=2 DEVICE=cpu"
MERGE_LAUNCHER = "bash stage2/scripts/convert_weights.sh"
PREDICT = """python scripts/predict_video.py --checkpoint output/efficient_sam3_full.pt --device cpu
  --video data/sa-v/sav_train/sav_000001.mp4 --box 20 10 70 50 --output out.mp4 --masks-dir masks"""


@pytest.fixture
def place(tmp_path: Path, teacher_file: Path, trained: Path) -> Path:
    """A working folder with the document's inputs: videos, SAM3, a merged Stage-1 student; and a config of its name."""
    drawn = ["--output", str(tmp_path / "sample"), "--num-train", "5", "--num-val", "0", "--num-frames", "13"]
    size = ["--objects", "2", "--width", "96", "--height", "64", "--workers", "1"]
    assert make_sample_sav.main([*drawn, *size]) == 0
    student = tmp_path / "output/efficient_sam3_efficientvit_b0.pt"
    paths = ["--student-ckpt", str(trained / "ckpt_epoch_1.pth"), "--sam3-ckpt", str(teacher_file)]
    assert convert_stage1_weights.main([*paths, "--output", str(student)]) == 0
    for folder in ("data/sa-v", "sam3_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sample/sav_train").rename(tmp_path / "data/sa-v/sav_train")
    (tmp_path / "sam3_checkpoints/sam3.pt").symlink_to(teacher_file)
    return tmp_path


def run(command: str, place: Path) -> str:
    """Its output; programs are those of the repository, `python` is the interpreter of this test."""
    words = [str(ROOT / word) if word.endswith((".sh", ".py")) else word for word in shlex.split(command)]
    words[0] = sys.executable if words[0] == "python" else words[0]
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_merged(place: Path, base: str, merged: str) -> None:
    """The file holds the memory bit by bit, and all of its base but the dense memory attention."""
    memory = model_of(place / "output/stage2_memory/ckpt_best.pth")
    before, after = (load_weights(place / name).tensors for name in (base, merged))
    assert all(torch.equal(after[f"tracker.{key}"], value) for key, value in memory.items())
    replaced = {key for key in before if key.startswith("tracker.transformer.encoder.")}
    assert replaced and set(after) == set(before) - replaced | {f"tracker.{key}" for key in memory}
    assert all(torch.equal(after[key], before[key]) for key in set(before) - replaced)


def test_the_users_commands(place: Path):
    run(EXTRACT, place)
    run(EMBED, place)
    stored = place / "output/stage2_embeddings"
    assert json.loads((stored / "global_metadata.json").read_text())["num_videos"] == 5
    assert {path.name for path in (stored / "sav_000001").iterdir()} == {
        *("metadata.json", *(f"{number:05d}.pt" for number in range(13))),
    }
    write_config(place, MAX_STEPS=2, SAVE_INTERVAL=2)
    run(f"{TRAIN} --dry-run", place)
    output = place / "output/stage2_memory"
    assert not output.exists()
    run(TRAIN, place)
    assert {path.name for path in output.iterdir()} >= {
        *("config.yaml", "train.log", "tensorboard", "ckpt_latest.pth", "ckpt_best.pth", "ckpt_step_2.pth"),
    }
    write_config(place, MAX_STEPS=4, SAVE_INTERVAL=2)
    assert "ckpt_latest.pth, resumed" in run(RESUME, place)
    assert torch.load(output / "ckpt_latest.pth", weights_only=True)["step"] == 4
    run(MERGE, place)
    check_merged(place, "sam3_checkpoints/sam3.pt", "output/efficient_sam3_memory.pt")
    run(MERGE_FULL, place)
    check_merged(place, "output/efficient_sam3_efficientvit_b0.pt", "output/efficient_sam3_full.pt")
    run(PREDICT, place)
    masks = sorted((place / "masks").glob("*.png"))
    assert len(masks) == 13
    assert all(set(np.unique(Image.open(path))) <= {0, 1} for path in masks)
    assert np.asarray(Image.open(masks[0])).any()
    with open_video(place / "out.mp4") as video:
        assert (len(video), video.height, video.width) == (13, 64, 96)


def test_the_launchers_with_two_processes(place: Path):
    run(f"{EXTRACT} --every 4", place)
    run(EMBED_LAUNCHER, place)
    assert len(list((place / "output/stage2_embeddings").glob("*/metadata.json"))) == 5
    write_config(place, MAX_STEPS=2, EFFECTIVE_BATCH=2)
    assert "effective batch 2 = 1 x 2 processes x 1 accumulated" in run(TRAIN_LAUNCHER, place)
    assert (place / "output/stage2_memory/log_rank1.txt").exists()
    run(MERGE_LAUNCHER, place)
    check_merged(place, "sam3_checkpoints/sam3.pt", "output/efficient_sam3_memory.pt")
