"""The thread that prepares batches, and the memory it uses again."""

from __future__ import annotations

import threading

import pytest
import torch

from sam3.engine.prefetch import ReusedMemory, prefetch


def test_items_come_in_order_and_the_thread_ends():
    before = threading.active_count()
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))
    assert list(prefetch(iter([]))) == []
    assert threading.active_count() == before


def test_at_most_depth_and_one_are_made_ahead():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    running = prefetch(items(), depth=2)
    for i in running:
        assert len(made) <= i + 1 + 2 + 1


def test_errors_arrive_in_their_place():
    def items():
        yield 1
        raise ValueError("second is broken")

    running = prefetch(items())
    assert next(running) == 1
    with pytest.raises(ValueError, match="second is broken"):
        next(running)

    def refuse():
        raise OSError("no device")

    with pytest.raises(OSError, match="no device"):
        next(prefetch(iter([1]), setup=refuse))


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    running = prefetch(iter(range(1000)))
    assert next(running) == 0
    running.close()
    assert threading.active_count() == before


def test_memory_is_reused_only_when_nobody_holds_it():
    memory = ReusedMemory()
    first = memory.take(64)
    address = first.data_ptr()
    view = first.view(torch.float16)[2:4]
    second = memory.take(64)
    assert second.data_ptr() != address
    del first
    assert memory.take(64).data_ptr() != address  # the view still lives
    view.fill_(1)
    del view
    smaller = memory.take(40)
    assert smaller.data_ptr() == address
    assert len(smaller) == 40
    del smaller
    assert len(memory.take(200)) == 200
