"""Requests to the video predictor on the tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.video_service import _boxes
from sam3.tracker_builder import build_sam3_video_predictor
from tests.model.videos import BOX, HEIGHT, WIDTH, pictures, rectangle, run

FRAMES = 4


@pytest.fixture(scope="module")
def predictor(teacher_file: Path) -> Sam3VideoPredictor:
    return build_sam3_video_predictor(teacher_file, device="cpu")


@pytest.fixture
def name(predictor: Sam3VideoPredictor):
    answer = predictor.handle_request({"type": "start_session", "resource_path": pictures(FRAMES)})
    yield answer["session_id"]
    predictor.handle_request({"type": "close_session", **answer})


def add(predictor: Sam3VideoPredictor, name: str, **fields) -> dict:
    return predictor.handle_request({"type": "add_prompt", "session_id": name, "frame_index": 1, **fields})


def test_a_session_by_requests_equals_one_by_methods(predictor, name):
    left, top, right, bottom = (value / side for value, side in zip(BOX, (WIDTH, HEIGHT) * 2, strict=True))
    relative = [left, top, right - left, bottom - top]
    answer = add(predictor, name, obj_id=5, bounding_boxes=[relative], bounding_box_labels=[1])
    assert answer["frame_index"] == 1
    add(predictor, name, obj_id=6, mask=rectangle())
    add(predictor, name, obj_id=7, points=[[0.2, 0.9], [0.5, 0.5]], point_labels=[1, 0])
    stream = predictor.handle_stream_request({"type": "propagate_in_video", "session_id": name})
    answers = {answer["frame_index"]: answer["outputs"] for answer in stream}
    with predictor.start_session(pictures(FRAMES)) as session:
        predictor.add_new_points_or_box(session, 1, 5, box=BOX, rel_coordinates=False)
        predictor.add_new_mask(session, 1, 6, rectangle())
        predictor.add_new_points(session, 1, 7, [[0.2, 0.9], [0.5, 0.5]], [1, 0])
        wanted = run(predictor, session, direction="both")
    assert list(answers) == list(wanted) == [1, 2, 3, 0]
    for t, outputs in answers.items():
        assert outputs["out_obj_ids"].dtype == np.int64 and outputs["out_obj_ids"].tolist() == [5, 6, 7]
        assert outputs["out_binary_masks"].dtype == bool
        assert (outputs["out_binary_masks"] != (wanted[t].video_masks[:, 0] > 0).numpy()).mean() < 1e-3
        np.testing.assert_allclose(outputs["out_probs"], wanted[t].object_logits[:, 0].sigmoid(), atol=1e-4)
        assert outputs["out_boxes_xywh"].shape == (3, 4)
        assert outputs["frame_stats"] == {"num_obj_tracked": 3}
    np.testing.assert_allclose(answers[1]["out_boxes_xywh"][1], [40 / 160, 20 / 90, 60 / 160, 40 / 90], atol=1e-6)


def test_boxes_of_masks():
    masks = torch.zeros(3, 4, 8, dtype=torch.bool)
    masks[0, 1:3, 2:4] = True
    masks[0, 3, 7] = True
    masks[1] = True
    assert _boxes(masks).tolist() == [[2 / 8, 1 / 4, 6 / 8, 3 / 4], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_directions_reset_and_removal(predictor, name):
    add(predictor, name, obj_id=1, points=[[0.5, 0.5]], point_labels=[1])
    add(predictor, name, obj_id=2, points=[[80, 45]], point_labels=[1], rel_coordinates=False)

    def frames(**fields) -> list[int]:
        request = {"type": "propagate_in_video", "session_id": name, **fields}
        return [answer["frame_index"] for answer in predictor.handle_stream_request(request)]

    assert frames(propagation_direction="backward") == [1, 0]
    assert frames(propagation_direction="forward", start_frame_index=2, max_frame_num_to_track=0) == [2]
    assert predictor.handle_request({"type": "remove_object", "session_id": name, "obj_id": 1}) == {"is_success": True}
    answer = add(predictor, name, obj_id=2, points=[[0.1, 0.1]], point_labels=[0], clear_old_points=False)
    assert answer["outputs"]["out_obj_ids"].tolist() == [2]
    assert predictor.handle_request({"type": "reset_session", "session_id": name}) == {"is_success": True}
    with pytest.raises(ValueError, match="nothing to track"):
        frames()


def test_closing_twice_is_fine_and_names_may_be_chosen(predictor):
    start = {"type": "start_session", "resource_path": pictures(1), "session_id": "mine"}
    assert predictor.handle_request(start) == {"session_id": "mine"}
    with pytest.raises(ValueError, match="session 'mine' is open already"):
        predictor.handle_request(start)
    for _ in range(2):
        assert predictor.handle_request({"type": "close_session", "session_id": "mine"}) == {"is_success": True}
    with pytest.raises(ValueError, match="no open session 'mine'"):
        predictor.handle_request({"type": "reset_session", "session_id": "mine"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a dog"}, "text-driven video model, which this predictor is not"),
        ({"points": [[0.5, 0.5]], "point_labels": [1]}, "needs obj_id"),
        ({"obj_id": 1, "points": [[0.5, 0.5]], "point_labels": [1], "mask": rectangle()}, "not both"),
        ({"obj_id": 1, "bounding_boxes": [[0, 0, 0.1, 0.1]] * 2}, "one box of the object.*got 2"),
        ({"obj_id": 1, "bounding_boxes": [[0, 0, 0.1, 0.1]], "bounding_box_labels": [0]}, "with the label 1"),
        ({"obj_id": 1}, "no prompt"),
        ({"obj_id": 1, "colour": "red"}, r"has \['colour'\]"),
    ],
)
def test_prompts_that_are_refused(predictor, name, fields, message):
    with pytest.raises(ValueError, match=message):
        add(predictor, name, **fields)


def test_requests_that_are_refused(predictor, name):
    with pytest.raises(ValueError, match="unknown request type 'sing'; known: start_session"):
        predictor.handle_request({"type": "sing"})
    with pytest.raises(ValueError, match="unknown request type 'add_prompt'; known: propagate_in_video"):
        predictor.handle_stream_request({"type": "add_prompt"})
    with pytest.raises(ValueError, match=r"a remove_object request lacks \['obj_id'\]"):
        predictor.handle_request({"type": "remove_object", "session_id": name})
