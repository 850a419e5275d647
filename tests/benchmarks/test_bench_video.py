"""The video benchmark on the tiny preset: flat memory, and its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bench_video import made_up_video, main, tensor_bytes
from sam3.model.memory_bank import MemoryBank

SHORT = ["--frames", "320", "--size", "60", "90", "--threads", "1", "--device", "cpu"]


def test_the_video_moves_and_is_made_when_it_is_read():
    video = made_up_video(10**6, 40, 60, num_objects=2)
    assert len(video) == 10**6 and video[7].shape == (3, 40, 60)
    assert not torch.equal(video[7], video[8])
    assert video[7][:, 7, 14].tolist() == [255, 0, 60]


def test_bytes_count_each_memory_once():
    before = tensor_bytes()
    tensor = torch.zeros(1000, dtype=torch.float64)
    view = tensor[10:]
    assert tensor_bytes() - before == 8000 and len(view) == 990


def test_tensors_of_a_tracing_compiler_are_not_counted():
    before = tensor_bytes()
    with FakeTensorMode():
        traced = torch.zeros(1000)
    assert tensor_bytes() == before and traced.numel() == 1000


@pytest.mark.parametrize("argv", [["--frames", "100"], ["--objects", "0"], ["--preset", "huge"], ["--size", "0", "9"]])
def test_wrong_arguments_end_with_2(argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


@pytest.mark.slow
def test_memory_is_flat(tmp_path, capsys):
    report = tmp_path / "f.json"
    assert main([*SHORT, "--json", str(report)]) == 0
    assert "last / first: tensors 1.0000" in capsys.readouterr().out
    figures = json.loads(report.read_text())
    assert [line["frames"] for line in figures["lines"]] == [32, 80, 160, 320]
    assert figures["growth"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_memory_that_grows_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(MemoryBank, "prune", lambda self, t, num_frames: None)
    assert main(SHORT) == 1
