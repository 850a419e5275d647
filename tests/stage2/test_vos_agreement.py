"""How well the masks of several models agree with the first one's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage2 import evaluate_vos
from tests.stage2.vos import LOWER, NOTHING, UPPER, nothing, rectangle, run, tell, write_davis, write_sav

FIRST, SECOND = rectangle(15, 5), rectangle(28, 30)  # the teacher's masks; of the truth FIRST has no pixel


def teacher(name: str, number: int, row: int) -> np.ndarray:
    return SECOND if row else FIRST


def student(name: str, number: int, row: int) -> np.ndarray:
    """Wrong where it does not count: in the first and the last frame of an object."""
    if name == "a":
        return {4: FIRST, 8: rectangle(15, 15)}.get(number, NOTHING)  # 1, 1/3 and 0 in frames 4, 8 and 12
    if row == 0:
        return FIRST if 4 <= number <= 12 else NOTHING
    return {8: SECOND, 12: rectangle(28, 30, 5)}.get(number, NOTHING)  # 1 and 1/2


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    return partial(tell, monkeypatch)


@pytest.fixture
def late(tmp_path: Path) -> Path:
    """Video a with one object, b with another that comes late, so that only frames 8 and 12 are scored."""
    stays = dict.fromkeys(range(0, 17, 4), UPPER)
    comes = {0: NOTHING, **dict.fromkeys(range(4, 17, 4), LOWER)}
    return write_sav(tmp_path / "late", {"a": [stays], "b": [stays, comes]})


AGREEMENT_A, AGREEMENT_B = (1 + 1 / 3 + 0) / 3, (1 + (1 + 1 / 2) / 2) / 2
TWO = ("--names", "teacher", "student")


def agreements(results: dict[str, Any]) -> list[tuple[float | None, int]]:
    return [(row["agreement"], row["num_agreement_videos"]) for row in results["models"]]


def printed_table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The cells of the last table, heading first."""
    head, _, *lines = capsys.readouterr().out.split("\nmodel ")[-1].splitlines()
    return [line.split() for line in ("model " + head, *lines)]


def test_agreement(teacher_file: Path, late: Path, tmp_path: Path, told, capsys: pytest.CaptureFixture[str]):
    told(teacher=teacher, student=student)
    files, output = [teacher_file, teacher_file], tmp_path / "out"
    code, results = run(files, late, output, *TWO, "--save-masks")
    assert code == 0 and results["models"][0]["videos"]["a"]["objects"]["000"]["j"] == 0, "the truth has no part in it"
    assert agreements(results) == [(1, 2), (pytest.approx((AGREEMENT_A + AGREEMENT_B) / 2), 2)]
    student_videos = results["models"][1]["videos"]
    assert student_videos["a"]["agreement"] == pytest.approx(AGREEMENT_A)
    assert student_videos["b"]["agreement"] == pytest.approx(AGREEMENT_B)
    head, *rows = printed_table(capsys)
    assert head[-4:] == ["agreement", "FPS", "videos", "objects"]
    assert [row[7] for row in rows[:2]] == ["100.0", "66.0"], "95/144"
    note = "agreement is J against the masks of teacher; videos with masks of both: student: 2"
    assert note in map(" ".join, rows)

    made = told(teacher=nothing, student=nothing)
    assert run(files, late, output, *TWO) == (0, results) and made == [], "going on gives the same"
    assert run(files[:1], late, output, "--names", "teacher")[1]["models"] == results["models"][:1]
    assert "agreement" not in printed_table(capsys)[0], "nothing to compare with"


def test_agreement_in_davis(teacher_file: Path, tmp_path: Path, told):
    data = write_davis(tmp_path / "data", {"a": [UPPER, LOWER]})
    told(teacher=teacher, student=lambda name, number, row: rectangle(28, 30, 5) if row else FIRST)
    flags = (*TWO, "--layout", "davis", "--save-masks")
    _, results = run([teacher_file, teacher_file], data, tmp_path / "out", *flags)
    assert agreements(results) == [(1, 1), (pytest.approx(3 / 4), 1)]


def test_agreement_only_where_both_kept_masks(teacher_file: Path, late: Path, tmp_path: Path, told, capsys):
    told(teacher=teacher, student=student)
    files, output = [teacher_file, teacher_file], tmp_path / "out"
    assert agreements(run(files, late, output, *TWO)[1]) == [(None, 0), (None, 0)]
    assert "agreement" not in printed_table(capsys)[0]

    run(files[0], late, output, "--names", "teacher", "--save-masks")
    _, results = run(files, late, output, *TWO, "--overlays", 1)
    assert agreements(results) == [(1, 2), (pytest.approx(AGREEMENT_A), 1)]

    shutil.rmtree(output / "teacher/Annotations_6fps/a")
    assert agreements(run(files, late, output, *TWO)[1]) == [(1, 1), (None, 0)]
    assert "agreement" not in printed_table(capsys)[0]


def test_agreement_of_three(teacher_file: Path, late: Path, tmp_path: Path, told, capsys):
    """The last has no masks; of the second's one is damaged."""
    told(teacher=teacher, student=student, bare=student)
    output, names = tmp_path / "out", (*TWO, "bare")
    run([teacher_file] * 2, late, output, *TWO, "--save-masks")
    (output / "student/Annotations_6fps/b/001/00012.png").write_bytes(b"no picture")
    code, results = run([teacher_file] * 3, late, output, "--names", *names[1:])
    assert code == 1 and agreements(results) == [(1, 2), (pytest.approx(AGREEMENT_A), 1), (None, 0)]
    (failure,) = results["failures"]
    assert failure["what"] == "masks of b with student" and "00012.png is damaged" in failure["reason"]
    assert [row[7] for row in printed_table(capsys)[1:4]] == ["100.0", "44.4", "-"]


def test_masks_of_other_options_are_not_compared(
    teacher_file: Path, late: Path, tmp_path: Path, told, monkeypatch: pytest.MonkeyPatch
):
    """An old result does not vouch for masks that were half replaced."""
    told(teacher=teacher, student=student)
    files, output = [teacher_file, teacher_file], tmp_path / "out"
    _, first = run(files, late, output, *TWO, "--save-masks")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_vos, "save_masks", fail)
        code, _ = run(files, late, output, *TWO, "--save-masks", "--prompt", "box")
    assert code == 1
    made = told(teacher=teacher, student=teacher)
    _, results = run(files, late, output, *TWO, "--save-masks")
    assert len(made) == 2 and agreements(results) == [(1, 2), (1, 2)] != agreements(first)
