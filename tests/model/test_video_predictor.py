"""The video predictor on the tiny model: what it yields, against the tracker's own steps; objects, order, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.model.memory_bank import MemoryBank
from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.tracker_builder import build_video_model
from sam3.transforms import Preprocess
from tests.model.videos import BOX, HEIGHT, POINT, WIDTH, add_box, click, close, pictures, rectangle, run, same

FRAMES = 6


@pytest.fixture(scope="module", params=["square", "pad"])
def predictor(request, teacher_file: Path) -> Sam3VideoPredictor:
    model = build_video_model(teacher_file, device="cpu")
    model.preprocess = Preprocess(img_size=224, resize=request.param)
    return Sam3VideoPredictor(model)


@pytest.fixture
def session(predictor: Sam3VideoPredictor):
    with predictor.start_session(pictures(FRAMES)) as session:
        yield session


def in_input(predictor: Sam3VideoPredictor, *points: list[float]) -> torch.Tensor:
    """Pixels of the video -> pixels of the 224 x 224 input, (1, P, 2), worked out by hand."""
    rows = 224 / HEIGHT if predictor.model.preprocess.resize == "square" else 126 / HEIGHT
    return torch.tensor([[[x * 224 / WIDTH, y * rows] for x, y in points]])


@torch.inference_mode()
def plain_loop(predictor: Sam3VideoPredictor, start: int, order: list[int], points, labels) -> dict[int, tuple]:
    """Low masks and object logits of one object by the tracker's methods alone, with a bank that forgets nothing."""
    model, bank = predictor.model, MemoryBank()
    tracker, found = model.tracker, {}
    reverse = order[-1] < start
    for t in order:
        square, size = model.preprocess.fit(torch.from_numpy(frame_array(t)).permute(2, 0, 1))
        features = model.encode(model.preprocess.normalise(square[None], torch.tensor([size])))
        first = t == start
        gathered = None if first else tracker.gather(bank.plan(t, FRAMES, reverse), bank.records)
        heads = tracker.predict_masks(
            tracker.condition(features.top, gathered), features.high_res, 1, (points, labels) if first else None
        )
        memory = tracker.encode_memory(features.top, heads.low, heads.object_logits, from_prompt=first)
        bank.add(t, tracker.remember(memory, heads), cond=first)
        found[t] = heads.low, heads.object_logits
    return found


def frame_array(t: int) -> np.ndarray:
    return np.array(pictures(t + 1)[t])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_equals_a_plain_loop_over_the_tracker(predictor, session, direction):
    start = 1 if direction == "forward" else 4
    order = list(range(start, FRAMES)) if direction == "forward" else list(range(start, -1, -1))
    add_box(predictor, session, start, obj_id=1)
    found = run(predictor, session, direction=direction)
    corners = in_input(predictor, BOX[:2], BOX[2:])
    wanted = plain_loop(predictor, start, order, corners, torch.tensor([[2, 3]]))
    assert list(found) == order
    for t, (low, object_logits) in wanted.items():
        close(found[t].low_masks, low)
        close(found[t].object_logits, object_logits)
        assert found[t].obj_ids == [1]
        assert found[t].video_masks.shape == (1, 1, HEIGHT, WIDTH)
        close(found[t].video_masks, predictor.model.preprocess.maps_to_image(low, (HEIGHT, WIDTH)))


def test_orders_and_counts(predictor, session):
    click(predictor, session, 2, obj_id=1)

    def order(*args, **options) -> list[int]:
        return [masks.frame_idx for masks in predictor.propagate_in_video(session, *args, **options)]

    assert order() == [2, 3, 4, 5]
    assert order(direction="backward") == [2, 1, 0]
    assert order(direction="both") == [2, 3, 4, 5, 1, 0]
    assert order(4) == [4, 5]
    assert order(1, 2) == [1, 2, 3]
    assert order(3, 1, "backward") == [3, 2]
    assert order(3, 1, "both") == [3, 4, 2]
    assert order(3, 0) == [3]
    assert order(0, direction="backward") == [0]
    assert order(0, direction="both") == [0, 1, 2, 3, 4, 5]


