"""Names, shapes and types of every weight at full size, without allocating any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sam3.model.config import Sam3Config
from sam3.model_builder import assemble_image_model

MANIFEST = Path(__file__).parent.parent / "manifests" / "sam3.tsv"


def full_model(**options):
    with torch.device("meta"):
        return assemble_image_model(Sam3Config.preset("full"), **options)


@pytest.fixture(scope="module")
def manifest() -> dict[str, tuple[str, str]]:
    """Key without `detector.` -> (shape, dtype)."""
    rows = [line.split("\t") for line in MANIFEST.read_text().splitlines()]
    return {key.removeprefix("detector."): (shape, kind) for key, shape, kind in rows if key.startswith("detector.")}


def describe(model) -> dict[str, tuple[str, str]]:
    return {
        key: ("x".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."))
        for key, tensor in model.state_dict().items()
    }


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_all_entries_of_the_checkpoint(manifest):
    model = full_model(with_sam2_neck=True)
    assert len(manifest) == 1156
    assert describe(model) == manifest
    assert count(model) == 848_311_862


def test_without_the_second_neck(manifest):
    model = full_model()
    assert describe(model) == {key: row for key, row in manifest.items() if ".sam2_convs." not in key}
    assert len(model.state_dict()) == 1134
    assert count(model) == 840_509_750


def test_counts_by_part():
    model = full_model(with_sam2_neck=True)
    neck = model.backbone.vision_backbone
    assert count(neck.trunk) == 446_237_696
    assert count(neck.convs) == count(neck.sam2_convs) == 7_802_112
    assert count(model.backbone.language_backbone) == 353_724_672
    assert count(model.geometry_encoder) == 8_215_808
    assert count(model.transformer.encoder) == 9_472_512
    assert count(model.transformer.decoder) == 11_575_093
    assert count(model.dot_prod_scoring) == 1_182_976
    assert count(model.segmentation_head) == 2_298_881


def test_parts_left_out_leave_no_keys():
    keys = full_model(enable_text_encoder=False, enable_segmentation=False).state_dict()
    assert len(keys) == 1134 - 295 - 28
    assert not [key for key in keys if "language_backbone" in key or "segmentation_head" in key]
