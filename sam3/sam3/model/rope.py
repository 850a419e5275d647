"""Axial rotary positions: channel pairs turn by an angle that grows with a token's column, or with its row.

Letters: N tokens, C channels of a head; the first C / 4 pairs turn with the column, the other C / 4 with the row.
Source: rotary embedding, Su et al. 2021 (arXiv:2104.09864); axial form, Heo et al. 2024 (arXiv:2403.13298).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MAX_CACHED_TABLES = 16  # a model needs two
RotationTable = tuple[Tensor, Tensor]  # (cos, sin), each (N, C / 2) float32


def axial_angles(columns: Tensor, rows: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """Angles of tokens that stand at `columns`, `rows` (each (N,), in cells): (N, dim // 2) float32, radians.

    Pair k < dim / 4 gets `column * theta ** (-4 k / dim)`; pair dim / 4 + k gets `row * theta ** (-4 k / dim)`.
    """
    if dim % 4:
        raise ValueError(f"axial rotation needs a width that is a multiple of 4, got {dim}")
    step = torch.arange(0, dim, 4, dtype=torch.float32, device=columns.device) / dim
    frequency = 1.0 / theta**step  # (dim / 4,)
    return torch.cat((columns.float()[:, None] * frequency, rows.float()[:, None] * frequency), dim=-1)


def grid_centres(cells: int, grid: int) -> Tensor:
    """Centres of `cells` equal parts of an axis of `grid` cells, in its cell numbers: (cells,) float32.

    `c_i = (i + 0.5) * grid / cells - 0.5`: the plain numbers 0, 1, ... if `cells == grid`, else 0.5, 2.5, ... for half
    as many, and so on.
    """
    return (torch.arange(cells, dtype=torch.float32) + 0.5) * grid / cells - 0.5


def rotation_table(angles: Tensor) -> RotationTable:
    """(cos, sin) of `angles` (N, dim // 2), in their dtype."""
    return angles.cos(), angles.sin()


def grid_table(
    grid: int, dim: int, cells: int | None = None, theta: float = 10000.0, device: torch.device | str = "cpu"
) -> RotationTable:
    """Table of `cells` x `cells` tokens (default: one per cell) spread over a `grid` x `grid` map, row by row.

    Tables are kept: a second call with the same arguments returns the same tensors, which are not to be written to.
    """
    arguments = (grid, dim, cells or grid, theta, torch.device(device))
    if torch.compiler.is_compiling():  # a traced graph must not fill the cache with its own tensors
        return _grid_table(*arguments)
    return _cached_grid_table(*arguments)


def _grid_table(grid: int, dim: int, cells: int, theta: float, device: torch.device) -> RotationTable:
    centres = grid_centres(cells, grid)
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    cos, sin = rotation_table(axial_angles(columns.flatten(), rows.flatten(), dim, theta))
    return cos.to(device), sin.to(device)


@lru_cache(maxsize=MAX_CACHED_TABLES)
def _cached_grid_table(*arguments) -> RotationTable:
    # A tensor born under inference_mode could not take part in a later training step.
    with torch.inference_mode(False), torch.no_grad():
        return _grid_table(*arguments)


def rotate_pairs(x: Tensor, table: RotationTable) -> Tensor:
    """Turns the channel pairs (2 k, 2 k + 1) of `x` by the angles of `table`.

    Args:
        x: (..., N, dim); the arithmetic runs in float32.
        table: cos and sin, each (N, dim // 2), on the device of `x`.

    Returns:
        (..., N, dim) in the dtype of `x`
    """
    cos, sin = table
    pairs = x.float().contiguous().unflatten(-1, (-1, 2))  # (..., N, dim / 2, 2)
    if x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))  # one kernel
    else:  # complex kernels are missing on some backends, and the compiler fuses real ones
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