def test_a_prompted_frame_keeps_its_mask(predictor, session):
    first = click(predictor, session, 2, obj_id=1)
    close(run(predictor, session)[2].video_masks, first.video_masks, atol=0)


def test_a_given_mask_comes_back_as_it_is(predictor, session):
    mask = rectangle()
    first = predictor.add_new_mask(session, 0, 3, mask)
    assert torch.equal(first.video_masks[0, 0] > 0, torch.from_numpy(mask))
    assert first.object_logits.item() == 10
    found = run(predictor, session)
    assert torch.equal(found[0].video_masks, first.video_masks)
    # The coarse mask covers the same part of the model's square.
    seen = predictor.model.preprocess.maps_to_image(first.low_masks, (HEIGHT, WIDTH))[0, 0] > 0
    assert (seen.numpy() != mask).mean() < 0.01
    empty = predictor.add_new_mask(session, 0, 3, torch.zeros(1, HEIGHT, WIDTH))
    assert empty.object_logits.item() == -10 and not (empty.video_masks > 0).any()


def test_a_mask_makes_the_tracker_s_own_memory(predictor, session):
    mask = torch.from_numpy(rectangle())
    predictor.add_new_mask(session, 0, 3, mask)
    predictor.propagate_in_video_preflight(session)
    tracker, preprocess = predictor.model.tracker, predictor.model.preprocess
    rows = 256 if preprocess.resize == "square" else 144  # of a square of 16 x 16 cells, 16 pixels each
    resize = torch.nn.functional.interpolate
    with torch.inference_mode():
        features = predictor.tracking.features(session, 0)
        seen = torch.zeros(1, 1, 256, 256)
        seen[:, :, :rows] = resize(mask[None, None].float(), (rows, 256), mode="bilinear", antialias=True)
        heads = tracker.take_mask(features, seen)
        low = torch.full((1, 1, 64, 64), -1024.0)
        coarse = resize(mask[None, None].float(), (rows // 4, 64), mode="bilinear", antialias=True)
        low[:, :, : rows // 4] = 2048 * coarse - 1024
        memory = tracker.encode_memory(features.top, low, torch.tensor([[10.0]]), from_prompt=True)
    record = session.objects[3].bank.cond[0]
    close(record.tokens.float(), memory.flatten(2).mT.bfloat16().float())
    close(record.pointer, heads.pointer)


def test_objects_of_one_frame_share_its_pixels(predictor, session):
    left, right = rectangle(right=80), rectangle(left=60)
    predictor.add_new_mask(session, 0, 1, left)
    click(predictor, session, 0, obj_id=2)
    both = predictor.add_new_mask(session, 0, 3, right).video_masks[:, 0] > 0
    assert torch.equal(both[0], torch.from_numpy(left & ~right))
    assert torch.equal(both[2], torch.from_numpy(right))
    # The click's mask has lost the cells in the middle of the rectangle.
    assert not both[1, 30:50, 70:90].any()


def test_the_memory_of_overlapping_objects_has_each_pixel_once(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    add_box(predictor, session, 0, obj_id=2, box=[60, 20, 140, 80])
    seen = []
    hook = predictor.model.tracker.maskmem_backbone.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    predictor.propagate_in_video_preflight(session)
    hook.remove()
    (masks,) = seen  # (2, 1, 256, 256): 10 on the object, -10 beside it, soft where they were resized
    assert (masks > 9).any(dim=(1, 2, 3)).all()
    assert not (masks > 9).all(dim=0).any()


def test_objects_together_equal_objects_alone(predictor):
    def prompts(session, wanted: set[int]) -> None:
        if 1 in wanted:
            add_box(predictor, session, 0, obj_id=1)
        if 2 in wanted:
            click(predictor, session, 1, obj_id=2)
        if 3 in wanted:
            predictor.add_new_mask(session, 2, 3, rectangle())

    runs = {}
    for wanted in ({1, 2, 3}, {1}, {2}, {3}):
        with predictor.start_session(pictures(FRAMES)) as session:
            prompts(session, wanted)
            runs[tuple(wanted)] = run(predictor, session, 0, direction="both")
    for row, obj_id in enumerate((1, 2, 3)):
        same(runs[1, 2, 3], runs[(obj_id,)], row, 0)


def test_objects_that_read_the_same_frames_go_through_the_model_together(predictor, session):
    predictor.add_new_mask(session, 0, 1, rectangle(right=60))
    predictor.add_new_mask(session, 0, 2, rectangle(left=60))
    click(predictor, session, 1, obj_id=3)
    batches = []
    attention = predictor.model.tracker.transformer.encoder
    hook = attention.register_forward_pre_hook(lambda _, args: batches.append(len(args[2])))
    together = run(predictor, session, 0, 2)
    assert batches == [1, 2, 2, 1]  # frame 1: 1 and 2 (3 is prompted there); frames 0 and 2: 3 by itself
    hook.remove()
    with predictor.start_session(pictures(FRAMES)) as alone:
        predictor.add_new_mask(alone, 0, 2, rectangle(left=60))
        same(together, run(predictor, alone, 0, 2), row=1, other_row=0)


def test_an_object_added_after_tracking_equals_one_added_before(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    before = run(predictor, session)
    click(predictor, session, 2, obj_id=9)
    after = run(predictor, session, 2)
    assert after[3].obj_ids == [1, 9]
    late = {t: masks for t, masks in before.items() if t >= 2}
    same(after, late, 0, 0, atol=0.02)  # kept as float16
    with predictor.start_session(pictures(FRAMES)) as alone:
        click(predictor, alone, 2, obj_id=9)
        same(after, run(predictor, alone, 2), 1, 0)


def test_an_object_without_prompt_or_result_has_no_mask(predictor, session):
    click(predictor, session, 0, obj_id=1)
    masks = click(predictor, session, 3, obj_id=2)
    assert (masks.video_masks[0] == -1024).all() and masks.object_logits[0] == -1024
    assert (masks.video_masks[1] > -1024).any()


def test_removing_an_object_in_the_middle_leaves_the_others(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    click(predictor, session, 1, obj_id=2)
    found = {}
    for masks in predictor.propagate_in_video(session, 1):
        found[masks.frame_idx] = masks
        if masks.frame_idx == 3:
            assert predictor.remove_object(session, 1) == [2]
    assert found[3].obj_ids == [1, 2] and found[4].obj_ids == [2] and len(found[4].low_masks) == 1
    with predictor.start_session(pictures(FRAMES)) as alone:
        click(predictor, alone, 1, obj_id=2)
        wanted = run(predictor, alone)
    close(found[5].low_masks, wanted[5].low_masks)
    assert predictor.remove_object(session, 2) == []
    with pytest.raises(ValueError, match="nothing to track"):
        predictor.propagate_in_video(session)


def test_a_prompt_between_two_frames_counts_from_there_on(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    found = {}
    for masks in predictor.propagate_in_video(session):
        found[masks.frame_idx] = masks
        if masks.frame_idx == 1:
            clicked = click(predictor, session, 2, obj_id=2)
    assert found[1].obj_ids == [1] and found[2].obj_ids == [1, 2]
    close(found[2].low_masks[1], clicked.low_masks[1], atol=0)
    with predictor.start_session(pictures(FRAMES)) as alone:
        click(predictor, alone, 2, obj_id=2)
        close(found[5].low_masks[1], run(predictor, alone)[5].low_masks[0])


def test_points_of_a_box_and_clicks_reach_the_model_in_its_pixels(predictor, session):
    shown = []
    encoder = predictor.model.tracker.sam_prompt_encoder
    hook = encoder.register_forward_pre_hook(lambda _, args, kwargs: shown.append(kwargs), with_kwargs=True)
    click(predictor, session, 0, 1, [[0.5, 0.25]], [0], relative=True)
    predictor.add_new_points_or_box(session, 0, 2, [POINT], [1], rel_coordinates=False, box=BOX)
    hook.remove()
    close(shown[0]["points"][0], in_input(predictor, [WIDTH / 2, HEIGHT / 4]))
    assert shown[0]["points"][1].tolist() == [[0]]
    close(shown[1]["points"][0], in_input(predictor, BOX[:2], BOX[2:], POINT))
    assert shown[1]["points"][1].tolist() == [[2, 3, 1]]
