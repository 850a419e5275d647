"""The small SAM3 that lies in the repository: what it is, and that it reaches what its card says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distillation.supervised.card import ROWS
from sam3.engine.weights import load_weights
from sam3.model_builder import build_sam3_image_model
from sam3.tracker_builder import build_video_model
from scripts import train_tiny_sam3

ROOT = Path(__file__).parent.parent
FILE = ROOT / "sam3_checkpoints/sam3_tiny.safetensors"
WANDER = 0.01  # that another processor or torch may make of a figure


def test_its_size_and_precision():
    assert FILE.stat().st_size <= 6_000_000
    kinds = {tensor.dtype for tensor in load_weights(FILE).tensors.values()}
    assert torch.float16 in kinds and torch.float32 not in kinds


def test_image_and_video_models_load_all_of_it():
    """Strictly: the builders refuse what is missing."""
    image, video = build_sam3_image_model(FILE, device="cpu"), build_video_model(FILE, device="cpu")
    assert image.preprocess.img_size == video.preprocess.img_size == 224


@pytest.mark.slow
@pytest.mark.parametrize("phase", train_tiny_sam3.MEASURED)
def test_it_reaches_what_its_card_says(phase: str):
    args = train_tiny_sam3.full_parser().parse_args(["--device", "cpu"])
    measured = train_tiny_sam3.measure(phase, FILE, args)
    page = FILE.with_suffix(".md").read_text()
    for name, (text, aim) in ROWS[phase].items():
        (said,) = re.findall(rf"^\| {re.escape(text)} \| ([\d.]+) \|", page, re.MULTILINE)
        assert measured[name] == pytest.approx(float(said), abs=WANDER), name
        assert aim is None or measured[name] >= aim, name
