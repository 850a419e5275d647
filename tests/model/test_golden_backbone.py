"""The small golden model: trunk, necks, positions and text against the table of the public implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model.golden import TEXTS, assert_row, golden_image, golden_model, golden_values, uniform


@pytest.fixture(scope="module")
def model():
    return golden_model()


def test_the_fill_is_the_one_of_the_table():
    np.testing.assert_allclose(
        uniform(3 * 112 * 112, 1)[[0, 1, 2, -1]], [-0.634167, 0.480170, 0.128790, 0.668757], atol=1e-6
    )
    checks = {
        ("backbone.vision_backbone.trunk.patch_embed.proj.weight", (64, 3, 14, 14)): (0.009213, 0.010429, 0.034416),
        ("backbone.language_backbone.encoder.token_embedding.weight", (49408, 64)): (-0.422312, -0.587924, 0.963866),
        ("transformer.decoder.query_embed.weight", (10, 32)): (-0.816864, 0.593265, 0.111830),
    }
    for (key, shape), expected in checks.items():
        np.testing.assert_allclose(golden_values(key, shape).flatten()[[0, 1, -1]], expected, atol=1e-6)
    np.testing.assert_allclose(
        golden_values("geometry_encoder.norm.weight", (32,))[[0, 1, -1]], [1.05592, 1.037931, 1.020532], atol=1e-6
    )


def test_size(model):
    assert len(model.state_dict()) == 366
    assert sum(p.numel() for p in model.parameters()) == 3_890_398


@torch.no_grad()
def test_image_pass(model):
    image = golden_image()
    (trunk,) = model.backbone.vision_backbone.trunk(image)
    assert_row(trunk, (1, 64, 8, 8), 0.060492, 1.520172, -1.25750, 2.21422)
    out = model.backbone.forward_image(image)
    fpn, sam2 = out["backbone_fpn"], out["sam2_backbone_out"]["backbone_fpn"]
    assert len(fpn) == len(sam2) == len(out["vision_pos_enc"]) == 3
    assert_row(fpn[0], (1, 32, 32, 32), -0.009212, 0.559982, 0.08187, -0.07730)
    assert_row(fpn[1], (1, 32, 16, 16), 0.064114, 0.957370, -0.59847, -0.85128)
    assert_row(fpn[2], (1, 32, 8, 8), -0.089296, 1.434856, 0.99826, 0.14672)
    assert_row(sam2[0], (1, 32, 32, 32), 0.027694, 0.528191, 0.13888, 0.05169)
    assert_row(sam2[1], (1, 32, 16, 16), -0.031493, 1.014796, -0.25679, 1.38027)
    assert_row(sam2[2], (1, 32, 8, 8), 0.111292, 1.383815, -0.28310, -0.00429)
    assert_row(out["vision_pos_enc"][2], (1, 32, 8, 8), 0.471742, 0.556111, 0.70711, 1.0)
    assert out["vision_features"] is fpn[2]


@torch.no_grad()
def test_text_pass(model):
    out = model.backbone.forward_text(TEXTS)
    assert_row(out["language_features"], (32, 2, 32), 0.007942, 0.742298, 0.49664, -0.90680)
    assert_row(out["language_embeds"], (32, 2, 64), -0.116893, 0.510696, 0.45684, -0.77949)
    assert out["language_mask"].dtype == torch.bool
    assert (~out["language_mask"]).sum(1).tolist() == [4, 3]  # start, words, end
