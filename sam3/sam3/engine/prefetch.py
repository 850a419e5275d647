"""Batches prepared by a thread while the caller computes, in memory that is used again."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 1, setup: Callable[[], None] | None = None) -> Iterator[Item]:
    """`items`, drawn by a thread that stays up to `depth` finished ones ahead.

    setup runs first in that thread. An exception there is raised here, in its place. The thread ends with the
    iteration, also if the caller leaves it early.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    left = threading.Event()

    def offer(entry: tuple[bool, Any]) -> None:
        waiting = True
        while waiting and not left.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                waiting = False

    def draw() -> None:
        try:
            if setup is not None:
                setup()
            for item in items:
                offer((True, item))
                del item  # else it would be held while the next one is made
                if left.is_set():
                    return
            offer((False, None))
        except BaseException as error:  # raised again in the caller's thread
            offer((False, error))

    thread = threading.Thread(target=draw, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                break
            yield item
            del item
        if item is not None:
            raise item
    finally:
        # An exception that is a variable of the frame it passed through is a cycle, and a DataLoader that only the
        # garbage collector frees cannot tell its workers to end.
        item = None
        left.set()
        thread.join()


class ReusedMemory:
    """Pageable memory for batches that is handed out again once no tensor uses it.

    Fresh memory has to be zeroed and mapped page by page, which takes longer than reading a record into it. Whether
    a piece is free is known from the life of the array that its tensors hold, so a batch may be kept for any time.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, num_bytes: int) -> Tensor:
        """uint8 `(num_bytes,)` with arbitrary content."""
        fitting = None
        for i, (array, user) in enumerate(self._pieces):
            if user() is None and len(array) >= num_bytes:
                fitting = array
                del self._pieces[i]
                break
        if fitting is None:
            self._pieces = [piece for piece in self._pieces if piece[1]() is not None]  # drops the too small ones
            fitting = np.empty(num_bytes, dtype=np.uint8)  # in huge pages, which numpy asks for and torch does not
        view = fitting[:num_bytes]
        self._pieces.append((fitting, weakref.ref(view)))
        return torch.from_numpy(view)
