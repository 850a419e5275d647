"""Attention against `nn.MultiheadAttention` on the same state dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam3.model.attention import Attention
from sam3.model.model_misc import MLP


@pytest.mark.parametrize("shared", ["none", "all", "query and key", "key and value"])
@pytest.mark.parametrize("masks", ["", "padding", "float", "both", "causal"])
def test_same_as_torch(shared: str, masks: str):
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    q, k, v = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    if shared == "all":
        k = v = q
    elif shared == "query and key":
        k = q
    elif shared == "key and value":
        v = k
    padding = torch.tensor([[False] * 4 + [True] * 2, [False] * 6]) if masks in ("padding", "both") else None
    added = torch.randn(2, 4, 6, 6) if masks in ("float", "both") else None
    reference_mask = None if added is None else added.flatten(0, 1)
    if masks == "causal":
        reference_mask = torch.full((6, 6), float("-inf")).triu(1)
    float_padding = None if padding is None else torch.zeros(2, 6).masked_fill(padding, float("-inf"))
    expected, _ = theirs(q, k, v, key_padding_mask=float_padding, attn_mask=reference_mask)
    found = ours(q, k, v, key_padding_mask=padding, attn_mask=added, causal=masks == "causal")
    torch.testing.assert_close(found, expected)


def test_width_must_split_into_heads():
    with pytest.raises(ValueError, match="width 10 is not a multiple of its 4 heads"):
        Attention(10, 4)


def test_mlp_by_hand():
    mlp = MLP(2, 3, 2, 2, residual=True)
    assert list(mlp.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    with torch.no_grad():
        mlp.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        mlp.layers[0].bias.zero_()
        mlp.layers[1].weight.copy_(torch.tensor([[1.0, 2.0, 100.0], [0.0, 1.0, 100.0]]))
        mlp.layers[1].bias.copy_(torch.tensor([0.5, -0.5]))
    # hidden relu(1, 2, -3) = (1, 2, 0); second (5.5, 1.5); plus the input
    assert mlp(torch.tensor([1.0, 2.0])).tolist() == [6.5, 3.5]
