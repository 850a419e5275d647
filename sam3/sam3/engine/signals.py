"""Signals that ask a run to save and stop: SIGTERM, SIGUSR1 (Slurm's warning before preemption) and Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

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


class StopAgreement:
    """Lets all processes stop at the same step once any of them got a signal, without waiting for each other.

    Each step starts a tiny all-reduce on the CPU and reads the result of the step before, which has arrived by then.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._shared = dist.is_initialized() and dist.get_world_size() > 1
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def step(self) -> int:
        """To be called once a step by every process; the signal number agreed upon, or 0 to go on."""
        if not self._shared:
            return self.signals.received
        agreed = self._collect()
        flag = torch.tensor(self.signals.received, dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (work, flag)
        return agreed

    def settle(self) -> int:
        """As `step`, but waits: includes every signal that came before the call on any process."""
        agreed = self.step()
        return max(agreed, self._collect()) if self._shared else agreed

    def _collect(self) -> int:
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        work.wait()
        return int(flag.item())
