"""Signals that ask a run to save and stop: SIGTERM, SIGUSR1 (Slurm's warning before preemption) and Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")  # Windows has no SIGUSR1
REPEAT_S = 2.0  # a launcher and a terminal may both deliver one Ctrl-C; only a later one means "now, without saving"


class StoppedBySignal(SystemExit):
    """Raised after the run was saved because of signal `signum`; ends the process with 128 + signum."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(128 + signum)
        self.signum = signum
        self.message = message or f"stopped by {signal.Signals(signum).name}"


class StopSignals:
    """While entered, notes the first signal of NAMES in `received` instead of dying by it.

    `interrupting()` marks a stretch that may be left anywhere: there the signal raises StoppedBySignal at once.
    A second Ctrl-C, at least REPEAT_S seconds later, raises KeyboardInterrupt anywhere.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._raise_now = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for name in NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
            if self._raise_now:
                raise StoppedBySignal(number)
        elif number == signal.SIGINT and now - self._since > REPEAT_S:
            raise KeyboardInterrupt

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A stretch of work that need not be finished before the run is saved, such as validation."""
        if self.received:
            raise StoppedBySignal(self.received)
        self._raise_now = True
        try:
            yield
        finally:
            self._raise_now = False
