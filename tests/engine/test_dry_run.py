"""Timing of a few steps, with a clock that stands still unless a step moves it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from sam3.engine import dry_run
from sam3.engine.dry_run import repeated, seconds_per_iteration

CPU = torch.device("cpu")


class Clock:
    """Each step takes the next of `durations`."""

    def __init__(self, durations: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.durations, self.steps = 0.0, iter(durations), 0
        monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def step(self, batch: object) -> None:
        self.now += next(self.durations)
        self.steps += 1


@pytest.mark.parametrize(
    ("durations", "batches", "mean", "steps"),
    [
        ([9, 1, 2, 3, 4, 5, 6], 100, 3, 6),  # the warm-up is left out, then five
        ([9, 2, 4], 3, 3, 3),
        ([9], 1, 9, 1),
        ([20, 11, 1], 3, 11, 2),  # none begins after 30 s
    ],
)
def test_mean_of_a_few_steps(monkeypatch: pytest.MonkeyPatch, durations, batches: int, mean: float, steps: int):
    clock = Clock(durations, monkeypatch)
    assert seconds_per_iteration(range(1, batches + 1), clock.step, CPU) == mean
    assert clock.steps == steps


def test_nothing_to_time():
    with pytest.raises(ValueError, match="no batch could be loaded"):
        seconds_per_iteration([], print, CPU)


def test_repeated_passes_over_empty_batches_and_ends_if_all_are():
    assert list(itertools.islice(repeated([[1], [], [2]]), 5)) == [[1], [2], [1], [2], [1]]
    assert list(repeated([[], []])) == []
