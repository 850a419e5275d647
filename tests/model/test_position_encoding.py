"""Sine codes, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sam3.model.position_encoding import MAX_CACHED_MAPS, PositionEmbeddingSine


def test_map_of_two_by_two():
    code = PositionEmbeddingSine(8)(torch.zeros(3, 5, 2, 2))
    assert code.shape == (3, 8, 2, 2)
    # m = 4 channels per axis, tau = 1, 1, 100, 100; rows stand at pi and 2 pi (nearly: the size has 1e-6 added).
    first = [math.sin(math.pi), math.cos(math.pi), math.sin(math.pi / 100), math.cos(math.pi / 100)]
    last = [math.sin(2 * math.pi), math.cos(2 * math.pi), math.sin(math.pi / 50), math.cos(math.pi / 50)]
    for row, y in enumerate((first, last)):
        for col, x in enumerate((first, last)):
            torch.testing.assert_close(code[1, :, row, col], torch.tensor(y + x), atol=1e-5, rtol=0)


def test_encode():
    code = PositionEmbeddingSine(8).encode(torch.tensor([[0.0, 0.25, 1.0]]))
    assert code.shape == (1, 3, 4)
    torch.testing.assert_close(code[0, 0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    quarter = torch.tensor([1.0, 0.0, math.sin(math.pi / 200), math.cos(math.pi / 200)])
    torch.testing.assert_close(code[0, 1], quarter, atol=1e-6, rtol=0)


def test_dtype_follows_the_features_but_not_the_arithmetic():
    module = PositionEmbeddingSine(8)
    exact = module(torch.zeros(1, 1, 6, 5))
    half = module(torch.zeros(1, 1, 6, 5, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())
    v = torch.tensor([0.3], dtype=torch.bfloat16)
    assert torch.equal(module.encode(v), module.encode(v.float()).bfloat16())


def test_cache_is_bounded_shared_and_usable_for_training():
    module = PositionEmbeddingSine(8)
    x = torch.zeros(1, 8, 4, 4)
    with torch.inference_mode():
        first = module(x)
    assert module(x).data_ptr() == first.data_ptr()
    weight = torch.ones(8, 1, 1, requires_grad=True)
    (weight * module(x)).sum().backward()  # would fail for a tensor born in inference mode
    assert weight.grad is not None
    for size in range(1, 2 * MAX_CACHED_MAPS):
        module(torch.zeros(1, 8, size, size))
    assert len(module._maps) == MAX_CACHED_MAPS
    module.to("cpu")
    assert not module._maps


def test_follows_the_device_of_the_input():
    assert PositionEmbeddingSine(8)(torch.zeros(2, 8, 4, 4, device="meta")).device.type == "meta"


def test_width_must_split_in_four():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        PositionEmbeddingSine(6)
