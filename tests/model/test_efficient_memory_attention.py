"""Efficient memory attention: ln n exact on constant squares, rotation at centres, groups, start from the teacher."""

from __future__ import annotations

import math

import pytest
import torch

from sam3.model import efficient_memory_attention, rope
from sam3.model.efficient_memory_attention import MAX_CACHED, EfficientMemoryAttention, TokenGroup
from sam3.model.memory_attention import MemoryAttention, rotate_frames
from sam3.model.perceiver import EfficientSpatialPerceiver
from sam3.model.rope import axial_angles, grid_centres, rotation_table
from sam3.model.tracker_config import TINY_MEMORY, TrackerConfig

DIM, MEM_DIM, FFN, GRID = 32, 8, 64, 8
DENSE = (TokenGroup(GRID**2, grid=GRID),)
MIXED = (TokenGroup(5), TokenGroup(16, grid=4))


def build(layout, pool_size: int = 2, num_layers: int = 2, **options) -> EfficientMemoryAttention:
    torch.manual_seed(0)
    return EfficientMemoryAttention(DIM, MEM_DIM, FFN, num_layers, GRID, layout, pool_size, **options).eval()


def inputs(attention: EfficientMemoryAttention, frames: int = 3, pointers: int = 4, batch: int = 2) -> dict:
    """Random tokens; keys strong enough for the softmax to be far from even."""
    torch.manual_seed(1)
    count = frames * attention.tokens_per_frame + pointers
    return {
        "x": torch.randn(batch, GRID**2, DIM),
        "position": torch.randn(GRID**2, DIM),
        "memory": torch.randn(batch, count, MEM_DIM),
        "memory_position": 2 * torch.randn(1, count, MEM_DIM),
        "num_frames": frames,
        "num_pointer_tokens": pointers,
    }


def dense_teacher(num_layers: int = 4, **sizes) -> MemoryAttention:
    torch.manual_seed(2)
    widths = {"dim": DIM, "mem_dim": MEM_DIM, "ffn_dim": FFN, **sizes}
    return MemoryAttention(**widths, num_layers=num_layers, grid=GRID).eval()


def test_parameters_of_the_full_size():
    layout = EfficientSpatialPerceiver().layout
    attention = EfficientMemoryAttention(256, 64, 2048, 2, 72, layout)
    assert sum(parameter.numel() for parameter in attention.parameters()) == 2_961_408
    teacher = MemoryAttention(256, 64, 2048, 2, 72)
    shapes = {name: tensor.shape for name, tensor in attention.state_dict().items()}
    assert len(shapes) == 54
    assert shapes == {name: tensor.shape for name, tensor in teacher.state_dict().items()}


def test_tokens_per_frame():
    """The numbers of the design: 512 latents of which 256 become 64, and 72 x 72 which become 36 x 36."""
    latents, dense = (TokenGroup(256), TokenGroup(256, grid=16)), (TokenGroup(5184, grid=72),)
    counts = [
        EfficientMemoryAttention(8, 4, 8, 1, 72, layout, p).tokens_per_frame
        for layout in (latents, dense)
        for p in (1, 2)
    ]
    assert counts == [512, 320, 5184, 1296]


@torch.no_grad()
def test_pool_by_hand():
    attention = build((TokenGroup(2), TokenGroup(9, grid=3)))
    tokens = torch.arange(11.0).view(1, 11, 1).expand(1, 11, MEM_DIM)
    # The grid is 2 3 4 / 5 6 7 / 8 9 10; its far squares are cut.
    assert attention.pool(tokens)[0, :, 0].tolist() == [0, 1, 4, 5.5, 8.5, 10]
    assert attention.layout[1].sizes(2).tolist() == [4, 2, 2, 1]
    assert attention.tokens_per_frame == 6
    assert torch.equal(build(attention.layout, pool_size=1).pool(tokens), tokens)


@torch.no_grad()
def test_one_frame_of_full_grids_is_the_dense_attention():
    attention, teacher = build(DENSE, pool_size=1), dense_teacher(num_layers=2)
    attention.init_from_teacher(teacher)
    given = inputs(attention)
    wanted = teacher(*(given[name] for name in ("x", "position", "memory", "memory_position")), 4)
    torch.testing.assert_close(attention(**given), wanted)


