"""Figures of scripts/evaluate_student.py by hand, and its refusals; tests/stage1/test_pipeline.py runs it whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.evaluate_student import main, mask_iou

FILES = ["--teacher", "none.pt", "--students", "none.pt", "--data-path", "nowhere", "--output", "out"]


def test_mask_iou_by_hand():
    first = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]]).bool()
    second = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]], [[1, 1, 1, 1]]]).bool()
    assert mask_iou(first, second).tolist() == pytest.approx([1 / 3, 1, 0, 0])


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
