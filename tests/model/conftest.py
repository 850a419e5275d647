"""The full-size model on synthetic weights, built once for all slow comparisons (about 4 GB)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sam3.model.config import Sam3Config
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import assemble_image_model
from tests.parity.fill import fill_, image


@pytest.fixture(scope="session")
def full_model():
    """Sizes of sam3.pt, weights of `tests/parity/fill.py`."""
    with torch.device("meta"):
        model = assemble_image_model(Sam3Config.preset("full"), with_sam2_neck=True)
    model = model.to_empty(device="cpu").eval()
    fill_(model.state_dict(), "detector.")
    return model


@pytest.fixture(scope="session")
def full_image_pass(full_model):
    """The picture of `tests/parity/README.md` through the processor: `processor`, `state`, `input`, `trunk`."""
    processor = Sam3Processor(full_model, confidence_threshold=0.0)
    seen = {}
    trunk = full_model.backbone.vision_backbone.trunk
    hook = trunk.register_forward_hook(lambda module, args, out: seen.update(input=args[0], trunk=out[-1]))
    state = processor.set_image(Image.fromarray(image(600, 800, seed=0)))
    hook.remove()
    return SimpleNamespace(processor=processor, state=state, **seen)


@pytest.fixture(scope="session")
def expected():
    """`tests/parity/detector.npz`: entry -> probes of the public implementation's output."""
    with np.load(Path(__file__).parent.parent / "parity" / "detector.npz") as file:
        return dict(file)
