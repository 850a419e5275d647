"""All processes of a run stop at the same step, whichever of them got a signal."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sam3.engine.signals import StopSignals


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
