"""The tracker's steps at the tiny size: what they must not do in a training step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sam3.model.memory_bank import MemoryBank, MemoryRecord
from sam3.model.tracker import Sam3Tracker
from sam3.model.tracker_config import TrackerConfig
from scripts.make_tiny_sam3 import make_tracker

CONFIG = TrackerConfig.preset("tiny")


class Recorded(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tracker() -> Sam3Tracker:
    return make_tracker(CONFIG, seed=3).eval().requires_grad_(False)


def test_gathering_memory_indexes_by_no_tensor(tracker: Sam3Tracker):
    """A list of numbers as index is copied to the GPU, which the host then waits for."""
    bank = MemoryBank()
    for t in range(4):
        record = MemoryRecord(torch.full((2, CONFIG.grid**2, CONFIG.mem_dim), t).bfloat16(), torch.zeros(2, CONFIG.dim),
                              torch.ones(2, 1))  # fmt: skip
        bank.add(t, record, cond=t == 0)
    with Recorded() as recorded:
        gathered = tracker.gather(bank.plan(4, 8), bank.records)
    assert "cat" in recorded.names
    assert not {"index", "_local_scalar_dense", "nonzero"} & recorded.names
    frames = gathered.positions[0, : 4 * CONFIG.grid**2].unflatten(0, (4, -1))
    assert gathered.tokens[0, : 4 * CONFIG.grid**2, 0].view(4, -1)[:, 0].tolist() == [0, 1, 2, 3]
    for row, code in enumerate((6, 2, 1, 0)):  # the prompted frame, then from old to new
        wanted = tracker.memory.positions(tracker.no_mem_embed) + tracker.maskmem_tpos_enc[code, 0]
        torch.testing.assert_close(frames[row], wanted)


def test_masks_are_enlarged_without_antialiasing(tracker: Sam3Tracker):
    """With it they would be the same; but it takes longer, and its backward pass on a GPU is not deterministic."""
    low = torch.randn(1, 1, tracker.low_side, tracker.low_side, generator=torch.Generator().manual_seed(0)) * 5
    top, side = torch.zeros(1, CONFIG.dim, CONFIG.grid, CONFIG.grid), 16 * CONFIG.grid
    with Recorded() as recorded:
        found = tracker.encode_memory(top, low.requires_grad_(), torch.ones(1, 1), from_prompt=False)
        found.sum().backward()
    assert "upsample_bilinear2d_backward" in recorded.names
    assert not [name for name in recorded.names if "bilinear2d_aa" in name]
    mask = tracker.upsample(low.detach()).sigmoid() * 20 - 10
    seen = F.interpolate(mask, (side, side), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, tracker.maskmem_backbone(top, seen))
