"""Encoder, decoder, scorer, masks, positions and resampler of the student: against transformers, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distillation.models.detr import SlimDecoder
from distillation.models.mask_decoder import MaskDecoder
from distillation.models.positions import PixelPositions
from distillation.models.resampler import PerceiverResampler
from sam3.model.encoder import TransformerEncoderFusion
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.scoring import DotProductScoring
from tests.parity.fill import fill_

DIM, HEADS, FFN, QUERIES, GRID = 64, 8, 128, 10, (5, 7)
SIZES = {"hidden_size": DIM, "num_attention_heads": HEADS, "intermediate_size": FFN, "layer_norm_eps": 1e-5}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 6, C), and a mask that leaves 6 and 4 tokens."""
    return randn(2, 6, DIM, seed=1), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


def decoder() -> SlimDecoder:
    module = SlimDecoder(DIM, HEADS, FFN, num_layers=3, num_queries=QUERIES).eval()
    fill_(module.state_dict())
    return module


def decode(module: SlimDecoder, memory: torch.Tensor | None = None):
    tokens = randn(2, math.prod(GRID), DIM, seed=2) if memory is None else memory
    return module(tokens, randn(2, math.prod(GRID), DIM, seed=3), *prompt(), GRID)


def copy_weights(ours: nn.Module, theirs: nn.Module, prefix: str) -> nn.Module:
    """Our weights in transformers' module, every one of its tensors; `prefix` is our part's place in SAM3."""
    from benchmarks.bench_model import renamed

    left = dict(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        for their_name, part in renamed(prefix + name, tensor):
            (key,) = [key for key in left if their_name == key or their_name.endswith(f".{key}")]
            left.pop(key).copy_(part)
    assert all("prompt_cross_attn" in key for key in left), list(left)
    return theirs.eval()


# Against transformers -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encoder_against_transformers():
    sam3 = pytest.importorskip("transformers.models.sam3.modeling_sam3")
    from transformers.models.sam3.configuration_sam3 import Sam3DETREncoderConfig

    ours = TransformerEncoderFusion(DIM, HEADS, FFN, num_layers=3).eval()
    fill_(ours.state_dict())
    config = Sam3DETREncoderConfig(num_layers=3, **SIZES)
    theirs = copy_weights(ours, sam3.Sam3DetrEncoder(config), "transformer.encoder.")
    level, pos, (text, mask) = randn(2, DIM, *GRID), randn(2, DIM, *GRID, seed=3), prompt()
    wanted = theirs([level], text, [pos], text_mask=~mask).last_hidden_state
    found = ours(*(x.flatten(2).transpose(1, 2) for x in (level, pos)), text, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoder_against_transformers():
    sam3 = pytest.importorskip("transformers.models.sam3.modeling_sam3")
    from transformers.models.sam3.configuration_sam3 import Sam3DETRDecoderConfig

    ours = decoder()
    config = Sam3DETRDecoderConfig(num_layers=3, num_queries=QUERIES, **SIZES)
    theirs = copy_weights(ours, sam3.Sam3DetrDecoder(config), "transformer.decoder.")
    memory, pos, (text, mask) = randn(2, math.prod(GRID), DIM, seed=2), randn(2, math.prod(GRID), DIM, seed=3), prompt()
    wanted = theirs(memory, text, pos, text_mask=~mask, spatial_shapes=torch.tensor([GRID]))
    found = decode(ours)
    torch.testing.assert_close(found.queries, wanted.intermediate_hidden_states[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.presence_logits, wanted.presence_logits[-1], rtol=1e-5, atol=1e-5)
    # Theirs are the boxes that entered the layer; the last refinement is the model's to make.
    entered = wanted.reference_boxes[-1].clamp(1e-3, 1 - 1e-3)
    refined = (entered.logit() + theirs.box_head(wanted.intermediate_hidden_states[-1])).sigmoid()
    torch.testing.assert_close(found.boxes, refined, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scorer_against_transformers():
    sam3 = pytest.importorskip("transformers.models.sam3.modeling_sam3")
    from transformers import Sam3Config

    ours = DotProductScoring(DIM, FFN).eval()
    fill_(ours.state_dict())
    config = Sam3Config(detr_decoder_config=SIZES)
    theirs = copy_weights(ours, sam3.Sam3DotProductScoring(config), "dot_prod_scoring.")
    queries, (text, mask) = randn(2, QUERIES, DIM), prompt()
    found = ours(queries, text, mask)
    torch.testing.assert_close(found, theirs(queries[None], text, ~mask)[0], rtol=1e-5, atol=1e-5)
    assert 1e-2 < found.abs().max() < 12


@torch.no_grad()
def test_masks_against_transformers():
    sam3 = pytest.importorskip("transformers.models.sam3.modeling_sam3")
    from transformers.models.sam3.configuration_sam3 import Sam3MaskDecoderConfig

    ours = MaskDecoder(DIM).eval()
    fill_(ours.state_dict())
    config = Sam3MaskDecoderConfig(hidden_size=DIM, num_attention_heads=HEADS, layer_norm_eps=1e-5)
    theirs = copy_weights(ours, sam3.Sam3MaskDecoder(config), "segmentation_head.")
    levels = [randn(2, DIM, 4 * side, 4 * side) for side in (7, 3.5, 1.75) for side in [int(side)]]
    memory, queries = randn(2, levels[-1].shape[-1] ** 2, DIM, seed=2), randn(2, QUERIES, DIM, seed=3)
    wanted = theirs(queries, levels, memory)  # without a prompt, theirs does not look at one either
    masks, semantic = ours(levels, memory, queries)
    torch.testing.assert_close(masks, wanted.pred_masks, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(semantic, wanted.semantic_seg, rtol=1e-5, atol=1e-5)


# By hand --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_box_bias_by_hand():
    """One box, a 2 x 4 grid, MLPs that hand through the distance to the first side in head 0, the second in head 1."""
    module = decoder()
    for mlp in (module.boxRPB_embed_x, module.boxRPB_embed_y):
        for layer in mlp.layers:
            layer.weight.zero_()
            layer.bias.zero_()
        first, last = mlp.layers
        for side in (0, 1):  # x = relu(x) - relu(-x)
            first.weight[2 * side, side], first.weight[2 * side + 1, side] = 1, -1
            last.weight[side, 2 * side], last.weight[side, 2 * side + 1] = 1, -1
    box = torch.tensor([[[0.5, 0.25, 0.5, 0.5]]])  # x from 0.25 to 0.75, y from 0 to 0.5
    bias = module.box_bias(box, (2, 4), torch.float32)

    def log(distance: float) -> float:
        return math.copysign(math.log2(abs(8 * distance) + 1) / 3, distance)

    columns, rows = (0, 0.25, 0.5, 0.75), (0, 0.5)
    for head, (y, x) in enumerate(((0, 0.25), (0.5, 0.75))):
        wanted = [log(row - y) + log(column - x) for row in rows for column in columns]
        torch.testing.assert_close(bias[0, head, 1], torch.tensor(wanted))
    assert bias.shape == (1, HEADS, 2, 8)
    assert bias[:, :, 0].count_nonzero() == 0  # the presence token has no place


def test_sine_code_of_a_box_by_hand():
    """Order y, x, w, h; sine and cosine in turn; angles 2 pi v over 10000 ** (2 floor(k / 2) / m)."""
    module = SlimDecoder(8, 2, 16, num_layers=1, num_queries=1)  # m = 4: divisors 1, 1, 100, 100
    code = module._encode_boxes(torch.tensor([[[0.25, 0.5, 0.125, 1.0]]]))
    wanted = []
    for v in (0.5, 0.25, 0.125, 1.0):
        angle = 2 * math.pi * v
        wanted += [math.sin(angle), math.cos(angle), math.sin(angle / 100), math.cos(angle / 100)]
    torch.testing.assert_close(code, torch.tensor([[wanted]]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_refinement_by_hand():
    """A box head that always says d: after three layers, logit(box) = logit(start) + 3 d."""
    module = decoder()
    step = torch.tensor([0.1, -0.2, 0.3, -0.4])
    module.bbox_embed.layers[-1].weight.zero_()
    module.bbox_embed.layers[-1].bias.copy_(step)
    start = module.reference_points.weight.clamp(-2, 2)
    module.reference_points.weight.copy_(start)
    torch.testing.assert_close(decode(module).boxes, (start + 3 * step).sigmoid().expand(2, -1, -1))


@torch.no_grad()
def test_refinement_starts_again_from_the_edge():
    """A coordinate beyond 0.999 counts as 0.999, so that no box is stuck at the border."""
    module = decoder()
    module.bbox_embed.layers[-1].weight.zero_()
    module.bbox_embed.layers[-1].bias.zero_()
    module.reference_points.weight.fill_(20.0)
    torch.testing.assert_close(decode(module).boxes, torch.full((2, QUERIES, 4), 0.999), rtol=0, atol=1e-6)


def test_references_carry_no_gradient_between_layers():
    """The last box learns the last step alone: with the same step in each of three layers, and nothing else that acts
    on the box, its gradient is that of one step."""
    module = decoder()
    with torch.no_grad():
        module.bbox_embed.layers[-1].weight.zero_()
        module.bbox_embed.layers[-1].bias.fill_(0.1)
    boxes = decode(module).boxes
    boxes.sum().backward()
    slope = (boxes * (1 - boxes)).sum(dim=(0, 1))
    torch.testing.assert_close(module.bbox_embed.layers[-1].bias.grad, slope.detach())


def test_training_has_one_copy_of_the_queries():
    assert decode(decoder().train()).queries.shape == (2, QUERIES, DIM)


@torch.no_grad()
def test_presence_is_clamped():
    module = decoder()
    module.presence_token_head.layers[-1].bias.fill_(50.0)
    assert decode(module).presence_logits.tolist() == [[10.0], [10.0]]


@torch.no_grad()
def test_boxes_are_float32_whatever_the_rest_is():
    module = decoder()
    exact = decode(module)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decode(module)
    assert rounded.boxes.dtype == rounded.presence_logits.dtype == torch.float32
    assert (rounded.boxes - exact.boxes).abs().max() < 0.02


@torch.no_grad()
def test_masks_are_float32_under_autocast():
    module = MaskDecoder(DIM).eval()
    fill_(module.state_dict())
    levels = [randn(1, DIM, side, side) for side in (8, 4, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        pixels = module.pixel_decoder([*levels[:2], levels[2]])
        memory, queries = levels[2].flatten(2).transpose(1, 2), randn(1, QUERIES, DIM)
        masks, semantic = module(levels, memory, queries)
    embedding = module.mask_predictor.mask_embed(queries)
    wanted = torch.einsum("bqc,bchw->bqhw", embedding, module.instance_seg_head(pixels.float()))
    assert masks.dtype == semantic.dtype == torch.float32
    torch.testing.assert_close(masks, wanted, rtol=1e-4, atol=1e-4)


def test_positions_by_hand():
    scaled, counted = (kind(8)(torch.zeros(1, 1, 2, 3)) for kind in (PositionEmbeddingSine, PixelPositions))
    assert scaled.shape == counted.shape == (1, 8, 2, 3)
    # m = 4 channels per axis, y first; divisors 1, 1, 100, 100. Row 1 of 2, column 2 of 3:
    for code, y, x in ((scaled, 2 * math.pi, 2 * math.pi), (counted, 2.0, 3.0)):
        wanted = [f(v / tau) for v in (y, x) for tau in (1, 100) for f in (math.sin, math.cos)]
        torch.testing.assert_close(code[0, :, 1, 2], torch.tensor(wanted), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_resampler_gathers_any_number_of_tokens_in_any_order():
    module = PerceiverResampler(DIM, HEADS, FFN, num_layers=2, num_latents=4).eval()
    fill_(module.state_dict())
    tokens = randn(2, 12, DIM)
    out = module(tokens)
    assert out.shape == (2, 4, DIM) == module(tokens[:, :5]).shape
    torch.testing.assert_close(module(tokens.flip(1)), out, rtol=1e-5, atol=1e-5)
    assert (module(tokens + randn(2, 12, DIM, seed=1)) - out).abs().max() > 1e-3
