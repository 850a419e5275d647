"""Full-size encoders against the public implementation, number by number; see tests/parity/README.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.parity.compare import distance
from tests.parity.fill import probe

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


@pytest.mark.parametrize("entry", ["input", "trunk", "fpn0", "fpn1", "fpn2", "pos0", "pos1", "pos2"])
def test_image_encoder(full_image_pass, expected, entry: str):
    levels = full_image_pass.state["backbone_out"]
    found = {
        "input": full_image_pass.input,
        "trunk": full_image_pass.trunk,
        **{f"fpn{i}": level for i, level in enumerate(levels["backbone_fpn"])},
        **{f"pos{i}": pos for i, pos in enumerate(levels["vision_pos_enc"])},
    }
    assert distance(found[entry], expected[entry]) <= TOLERANCE


def test_text_encoder(full_model, expected):
    with torch.inference_mode():
        out = full_model.backbone.forward_text(["a red car"])
    for name in ("language_features", "language_embeds"):
        assert distance(out[name], expected[f"text.{name}"]) <= TOLERANCE, name
    np.testing.assert_array_equal(probe(out["language_mask"]), expected["text.language_mask"])
