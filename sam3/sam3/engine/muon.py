"""Muon: an optimizer for hidden matrices, with AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_SIDE = 16  # of a matrix; smaller ones, and vectors and kernels, are left to AdamW
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration; it brings singular values into 0.7 .. 1.2
STEPS = 5
MATCH = 0.2  # root mean square of AdamW's updates


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to the momentum of each hidden matrix, so that all its directions
    learn at one pace (Jordan et al. 2024, Muon); scaled so that AdamW's learning rate and weight decay serve for both
    (Liu et al. 2025, Muon is Scalable for LLM Training).

    groups: as `optim.parameter_groups` makes them. Matrices of at least MIN_SIDE x MIN_SIDE in groups with weight decay
    are Muon's; groups without hold embeddings, biases and norms, for AdamW. lr, betas, eps: AdamW's. momentum: Muon's,
    with Nesterov's look ahead. matrix_lr: learning rate of Muon's part, times `lr`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        matrix_lr: float = 1.0,
    ) -> None:
        split = []
        for group in groups:
            for matrices in (False, True):
                own = [p for p in group["params"] if is_matrix(p, group["weight_decay"]) == matrices]
                if own:
                    split.append({**group, "params": own, "matrices": matrices})
        self._adamw = torch.optim.AdamW(split, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__(self._adamw.param_groups, {**self._adamw.defaults, "momentum": momentum, "matrices": False})
        self.matrix_lr = matrix_lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        bad = getattr(self, "found_inf", None)  # set by who wants a step skipped, see `amp.step_unless_bad`
        self._adamw.found_inf = bad
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["matrices"]:
                self._step_matrices(group, bad)
        return loss

    def _step_matrices(self, group: dict[str, Any], bad: Tensor | None) -> None:
        """Matrices of one shape are handled together: each alone is too small to keep a processor busy."""
        alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[parameter.shape, parameter.device].append(parameter)
        for parameters in alike.values():
            momenta = [self._momentum(parameter) for parameter in parameters]
            gradients, rate = [parameter.grad for parameter in parameters], self.matrix_lr * group["lr"]
            if bad is not None:  # everything stays, and no device waits for the answer
                gradients = [torch.where(bad > 0, old, new) for old, new in zip(momenta, gradients, strict=True)]
                rate = rate * (1 - bad)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            updates = orthogonal(torch.stack(ahead))
            size = MATCH * max(updates.shape[1:]) ** 0.5
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_sub_(parameters, list((rate * size * updates).unbind()))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def is_matrix(parameter: Tensor, weight_decay: float) -> bool:
    """Whether Muon takes it."""
    return parameter.ndim == 2 and min(parameter.shape) >= MIN_SIDE and weight_decay > 0


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows (or columns, of tall ones) to those of x `(n, rows, columns)`.

    Quintic Newton-Schulz iteration; in bfloat16 on a GPU, where that is fast and good enough.
    """
    a, b, c = COEFFICIENTS
    dtype, tall = x.dtype, x.shape[1] > x.shape[2]
    if x.is_cuda:
        x = x.bfloat16()
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(dtype)
