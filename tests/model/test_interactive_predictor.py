"""Clicks, boxes and earlier masks on one picture, on the tiny model: against the tracker's own methods."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.model.interactive_predictor import FEATURES, InteractivePredictor
from sam3.model.mask_cleaning import fill_holes
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model
from sam3.transforms import Preprocess
from tests.parity.fill import image

HEIGHT, WIDTH = 90, 160
POINTS, LABELS = [[80, 45], [20, 70]], [1, 0]
BOX = [30, 20, 110, 80]


@pytest.fixture(scope="module", params=["square", "pad"])
def model(request, teacher_file: Path) -> Sam3Image:
    model = build_sam3_image_model(teacher_file, device="cpu", enable_inst_interactivity=True)
    model.preprocess = Preprocess(img_size=224, resize=request.param)
    tracker = model.inst_interactive_predictor.model
    model.inst_interactive_predictor = InteractivePredictor(tracker, model.preprocess, max_hole_area=0)
    return model


@pytest.fixture
def state(model) -> dict:
    return Sam3Processor(model).set_image(image(HEIGHT, WIDTH))


def in_square(model, *points) -> torch.Tensor:
    """Pixels of the picture -> pixels of the 224 x 224 input, (1, P, 2), worked out by hand."""
    rows = 224 / HEIGHT if model.preprocess.resize == "square" else 126 / HEIGHT
    return torch.tensor([[[x * 224 / WIDTH, y * rows] for x, y in points]])


@torch.inference_mode()
def plain(model, state, points, labels, masks=None, multimask=True):
    """What the tracker says of a frame without a past: low masks (K, 64, 64) and ious (K,)."""
    tracker = model.inst_interactive_predictor.model
    features = tracker.prepare_features(state["backbone_out"]["sam2_backbone_out"]["backbone_fpn"])
    heads = tracker.predict_masks(
        tracker.condition(features.top, None), features.high_res, 1, (points, torch.tensor([labels])), masks, multimask
    )
    return heads.candidates[0].clamp(-32, 32).numpy(), heads.ious[0].numpy()


def close(found, wanted) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("multimask", [True, False])
def test_points_are_what_the_tracker_says(model, state, multimask: bool):
    masks, ious, low = model.predict_inst(state, POINTS, LABELS, multimask_output=multimask)
    wanted, wanted_ious = plain(model, state, in_square(model, *POINTS), LABELS, multimask=multimask)
    count = 3 if multimask else 1
    assert (masks.shape, masks.dtype) == ((count, HEIGHT, WIDTH), bool)
    assert (low.dtype, ious.shape) == (np.float32, (count,))
    close(low, wanted)
    close(ious, wanted_ious)
    assert 0 < masks.mean() < 1


def test_a_box_is_two_points_before_the_others(model, state):
    _, _, low = model.predict_inst(state, POINTS, LABELS, box=BOX)
    close(low, plain(model, state, in_square(model, BOX[:2], BOX[2:], *POINTS), [2, 3, *LABELS])[0])
    _, _, low = model.predict_inst(state, box=np.array([BOX]), multimask_output=False)
    close(low, plain(model, state, in_square(model, BOX[:2], BOX[2:]), [2, 3], multimask=False)[0])


def test_masks_are_the_low_ones_over_the_picture(model, state):
    logits, _, low = model.predict_inst(state, POINTS, LABELS, return_logits=True)
    masks = model.predict_inst(state, POINTS, LABELS)[0]
    assert np.abs(logits).max() < 32  # nothing was clamped, so that the low masks tell all
    rows = 64 if model.preprocess.resize == "square" else 36  # 64 * 90 / 160
    wanted = torch.nn.functional.interpolate(torch.from_numpy(low)[None, :, :rows], (HEIGHT, WIDTH), mode="bilinear")[0]
    close(logits, wanted.numpy())
    assert np.array_equal(masks, logits > 0)


def test_an_earlier_mask_refines(model, state):
    _, ious, low = model.predict_inst(state, POINTS[:1], LABELS[:1])
    earlier = low[ious.argmax()][None]
    _, _, refined = model.predict_inst(state, POINTS, LABELS, mask_input=earlier, multimask_output=False)
    shown = torch.from_numpy(earlier)[None]
    close(refined, plain(model, state, in_square(model, *POINTS), LABELS, shown, multimask=False)[0])
    without = model.predict_inst(state, POINTS, LABELS, multimask_output=False)[2]
    assert np.abs(refined - without).max() > 0.01


@torch.inference_mode()
def test_a_mask_alone_comes_without_any_point(model, state):
    shown = torch.linspace(-5, 5, 64 * 64).view(1, 1, 64, 64)
    tracker = model.inst_interactive_predictor.model
    features = tracker.prepare_features(state["backbone_out"]["sam2_backbone_out"]["backbone_fpn"])
    decoder, encoder = tracker.sam_mask_decoder, tracker.sam_prompt_encoder
    dense = encoder.mask_downscaling(shown)
    conditioned = features.top + tracker.no_mem_embed.view(1, -1, 1, 1)
    nothing = torch.zeros(1, 0, dense.shape[1])
    wanted = decoder(conditioned, encoder.get_dense_pe(), nothing, dense, True, features.high_res)
    _, ious, low = model.predict_inst(state, mask_input=shown[0])
    close(low, wanted.masks[0].numpy())
    close(ious, wanted.ious[0].numpy())


def test_several_prompts_are_one_by_one(model, state):
    boxes = [BOX, [5, 5, 60, 60], [0, 0, WIDTH, HEIGHT]]
    single = [model.predict_inst(state, box=box) for box in boxes]
    together = model.predict_inst(state, box=boxes)
    assert [part.shape for part in together] == [(3, 3, HEIGHT, WIDTH), (3, 3), (3, 3, 64, 64)]
    for i in (1, 2):
        close(together[i], np.stack([found[i] for found in single]))

    points, labels = [[[80, 45]], [[20, 70]], [[5, 5]]], [[1], [1], [0]]
    single = [
        model.predict_inst(state, point, label, box, low[:1])[2]
        for point, label, box, (_, _, low) in zip(points, labels, boxes, single, strict=True)
    ]
    close(model.predict_inst(state, points, labels, boxes, together[2][:, :1])[2], np.stack(single))


def test_a_batch_of_pictures_is_one_by_one(model):
    pictures = [image(HEIGHT, WIDTH, seed=1), image(WIDTH, HEIGHT, seed=2), image(64, 64, seed=3)]
    processor = Sam3Processor(model)
    state = processor.set_image_batch(pictures)
    prompts = {
        "point_coords": [[[40, 45]], None, [[10, 20], [30, 40]]],
        "point_labels": [[1], None, [1, 0]],
        "box": [None, [[10, 20, 60, 140], [5, 5, 50, 50]], None],
    }
    batches = model.predict_inst_batch(state, **{f"{name}_batch": entries for name, entries in prompts.items()})
    assert [masks.shape for masks in batches[0]] == [(3, HEIGHT, WIDTH), (2, 3, WIDTH, HEIGHT), (3, 64, 64)]
    for i, picture in enumerate(pictures):
        alone = model.predict_inst(
            processor.set_image(picture), **{name: entries[i] for name, entries in prompts.items()}
        )
        for found, wanted in zip((column[i] for column in batches[1:]), alone[1:], strict=True):
            close(found, wanted)
    state["index"] = 2  # as after a prompt to the processor about picture 2
    close(model.predict_inst(state, prompts["point_coords"][2], prompts["point_labels"][2])[2], batches[2][2])


def test_relative_coordinates(model, state):
    pixels = model.predict_inst(state, [[80, 45]], [1], [16, 9, 144, 81])[2]
    relative = model.predict_inst(state, [[0.5, 0.5]], [1], [0.1, 0.1, 0.9, 0.9], normalize_coords=False)[2]
    close(relative, pixels)


def test_features_are_made_once_per_picture(model, state, monkeypatch):
    tracker, calls = model.inst_interactive_predictor.model, []
    prepare = tracker.prepare_features
    monkeypatch.setattr(tracker, "prepare_features", lambda levels: calls.append(1) or prepare(levels))
    first = model.predict_inst(state, POINTS, LABELS)[2]
    model.predict_inst(state, box=BOX)
    assert len(calls) == 1
    assert FEATURES in state["backbone_out"]["sam2_backbone_out"]
    Sam3Processor(model).set_image(image(HEIGHT, WIDTH, seed=7), state)
    assert np.abs(model.predict_inst(state, POINTS, LABELS)[2] - first).max() > 0.01
    assert len(calls) == 2


def test_holes_are_filled_in_masks_but_not_in_low_ones(model, state):
    clicks = model.inst_interactive_predictor
    filling = InteractivePredictor(clicks.model, clicks.preprocess)
    logits, _, low = filling.predict(state, POINTS, LABELS, return_logits=True)
    unfilled, _, same = model.predict_inst(state, POINTS, LABELS, return_logits=True)
    assert np.array_equal(low, same)
    filled = fill_holes(torch.from_numpy(low)[:, None], 256, 10.0)
    assert (filled != torch.from_numpy(low)[:, None]).any()
    close(logits, clicks.preprocess.maps_to_image(filled, (HEIGHT, WIDTH))[:, 0].numpy())
    assert (unfilled != logits).any()


def test_visibility_plays_no_part(model, state):
    bias = model.inst_interactive_predictor.model.sam_mask_decoder.pred_obj_score_head.layers[2].bias
    expected = model.predict_inst(state, POINTS, LABELS)[2]
    with torch.no_grad():
        bias.sub_(100)
        try:
            assert np.array_equal(model.predict_inst(state, POINTS, LABELS)[2], expected)
        finally:
            bias.add_(100)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision(model, state, way: str):
    expected = model.predict_inst(state, POINTS, LABELS)[0]
    half = copy.deepcopy(model).bfloat16() if way == "weights" else model
    autocast_dtype = torch.bfloat16 if way == "autocast" else None
    found = Sam3Processor(half, autocast_dtype=autocast_dtype).set_image(image(HEIGHT, WIDTH))
    masks, ious, low = half.predict_inst(found, POINTS, LABELS)
    assert ious.dtype == low.dtype == np.float32
    assert (masks == expected).mean() > 0.95
    assert np.isfinite(half.predict_inst(found, mask_input=low[:1])[2]).all()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "nothing to segment"),
        ({"point_coords": POINTS}, "point_labels are missing"),
        ({"point_labels": LABELS}, "point_coords are missing"),
        ({"point_coords": POINTS, "point_labels": [1]}, r"got \(2, 2\) with \(1,\)"),
        ({"point_coords": [], "point_labels": []}, r"got \(0,\) with \(0,\)"),
        ({"point_coords": POINTS, "point_labels": [1, 2]}, "label of a point is 1"),
        ({"point_coords": [[161, 5]], "point_labels": [1]}, r"\(161, 5\) lies outside the picture of 160 x 90"),
        ({"point_coords": [[float("nan"), 5]], "point_labels": [1]}, "finite"),
        ({"point_coords": "here", "point_labels": [1]}, "points must be numbers"),
        ({"box": [30, 20, 30, 80]}, "has no area"),
        ({"box": [30, 20, 110, 91]}, "outside the picture"),
        ({"box": [1, 2, 3]}, r"several are \(n, 4\)"),
        ({"box": []}, r"several are \(n, 4\)"),
        ({"box": [BOX, BOX], "point_coords": POINTS, "point_labels": LABELS}, "2 boxes with 1 sets of points"),
        ({"box": [BOX, BOX], "mask_input": np.zeros((1, 64, 64))}, "1 masks for 2 prompts"),
        ({"mask_input": np.zeros((64, 64))}, r"has the shape \(64, 64\), wanted \(1, 64, 64\)"),
        ({"mask_input": np.zeros((3, 64, 64))}, r"\(3, 64, 64\), wanted"),
        ({"mask_input": np.zeros((1, 90, 160))}, r"\(1, 90, 160\), wanted"),
        ({"point_coords": [[1.5, 0.5]], "point_labels": [1], "normalize_coords": False}, "outside the picture"),
    ],
)
def test_wrong_prompts_are_refused(model, state, prompt: dict, message: str):
    with pytest.raises(ValueError, match=message):
        model.predict_inst(state, **prompt)


def test_wrong_states_and_batches_are_refused(model, state, teacher_file: Path):
    with pytest.raises(ValueError, match="call set_image"):
        model.predict_inst({}, box=BOX)
    with pytest.raises(ValueError, match="box_batch has 2 entries for 1 pictures"):
        model.predict_inst_batch(state, box_batch=[BOX, BOX])
    bare = build_sam3_image_model(teacher_file, device="cpu")
    with pytest.raises(ValueError, match="without clicks; build it with enable_inst_interactivity=True"):
        bare.predict_inst(state, box=BOX)
    foreign = Sam3Processor(bare).set_image(image(HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="lacks the maps of the second neck"):
        model.predict_inst(foreign, box=BOX)


def test_text_still_works_beside_clicks(model, state):
    before = model.predict_inst(state, box=BOX)[2]
    found = Sam3Processor(model, confidence_threshold=0).set_text_prompt("a dog", state)
    assert len(found["scores"]) == 20
    assert np.array_equal(model.predict_inst(state, box=BOX)[2], before)
