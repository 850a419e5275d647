"""A training step at the released sizes: the full tracker with synthetic weights, a clip of two frames."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.processes import ROOT, environment

MEMORY_GIB = 20


@pytest.mark.slow
def test_a_step_at_full_size_fits_into_memory(tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks/bench_stage2.py"), "--no-baseline", "--frames", "2"]
    command += ["--objects", "1", "--threads", "1", "--device", "cpu", "--json", str(tmp_path / "step.json")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "step.json").read_text())
    assert (report["preset"], report["frames"], report["objects"]) == ("full", 2, 1)
    ours = report["sides"]["ours"]
    print(f"a step of 2 frames, 1 object: {ours['peak_gib']:.1f} GiB, {ours['step_s']:.0f} s")
    assert 0 < ours["peak_gib"] < MEMORY_GIB
    assert 0 < ours["loss"] < 100
    assert ours["trained"] == 6_276_928  # 3,315,520 of the Perceiver, 2,961,408 of two layers of memory attention
