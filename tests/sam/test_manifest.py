"""Names, shapes and types of every weight at full size, without allocating any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder
from sam3.sam.transformer import TwoWayTransformer
from tests.model.test_manifest import count, describe
from tests.sam.parts import OPTIONS

MANIFEST = Path(__file__).parent.parent / "manifests" / "sam3.tsv"


def entries(prefix: str) -> dict[str, tuple[str, str]]:
    rows = [line.split("\t") for line in MANIFEST.read_text().splitlines()]
    return {key.removeprefix(prefix): (shape, kind) for key, shape, kind in rows if key.startswith(prefix)}


def decoder(**options) -> MaskDecoder:
    with torch.device("meta"):
        return MaskDecoder(256, TwoWayTransformer(2, 256, 8, 2048), **options)


def test_prompt_encoder():
    with torch.device("meta"):
        encoder = PromptEncoder(256, (72, 72), (1008, 1008))
    wanted = entries("tracker.sam_prompt_encoder.")
    assert len(wanted) == 17
    assert describe(encoder) == wanted
    assert count(encoder) == 6_476 - 256  # the rest is the buffer of the position code


def test_mask_decoder_of_the_tracker():
    wanted = entries("tracker.sam_mask_decoder.")
    model = decoder(**OPTIONS)
    assert len(wanted) == 131
    assert describe(model) == wanted
    assert count(model) == 4_215_109
    assert count(model.transformer) == 3_291_264


def test_mask_decoder_of_the_first_sam_has_a_subset():
    wanted = entries("tracker.sam_mask_decoder.")
    extra = ("conv_s0.", "conv_s1.", "obj_score_token.", "pred_obj_score_head.")
    assert describe(decoder()) == {key: row for key, row in wanted.items() if not key.startswith(extra)}


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="even width, got 5"):
        PromptEncoder(5, (4, 4), (56, 56))
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        MaskDecoder(12, TwoWayTransformer(1, 12, 1, 12))
    with pytest.raises(ValueError, match="64 / 2 is not a multiple of its 64 heads"):
        TwoWayTransformer(1, 64, 64, 64, attention_downsample_rate=2)
