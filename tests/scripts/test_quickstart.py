"""scripts/quickstart.sh as a user runs it: what each stage is for, held against scenes and clips of no training."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.make_report import CLEARLY, MEMORY_LOSS, merged_rows, statements

ROOT = Path(__file__).parent.parent.parent
TEACHER = {"text_iou": 0.65, "box_iou": 0.75, "click_iou": 0.75, "rejected": 0.85, "jf": 0.75}  # at least


Rows = dict[str, dict[str, Any]]


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


@pytest.fixture(scope="module")
def rows(quickstart: tuple[Path, str]) -> Rows:
    """Figures of all models, by name."""
    found = {row["name"]: row for row in merged_rows(quickstart[0])}
    print("\n".join(f"{'yes' if holds else 'no'}: {text}" for holds, text in statements(found)))
    return found


def test_a_folder_of_others_stays(tmp_path: Path):
    (tmp_path / "mine").write_text("kept")
    script = ["bash", str(ROOT / "scripts/quickstart.sh")]
    done = subprocess.run(script, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{tmp_path} is there and is no quickstart's" in done.stderr
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/efficientsam3.stamp").exists(), reason="needs the .venv of scripts/setup_env.sh")
class TestQuickstart:
    def test_stage_1_beats_the_untrained_student(self, rows: Rows):
        before, after = rows["Stage 1, untrained"], rows["Stage 1"]
        assert after["cosine"] > before["cosine"] + 0.6
        assert after["text_iou"] > before["text_iou"]
        assert after["text_taught_any_iou"] > before["text_taught_any_iou"] + 0.3
        assert after["box_iou"] > before["box_iou"] + 0.4
        assert after["click_iou"] > before["click_iou"] + 0.25

    def test_geometry_fine_tuning_improves_boxes(self, rows: Rows):
        assert rows["Stage 1 + geometry"]["box_iou"] > rows["Stage 1"]["box_iou"]

    def test_the_compressed_memory_comes_near_the_dense_one(self, rows: Rows):
        assert rows["teacher, memory"]["jf"] > rows["teacher"]["jf"] - MEMORY_LOSS
        assert rows["teacher, memory"]["jf"] > rows["teacher, memory, untrained"]["jf"] + 2 * CLEARLY

    def test_the_distilled_student_beats_the_untrained_one(self, rows: Rows):
        before, after = (rows[name]["text_taught_any_iou"] for name in ("distilled, untrained", "distilled"))
        assert after > before + CLEARLY

    def test_the_teacher_segments_and_tracks(self, rows: Rows):
        for key, least in TEACHER.items():
            assert rows["teacher"][key] > least, key

    def test_it_ends_with_a_table_a_page_and_pictures(self, quickstart: tuple[Path, str]):
        output, printed = quickstart
        assert re.search(r"^Stage 1 \+ geometry +0\.\d{3} ", printed, re.MULTILINE)
        assert "missing" not in printed.rsplit("done in", 1)[1]
        assert "distilled" in (output / "report.html").read_text()
        assert Image.open(output / "prediction.png").format == "PNG"
        assert Image.open(output / "prompts/prompts.png").format == "PNG"
