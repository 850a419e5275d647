"""Following objects: what is computed, and what a step keeps until the backward pass."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sam3.model.tracker import FrameFeatures, Sam3Tracker
from sam3.model.tracker_config import TINY_MEMORY
from stage2 import rollout
from tests.stage2.clips import distiller, make_batch

TWO_CLIPS = [["mask", "box"], ["click"]]


@pytest.mark.parametrize("share_memory", [False, True])
def test_nothing_is_remembered_of_the_last_frame(monkeypatch, share_memory: bool):
    calls = []
    for name in ("encode_memory", "remember"):
        method = getattr(Sam3Tracker, name)
        monkeypatch.setattr(
            Sam3Tracker, name, lambda *a, _name=name, _method=method, **k: (calls.append(_name), _method(*a, **k))[1]
        )
    distiller(share_memory=share_memory)(make_batch(TWO_CLIPS, num_frames=4))
    followers = 1 if share_memory else 2  # by their own masks; frame 0, then frames 1 and 2
    assert calls.count("encode_memory") == 1 + followers * 2
    assert calls.count("remember") == 2 * 3


def test_recomputing_keeps_neither_copies_for_each_object_nor_what_the_perceiver_computed(monkeypatch):
    kept, runs = [], []
    select = FrameFeatures.select

    def watched(self: FrameFeatures, rows) -> FrameFeatures:
        features = select(self, rows)
        kept.extend(weakref.ref(maps) for maps in (features.s0, features.s1, features.top))
        return features

    monkeypatch.setattr(FrameFeatures, "select", watched)
    model = distiller(recompute=True)
    model.spatial_perceiver.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    loss = model(make_batch(TWO_CLIPS, num_frames=4))["total"]
    gc.collect()
    assert kept
    assert not [maps for maps in kept if maps() is not None]
    assert len(runs) == 3
    loss.backward()
    assert len(runs) == 6


def test_features_of_a_single_clip_are_shared():
    model = distiller()
    clip = model.rollout.start(make_batch([["mask", "box", "click"]]))
    assert all(clip.features(t) is clip.frames[t] for t in range(3))
    apart = model.rollout.start(make_batch(TWO_CLIPS))
    assert torch.equal(apart.features(1).s0, apart.frames[1].s0[[0, 0, 1]])


def test_recomputing_tells_torch_the_device(monkeypatch):
    """torch restores random numbers and autocast of the devices of the tensors it is handed, not of those inside
    objects: with dropout, or autocast on MPS, the backward pass would be of another function."""
    handed = []

    def spy(function, *args, **options):
        handed.append([leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)])
        return checkpoint(function, *args, **options)

    monkeypatch.setattr(rollout, "checkpoint", spy)
    model = distiller(replace(TINY_MEMORY, dropout=0.5), recompute=True)
    model(make_batch(TWO_CLIPS))["total"].backward()
    assert len(handed) == 4  # two frames followed, two remembered
    assert all(handed)


def test_recomputing_draws_the_same_dropout():
    gradients = []
    for recompute in (False, True):
        model = distiller(replace(TINY_MEMORY, dropout=0.5), recompute=recompute)
        torch.manual_seed(7)
        model(make_batch(TWO_CLIPS))["total"].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
