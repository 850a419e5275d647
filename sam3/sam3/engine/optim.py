"""Parameter groups, optimizers and learning-rate schedules."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam3.engine.muon import Muon

log = logging.getLogger("sam3.optim")

LrAt = Callable[[int], float]
REFERENCE_BATCH = 512  # the configured learning rates are meant for this many samples per optimizer step


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters, with and without weight decay.

    Parts that the model names in `lr_scales()` (prefix of names -> factor) have groups of their own, with an
    `lr_scale`. Without weight decay: vectors and scalars (norms, biases), names ending in `.bias`, and what any
    submodule names in `no_weight_decay()` (names relative to it) or `no_weight_decay_keywords()` (parts of names).
    Raises ValueError if nothing is trainable.
    """
    exempt = _exempt_names(model)
    scales = model.lr_scales() if hasattr(model, "lr_scales") else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for scale in (1.0, *scales.values()):
        groups |= {(scale, free): [] for free in (False, True)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            scale = next((scales[prefix] for prefix in scales if name.startswith(prefix)), 1.0)
            groups[scale, free].append(parameter)
    if not any(groups.values()):
        raise ValueError("no parameter of the model is trainable")
    return [
        {"params": own, "weight_decay": 0.0 if free else weight_decay, **({} if scale == 1 else {"lr_scale": scale})}
        for (scale, free), own in groups.items()
        if own
    ]


def _exempt_names(model: nn.Module) -> set[str]:
    names = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if callable(listed := getattr(module, "no_weight_decay", None)):
            names |= {f"{prefix}{name}" for name in listed()}
        if callable(listed := getattr(module, "no_weight_decay_keywords", None)):
            keywords = tuple(listed())
            names |= {
                f"{prefix}{name}"
                for name, _ in module.named_parameters()
                if any(keyword in name for keyword in keywords)
            }
    return names


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    matrix_lr: float = 1.0,
) -> torch.optim.Optimizer:
    """`adamw`, `muon` (see `sam3.engine.muon`), or `sgd` with Nesterov momentum; all can skip a step with bad gradients
    without a look at them."""
    if name == "muon":
        return Muon(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, matrix_lr=matrix_lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum:
            # Zeros give the first step of an empty state; but a first step that is skipped would leave torch's
            # fused SGD with buffers never written.
            for parameter in (p for group in groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    raise ValueError(f"optimizer {name!r} is unknown; choose adamw, muon or sgd")


def load_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over what a checkpoint's optimizer has gathered; weight decay and the like stay this run's.

    Raises ValueError if it is another model's.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(copy.deepcopy(state))  # a copy: a checkpoint's tensors are views of the file
    except ValueError as error:
        raise ValueError(f"the checkpoint's optimizer state does not fit the model: {error}") from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """L2 norm of all gradients together, which are scaled down to `limit` if above it; 0 sets none."""
    if limit:
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def lr_scale(batch_size: int, world_size: int, accumulation: int = 1) -> float:
    """Linear scaling: samples per optimizer step over REFERENCE_BATCH. 64 x 8 -> 1; 4 x 1 -> 0.0078. Logged."""
    samples = batch_size * world_size * accumulation
    scale = samples / REFERENCE_BATCH
    log.info(
        f"learning rates x {scale:.4g}: {samples} samples per step ({batch_size} x {world_size} processes x "
        f"{accumulation} accumulated) / {REFERENCE_BATCH}"
    )
    return scale


def build_schedule(
    name: str,
    *,
    base_lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    decay_steps: int = 1,
    decay_rate: float = 0.1,
    cosine_from_warmup: bool = False,
) -> LrAt:
    """The learning rate as a function of the optimizer step t = 0, 1, ...; it has no state.

    t < W: warmup_lr + t (base_lr - warmup_lr) / W. From there, with T = total_steps:
    `cosine`: min_lr + (base_lr - min_lr) (1 + cos(pi t / T)) / 2, min_lr from T on. t counts from the start, so the
    rate steps down a little at W; with cosine_from_warmup t - W and T - W stand in its place.
    `linear`: from base_lr at W to base_lr / 100 at T. `step`: base_lr decay_rate^(t // decay_steps).
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warm-up of {warmup_steps} steps does not fit into {total_steps} steps; shorten it")
    if name == "step" and decay_steps < 1:
        raise ValueError(f"the step schedule needs decay_steps of at least 1, got {decay_steps}")

    def cosine(t: int) -> float:
        start = warmup_steps if cosine_from_warmup else 0
        progress = min((t - start) / max(total_steps - start, 1), 1.0)
        return min_lr + 0.5 * (base_lr - min_lr) * (1 + math.cos(math.pi * progress))

    def linear(t: int) -> float:
        progress = min((t - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return base_lr * (1 - 0.99 * progress)

    def step(t: int) -> float:
        return base_lr * decay_rate ** (t // decay_steps)

    decays = {"cosine": cosine, "linear": linear, "step": step}
    if name not in decays:
        raise ValueError(f"schedule {name!r} is unknown; choose one of {', '.join(decays)}")
    decay = decays[name]

    def lr_at(t: int) -> float:
        if t < warmup_steps:
            return warmup_lr + t * (base_lr - warmup_lr) / warmup_steps
        return decay(t)

    return lr_at


def schedule_from_config(config: Any, steps_per_epoch: int, scale: float = 1.0) -> LrAt:
    """`build_schedule` from the shared TRAIN keys; `scale` multiplies the three learning rates.

    TRAIN.MAX_STEPS, if set, shortens the run, and the schedule with it.
    """
    train = config.TRAIN
    total = train.EPOCHS * steps_per_epoch
    if train.MAX_STEPS:
        total = min(total, train.MAX_STEPS)
    return build_schedule(
        train.LR_SCHEDULER.NAME,
        base_lr=train.BASE_LR * scale,
        total_steps=total,
        warmup_steps=min(train.WARMUP_EPOCHS * steps_per_epoch, total),
        warmup_lr=train.WARMUP_LR * scale,
        min_lr=train.MIN_LR * scale,
        decay_steps=train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch,
        decay_rate=train.LR_SCHEDULER.DECAY_RATE,
    )


def optimizer_from_config(config: Any, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Parameter groups and optimizer from the shared TRAIN keys; the loop sets the learning rate before each step."""
    train = config.TRAIN
    return build_optimizer(
        train.OPTIMIZER.NAME,
        parameter_groups(model, train.WEIGHT_DECAY),
        lr=lr,
        betas=train.OPTIMIZER.BETAS,
        eps=train.OPTIMIZER.EPS,
        momentum=train.OPTIMIZER.MOMENTUM,
        matrix_lr=train.OPTIMIZER.MATRIX_LR,
    )
