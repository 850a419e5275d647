"""Decoder: box bias and refinement worked out by hand, train mode against eval mode."""

from __future__ import annotations

import math

import pytest
import torch

from sam3.model.box_ops import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, inverse_sigmoid
from sam3.model.decoder import TransformerDecoder, _log_distances

DIM, HEADS, QUERIES, GRID = 16, 2, 5, (3, 4)


def make_decoder(dropout: float = 0.0, refine: bool = True, **options) -> TransformerDecoder:
    torch.manual_seed(0)
    decoder = TransformerDecoder(DIM, HEADS, 24, num_layers=3, num_queries=QUERIES, dropout=dropout, **options).eval()
    if refine:
        torch.nn.init.normal_(decoder.bbox_embed.layers[-1].weight, std=0.3)
    return decoder


def make_inputs(batch: int = 2) -> tuple:
    torch.manual_seed(1)
    cells = GRID[0] * GRID[1]
    prompt_mask = torch.zeros(batch, 6, dtype=torch.bool)
    prompt_mask[-1, 4:] = True
    return torch.randn(batch, cells, DIM), torch.randn(batch, cells, DIM), torch.randn(batch, 6, DIM), prompt_mask, GRID


def test_box_formats():
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    torch.testing.assert_close(box_cxcywh_to_xyxy(boxes), torch.tensor([[0.4, 0.1, 0.6, 0.7]]))
    torch.testing.assert_close(box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes)), boxes)


def test_inverse_sigmoid_is_bounded():
    x = torch.tensor([-1.0, 0.0, 0.25, 1.0, 2.0])
    bound = math.log(1000)
    assert inverse_sigmoid(x).tolist() == pytest.approx([-bound, -bound, -math.log(3), bound, bound], abs=1e-3)


def test_log_distances_by_hand():
    distances = _log_distances(2, torch.tensor([[0.0]]), torch.tensor([[0.875]]))  # cell edges at 0 and 0.5
    assert distances.shape == (1, 1, 2, 2)
    assert distances[0, 0].flatten().tolist() == pytest.approx([0.0, -1.0, math.log2(5) / 3, -2 / 3])


@torch.no_grad()
def test_box_bias_is_the_sum_of_a_row_and_a_column_term():
    decoder = make_decoder()
    boxes = torch.rand(2, QUERIES, 4)
    bias = decoder.box_bias(boxes, GRID, torch.float32)
    height, width = GRID
    assert bias.shape == (2, HEADS, 1 + QUERIES, height * width)
    assert bias.is_contiguous()
    assert not bias[:, :, 0].any(), "the presence token looks everywhere alike"
    cx, cy, w, h = boxes[1, 3].tolist()
    for i, j in ((0, 0), (2, 3), (1, 2)):
        dy = [i / height - (cy - h / 2), i / height - (cy + h / 2)]
        dx = [j / width - (cx - w / 2), j / width - (cx + w / 2)]
        dy, dx = (torch.tensor([math.copysign(math.log2(abs(8 * d) + 1) / 3, d) for d in ds]) for ds in (dy, dx))
        wanted = decoder.boxRPB_embed_y(dy) + decoder.boxRPB_embed_x(dx)
        torch.testing.assert_close(bias[1, :, 1 + 3, i * width + j], wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_fresh_decoder_answers_with_its_reference_boxes():
    decoder = make_decoder(refine=False)
    torch.nn.init.uniform_(decoder.reference_points.weight, -3, 3)  # within the bounds of the box logits
    out = decoder(*make_inputs())
    wanted = decoder.reference_points.weight.sigmoid().expand(3, 2, -1, -1)
    torch.testing.assert_close(out.boxes, wanted, rtol=0, atol=1e-6)
    assert out.hs.shape == (3, 2, QUERIES, DIM)
    assert out.presence_logits.shape == (3, 2, 1)
    assert out.presence.shape == (2, 1, DIM)


@torch.no_grad()
def test_each_layer_starts_from_the_boxes_of_the_one_before():
    out = make_decoder()(*make_inputs())
    torch.testing.assert_close(out.references[1:], out.boxes[:-1])
    assert (out.boxes[1:] - out.boxes[:-1]).abs().max() > 1e-3


def test_a_box_teaches_its_own_layer_and_the_one_before():
    decoder = make_decoder()
    out = decoder(*make_inputs())
    (gradient,) = torch.autograd.grad(out.boxes[2].sum(), out.references[1], allow_unused=True, retain_graph=True)
    assert gradient is None, "the boxes of two layers earlier are detached"
    assert out.references[2].requires_grad
    assert not torch.equal(out.boxes[2], out.references[2])


@torch.no_grad()
def test_train_mode_doubles_the_queries_and_leaves_the_first_half_as_in_eval_mode():
    decoder, inputs = make_decoder(dropout=0.0), make_inputs()
    eval_out = decoder(*inputs)
    train_out = decoder.train()(*inputs)
    assert train_out.hs.shape[2] == 2 * QUERIES
    torch.testing.assert_close(train_out.hs[:, :, :QUERIES], eval_out.hs, rtol=0, atol=1e-5)
    torch.testing.assert_close(train_out.boxes[:, :, :QUERIES], eval_out.boxes, rtol=0, atol=1e-5)
    assert (train_out.hs[:, :, QUERIES:] - eval_out.hs).abs().max() > 1e-2, "one-to-many queries skip self-attention"


def test_dropout_acts_in_train_mode_only():
    decoder, inputs = make_decoder(dropout=0.5), make_inputs()
    assert torch.equal(decoder(*inputs).hs, decoder(*inputs).hs)
    decoder.train()
    assert not torch.equal(decoder(*inputs).hs, decoder(*inputs).hs)


def test_activation_checkpointing_keeps_values_and_gradients():
    gradients = []
    for checkpointing in (False, True):
        decoder = make_decoder(activation_checkpointing=checkpointing)
        decoder(*make_inputs()).boxes[-1].sum().backward()
        gradients.append(decoder.query_embed.weight.grad)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_masked_prompt_tokens_do_not_count():
    decoder = make_decoder()
    memory, pos, prompt, prompt_mask, grid = make_inputs()
    out = decoder(memory, pos, prompt, prompt_mask, grid)
    changed = prompt.clone()
    changed[-1, 4:] = 50
    torch.testing.assert_close(decoder(memory, pos, changed, prompt_mask, grid).hs, out.hs)


def test_feed_forward_stays_out_of_autocast():
    decoder, seen = make_decoder(), []
    decoder.layers[0].linear2.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder(*make_inputs())
    assert seen == [torch.float32]
