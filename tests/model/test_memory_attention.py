"""Memory attention: names, parity with transformers, and what the order and the kind of the keys mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sam3.model.memory_attention import MemoryAttention, RoPEAttention, rotate_frames
from sam3.model.rope import grid_table, rotate_pairs
from tests.model.test_manifest import MANIFEST, describe

DIM, MEM_DIM, GRID, FFN = 32, 64, 6, 128  # transformers always has 64 memory channels
TOKENS = GRID**2
POINTER_TOKENS = 8


def build(num_layers: int = 2, dropout: float = 0.1) -> MemoryAttention:
    torch.manual_seed(0)
    model = MemoryAttention(DIM, MEM_DIM, FFN, num_layers, GRID, dropout)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases too, and scores that are not flat
    return model.eval()


def inputs(num_frames: int = 3, num_pointer_tokens: int = POINTER_TOKENS) -> tuple:
    """x, its positions, memory, its positions, number of pointer tokens."""
    torch.manual_seed(1)
    count = num_frames * TOKENS + num_pointer_tokens
    x, position = torch.randn(2, TOKENS, DIM), torch.randn(TOKENS, DIM)
    return x, position, torch.randn(2, count, MEM_DIM), torch.randn(1, count, MEM_DIM), num_pointer_tokens


def test_names_and_shapes_of_the_checkpoint():
    with torch.device("meta"):
        model = MemoryAttention(256, 64, 2048, num_layers=4, grid=72)
    prefix = "tracker.transformer.encoder."
    rows = [line.split("\t") for line in MANIFEST.read_text().splitlines() if line.startswith(prefix)]
    assert describe(model) == {key.removeprefix(prefix): (shape, kind) for key, shape, kind in rows}
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_922_304


def transformers_attention(ours: MemoryAttention):
    pytest.importorskip("transformers")
    from transformers.models.sam3_tracker_video import modeling_sam3_tracker_video as modeling

    config = modeling.Sam3TrackerVideoConfig(
        memory_attention_hidden_size=DIM,
        memory_attention_num_layers=len(ours.layers),
        memory_attention_feed_forward_hidden_size=FFN,
    )
    config.memory_attention_rope_feat_sizes = [GRID, GRID]  # its constructor overwrites this one
    config._attn_implementation = "eager"
    theirs = modeling.Sam3TrackerVideoMemoryAttention(config).eval()

    names = {key: key.replace("out_proj", "o_proj").replace("norm", "layer_norm") for key in ours.state_dict()}
    theirs.load_state_dict({names[key]: tensor for key, tensor in ours.state_dict().items()})
    return theirs


@pytest.mark.parametrize(("num_frames", "num_pointer_tokens"), [(1, 0), (3, 8)])
@torch.no_grad()
def test_agrees_with_transformers(num_frames, num_pointer_tokens):
    ours = build()
    theirs = transformers_attention(ours)
    x, position, memory, memory_position, _ = inputs(num_frames, num_pointer_tokens)
    memory_position = memory_position.expand_as(memory)
    first = [tensor.transpose(0, 1) for tensor in (x, memory, position.expand_as(x), memory_position)]  # tokens first
    expected = theirs(*first, num_pointer_tokens)[0]
    out = ours(x, position, memory, memory_position, num_pointer_tokens)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_one_attention_spelled_out():
    torch.manual_seed(0)
    attention = RoPEAttention(8, 4)
    table = grid_table(2, 8)
    q, k, v = torch.randn(1, 4, 8), torch.randn(1, 4 + 4 + 1, 4), torch.randn(1, 9, 4)
    bias = torch.randn(9)
    queries = rotate_pairs(attention.q_proj(q), table)
    keys = attention.k_proj(k)
    keys = torch.cat((rotate_pairs(keys[:, :4], table), rotate_pairs(keys[:, 4:8], table), keys[:, 8:]), dim=1)
    weights = (queries @ keys.mT / 8**0.5 + bias).softmax(dim=-1)
    expected = attention.out_proj(weights @ attention.v_proj(v))
    out = attention(q, k, v, table, table, num_plain_keys=1, bias=bias[None, None, None])
    torch.testing.assert_close(out, expected)


def test_keys_must_be_whole_frames():
    with pytest.raises(AssertionError, match="7 keys are not whole frames of 4 tokens"):
        rotate_frames(torch.zeros(1, 8, 8), grid_table(2, 8), num_plain=1)


def test_pointers_alone_are_memory_too():
    model = build()
    out = model(*inputs(num_frames=0))
    assert out.shape == (2, TOKENS, DIM) and out.isfinite().all()


@torch.no_grad()
def test_order_of_frames_and_of_pointers_does_not_matter_but_their_kind_does():
    model = build()
    x, position, memory, memory_position, count = inputs(num_frames=2)
    first, second, pointers = range(TOKENS), range(TOKENS, 2 * TOKENS), range(2 * TOKENS, 2 * TOKENS + count)
    expected = model(x, position, memory, memory_position, count)
    order = [*second, *first, *reversed(pointers)]
    out = model(x, position, memory[:, order], memory_position[:, order], count)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    order = [*reversed(first), *second, *pointers]  # tokens of a frame stand at places
    out = model(x, position, memory[:, order], memory_position[:, order], count)
    assert (out - expected).abs().max() > 1e-2


@torch.no_grad()
def test_positions_go_to_the_keys_only():
    model = build(num_layers=1)
    x, position, memory, memory_position, count = inputs(num_frames=1)
    model.layers[0].cross_attn_image.k_proj.weight.zero_()
    flat = model(x, position, memory, memory_position, count)  # all keys alike but for their turn
    torch.testing.assert_close(model(x, position, memory, memory_position + 1, count), flat)
    assert (model(x, position, memory + 1, memory_position, count) - flat).abs().max() > 1e-2


def test_memory_may_be_stored_in_bfloat16():
    model = build()
    x, position, memory, memory_position, count = inputs()
    out = model(x, position, memory.bfloat16(), memory_position, count)
    assert out.dtype == torch.float32
    assert torch.equal(out, model(x, position, memory.bfloat16().float(), memory_position, count))


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    arguments = inputs()
    assert torch.equal(model(*arguments), model(*arguments))
    model.train()
    assert not torch.equal(model(*arguments), model(*arguments))


def test_only_frames_of_the_grid():
    x, position, *memory = inputs()
    with pytest.raises(AssertionError, match="30 tokens where the grid of 6 has 36"):
        build()(x[:, :30], position[:30], *memory)


@torch.no_grad()
def test_scores_are_those_of_the_fused_kernel(monkeypatch):
    """One call of SDPA for each attention: no score matrix of L x M is spelled out."""
    shapes = []
    fused = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        shapes.append((*q.shape, k.shape[2], options["attn_mask"]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    build()(*inputs())
    keys = 3 * TOKENS + POINTER_TOKENS
    assert shapes == [(2, 1, TOKENS, DIM, TOKENS, None), (2, 1, TOKENS, DIM, keys, None)] * 2
