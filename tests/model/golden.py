"""The small golden model: its sizes, its weights and its picture, all given by formulas.

The table of expected values was made with the public implementation in float32 on a CPU. `assert_row` compares a tensor
with one row of it: shape, mean, mean of absolute values, first and last element.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sam3.model.config import Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model

CONFIG = Sam3Config(
    img_size=112,
    pretrain_img_size=56,
    vit_dim=64,
    vit_depth=4,
    vit_heads=4,
    vit_mlp_dim=296,
    window_size=4,
    global_blocks=(1, 3),
    dim=32,
    ffn_dim=64,
    geometry_layers=2,
    fusion_layers=2,
    decoder_layers=3,
    num_queries=10,
    text_width=64,
    text_heads=4,
    text_layers=2,
    text_mlp_dim=256,
)
TEXTS = ["yellow dog", "visual"]
UNSCALED = ("embed.weight", "embedding.weight", "points.weight", "token.weight", "pos_embed", "positional_embedding")


def uniform(count: int, h: int) -> np.ndarray:
    """`count` float32 numbers in -1..1 that depend on nothing but their index and `h`."""
    v = np.sin(12.9898 * np.arange(count, dtype=np.float64) + 78.233 * h) * 43758.5453
    return (2 * (v - np.floor(v)) - 1).astype(np.float32)


def golden_values(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight called `key` (as in sam3.pt, without `detector.`)."""
    numel = int(np.prod(shape))
    r = torch.from_numpy(uniform(numel, sum(key.encode()) % 997)).reshape(shape)
    if len(shape) >= 2:
        return r if key.endswith(UNSCALED) else r * (3 / (numel / shape[0])) ** 0.5
    return 1 + 0.1 * r if key.endswith(".weight") else 0.1 * r


@torch.no_grad()
def fill_golden(model: nn.Module) -> None:
    """Sets every floating weight; the complex rotary tables keep what the model computed."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(golden_values(key, tuple(tensor.shape)))


def golden_model() -> Sam3Image:
    """On the CPU, eval mode, with the second neck."""
    model = assemble_image_model(CONFIG, with_sam2_neck=True)
    fill_golden(model)
    return model.eval()


def golden_image() -> Tensor:
    """(1, 3, 112, 112), normalised."""
    return torch.from_numpy(uniform(3 * 112 * 112, 1)).reshape(1, 3, 112, 112)


def assert_row(tensor: Tensor, shape: tuple[int, ...], *row: float, atol: float = 1e-4) -> None:
    """`row`: mean, mean of absolute values, first and last element."""
    assert tuple(tensor.shape) == shape
    x = tensor.double()
    found = [x.mean(), x.abs().mean(), x.flatten()[0], x.flatten()[-1]]
    np.testing.assert_allclose([float(v) for v in found], row, rtol=0, atol=atol)
