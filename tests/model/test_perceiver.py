"""Perceiver: EdgeTAM's resampler of transformers on the same weights, counts, windows and positions by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.engine.optim import parameter_groups
from sam3.model.efficient_memory_attention import TokenGroup
from sam3.model.perceiver import EDGETAM, EfficientSpatialPerceiver, PerceiverResampler, nearest_multiple
from sam3.model.position_encoding import PositionEmbeddingSine

TINY = {"mem_dim": 16, "dim": 64, "heads": 2, "dim_head": 16, "num_latents": 12, "num_latents_2d": 16}
# Ours -> transformers, in this order; `to_kv` is two matrices there.
RENAMES = (
    (".attn.norm_x.", ".layer_norm_input."),
    (".attn.norm_latents.", ".layer_norm_latents."),
    (".self_attn.norm.", ".layer_norm_self."),
    (".self_attn.", ".self_attention."),
    (".attn.", ".cross_attention."),
    (".self_ff.0.", ".self_mlp.layer_norm."),
    (".self_ff.1.", ".self_mlp.up_proj."),
    (".self_ff.3.", ".self_mlp.down_proj."),
    (".ff.0.", ".mlp.layer_norm."),
    (".ff.1.", ".mlp.up_proj."),
    (".ff.3.", ".mlp.down_proj."),
    ("to_q.", "q_proj."),
    ("to_out.", "o_proj."),
)


def their_weights(ours: nn.Module) -> dict[str, Tensor]:
    """Weights of the edgetam preset under the names of transformers."""
    theirs = {}
    for name, tensor in ours.state_dict().items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        if "to_kv." in name:
            for letter, part in zip("kv", tensor.chunk(2), strict=True):
                theirs[name.replace("to_kv.", f"{letter}_proj.")] = part
        else:
            theirs[{"latents": "latents_1d"}.get(name, name.replace("norm.", "layer_norm.", name[:5] == "norm."))] = (
                tensor
            )
    return theirs


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seeded(**sizes) -> EfficientSpatialPerceiver:
    """A perceiver whose norms are not those of a fresh one."""
    torch.manual_seed(0)
    perceiver = EfficientSpatialPerceiver(**sizes)
    with torch.no_grad():
        for parameter in perceiver.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return perceiver.eval()


@torch.no_grad()
def test_equals_edgetam_of_transformers():
    edgetam = pytest.importorskip("transformers.models.edgetam_video.modeling_edgetam_video")
    from transformers import EdgeTamVideoConfig

    ours = seeded(**EDGETAM)
    theirs = edgetam.EdgeTamVideoPerceiverResampler(EdgeTamVideoConfig()).eval()
    theirs.load_state_dict(their_weights(ours))  # strictly
    memory = torch.randn(2, 64, 64, 64)
    code = PositionEmbeddingSine(64)(memory[:1])
    wanted, wanted_position = zip(*(theirs(one[None], code) for one in memory), strict=True)  # takes one object only
    tokens, position = ours(memory)
    assert tokens.shape == (2, 512, 64) and position.shape == (1, 512, 64)
    torch.testing.assert_close(tokens, torch.cat(wanted), atol=1e-5, rtol=0)
    torch.testing.assert_close(position, wanted_position[0], atol=1e-5, rtol=0)


def test_edgetam_has_its_tensors():
    shapes = {name: tuple(tensor.shape) for name, tensor in EfficientSpatialPerceiver(**EDGETAM).state_dict().items()}
    assert len(shapes) == 44
    layer = {
        **{f"attn.{n}": (64,) for n in ("norm_x.weight", "norm_x.bias", "norm_latents.weight", "norm_latents.bias")},
        **{f"self_attn.norm.{n}": (64,) for n in ("weight", "bias")},
        **{
            f"{a}.to_{n}.weight": (s, 64)
            for a in ("attn", "self_attn")
            for n, s in (("q", 64), ("kv", 128), ("out", 64))
        },
        **{f"{ff}.0.{n}": (64,) for ff in ("ff", "self_ff") for n in ("weight", "bias")},
        **{f"{ff}.1.weight": (256, 64) for ff in ("ff", "self_ff")},
        **{f"{ff}.3.weight": (64, 256) for ff in ("ff", "self_ff")},
    }
    wanted = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    wanted.update({"latents": (256, 64), "latents_2d": (256, 64), "norm.weight": (64,), "norm.bias": (64,)})
    assert shapes == wanted


def test_counts():
    full = EfficientSpatialPerceiver()
    assert count(full.input_proj) == 16_640 and count(full.output_proj) == 16_448
    assert count(full) == 3_282_432 + 16_640 + 16_448
    assert count(EfficientSpatialPerceiver(**EDGETAM)) == 230_784
    assert count(EfficientSpatialPerceiver(heads=8, dim_head=32)) == count(full)
    assert full.layout == (TokenGroup(256), TokenGroup(256, grid=16))
    # Without self-attention each layer lacks 2 C + 4 C I of it and 2 C + 8 C^2 of its feed-forward.
    plain = EfficientSpatialPerceiver(use_self_attn=False)
    assert count(full) - count(plain) == 2 * (512 + 4 * 256**2 + 512 + 8 * 256**2)


@pytest.mark.parametrize(
    ("cells", "side", "wanted"), [(72, 16, 64), (73, 16, 80), (64, 16, 64), (16, 4, 16), (3, 16, 16), (40, 16, 32)]
)
def test_nearest_multiple(cells: int, side: int, wanted: int):
    assert nearest_multiple(cells, side) == wanted


@torch.no_grad()
def test_positions():
    perceiver = seeded(**TINY)
    tokens, position = perceiver(torch.randn(2, 16, 16, 16))
    assert tokens.shape == (2, 28, 16) and position.shape == (1, 28, 16)
    assert not position[:, :12].any()
    code = PositionEmbeddingSine(16)(torch.zeros(1, 1, 4, 4))
    assert torch.equal(position[0, 12:].view(4, 4, 16), code[0].permute(1, 2, 0))
    assert perceiver(torch.randn(1, 16, 16, 16, dtype=torch.float32))[1].dtype == torch.float32


@torch.no_grad()
def test_a_2d_latent_sees_its_window_and_a_global_latent_sees_everything():
    perceiver = seeded(**TINY)
    memory = torch.randn(1, 16, 16, 20)  # windows of 4 rows x 5 columns
    other = memory.clone()
    other[:, :, 9, 16] += 1.0  # row 9, column 16: window (2, 3), the 2 * 4 + 3 = 11th from 0
    change = (perceiver(other)[0] - perceiver(memory)[0]).abs().amax(dim=-1)[0]
    assert (change[:12] > 0).all()
    assert change[12:].nonzero().flatten().tolist() == [11]


@torch.no_grad()
def test_sides_that_are_no_multiples_are_resized_each_for_itself():
    perceiver = seeded(**TINY)
    memory = torch.randn(2, 16, 18, 16)
    tokens, _ = perceiver(memory)
    resized = F.interpolate(memory, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(tokens[:, 12:], perceiver(resized)[0][:, 12:])
    # The global latents read the map as it is.
    x = perceiver.input_proj(memory.flatten(2).transpose(1, 2))
    code = PositionEmbeddingSine(32)(memory).flatten(2).transpose(1, 2)
    wanted = perceiver.output_proj(PerceiverResampler.forward(perceiver, x, code))
    torch.testing.assert_close(tokens[:, :12], wanted)


@torch.no_grad()
def test_position_joins_keys_and_values():
    """One latent, one token: the softmax is 1 and what comes out is Wo (Wv x + pos)."""
    resampler = PerceiverResampler(dim=8, depth=1, heads=2, dim_head=4, num_latents=1, use_self_attn=False)
    x, position = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    layer = resampler.layers[0]
    value = layer.attn.to_kv.weight[8:] @ layer.attn.norm_x(x)[0, 0] + position[0, 0]
    latent = resampler.latents[0] + layer.attn.to_out.weight @ value
    wanted = resampler.norm(latent + layer.ff(latent))
    torch.testing.assert_close(resampler(x, position)[0, 0], wanted)


def test_every_parameter_gets_a_gradient():
    perceiver = EfficientSpatialPerceiver(**TINY)
    memory = torch.randn(2, 16, 18, 18, requires_grad=True)
    perceiver(memory)[0].square().sum().backward()
    for name, parameter in perceiver.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (memory.grad != 0).all()


@torch.no_grad()
def test_objects_do_not_meet():
    perceiver = seeded(**TINY)
    memory = torch.randn(3, 16, 16, 16)
    torch.testing.assert_close(perceiver(memory)[0][1:2], perceiver(memory[1:2])[0])


@torch.no_grad()
def test_bfloat16():
    perceiver = seeded(**TINY)
    memory = torch.randn(1, 16, 16, 16)
    exact, _ = perceiver(memory)
    rounded, position = perceiver.bfloat16()(memory.bfloat16())
    assert rounded.dtype == position.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("latents", [0, 15, 255])
def test_2d_latents_that_fill_no_square(latents: int):
    with pytest.raises(ValueError, match=f"square grid.*got {latents}"):
        EfficientSpatialPerceiver(num_latents_2d=latents)


def test_latents_are_tokens_and_do_not_decay():
    for module, latents in ((seeded(**TINY), 2), (PerceiverResampler(dim=64, heads=2, dim_head=16), 1)):
        decayed, plain = parameter_groups(nn.ModuleDict({"spatial_perceiver": module}), 0.1)
        own = [parameter for _, parameter in module.named_parameters(recurse=False)]
        assert len(own) == latents
        assert {id(parameter) for parameter in own} <= {id(parameter) for parameter in plain["params"]}
        assert all(parameter.ndim == 2 for parameter in decayed["params"])
