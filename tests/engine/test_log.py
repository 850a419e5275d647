from __future__ import annotations

import json
import logging
import re
import sys
import time

import pytest
import torch

from sam3.engine import log
from sam3.engine.log import MetricLog, duration, progress


@pytest.fixture(autouse=True)
def restored():
    """The loggers as they were."""
    logger = logging.getLogger("sam3")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_process_has_a_file_and_the_first_the_console(tmp_path, capsys):
    for _ in range(2):  # appended
        for rank in (0, 1):
            log.setup(tmp_path, rank).info(f"from {rank}")
            logging.getLogger("sam3.sub").debug(f"detail {rank}")
    out = capsys.readouterr().out
    assert out.count("from 0") == 2
    assert "from 1" not in out
    assert "detail" not in out
    text = (tmp_path / "log_rank1.txt").read_text()
    assert (text.count("from 1"), text.count("detail 1"), text.count("from 0")) == (2, 2, 0)


def test_metrics_are_json_lines(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as metrics:
        metrics.scalars(3, {"train/loss": 1.5, "bad": float("nan")})
        metrics.image(3, "picture", torch.zeros(3, 2, 2, dtype=torch.uint8))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["train/loss"], line["bad"]) == (3, 1.5, None)
    assert abs(line["time"] - time.time()) < 60


def test_numbers_may_have_other_names_and_units(tmp_path):
    tags = {"step_ms": [("step_s", 1e-3)], "loss": [("weighted", 1), ("raw", 0.5)]}
    with MetricLog(tmp_path, tensorboard=False, tags=tags) as metrics:
        metrics.scalars(3, {"step_ms": 1500.0, "loss": 4.0, "lr": 0.1})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert {k: v for k, v in line.items() if k != "time"} == {
        "step": 3, "step_s": 1.5, "weighted": 4.0, "raw": 2.0, "lr": 0.1,
    }  # fmt: skip


def test_the_main_process_may_have_another_file(tmp_path):
    for rank in (0, 1):
        log.setup(tmp_path, rank, "train.log").info(f"from {rank}")
    assert {path.name for path in tmp_path.iterdir()} == {"train.log", "log_rank1.txt"}
    assert "from 0" in (tmp_path / "train.log").read_text()


def test_resuming_drops_lines_that_will_come_again(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as metrics:
        for step in (10, 20, 30):
            metrics.scalars(step, {"a": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "a"')  # cut by a kill
    with MetricLog(tmp_path, tensorboard=False, resume_step=21) as metrics:
        metrics.scalars(30, {"a": 2.0})
    assert [(line["step"], line["a"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
    ]


def test_tensorboard_events_lie_below_date_and_time(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLog(tmp_path) as metrics:
        metrics.scalars(4, {"train/loss": 0.25})
        metrics.image(4, "maps", torch.full((3, 4, 5), 200, dtype=torch.uint8))
    (events,) = tmp_path.glob("*/*/events.*")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", str(events.parent.relative_to(tmp_path)))
    board = EventAccumulator(str(events.parent)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(4, 0.25)]
    assert (board.Images("maps")[0].height, board.Images("maps")[0].width) == (4, 5)


def test_tensorboard_events_in_a_folder_of_their_own(tmp_path):
    pytest.importorskip("tensorboard")
    with MetricLog(tmp_path, tensorboard_folder="tensorboard") as metrics:
        metrics.scalars(4, {"train/loss": 0.25})
    assert [path.parent for path in tmp_path.glob("**/events.*")] == [tmp_path / "tensorboard"]


def test_nothing_is_written_where_it_is_not_enabled(tmp_path):
    with MetricLog(tmp_path / "out", enabled=False) as metrics:
        metrics.scalars(1, {"a": 1.0})
        metrics.image(1, "b", torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("wandb", {"wandb_project": "x", "tensorboard": False}, "wandb was asked for, but is not installed"),
        ("torch.utils.tensorboard", {}, "TENSORBOARD is True, but tensorboard is not installed"),
    ],
)
def test_asked_for_but_absent(tmp_path, monkeypatch, module, options, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        MetricLog(tmp_path, **options)


def test_progress_as_lines(monkeypatch, capsys):
    log.setup()
    clock = iter(range(100))
    monkeypatch.setattr(log.time, "monotonic", lambda: float(next(clock)))
    batches = [[1, 2], [3, 4], [5, 6], [7]]
    passed = list(progress(batches, desc="export", unit="images", total=7, count=len, interval_s=2.0))
    assert passed == batches
    text = capsys.readouterr().out
    assert "export: 4/7 images (57.1%), 2 images/s, ETA 0:00:02" in text
    assert "export: 7/7 images (100.0%)" in text
    assert text.rstrip().endswith("finished")


def test_progress_counts_items_and_takes_what_has_no_length(capsys):
    log.setup()
    assert list(progress(range(3), desc="a", unit="files")) == [0, 1, 2]
    assert list(progress(iter([1]), desc="b", unit="files")) == [1]
    text = capsys.readouterr().out
    assert "a: 3/3 files (100.0%)" in text
    assert "b: 1 files" in text


def test_progress_as_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress([[1, 2], [3]], desc="export", unit="images", total=3, count=len)) == [[1, 2], [3]]
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(3725, "1:02:05"), (0, "0:00:00"), (200000, "2 d 7:33:20")])
def test_duration(seconds, text):
    assert duration(seconds) == text
