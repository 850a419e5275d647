"""The first frame of the tracker fixture: full-size prompt encoder and mask decoder, two clicks, no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder
from sam3.sam.transformer import TwoWayTransformer
from tests.parity.compare import distance
from tests.parity.fill import _rng, fill_, values
from tests.sam.parts import OPTIONS

FIXTURE = Path(__file__).parent.parent / "parity" / "tracker.npz"


@pytest.fixture(scope="module")
def parts() -> nn.ModuleDict:
    encoder = PromptEncoder(256, (72, 72), (1008, 1008))
    decoder = MaskDecoder(256, TwoWayTransformer(2, 256, 8, 2048), **OPTIONS)
    parts = nn.ModuleDict({"sam_prompt_encoder": encoder, "sam_mask_decoder": decoder})
    fill_(parts.state_dict(), "tracker.")
    with torch.no_grad():
        decoder.pred_obj_score_head.layers[2].bias.add_(3.0)
    return parts.eval()


@torch.no_grad()
def test_the_first_frame(parts):
    generator = _rng("framea0")
    fine, middle, top = (
        torch.from_numpy(generator.standard_normal((side * side, 1, width), dtype=np.float32))
        .permute(1, 2, 0)
        .unflatten(2, (side, side))
        for side, width in ((288, 32), (144, 64), (72, 256))
    )
    no_memory = torch.from_numpy(values("tracker.no_mem_embed", (1, 1, 256))).view(1, 256, 1, 1)
    encoder, decoder = parts["sam_prompt_encoder"], parts["sam_mask_decoder"]
    points = torch.tensor([[[400.0, 380.0], [520.0, 600.0]]]), torch.ones(1, 2, dtype=torch.int32)
    out = decoder(top + no_memory, encoder.get_dense_pe(), *encoder(points), False, (fine, middle))
    with np.load(FIXTURE) as fixture:
        assert distance(out.masks, fixture["t0.pred_masks"]) <= 1e-4
        assert distance(out.object_logits, fixture["t0.object_score_logits"]) <= 1e-4
