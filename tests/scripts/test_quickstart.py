"""scripts/quickstart.sh as a user runs it: what each stage is for, held against scenes and clips of no training."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from scripts.make_report import merged_rows, statements

ROOT = Path(__file__).parent.parent.parent
TEACHER = {"text_iou": 0.5, "box_iou": 0.6, "click_iou": 0.6, "rejected": 0.8, "jf": 0.6}  # at least


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its output folder and what it printed."""
    place = tmp_path_factory.mktemp("quickstart")
    folders = {"OUT": place / "out", "DATA": place / "scenes", "VIDEOS": place / "videos"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh")],
        cwd=place,
        env={**os.environ, **{name: str(path) for name, path in folders.items()}},
        capture_output=True,
        text=True,
        timeout=2700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "out", done.stdout


def test_a_folder_of_others_stays(tmp_path: Path):
    (tmp_path / "mine").write_text("kept")
    script = ["bash", str(ROOT / "scripts/quickstart.sh")]
    done = subprocess.run(script, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{tmp_path} is there and is no quickstart's" in done.stderr
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/efficientsam3.stamp").exists(), reason="needs the .venv of scripts/setup_env.sh")
class TestQuickstart:
    def test_each_stage_does_what_it_is_for(self, quickstart: tuple[Path, str]):
        rows = {row["name"]: row for row in merged_rows(quickstart[0])}
        claims = statements(rows)
        print("\n".join(f"{'yes' if holds else 'NO'}: {text}" for holds, text in claims))
        assert len(claims) == 5  # Stage 1, geometry, memory trained and against the dense one, distillation
        assert all(holds for holds, _ in claims), claims

    def test_the_teacher_segments_and_tracks(self, quickstart: tuple[Path, str]):
        teacher = next(row for row in merged_rows(quickstart[0]) if row["name"] == "teacher")
        for key, least in TEACHER.items():
            assert teacher[key] > least, key

    def test_it_ends_with_a_table_a_page_and_pictures(self, quickstart: tuple[Path, str]):
        output, printed = quickstart
        assert re.search(r"^Stage 1 \+ geometry +0\.\d{3} ", printed, re.MULTILINE)
        assert "missing" not in printed.rsplit("done in", 1)[1]
        assert "distilled" in (output / "report.html").read_text()
        assert Image.open(output / "prediction.png").format == "PNG"
        assert Image.open(output / "prompts/prompts.png").format == "PNG"
