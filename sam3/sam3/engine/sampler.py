"""Which samples make up each batch: seeded, split over processes, and able to start anywhere inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[list[int]]):
    """A batch sampler: yields this process's lists of indices, for `DataLoader(batch_sampler=...)`.

    Epoch e goes through one permutation of 0..num_samples-1, seeded by (seed, e), the same on all processes; with R
    processes, process r takes every R-th entry. How far an epoch has come is one number, `consumed`: entries of the
    permutation that all processes have used together. Iterating starts there, so that a resumed run loads nothing
    twice, and may have another number of processes or another batch size.

    drop_last: leave out the last entries that do not fill a batch on every process. Otherwise the last batch is
    smaller, and with `padding` the permutation is extended from its start so that all processes get equally many
    entries (collectives in the loop over batches need that); without, each entry occurs exactly once.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        padding: bool = True,
    ) -> None:
        if num_samples < 1:
            raise ValueError("the data set is empty")
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        if drop_last and num_samples < batch_size * world_size:
            raise ValueError(
                f"a batch of {batch_size} on each of {world_size} processes needs {batch_size * world_size} samples, "
                f"but the data set has {num_samples}; lower the batch size (--batch-size)"
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.drop_last, self.padding = shuffle, seed, drop_last, padding
        self.epoch = 0
        self.consumed = 0

    @property
    def global_batch(self) -> int:
        """Samples that all processes together take with one batch each."""
        return self.batch_size * self.world_size

    def set_position(self, epoch: int, consumed: int = 0) -> None:
        """Where the next `iter()` starts. An iterator that is under way is not moved."""
        self.epoch, self.consumed = epoch, consumed

    def advance(self, batches: int = 1) -> None:
        """Note that every process has used `batches` more batches."""
        self.consumed = min(self.consumed + batches * self.global_batch, self.num_samples)

    def batches_per_epoch(self) -> int:
        """Batches of this process in a whole epoch."""
        return self._num_batches(self.num_samples)

    def __len__(self) -> int:
        """Batches of this process that are left in the epoch."""
        return self._num_batches(self.num_samples - self.consumed)

    def _num_batches(self, samples: int) -> int:
        if self.drop_last:
            return samples // self.global_batch
        if self.padding:
            own = -(-samples // self.world_size)
        else:
            own = max(0, -(-(samples - self.rank) // self.world_size))
        return -(-own // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rest = self.permutation()[self.consumed :]
        if not self.drop_last and self.padding and len(rest) % self.world_size:
            missing = self.world_size - len(rest) % self.world_size
            rest = torch.cat([rest, self.permutation().repeat(missing)[:missing]])
        own = rest[self.rank :: self.world_size]
        for i in range(self._num_batches(self.num_samples - self.consumed)):
            yield own[i * self.batch_size : (i + 1) * self.batch_size].tolist()

    def permutation(self) -> torch.Tensor:
        """Order of the whole epoch, `(num_samples,)` int64."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(self.num_samples, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Position, and what the order depends on."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a position; ValueError if the order would not be the one in which it was counted."""
        for name in ("num_samples", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's epochs go over {name} {state[name]}, this run's over {getattr(self, name)}; "
                    "restore the data set or seed, or start anew in another --output"
                )
        self.set_position(int(state["epoch"]), int(state["consumed"]))
