"""scripts/quickstart.sh as a user runs it, with a short training."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from sam3.sam1_files import load_sam1

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/efficientsam3.stamp").exists(), reason="needs the .venv of scripts/setup_env.sh")
def test_quickstart_ends_with_a_table_and_pictures(tmp_path: Path):
    output = tmp_path / "quickstart"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh")],
        cwd=tmp_path,
        env={**os.environ, "OUT": str(output), "EPOCHS": "4", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ES-EV-S, untrained" in done.stdout and "6. train a student" in done.stdout
    assert Image.open(output / "evaluation.png").width == 5 * 320  # photo, teacher, student before, after, tuned
    assert Image.open(output / "prediction.png").format == "PNG"
    assert "11 of 11 checks passed" in done.stdout
    assert Image.open(output / "distilled_prediction.png").format == "PNG"
    assert len(load_sam1(output / "prompt_distillation/mobile_sam.pt", "vit_t").state_dict()) == 439
    _, before, after, tuned = json.loads((output / "evaluation.json").read_text())["models"]
    assert after["cosine"] > before["cosine"] + 0.2
    assert tuned["cosine"] > before["cosine"] + 0.2
