"""Runs blocks one after the other, on request without keeping what happens inside them for the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """`x` through every block in turn.

    With `recompute` and gradients on, only each block's input is kept; its inside is computed again in the backward
    pass (gradient checkpointing). Gradients and batch-norm statistics are those of the plain run.
    """
    for block in blocks:
        x = _recomputed(block, x) if recompute and torch.is_grad_enabled() else block(x)
    return x


@torch.compiler.disable  # torch.compile refuses `context_fn`; it leaves these blocks as they are
def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    contexts = contextlib.nullcontext(), _StatisticsKept(block)  # around the first and the second run
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


class _StatisticsKept:
    """Leaves running means and variances alone: the second run sees the batch that the first has already counted.

    A context manager that may be entered again: a graph may go backward more than once.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __enter__(self) -> None:
        norms = [m for m in self.block.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        self.kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(self, *error: object) -> None:
        for norm, momentum, count in self.kept:
            norm.momentum = momentum
            norm.num_batches_tracked = count
