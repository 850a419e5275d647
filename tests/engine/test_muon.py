"""Muon: what it does to a matrix, what it leaves to AdamW, and that it goes on from a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam3.engine.amp import step_unless_bad
from sam3.engine.muon import Muon, orthogonal
from sam3.engine.optim import build_optimizer, load_moments, parameter_groups


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def gradients(model: nn.Module, seed: int) -> None:
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(x).square().sum().backward()


def muon(model: nn.Module, lr: float = 0.01, weight_decay: float = 0.1) -> Muon:
    optimizer = build_optimizer("muon", parameter_groups(model, weight_decay), lr=lr)
    assert isinstance(optimizer, Muon)
    return optimizer


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_all_directions_become_about_as_large(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(*shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.5 and values.max() < 1.3


def test_it_agrees_with_torch(model):
    """On the matrices; on the rest with AdamW."""
    theirs = copy.deepcopy(model)
    hidden = [theirs[0].weight, theirs[2].weight]
    rest = [theirs[4].weight, *(layer.bias for layer in (theirs[0], theirs[2], theirs[4]))]
    other = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", ns_steps=5)
    plain = torch.optim.AdamW(
        [{"params": rest[:1], "weight_decay": 0.1}, {"params": rest[1:], "weight_decay": 0.0}], lr=0.01
    )
    ours = muon(model)
    for seed in range(3):
        for network, optimizers in ((model, [ours]), (theirs, [other, plain])):
            gradients(network, seed)
            for optimizer in optimizers:
                optimizer.step()
    for index in (0, 2):  # theirs iterates in bfloat16
        torch.testing.assert_close(model[index].weight, theirs[index].weight, atol=3e-3, rtol=0)
    torch.testing.assert_close(model[4].weight, theirs[4].weight, atol=2e-3, rtol=0)


def test_it_learns_a_map(model):
    torch.manual_seed(1)
    x = torch.randn(64, 20)
    wanted = x @ torch.randn(20, 4)
    optimizer, losses = muon(model, lr=0.02, weight_decay=1e-3), []
    for _ in range(60):
        loss = (model(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_matrices_may_learn_faster_than_the_rest(model):
    moved = []
    for factor in (1.0, 4.0):
        own = copy.deepcopy(model)
        gradients(own, 0)
        build_optimizer("muon", parameter_groups(own, 1e-6), lr=0.01, matrix_lr=factor).step()
        moved.append([(own[i].weight - model[i].weight).norm().item() for i in (2, 4)])
    assert moved[1][0] == pytest.approx(4 * moved[0][0], rel=1e-3) and moved[1][1] == pytest.approx(moved[0][1])


def test_what_goes_on_from_a_checkpoint_ends_alike(model):
    whole = muon(model)
    for seed in range(4):
        gradients(model, seed)
        whole.step()
        if seed == 1:
            saved = copy.deepcopy((model.state_dict(), whole.state_dict()))
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved[0])
    again = muon(model)
    load_moments(again, saved[1])
    for seed in (2, 3):
        gradients(model, seed)
        again.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_bad_step_changes_nothing(model):
    optimizer = muon(model)
    gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    gradients(model, 1)
    model[2].weight.grad[0, 0] = torch.nan
    step_unless_bad(optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.tensor(True))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[0][key]), key
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before[1][key][name]), (key, name)
    gradients(model, 1)
    step_unless_bad(optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.tensor(False))
    assert not torch.equal(model[2].weight, before[0]["2.weight"])
