"""`--verify` on sample data: it passes where all is well, and says what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_distill
from distillation import verify
from tests.distillation.runs import run

CONFIG = Path(__file__).parents[2] / "configs/distillation_tiny.yaml"


@pytest.mark.slow
def test_all_checks_pass_with_the_tiny_teacher(teacher_file: Path, tmp_path: Path, capsys):
    from data import make_sample_sa1b

    data = tmp_path / "sample"
    assert make_sample_sa1b.main(["--output", str(data)]) == 0
    argv = ["--verify", "--config", str(CONFIG), "--data", str(data), "--teacher", str(teacher_file)]
    argv += ["--opts", "num_val=8", "batch_size=1", "grad_accum_steps=2", "phase1_warmup=4"]
    argv += ["teacher_score_threshold=0", "presence_space=logit", "phase1_lr=1e-3"]  # this teacher is random
    argv += ["memory_budget_gb=64"]  # the peak is that of this whole process
    before = sorted(tmp_path.rglob("*"))
    assert train_distill.main([*argv, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "11 of 11 checks passed" in out and "FAILED" not in out
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_a_budget_that_is_too_small_fails_one_check(sa1b: Path, tmp_path: Path, capsys):
    assert run(sa1b, tmp_path, "--verify", memory_budget_gb=0.1, phase1_warmup=0) == 1
    out = capsys.readouterr().out
    assert "10 of 11 checks passed" in out
    (line,) = [line for line in out.splitlines() if "FAILED" in line]
    assert "memory" in line and "above memory_budget_gb 0.1" in line


def test_without_pictures_every_check_says_so(tmp_path: Path, capsys):
    assert run(tmp_path, tmp_path / "out", "--verify") == 1
    out = capsys.readouterr().out
    assert "no sa_<number>.jpg in" in out and "4 of 11 checks passed" in out  # those that need no picture


def test_a_fault_is_found(sa1b: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "learning_rate", lambda step, total, phase: phase.lr)
    assert run(sa1b, tmp_path, "--verify", phase1_warmup=0) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert "schedule" in line and "of the highest" in line
