"""What the tests of the students share: manifests, filled weights, a small picture."""

from __future__ import annotations

from pathlib import Path

import torch

from sam3.backbones.student import BACKBONES, StudentEncoder, build_student
from tests.parity.fill import fill_

MANIFESTS = Path(__file__).parents[1] / "manifests"


def manifest(name: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(key, shape, dtype) of every entry of a student's checkpoint, in order."""
    rows = (line.split("\t") for line in (MANIFESTS / f"{BACKBONES[name].stem}.tsv").read_text().splitlines())
    return [(key, tuple(int(n) for n in shape.split("x") if n), dtype) for key, shape, dtype in rows]


def filled(name: str, embed_dim: int = 1024, embed_size: int = 72, drop_path: float | None = None) -> StudentEncoder:
    """A student with the parity weights, in eval mode."""
    student = build_student(name, embed_dim, embed_size, drop_path)
    stem = BACKBONES[name].stem
    fill_(student.state_dict(), f"{stem}.", gain=0.4 if "_rv_" in stem else 1.0)
    return student.eval()


def pictures(count: int = 1, side: int = 96) -> torch.Tensor:
    """(count, 3, side, side) in about -2..2."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def on_meta(name: str, embed_dim: int = 1024) -> StudentEncoder:
    with torch.device("meta"):
        return build_student(name, embed_dim)
