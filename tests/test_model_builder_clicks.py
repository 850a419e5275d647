"""Loading whole models with clicks (`predict_inst`): the second neck and the tracker come along."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sam3.engine.weights import load_weights, save_weights
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model.tracker_config import TINY_MEMORY, TrackerConfig
from sam3.model.tracker_memory import CompressedMemory
from sam3.model_builder import build_efficientsam3_image_model, build_sam3_image_model
from sam3.tracker_builder import assemble_tracker
from tests.parity.fill import image
from tests.test_model_builder import with_student

CLICK = {"point_coords": [[80, 45]], "point_labels": [1]}


@pytest.fixture(scope="module")
def clicked(teacher_file):
    """The tensors and meta of a whole tiny file, its model with clicks, and what a click gives."""
    model = build_sam3_image_model(teacher_file, device="cpu", enable_inst_interactivity=True)
    return load_weights(teacher_file).tensors, model, click(model)


def click(model):
    state = Sam3Processor(model).set_image(image(90, 160))
    return model.predict_inst(state, **CLICK)[2]


def test_clicks_bring_the_second_neck_and_the_tracker(clicked):
    tensors, model, low = clicked
    own = model.state_dict()
    assert len(own) == len(tensors)
    moved = {"detector.": "", "tracker.": "inst_interactive_predictor.model."}
    for key, tensor in tensors.items():
        root = key[: key.index(".") + 1]
        assert torch.equal(own[moved[root] + key.removeprefix(root)], tensor)
    assert not model.inst_interactive_predictor.training
    assert low.shape == (3, 64, 64)


def test_clicks_of_a_file_of_the_image_model_alone(clicked, tmp_path):
    _, model, low = clicked
    save_weights(tmp_path / "w.pt", model.state_dict())
    again = build_sam3_image_model(tmp_path / "w.pt", device="cpu", enable_inst_interactivity=True)
    assert np.array_equal(click(again), low)


def test_clicks_with_a_compressed_memory_are_the_same(clicked, tmp_path):
    tensors, _, low = clicked
    config = replace(TrackerConfig.preset("tiny"), memory=TINY_MEMORY)
    memory = {
        f"tracker.{key}": tensor
        for key, tensor in assemble_tracker(config).state_dict().items()
        if key.startswith(("memory_attention.", "spatial_perceiver."))
    }
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("tracker.transformer.")}
    save_weights(tmp_path / "w.pt", kept | memory, {"memory": TINY_MEMORY.to_meta()})
    model = build_sam3_image_model(tmp_path / "w.pt", device="cpu", enable_inst_interactivity=True)
    assert isinstance(model.inst_interactive_predictor.model.memory, CompressedMemory)
    assert np.array_equal(click(model), low)  # a picture has no past


def test_clicks_with_a_student(clicked, tmp_path):
    save_weights(tmp_path / "w.pt", *with_student(clicked[0]))
    model = build_efficientsam3_image_model(tmp_path / "w.pt", device="cpu", enable_inst_interactivity=True)
    assert model.inst_interactive_predictor.preprocess.resize == "pad"
    assert np.isfinite(click(model)).all()


def test_clicks_with_random_weights():
    model = build_sam3_image_model(device="meta", config="tiny", enable_inst_interactivity=True)
    assert model.inst_interactive_predictor.model.config.img_size == 224


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tracker.", r"w\.pt has no tracker \(tracker\.\*\), which video and clicks need"),
        (
            "detector.backbone.vision_backbone.sam2_convs.",
            r"w\.pt lacks the second neck .* video and clicks need",
        ),
        ("tracker.no_obj_ptr", r"w\.pt.*1 missing: no_obj_ptr"),
    ],
)
def test_clicks_need_the_whole_file(clicked, tmp_path, lost: str, message: str):
    save_weights(tmp_path / "w.pt", {key: t for key, t in clicked[0].items() if not key.startswith(lost)})
    with pytest.raises(ValueError, match=message):
        build_sam3_image_model(tmp_path / "w.pt", device="cpu", enable_inst_interactivity=True)
