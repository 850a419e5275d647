"""State dicts made from the manifests, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def manifest_tensors(name: str, *, full: bool = False) -> dict[str, Tensor]:
    """The state dict of `<name>.tsv`: every key and dtype, each tensor with values of its own.

    Dimensions are cut to at most 4, so that files are small; `full` keeps them, by repeating one value without memory.
    """
    tensors = {}
    lines = (Path(__file__).parent / f"{name}.tsv").read_text().splitlines()
    for number, line in enumerate(lines):
        key, shape_text, dtype_name = line.split("\t")
        shape = [int(size) for size in shape_text.split("x")] if shape_text else []
        dtype = getattr(torch, dtype_name)
        if full:
            tensors[key] = torch.tensor(number, dtype=dtype).expand(shape)
        else:
            shape = [min(size, 4) for size in shape]
            values = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            tensors[key] = (values * 100).to(dtype)
    return tensors
