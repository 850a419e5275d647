from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sam3.engine.config import load_config, shared_defaults
from sam3.engine.optim import (
    build_optimizer,
    build_schedule,
    lr_scale,
    optimizer_from_config,
    parameter_groups,
    schedule_from_config,
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.zeros(2, 3))
        self.rel_table = nn.Parameter(torch.zeros(2, 3))
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def no_weight_decay(self):
        return {"biases"}

    def no_weight_decay_keywords(self):
        return {"rel_"}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.layers = nn.Sequential(Attention())


def test_parameter_groups():
    model = Model()
    decayed, free = parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {"linear.weight", "layers.0.weight"}
    assert {names[id(p)] for p in free["params"]} == {
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "layers.0.biases",
        "layers.0.rel_table",
    }


def test_nothing_trainable():
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_step_as_torchs_plain_ones(name):
    ours, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    first = build_optimizer(name, parameter_groups(ours, 0.1), lr=0.1, betas=(0.8, 0.9), eps=1e-6, momentum=0.7)
    groups = parameter_groups(plain, 0.1)
    if name == "adamw":
        second = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    else:
        second = torch.optim.SGD(groups, lr=0.1, momentum=0.7, nesterov=True, foreach=False)
    for _ in range(3):
        for model, optimizer in ((ours, first), (plain, second)):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_unknown_names():
    with pytest.raises(ValueError, match="optimizer 'lion' is unknown; choose adamw, muon or sgd"):
        build_optimizer("lion", [], lr=1.0)
    with pytest.raises(ValueError, match="schedule 'poly' is unknown; choose one of cosine, linear, step"):
        build_schedule("poly", base_lr=1.0, total_steps=1)


def test_linear_scaling():
    assert lr_scale(64, 8) == 1.0
    assert lr_scale(32, 8) == 0.5
    assert lr_scale(4, 1) == 4 / 512
    assert lr_scale(4, 1, accumulation=8) == 32 / 512


def test_cosine_counts_from_the_start():
    """W = 5, T = 50: at W the rate is not base, but min + (base - min) (1 + cos(0.1 pi)) / 2 = 0.97553 base + ..."""
    lr_at = build_schedule("cosine", base_lr=1.0, total_steps=50, warmup_steps=5, warmup_lr=0.1, min_lr=0.0)
    assert lr_at(0) == 0.1
    assert lr_at(4) == pytest.approx(0.1 + 4 * 0.9 / 5)
    assert lr_at(5) == pytest.approx(0.9755282581)
    assert lr_at(25) == pytest.approx(0.5)
    assert lr_at(50) == pytest.approx(0.0)
    assert lr_at(500) == pytest.approx(0.0)


def test_cosine_from_warmup():
    lr_at = build_schedule("cosine", base_lr=1.0, total_steps=50, warmup_steps=10, min_lr=0.2, cosine_from_warmup=True)
    assert lr_at(0) == 0.0
    assert lr_at(10) == pytest.approx(1.0)
    assert lr_at(30) == pytest.approx(0.6)
    assert lr_at(50) == pytest.approx(0.2)


def test_linear_ends_at_a_hundredth():
    lr_at = build_schedule("linear", base_lr=2.0, total_steps=50, warmup_steps=10, warmup_lr=1.0)
    assert [lr_at(t) for t in (0, 5, 10)] == [1.0, 1.5, 2.0]
    assert lr_at(30) == pytest.approx(2 * (1 - 0.99 / 2))
    assert lr_at(50) == pytest.approx(0.02)
    assert lr_at(60) == pytest.approx(0.02)


def test_step_decays_at_multiples():
    lr_at = build_schedule("step", base_lr=1.0, total_steps=100, decay_steps=30, decay_rate=0.1)
    assert [lr_at(t) for t in (0, 29, 30, 59, 60)] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_schedules_that_cannot_be():
    with pytest.raises(ValueError, match="warm-up of 6 steps does not fit into 5"):
        build_schedule("cosine", base_lr=1.0, total_steps=5, warmup_steps=6)
    with pytest.raises(ValueError, match="decay_steps of at least 1"):
        build_schedule("step", base_lr=1.0, total_steps=5, decay_steps=0)


def test_from_config():
    opts = "TRAIN.EPOCHS 50 TRAIN.WARMUP_EPOCHS 5 TRAIN.BASE_LR 1e-3 TRAIN.WARMUP_LR 1e-6 TRAIN.MIN_LR 1e-5"
    config = load_config(shared_defaults(), opts=opts.split())
    lr_at = schedule_from_config(config, steps_per_epoch=10, scale=0.5)
    assert lr_at(0) == 0.5e-6
    assert lr_at(50) == pytest.approx(0.5 * (1e-5 + 0.99e-3 * (1 + math.cos(0.1 * math.pi)) / 2))
    assert lr_at(500) == pytest.approx(0.5e-5)
    short = load_config(config, opts=["TRAIN.MAX_STEPS", "100"])
    assert schedule_from_config(short, 10)(100) == pytest.approx(1e-5)
    optimizer = optimizer_from_config(config, nn.Linear(2, 2), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_parts_may_have_a_learning_rate_of_their_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def lr_scales(self):
            return {"trunk.": 0.25}

    model = Model()
    groups = parameter_groups(model, 0.1)
    found = [(group["weight_decay"], group.get("lr_scale"), group["params"][0]) for group in groups]
    expected = [
        *((0.1, None, model.head.weight), (0.0, None, model.head.bias)),
        *((0.1, 0.25, model.trunk.weight), (0.0, 0.25, model.trunk.bias)),
    ]
    assert all(ours[:2] == theirs[:2] and ours[2] is theirs[2] for ours, theirs in zip(found, expected, strict=True))
