"""The programs at the released sizes, in the user's words: ViT-H and MobileSAM with made-up weights, on the CPU."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.sam.sam1 import build_sam1
from sam3.sam1_files import save_sam1
from tests.distillation.prompt.folders import write_picture
from tests.distillation.prompt.runs import LOSSES
from tests.distillation.prompt.test_config import SNIPPET
from tests.engine.processes import ROOT, environment
from tests.stage1.runs import metrics

MEMORY_GB = 10


def program(folder: Path, *arguments: object) -> str:
    """Run a program of the project in `folder`, in the words of the user's document."""
    script, *rest = map(str, arguments)
    command = [sys.executable, str(ROOT / script), *rest]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_step_and_an_extraction_at_full_size(tmp_path: Path):
    weights = tmp_path / "weights"
    weights.mkdir()
    for type, name in (("vit_h", "sam_vit_h_4b8939.pth"), ("vit_t", "mobile_sam.pt")):
        torch.manual_seed(0)
        save_sam1(build_sam1(type), weights / name)
    for split in ("train", "val"):
        write_picture(tmp_path / "datasets" / split, "photo", (600, 900), [(100, 80, 500, 400)])
    own = '"train": {"batch_size": 1, "log_every": 1, "device": "cpu", "tensorboard": false}'
    (tmp_path / "config.jsonc").write_text("{ // the snippet as it stands\n" + SNIPPET + ",\n" + own + "}")
    train = ("scripts/train_prompt_distill.py", "--config", "config.jsonc", "--max-steps", 1)

    text = program(tmp_path, *train)
    assert "SAM-H 0.7, MobileSAM_orig 0.3; run beside the student" in text
    assert all(math.isfinite(metrics(tmp_path / "logs", f"train/distill/{name}/SAM-H")[0]) for name in LOSSES)
    (online,), (peak,) = (metrics(tmp_path / "logs", f"train/{name}") for name in ("step_ms", "max_mem_gib"))

    # ViT-H would need another minute for each picture; the files are the same.
    program(
        tmp_path,
        *("scripts/extract_teacher_features.py", "--teacher_name", "MobileSAM_orig"),
        *("--teacher_cfg", ROOT / "configs/mobile_sam.yaml", "--teacher_ckpt", "./weights/mobile_sam.pt"),
        *("--dataset_base_dir", "./datasets", "--output_base_dir", "./precomputed/MobileSAM_orig"),
        *("--splits", "train", "val", "--fp16"),
    )
    features = tmp_path / "precomputed/MobileSAM_orig/train"
    sizes = {path.name[6:-4]: path.stat().st_size - 128 for path in features.glob("photo_*.npy")}
    assert sizes == {"enc_patch": 2097152, "prompt_embed": 2097152, "mask_token": 2048, "dense_logits": 131072}
    assert all(np.load(path).dtype == np.float16 for path in features.glob("*.npy"))

    stored = (
        "distillation.use_precomputed_features=true",
        "model.save_path=stored",
        "teachers=[{name: MobileSAM_orig}]",
    )
    program(tmp_path, *train, "--opts", *stored)
    (offline,) = metrics(tmp_path / "stored", "train/step_ms")
    print(f"a step: {online / 1000:.0f} s and {peak:.1f} GiB with both teachers, {offline / 1000:.1f} s from a store")
    assert peak < MEMORY_GB and offline < online