@torch.no_grad()
def test_ln_4_is_exact_where_squares_are_constant(monkeypatch):
    """Without rotation (which differs inside a square), pooling keys that are equal changes nothing."""
    for module in (rope, efficient_memory_attention):
        monkeypatch.setattr(module, "axial_angles", lambda columns, rows, dim: torch.zeros(len(columns), dim // 2))
    zero = rotation_table(torch.zeros(GRID**2, DIM // 2))
    monkeypatch.setattr(efficient_memory_attention, "grid_table", lambda *args, **kwargs: zero)
    dense, pooled = build(DENSE, pool_size=1), build(DENSE)
    given = inputs(pooled)
    wide = {
        name: torch.cat((spread(given[name][:, : 3 * 16]), given[name][:, 3 * 16 :]), dim=1)
        for name in ("memory", "memory_position")
    }
    wanted = dense(**{**given, **wide})
    frames = wide["memory"][:, : 3 * 64].unflatten(1, (3, 64))
    assert torch.allclose(pooled.pool(frames[:, 0]), given["memory"][:, :16])
    torch.testing.assert_close(pooled(**given), wanted, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(pooled, "_bias", lambda *args: None)
    pooled._cache.clear()
    assert (pooled(**given) - wanted).abs().max() > 0.1


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """(B, 3 x 16, D) of 4 x 4 grids -> (B, 3 x 64, D) of 8 x 8 grids whose squares of 2 x 2 are constant."""
    grids = tokens.unflatten(1, (3, 4, 4))
    return grids.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).flatten(1, 3)


@torch.no_grad()
def test_bias():
    bias = build(MIXED)._bias(2, 3, torch.device("cpu"))
    frame = [0.0] * 5 + [math.log(4)] * 4
    assert bias.shape == (1, 1, 1, 21)
    assert bias.flatten().tolist() == pytest.approx(frame + frame + [0.0] * 3)
    assert build(MIXED, pool_size=1)._bias(2, 3, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("group", "pool_size", "first"),
    [
        (TokenGroup(72**2, 72), 2, [0.5, 2.5, 4.5]),
        (TokenGroup(256, 16), 2, [4.0, 13.0, 22.0]),
        (TokenGroup(256, 16), 1, [1.75, 6.25, 10.75]),
        (TokenGroup(9, 3), 2, [23.5, 59.5]),  # centres 11.5, 35.5 and 59.5; the last square holds one
    ],
)
def test_pooled_tokens_turn_by_the_centre_of_their_square(group: TokenGroup, pool_size: int, first: list[float]):
    angles = group.angles(pool_size, 72, 8)  # pairs: columns at 1 and 0.01, rows at 1 and 0.01
    side = math.isqrt(len(angles))
    assert angles.shape == (group.pooled_count(pool_size), 4)
    assert angles[: len(first), 0].tolist() == pytest.approx(first)
    assert angles[::side, 2][: len(first)].tolist() == pytest.approx(first)
    assert angles[::side, 3][: len(first)].tolist() == pytest.approx([0.01 * centre for centre in first])


@torch.no_grad()
def test_turning_at_the_centre_is_turning_before_pooling_but_for_a_gain():
    """The mean of two equal vectors turned by a and a + f is one turned by a + f / 2 and cos(f / 2) as long."""
    attention = build(DENSE)
    key = torch.randn(1, 1, DIM).expand(1, GRID**2, DIM)
    centres = grid_centres(GRID, GRID)
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    turned = rotate_frames(key, rotation_table(axial_angles(columns.flatten(), rows.flatten(), DIM)))
    frequency = axial_angles(torch.ones(1), torch.ones(1), DIM)[0]  # angle of a step of one cell
    gain = (frequency / 2).cos().repeat_interleave(2)
    assert gain.min() == pytest.approx(0.87758, abs=1e-5)
    pooled = rotate_frames(key[:, :16], attention._key_table(DIM, key.device))
    torch.testing.assert_close(attention.pool(turned), gain * pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sets_and_pointers_have_no_order_and_grids_have():
    attention = build(MIXED, pool_size=1)
    given = inputs(attention, frames=1)
    out = attention(**given)

    def swapped(first: int, second: int) -> torch.Tensor:
        order = torch.arange(5 + 16 + 4)
        order[[first, second]] = order[[second, first]]
        moved = {name: given[name][:, order] for name in ("memory", "memory_position")}
        return (attention(**{**given, **moved}) - out).abs().max()

    assert swapped(0, 4) < 1e-5  # of the set
    assert swapped(21, 24) < 1e-5  # pointers
    assert swapped(0, 22) < 1e-5  # a set is treated as pointers are
    assert swapped(5, 20) > 1e-2  # corners of the grid


@torch.no_grad()
def test_only_keys_get_positions():
    attention = build(MIXED)
    given = inputs(attention, frames=1, pointers=0)
    # All tokens alike, so that what comes out of the attention is their value, wherever they stand.
    given["memory"] = given["memory"][:, :1].expand_as(given["memory"])
    moved = {**given, "memory_position": 5 * given["memory_position"]}
    torch.testing.assert_close(attention(**moved), attention(**given))


@torch.no_grad()
def test_memory_of_wrong_length_is_a_programming_error():
    attention = build(MIXED)
    given = inputs(attention)
    with pytest.raises(AssertionError, match="31 memory tokens, wanted 22"):
        attention(**{**given, "num_frames": 2})
    with pytest.raises(AssertionError, match="60 tokens where the grid of 8 has 64"):
        attention(**{**given, "x": given["x"][:, :60]})


@torch.no_grad()
def test_pointers_alone_and_frames_alone():
    attention = build(MIXED)
    for frames, pointers in ((0, 3), (2, 0)):
        assert attention(**inputs(attention, frames, pointers)).isfinite().all()


def test_every_parameter_and_input_gets_a_gradient():
    attention = build(MIXED).train()
    given = inputs(attention)
    given["memory"].requires_grad_()
    attention(**given).square().sum().backward()
    assert given["memory"].grad.abs().sum() > 0
    for name, parameter in attention.named_parameters():
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name  # the same for all keys: no effect


def test_tables_are_built_once_and_serve_training_after_inference():
    attention = build(MIXED)
    given = inputs(attention)
    with torch.inference_mode():
        attention(**given)
    kept = dict(attention._cache)
    assert len(kept) == 2
    attention(**given).sum().backward()
    assert all(attention._cache[key] is value for key, value in kept.items()) and len(attention._cache) == 2
    for pointers in range(2 * MAX_CACHED):
        attention._cached(attention._bias, 1, pointers, torch.device("cpu"))
    assert len(attention._cache) == MAX_CACHED
    assert not attention.double()._cache


@torch.no_grad()
def test_bfloat16():
    attention = build(MIXED)
    given = inputs(attention)
    exact = attention(**given)
    given["x"] = given["x"].bfloat16()
    rounded = attention.bfloat16()(**given)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.15, rtol=0.1)


def test_start_from_the_teacher():
    teacher, attention = dense_teacher(), build(MIXED)
    torch.nn.init.normal_(teacher.norm.weight)
    for layers, numbers in ((None, (0, 3)), ((0, -1), (0, 3)), ((1, 2), (1, 2))):
        attention.init_from_teacher(teacher, layers)
        for layer, number in zip(attention.layers, numbers, strict=True):
            theirs = teacher.layers[number].state_dict()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in layer.state_dict().items())
        assert torch.equal(attention.norm.weight, teacher.norm.weight)
    assert attention.norm.weight is not teacher.norm.weight
    for num_layers, numbers in ((1, (0,)), (3, (0, 1, 3)), (4, (0, 1, 2, 3))):
        attention = build(MIXED, num_layers=num_layers)
        attention.init_from_teacher(teacher)
        for layer, number in zip(attention.layers, numbers, strict=True):
            assert torch.equal(layer.linear1.weight, teacher.layers[number].linear1.weight)


def test_wrong_teachers():
    with pytest.raises(ValueError, match=r"3 teacher layers \(0, 1, 2\) for the 2 of the student"):
        build(MIXED).init_from_teacher(dense_teacher(), (0, 1, 2))
    with pytest.raises(ValueError, match=r"teacher layers \(0, 4\), but it has 4"):
        build(MIXED).init_from_teacher(dense_teacher(), (0, 4))
    with pytest.raises(ValueError, match=r"linear1.weight of \(128, 32\), the student's is \(64, 32\)"):
        build(MIXED).init_from_teacher(dense_teacher(ffn_dim=128))


def test_wrong_sizes():
    for group in ((0,), (8, 3), (9, 2)):
        with pytest.raises(ValueError, match="a grid of g has"):
            TokenGroup(*group)
    with pytest.raises(ValueError, match="pool size is at least 1"):
        build(MIXED, pool_size=0)


@pytest.mark.parametrize("pool_size", [1, 2])
def test_perceiver_and_attention_at_the_tiny_preset(pool_size: int):
    sizes, memory = TrackerConfig.preset("tiny"), TINY_MEMORY
    perceiver = EfficientSpatialPerceiver(
        sizes.mem_dim,
        memory.perceiver_dim,
        memory.perceiver_depth,
        memory.perceiver_heads,
        memory.perceiver_dim_head,
        memory.num_latents,
        memory.num_latents_2d,
    )
    attention = EfficientMemoryAttention(
        sizes.dim, sizes.mem_dim, memory.ffn_dim, 2, sizes.grid, perceiver.layout, pool_size
    )
    assert attention.tokens_per_frame == 16 + 16 // pool_size**2
    maps = torch.randn(3, 1, sizes.mem_dim, sizes.grid, sizes.grid)
    frames, positions = zip(*(map(attention.pool, perceiver(frame)) for frame in maps), strict=True)
    x, position = torch.randn(1, sizes.grid**2, sizes.dim), torch.randn(sizes.grid**2, sizes.dim)
    out = attention(x, position, torch.cat(frames, dim=1), torch.cat(positions, dim=1), num_frames=3)
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in perceiver.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
