"""Memory encoder: names, parity with transformers, and small sizes."""

from __future__ import annotations

import pytest
import torch

from sam3.model.memory_encoder import ConvNeXtBlock, MemoryEncoder
from tests.model.test_manifest import MANIFEST, describe

NAMES = (  # ours -> theirs
    ("mask_downsampler.encoder.12.", "mask_downsampler.final_conv."),
    *((f"mask_downsampler.encoder.{3 * i}.", f"mask_downsampler.layers.{i}.conv.") for i in range(4)),
    *((f"mask_downsampler.encoder.{3 * i + 1}.", f"mask_downsampler.layers.{i}.layer_norm.") for i in range(4)),
    ("pix_feat_proj.", "feature_projection."),
    ("out_proj.", "projection."),
    ("fuser.", "memory_fuser."),
    (".gamma", ".scale"),
    (".dwconv.", ".depthwise_conv."),
    (".norm.", ".layer_norm."),
    (".pwconv", ".pointwise_conv"),
)


def build(dim: int = 64, mem_dim: int = 16) -> MemoryEncoder:
    torch.manual_seed(0)
    model = MemoryEncoder(dim, mem_dim)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") or "norm" in name or ".bias" in name:
            torch.nn.init.normal_(parameter, mean=0.3, std=0.2)  # the initial 1e-6 would hide the blocks
    return model.eval()


def inputs(dim: int = 64, grid: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, dim, grid, grid), torch.rand(2, 1, 16 * grid, 16 * grid) * 20 - 10


def test_names_and_shapes_of_the_checkpoint():
    with torch.device("meta"):
        model = MemoryEncoder(256, 64)
    prefix = "tracker.maskmem_backbone."
    rows = [line.split("\t") for line in MANIFEST.read_text().splitlines() if line.startswith(prefix)]
    assert describe(model) == {key.removeprefix(prefix): (shape, kind) for key, shape, kind in rows}
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_384_608


@torch.no_grad()
def test_agrees_with_transformers():
    pytest.importorskip("transformers")
    from transformers.models.sam3_tracker_video import modeling_sam3_tracker_video as modeling

    ours = build()
    config = modeling.Sam3TrackerVideoConfig(
        memory_encoder_hidden_size=64,
        memory_encoder_output_channels=16,
        memory_fuser_embed_dim=64,
        memory_fuser_intermediate_dim=256,
        mask_downsampler_embed_dim=64,
    )
    theirs = modeling.Sam3TrackerVideoMemoryEncoder(config).eval()
    renamed = {}
    for key, tensor in ours.state_dict().items():
        for name, their_name in NAMES:
            key = key.replace(name, their_name, 1)
        renamed[key] = tensor
    theirs.load_state_dict(renamed)
    features, masks = inputs()
    expected, _ = theirs(features, masks)
    assert expected.shape == (2, 16, 5, 5)
    torch.testing.assert_close(ours(features, masks), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_frame_serves_all_objects():
    model = build()
    features, masks = inputs()
    expected = model(features[:1].expand(2, -1, -1, -1), masks)
    torch.testing.assert_close(model(features[:1], masks), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the masks differ


@torch.no_grad()
def test_a_mask_acts_where_it_is():
    model = build()
    features, masks = inputs(grid=16)
    changed = masks.clone()
    changed[:, :, 208:, 208:] *= -1  # the last 3 x 3 cells
    where = (model(features, changed) - model(features, masks)).abs().amax(dim=(0, 1)) > 1e-6
    assert where[13:, 13:].all()
    assert not where[:6].any() and not where[:, :6].any()  # two 7x7 convolutions and the mask's own reach 7 cells


@torch.no_grad()
def test_a_fresh_block_is_almost_the_identity():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 9)
    difference = (ConvNeXtBlock(8)(x) - x).abs().max()
    assert 0 < difference < 1e-5
