"""The program at the released sizes: the full teacher with made-up weights, the full student, one step on the CPU."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from distillation.config import LOSSES
from tests.engine.processes import ROOT, environment
from tests.samples import write_sa1b
from tests.stage1.runs import metrics

MEMORY_GB = 10


def program(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_step_at_full_size_is_exported_and_used(tmp_path: Path):
    teacher, out = tmp_path / "sam3.pt", tmp_path / "out"
    program("scripts/make_tiny_sam3.py", "--preset", "full", "--output", teacher)
    write_sa1b(tmp_path / "data", num_train=2, num_val=1)
    text = program(
        *("train_distill.py", "--data", tmp_path / "data", "--teacher", teacher, "--output", out, "--device", "cpu"),
        *("--num-val", 1, "--grad-accum", 1, "--max-steps", 1, "--opts", "student_pretrained=false"),
        *("tensorboard=false", "log_every_steps=1", "save_every_steps=0"),
    )
    teacher.unlink()
    assert "91,548,430 parameters trained, 8,720,160 frozen" in text
    (pairs,) = metrics(out / "phase1", "train/matched_pairs")
    (seconds,), (peak,) = (metrics(out / "phase1", f"sys/{name}") for name in ("sec_per_step", "peak_mem_gb"))
    print(f"a step with 1 photo: {peak:.2f} GB, {seconds:.0f} s")
    assert pairs == 100 and 0 < peak < MEMORY_GB
    for part in ("train", "val"):
        terms = [metrics(out / "phase1", f"{part}/{name}")[0] for name in LOSSES]
        assert all(math.isfinite(term) and term > 0 for term in terms)
    exported = out / "phase1/student_fp16.pt"
    assert 200e6 <= exported.stat().st_size <= 202e6
    photo = next((tmp_path / "data/images/val").glob("*.jpg"))
    words = ("--text", "all objects", "--threshold", 0, "--top-k", 3, "--device", "cpu")
    assert "3 objects" in program("scripts/predict.py", "--checkpoint", exported, "--image", photo, *words)
