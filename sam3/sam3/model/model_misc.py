"""Small building blocks shared by the heads."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """`num_layers` linears `in_dim - hidden - ... - hidden - out_dim` with ReLU (then dropout) after all but the last.

    Args:
        residual: adds the input to the output of the last linear (needs `in_dim == out_dim`).
        out_norm: module applied at the very end, after the residual.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        out_dim: int,
        num_layers: int,
        residual: bool = False,
        out_norm: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        assert not residual or in_dim == out_dim, f"a residual MLP keeps its width, got {in_dim} -> {out_dim}"
        widths = [in_dim, *[hidden] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.residual = residual
        self.out_norm = out_norm if out_norm is not None else nn.Identity()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        y = x
        for layer in self.layers[:-1]:
            y = F.dropout(F.relu(layer(y)), self.dropout, self.training)
        y = self.layers[-1](y)
        return self.out_norm(x + y if self.residual else y)
