"""Prompts, table and refusals of scripts/evaluate_student.py; tests/stage1/test_pipeline.py runs it whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sam3.transforms import Preprocess
from scripts.evaluate_student import _prompts, main, table

FILES = ["--teacher", "none.pt", "--students", "none.pt", "--data-path", "nowhere", "--output", "out"]


@pytest.mark.parametrize(
    "flags", [["--num-images", "0"], ["--num-boxes", "-1"], ["--num-pictures", "-1"], ["--names", "a", "b"]]
)
def test_wrong_flags_exit_with_2(flags: list[str]):
    with pytest.raises(SystemExit) as stop:
        main([*FILES, *flags])
    assert stop.value.code == 2


def test_a_missing_data_set_is_named_before_any_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(FILES)


def write_annotations(path: Path, *objects: tuple[list[float], list[float] | None, float]) -> Path:
    """objects: box xywh, point, area."""
    entries = [
        {"bbox": box, "point_coords": point and [point], "area": area, "segmentation": []}
        for box, point, area in objects
    ]
    path.write_text(json.dumps({"image": {"height": 100, "width": 200}, "annotations": entries}))
    return path


def test_prompts_are_those_a_training_would_take(tmp_path: Path):
    nan = float("nan")
    path = write_annotations(
        tmp_path / "a.json",
        ([10, 20, 40, 30], [20, 30], 5),
        ([150, 60, 100, 100], [210, 70], 50),  # box beyond the edges, point outside
        ([10, 10, 0.5, 30], [10, 20], 90),  # narrower than a pixel
        ([nan, 10, 20, 30], [10, 20], 80),
        ([300, 10, 20, 30], [10, 20], 70),  # outside
        ([0, 0, 20, 10], [nan, 5], 6),
        ([0, 0, 20, 10], None, 1),
    )
    found = _prompts(path, (100, 200), Preprocess(img_size=100), 3)
    # The longer side of 200 pixels becomes 1.
    expected = torch.tensor([[0.75, 0.3, 1, 0.5], [0, 0, 0.1, 0.05], [0.05, 0.1, 0.25, 0.25]])
    assert torch.allclose(found["box"], expected)
    assert torch.allclose(found["point"], torch.tensor([[0.1, 0.15]]))
    assert found["box"].dtype == found["point"].dtype == torch.float32
    assert _prompts(tmp_path / "none.json", (100, 200), Preprocess(img_size=100), 3) == {}
    unusable = write_annotations(tmp_path / "b.json", ([10, 10, 0, 30], [10, 20], 90))
    assert [len(coords) for coords in _prompts(unusable, (100, 200), Preprocess(img_size=100), 3).values()] == [0, 0]


def test_a_damaged_annotation_file_is_named(tmp_path: Path):
    path = write_annotations(tmp_path / "bad.json", ([10, 10, 30], None, 90))
    with pytest.raises(ValueError, match=r"bad\.json is damaged"):
        _prompts(path, (100, 200), Preprocess(img_size=100), 3)


def test_columns_stay_aligned_whatever_the_names():
    figures = {
        "cosine": 0.5, "cosine_p5": 0.25, "box_iou": 0.75, "point_iou": None,
        "trunk_parameters": 4_250_000, "trunk_ms": 12.5, "file_bytes": 3 << 20,
    }  # fmt: skip
    names = ["teacher", "efficient_sam3_repvit_m_geometry, untrained"]
    lines = table([{"name": name, **figures} for name in names], {"box": 2, "point": 0}).splitlines()
    head, rule, first, second, _ = lines
    assert len({len(line) for line in lines[:4]}) == 1
    assert rule == "-" * len(head)
    assert second.startswith(f"{names[1]}   0.5000")
    assert first[len(names[1]) :] == second[len(names[1]) :]
    short = table([{"name": "teacher", **figures}], {}).splitlines()
    assert len(short[0]) == len(short[2])
