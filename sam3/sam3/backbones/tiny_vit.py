"""TinyViT (convolutions, then attention in windows): timm's layers under the names of the reference checkpoints.

Legend: B images (or windows), C channels, H W rows and columns, N tokens of a window, D channels of a head.
"""

from __future__ import annotations

from collections import OrderedDict

import timm
import torch
import torch.nn.functional as F
from timm.models import tiny_vit as timm_tiny_vit
from torch import Tensor, nn

from sam3.backbones.recompute import run_blocks


class TinyViT(nn.Module):
    """`(B, 3, H, W)` -> `(B, out_channels, H/32, W/32)`, sizes rounded up at each halving (1008 pixels give 32).

    `name` is timm's without the image size, for example `tiny_vit_11m`. `drop_path` is the stochastic depth of the
    last block, growing linearly from 0 at the first; None takes the family's own (0, 0.1, 0.2 for 5M, 11M, 21M).
    See `StudentEncoder` for its output stride.
    The classifier and the norm in front of it are left out: the embedding is taken before them.
    """

    def __init__(self, name: str, drop_path: float | None = None) -> None:
        super().__init__()
        options = {} if drop_path is None else {"drop_path_rate": drop_path}
        model = timm.create_model(f"{name}_224", num_classes=0, **options)
        _name_convolutions(model)
        stem, stages = model.patch_embed, list(model.stages)
        downsamples = [stage.downsample for stage in stages[1:]]
        self.patch_embed = nn.Sequential(OrderedDict(seq=nn.Sequential(stem.conv1, stem.act, stem.conv2)))
        self.layers = nn.ModuleList(
            _Layer(stage.blocks, downsample) for stage, downsample in zip(stages, [*downsamples, None], strict=True)
        )
        self.name = name
        self.out_channels = model.num_features
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x, self.grad_checkpointing)
        return x

    def no_weight_decay(self) -> set[str]:
        """The tables of attention biases: 2-D, yet biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def parts(self) -> dict[str, list[nn.Module]]:
        """The layers by the stride of what they give; together they hold every parameter once."""
        parts = {"stem (/4)": [self.patch_embed]}
        downsample: list[nn.Module] = []
        for i, layer in enumerate(self.layers):
            parts[f"stage {i} (/{4 << i})"] = [*downsample, layer.blocks]
            downsample = [layer.downsample]
        return parts


class _Layer(nn.Module):
    """The blocks of one resolution, then the step down to the next (not behind the last)."""

    def __init__(self, blocks: nn.Sequential, downsample: nn.Module | None) -> None:
        super().__init__()
        self.channels_last = isinstance(blocks[0], timm_tiny_vit.TinyVitBlock)
        if self.channels_last:
            for block in blocks:
                block.attn = WindowAttention(block.attn)
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        """`x`: (B, C, H, W). Attention blocks work on (B, H, W, C)."""
        if self.channels_last:
            x = run_blocks(self.blocks, x.permute(0, 2, 3, 1), recompute).permute(0, 3, 1, 2)
        else:
            x = run_blocks(self.blocks, x, recompute)
        return x if self.downsample is None else self.downsample(x)


class WindowAttention(nn.Module):
    """Attention among the N = side * side tokens of a window, with a learnt bias for every |dy|, |dx|.

    Takes over timm's weights but not its cache of biases, which goes stale when weights are loaded in eval mode and
    holds the graph of a finished backward pass when a frozen-norm student trains in eval mode.
    """

    def __init__(self, attention: timm_tiny_vit.Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.attention_biases = attention.attention_biases
        self.norm = attention.norm
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.register_buffer("offsets", _window_offsets(attention.resolution[0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x`: (B, N, C) -> (B, N, C)."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, 3 D)
        q, k, v = qkv.chunk(3, dim=-1)
        bias = self.attention_biases[:, self.offsets].to(q.dtype)  # (heads, N, N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))


def _window_offsets(side: int) -> Tensor:
    """Index |dy| * side + |dx| of every pair of window tokens: (N, N) int64.

    Always real and on the CPU, also inside `torch.device("meta")`: no checkpoint could fill it in later.
    """
    position = torch.arange(side, device="cpu")
    distance = (position[:, None] - position[None, :]).abs()
    y, x = distance[:, None, :, None], distance[None, :, None, :]
    return (y * side + x).reshape(side * side, side * side)


def _name_convolutions(model: nn.Module) -> None:
    """Call the convolution of every convolution-and-norm pair `c`, as the checkpoints do (timm: `conv`)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, timm_tiny_vit.ConvNorm):
                setattr(module, name, nn.Sequential(OrderedDict(c=child.conv, bn=child.bn)))
