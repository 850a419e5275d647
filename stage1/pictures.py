"""Pictures of embeddings: photo, teacher and student side by side, in the colours of the teacher's main directions.

Letters: `C` channels, `G` side of the grid, `S` side of the picture in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compare_embeddings(image: Tensor, size: tuple[int, int], teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """One row: photo | teacher | student, cut to the picture's own part of the square.

    image: `(3, S, S)` uint8; size: its rows and columns inside the square; teacher, student: `(C, G, G)` float32;
    mask: `(1, G, G)`, ones on valid cells. Returns `(3, h, 3 w)` uint8 on the CPU.
    """
    rows, columns = size
    side = image.shape[-1]
    panels = [image.cpu()]
    for colours in principal_colours(teacher, student, mask):
        panel = F.interpolate(colours[None], size=(side, side), mode="nearest")[0]
        panels.append((panel * 255).round().to(torch.uint8).cpu())
    return torch.cat([panel[:, :rows, :columns] for panel in panels], dim=2)


def principal_colours(teacher: Tensor, student: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both grids projected on the teacher's first three principal directions, scaled to 0..1 by the teacher's range.

    The directions come from the teacher's valid cells alone, so equal colours mean equal embeddings.
    """
    valid = mask.flatten().bool()
    cells = teacher.flatten(1).T[valid]  # (cells, C)
    if len(cells) < 4:
        blank = torch.zeros(3, *teacher.shape[-2:], device=teacher.device)
        return blank, blank
    mean = cells.mean(0)
    # lowrank PCA draws random numbers: keep the run's own random state out of it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank((cells - mean).cpu(), q=min(6, *cells.shape))
    directions = directions[:, :3].to(teacher.device)
    projected = (cells - mean) @ directions
    low, high = projected.quantile(0.01, dim=0), projected.quantile(0.99, dim=0)

    def colour(grid: Tensor) -> Tensor:
        values = ((grid.flatten(1).T - mean) @ directions - low) / (high - low).clamp(min=1e-6)  # (G*G, 3)
        return (values.clamp(0, 1) * valid[:, None]).T.reshape(-1, *grid.shape[-2:])

    return colour(teacher), colour(student)
