"""MobileSAM's encoder against the same mathematics in plain torch, straight from the entries of its state dict."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.backbones.mobile_sam_vit import MobileSamViT
from tests.backbones.samples import pictures
from tests.parity.fill import fill_

HEADS, WINDOWS = (None, 4, 5, 10), (None, 7, 14, 7)
BLOCKS, STEPS = (2, 2, 6, 2), (2, 2, 1)  # blocks of each layer, strides between layers


@pytest.fixture(scope="module")
def encoder() -> MobileSamViT:
    encoder = MobileSamViT()
    fill_(encoder.state_dict(), "mobile_sam.")
    return encoder.eval()


class Plain:
    """The encoder as functions of its entries; maps are (1, C, H, W) throughout, windows are cut one by one."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv("patch_embed.seq.2", F.gelu(self.conv("patch_embed.seq.0", x, 2)), 2)
        for i in range(4):
            for j in range(BLOCKS[i]):
                name = f"layers.{i}.blocks.{j}"
                x = self.inverted(name, x) if i == 0 else self.windowed(name, x, HEADS[i], WINDOWS[i])
            if i < 3:
                x = self.inverted_path(f"layers.{i}.downsample", x, STEPS[i])
        x = F.conv2d(x, self.state["neck.0.weight"])
        x = F.conv2d(self.norm("neck.1", x, 1e-6), self.state["neck.2.weight"], padding=1)
        return self.norm("neck.3", x, 1e-6)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """Convolution and batch norm."""
        weight = self.state[f"{name}.c.weight"]
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        scale, bias, mean, var = (
            self.state[f"{name}.bn.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + bias

    def inverted_path(self, name: str, x: Tensor, stride: int) -> Tensor:
        x = F.gelu(self.conv(f"{name}.conv1", x))
        return self.conv(f"{name}.conv3", F.gelu(self.conv(f"{name}.conv2", x, stride)))

    def inverted(self, name: str, x: Tensor) -> Tensor:
        return F.gelu(x + self.inverted_path(name, x, 1))

    def windowed(self, name: str, x: Tensor, heads: int, window: int) -> Tensor:
        x = x + self.attend_in_windows(f"{name}.attn", x, heads, window)
        x = self.conv(f"{name}.local_conv", x)  # no residual
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.mlp.norm", x, 1e-5)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def attend_in_windows(self, name: str, x: Tensor, heads: int, window: int) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % window, 0, -height % window))
        out = torch.zeros_like(x)
        for top, left in product(range(0, x.shape[2], window), range(0, x.shape[3], window)):
            cut = (..., slice(top, top + window), slice(left, left + window))
            out[cut] = self.attend(name, x[cut], heads)
        return out[:, :, :height, :width]

    def attend(self, name: str, x: Tensor, heads: int) -> Tensor:
        """Attention in one window (1, C, w, w): per head q, k and v lie side by side."""
        side = x.shape[-1]
        qkv = self.linear(f"{name}.qkv", self.norm(f"{name}.norm", x, 1e-5)).flatten(2)[0]  # (3 C, N)
        bias = self.state[f"{name}.attention_biases"][:, first_seen(side)]
        heads_out = []
        for head, part in enumerate(qkv.chunk(heads)):
            q, k, v = part.chunk(3)  # each (d, N)
            heads_out.append(v @ (q.T @ k / q.shape[0] ** 0.5 + bias[head]).softmax(-1).T)
        return self.linear(f"{name}.proj", torch.cat(heads_out).unflatten(1, (side, side))[None])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"][:, :, None, None], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Layer norm over the channels."""
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        scale, bias = (self.state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return (x - mean) / (var + eps).sqrt() * scale + bias


def first_seen(side: int) -> Tensor:
    """Distances of all pairs of a window's places, numbered as they first come up: (N, N)."""
    places, numbers = list(product(range(side), repeat=2)), {}
    rows = [[numbers.setdefault((abs(a - c), abs(b - d)), len(numbers)) for c, d in places] for a, b in places]
    return torch.tensor(rows)


@torch.no_grad()
@pytest.mark.parametrize("side", [224, 320], ids=["a window as large as the grid", "padded windows"])
def test_equals_the_plain_formulation(encoder: MobileSamViT, side: int) -> None:
    x = pictures(1, side)
    ours = encoder(x)
    assert ours.shape == (1, 256, side // 16, side // 16)
    torch.testing.assert_close(ours, Plain(encoder.state_dict())(x), atol=1e-4, rtol=1e-4)


def test_every_entry_but_the_classifier_is_read(encoder: MobileSamViT) -> None:
    read: set[str] = set()

    class Watched(dict):
        def __getitem__(self, key: str) -> Tensor:
            read.add(key)
            return super().__getitem__(key)

    state = Watched(encoder.state_dict())
    with torch.no_grad():
        Plain(state)(pictures(1, 64))
    rest = {key for key in set(state) - read if not key.endswith("num_batches_tracked")}
    assert rest == {"norm_head.weight", "norm_head.bias", "head.weight", "head.bias"}


def test_hooks_see_the_second_to_last_block_and_the_neck(encoder: MobileSamViT) -> None:
    seen = []
    hooked = (encoder.layers[3].blocks[0], encoder.neck)
    handles = [part.register_forward_hook(lambda module, args, output: seen.append(output)) for part in hooked]
    out = encoder(pictures(2, 64))
    for handle in handles:
        handle.remove()
    assert seen[0].shape == (2, 4, 4, 320)
    assert seen[1] is out


def test_recomputing_gives_the_same_gradients_in_every_used_parameter(encoder: MobileSamViT) -> None:
    x, gradients = pictures(1, 64), []
    for encoder.grad_checkpointing in (True, False):
        encoder.zero_grad()
        encoder(x).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        if name.startswith(("norm_head", "head")):
            assert gradient is None
        else:
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bias_tables_do_not_decay(encoder: MobileSamViT) -> None:
    names = encoder.no_weight_decay()
    assert len(names) == 10
    assert all(name.endswith(".attn.attention_biases") for name in names)
