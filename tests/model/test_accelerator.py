"""The tiny model on CUDA or MPS against the CPU: nothing may stay behind on another device. Skipped without either."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sam3.engine.distributed import choose_device
from sam3.model.config import Sam3Config
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import assemble_image_model, build_sam3_image_model
from tests.parity.fill import fill_, image

DEVICE = choose_device("auto")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA or MPS"),
]
TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.1}  # of scores; float32 convolutions may run as TF32


def find(processor: Sam3Processor) -> dict:
    """Text, boxes and points in a batch of two pictures, on the second."""
    state = processor.set_image_batch([Image.fromarray(image(90, 160, seed)) for seed in (0, 1)])
    boxes = [((0.5, 0.5, 0.4, 0.3), True), ((0.2, 0.3, 0.2, 0.2), False)]
    return processor.set_prompts(state, "a red car", boxes=boxes, points=[((30, 40), True)], index=1)


def make_model():
    model = assemble_image_model(Sam3Config.preset("tiny"), with_sam2_neck=True)
    fill_(model.state_dict(), "detector.")
    return model.eval()


@pytest.fixture(scope="module")
def expected() -> dict:
    return find(Sam3Processor(make_model(), confidence_threshold=0.0))


@pytest.mark.parametrize("way", ["float32", "bfloat16 autocast", "bfloat16 weights"])
def test_results_are_those_of_the_cpu(expected, way: str):
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    model = make_model().to(DEVICE, dtype if way == "bfloat16 weights" else torch.float32)
    autocast_dtype = dtype if way == "bfloat16 autocast" else None
    state = find(Sam3Processor(model, confidence_threshold=0.0, autocast_dtype=autocast_dtype))
    assert {state[name].device.type for name in ("masks", "masks_logits", "boxes", "scores")} == {DEVICE.type}
    assert (state["scores"].cpu() - expected["scores"]).abs().max() < TOLERANCES[dtype]
    assert (state["masks"].cpu() == expected["masks"]).float().mean() > 0.95


def test_a_model_that_has_moved_leaves_its_caches_behind(expected):
    processor = Sam3Processor(make_model(), confidence_threshold=0.0)
    find(processor)  # fills the caches of positions and phrases on the CPU
    moved = find(Sam3Processor(processor.model, device=DEVICE, confidence_threshold=0.0))
    assert (moved["scores"].cpu() - expected["scores"]).abs().max() < TOLERANCES[torch.float32]


def test_clicks_are_those_of_the_cpu(teacher_file):
    found = {}
    for device in ("cpu", DEVICE):
        model = build_sam3_image_model(teacher_file, device=device, enable_inst_interactivity=True)
        state = Sam3Processor(model).set_image(Image.fromarray(image(90, 160)))
        earlier = model.predict_inst(state, [[80, 45]], [1])[2][:1]
        found[str(device)] = model.predict_inst(state, [[80, 45]], [1], [30, 20, 110, 80], earlier)
    (masks, ious, _), (expected, expected_ious, _) = found[str(DEVICE)], found["cpu"]
    assert (masks == expected).mean() > 0.95
    assert abs(ious - expected_ious).max() < TOLERANCES[torch.float32]


def test_every_gradient_arrives():
    model = make_model().to(DEVICE).train()
    side = model.preprocess.img_size
    out = model(torch.randn(2, 3, side, side, device=DEVICE), ["a cat", "a red car"])
    (out["pred_masks"].float().mean() + out["pred_boxes"].mean() + out["pred_logits"].float().mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.backbone.vision_backbone.trunk.patch_embed.proj.weight.grad.abs().sum() > 0
