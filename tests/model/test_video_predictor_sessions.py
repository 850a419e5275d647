"""Sessions of the video predictor on the tiny model: clicks on tracked frames, taking back, memory, bad input."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.engine.weights import load_weights, save_weights
from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.tracker_config import TINY_MEMORY, TrackerConfig
from sam3.model.video_prompts import first_and_last, mask_in_square
from sam3.model.video_session import LogitFile
from sam3.model.video_tracking import without_overlap
from sam3.tracker_builder import build_efficientsam3_video_predictor, build_memory, build_sam3_video_predictor
from sam3.transforms import Preprocess
from tests.model.videos import HEIGHT, WIDTH, add_box, click, close, pictures, rectangle, run, same

FRAMES = 6


@pytest.fixture(scope="module")
def predictor(teacher_file: Path) -> Sam3VideoPredictor:
    return build_sam3_video_predictor(teacher_file, device="cpu")


@pytest.fixture
def session(predictor: Sam3VideoPredictor):
    with predictor.start_session(pictures(FRAMES)) as session:
        yield session


def prompts_seen(predictor: Sam3VideoPredictor, action) -> list[dict]:
    """Arguments of the prompt encoder during `action()`."""
    shown = []
    encoder = predictor.model.tracker.sam_prompt_encoder
    hook = encoder.register_forward_pre_hook(lambda _, args, kwargs: shown.append(kwargs), with_kwargs=True)
    action()
    hook.remove()
    return shown


def test_a_click_on_a_tracked_frame_goes_on_from_its_mask(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    tracked = run(predictor, session)
    (shown,) = prompts_seen(predictor, lambda: click(predictor, session, 3, obj_id=1))
    wanted = tracked[3].low_masks.clamp(-32, 32)
    close(shown["masks"], wanted, atol=0.02)  # kept as float16
    assert (shown["masks"] > 0).eq(wanted > 0).all()
    (shown,) = prompts_seen(predictor, lambda: click(predictor, session, 3, obj_id=2))
    assert shown["masks"] is None


def test_points_gather_until_they_are_cleared(predictor, session):
    def click_again(x: int, clear: bool) -> None:
        click(predictor, session, 0, 1, [[x, 30]], [1], clear_old_points=clear)

    click_again(10, True)
    (second,) = prompts_seen(predictor, lambda: click_again(20, False))
    (third,) = prompts_seen(predictor, lambda: click_again(30, True))
    assert second["points"][0][0, :, 0].tolist() == [14, 28]  # 224 / 160 of it
    assert third["points"][0][0, :, 0].tolist() == [42]


def test_refining_tracks_again_and_keeps_conditioning_frames(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    before = run(predictor, session)
    refined = click(predictor, session, 3, obj_id=1, labels=(0,))
    assert sorted(session.objects[1].prompted) == [0, 3]
    after = run(predictor, session)
    for t in (0, 3):
        close(after[t].low_masks, {0: before, 3: {3: refined}}[t][t].low_masks, atol=0)
    # The new conditioning frame is read from both sides.
    assert all((after[t].low_masks - before[t].low_masks).abs().max() > 1e-3 for t in (1, 2, 4, 5))
    assert list(session.objects[1].bank.cond) == [0, 3]


def counted(predictor: Sam3VideoPredictor, action) -> int:
    """Objects that went through the memory attention during `action()`."""
    batches = []
    attention = predictor.model.tracker.transformer.encoder
    hook = attention.register_forward_pre_hook(lambda _, args: batches.append(len(args[2])))
    action()
    hook.remove()
    return sum(batches)


def test_only_what_changed_is_tracked_again(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    first = run(predictor, session)
    again = {}
    assert counted(predictor, lambda: again.update(run(predictor, session))) == 0
    same(again, first, 0, 0, atol=0.02)  # kept as float16
    click(predictor, session, 2, obj_id=2)
    assert counted(predictor, lambda: run(predictor, session, 2)) == 3  # frames 3 to 5 of object 2
    assert counted(predictor, lambda: run(predictor, session, 4, 1, "backward")) == 4  # another direction: both
    # Object 1 comes from frame 0 upon frames 3 and 4, which were tracked backwards, and goes on to the end.
    assert counted(predictor, lambda: run(predictor, session, 3)) == 6
    click(predictor, session, 0, obj_id=1)
    assert counted(predictor, lambda: run(predictor, session, 4)) == 2  # frames 4 and 5 of object 1


def test_without_the_file_all_is_tracked_again(predictor):
    forgetful = Sam3VideoPredictor(predictor.model, keep_logits=False)
    with forgetful.start_session(pictures(4)) as session:
        add_box(forgetful, session, 0, obj_id=1)
        first = run(forgetful, session)
        again = {}
        assert counted(forgetful, lambda: again.update(run(forgetful, session))) == 3
        same(again, first, 0, 0)
        (shown,) = prompts_seen(forgetful, lambda: click(forgetful, session, 2, obj_id=1))
        assert shown["masks"] is None


def test_clearing_a_frame_turns_it_into_a_tracked_one(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    run(predictor, session)
    refined = click(predictor, session, 3, obj_id=1)
    predictor.propagate_in_video_preflight(session)
    cleared = predictor.clear_all_points_in_frame(session, 3, 1)
    close(cleared.low_masks, refined.low_masks)
    bank = session.objects[1].bank
    assert list(bank.cond) == [0] and 3 in bank.others
    assert counted(predictor, lambda: run(predictor, session)) == 5
    with pytest.raises(ValueError, match="object 1 has no prompt in frame 3"):
        predictor.clear_all_points_in_frame(session, 3, 1)


def test_a_click_taken_back_before_tracking_leaves_the_tracked_mask(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    tracked = run(predictor, session)
    click(predictor, session, 3, obj_id=1)
    close(predictor.clear_all_points_in_frame(session, 3, 1).low_masks, tracked[3].low_masks, atol=0.02)


def test_an_object_whose_last_prompt_is_taken_back_is_not_tracked(predictor, session):
    add_box(predictor, session, 0, obj_id=1)
    click(predictor, session, 0, obj_id=2)
    run(predictor, session)
    predictor.clear_all_points_in_frame(session, 0, 1)
    found = run(predictor, session)
    assert all(masks.obj_ids == [1, 2] for masks in found.values())
    assert all((masks.video_masks[0] == -1024).all() for masks in found.values())
    assert all((masks.video_masks[1] != -1024).any() for masks in found.values())
    assert not session.objects[1].bank.records


def test_clearing_and_resetting_the_video(predictor, session):
    add_box(predictor, session, 0, obj_id=4)
    first = run(predictor, session)
    predictor.clear_all_points_in_video(session)
    assert session.obj_ids == [4]
    with pytest.raises(ValueError, match="nothing to track"):
        predictor.propagate_in_video(session)
    predictor.reset_session(session)
    assert session.obj_ids == []
    add_box(predictor, session, 0, obj_id=8)
    same(run(predictor, session), first, 0, 0)


def test_a_closed_session_frees_its_file_and_says_so(predictor):
    session = predictor.start_session(pictures(3))
    click(predictor, session, 0, obj_id=1)
    tracking = predictor.propagate_in_video(session)
    next(tracking)
    predictor.close_session(session)
    predictor.close_session(session)
    assert session.logits._file.closed
    with pytest.raises(ValueError, match="closed"):
        next(tracking)
    for action in (
        lambda: click(predictor, session, 0, obj_id=1),
        lambda: predictor.propagate_in_video(session),
        lambda: predictor.remove_object(session, 1),
        lambda: predictor.reset_session(session),
    ):
        with pytest.raises(ValueError, match="this session is closed; start another one"):
            action()


def test_memory_stays_bounded_on_a_long_video(teacher_file):
    predictor = build_sam3_video_predictor(teacher_file, device="cpu")
    sizes = {}
    with predictor.start_session(pictures(44)) as session:
        click(predictor, session, 0, obj_id=1)
        for masks in predictor.propagate_in_video(session):
            bank, t = session.objects[1].bank, masks.frame_idx
            if t in (32, 38, 43):
                sizes[t] = bank.num_tokens, len(bank.records), tensor_bytes()
    # Frame 0 and the six maps after it, the current frame and six before it, of 16 x 16 tokens each; pointers of both
    # and of 15 frames beside them.
    assert sizes[32] == sizes[38] == sizes[43]
    assert sizes[43][:2] == (14 * 256, 32)


def tensor_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_tracking_may_start_where_maps_were_forgotten(predictor):
    with predictor.start_session(pictures(24)) as session:
        click(predictor, session, 0, obj_id=1)
        run(predictor, session)
        session.objects[1].tracked.clear()
        bank = session.objects[1].bank
        assert bank.others[12].tokens is None and 16 in bank.others  # the pointer is still there, the map is not
        assert bank.others[16].tokens is None
        (masks,) = run(predictor, session, 17, 0).values()
        assert masks.low_masks.isfinite().all()


def test_memory_selection_reads_by_score(teacher_file):
    predictor = build_sam3_video_predictor(teacher_file, device="cpu", memory_selection=True)
    with predictor.start_session(pictures(4)) as session:
        add_box(predictor, session, 0, obj_id=1)
        found = run(predictor, session)
        scores = {t: record.score for t, record in session.objects[1].bank.others.items()}
    assert sorted(scores) == [1, 2, 3] and all(0 < score < 1 for score in scores.values())
    certainty = 2 * found[2].object_logits.sigmoid().item() - 1
    assert scores[2] < certainty


def test_precisions(teacher_file, predictor):
    def masks(**options) -> torch.Tensor:
        own = build_sam3_video_predictor(teacher_file, device="cpu", **options)
        with own.start_session(pictures(4)) as session:
            add_box(own, session, 0, obj_id=1)
            own.add_new_mask(session, 0, 2, rectangle())
            click(own, session, 0, obj_id=1, labels=(0,))
            return run(own, session)[3].low_masks

    full = masks()
    for options in ({"autocast_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}):
        found = masks(**options)
        assert found.dtype == torch.float32
        assert not torch.equal(found, full)
        assert ((found > 0) == (full > 0)).float().mean() > 0.95


def test_holes_are_filled_in_results_but_not_in_memory(teacher_file, predictor, session):
    filling = Sam3VideoPredictor(predictor.model, fill_hole_area=100000)
    add_box(predictor, session, 0, obj_id=1)
    plain = run(predictor, session, 0, 1)[1]
    with filling.start_session(pictures(FRAMES)) as other:
        add_box(filling, other, 0, obj_id=1)
        found = run(filling, other, 0, 1)[1]
        # Every background region of a mask is "small" here, so that masks cover everything.
        assert (found.video_masks > 0).all() and not (plain.video_masks > 0).all()
        heads = other.objects[1].prompted[0].heads
        assert (heads.low > 0).all()
    with pytest.raises(ValueError, match="must not be negative"):
        Sam3VideoPredictor(predictor.model, fill_hole_area=-1)


def test_a_video_of_one_frame(predictor):
    with predictor.start_session(pictures(1)[0]) as session:
        first = click(predictor, session, 0, obj_id=1)
        found = run(predictor, session, direction="both")
    assert list(found) == [0]
    close(found[0].video_masks, first.video_masks, atol=0)


def test_more_than_sixteen_points():
    points, labels = torch.arange(40.0).reshape(20, 2), torch.arange(20)
    shown, marks = first_and_last(points, labels)
    assert marks.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19]
    assert torch.equal(shown, points[marks])
    assert torch.equal(first_and_last(points[:16], labels[:16])[1], labels[:16])


def test_each_pixel_goes_to_the_highest_logit():
    logits = torch.tensor([[3.0, -20.0, 1.0, -4.0], [2.0, -30.0, 5.0, -5.0]])[:, None, None]
    wanted = torch.tensor([[3.0, -20.0, -10.0, -4.0], [-10.0, -30.0, 5.0, -10.0]])[:, None, None]
    assert torch.equal(without_overlap(logits), wanted)
    assert torch.equal(without_overlap(logits[:1]), logits[:1])


def test_a_mask_in_the_square_of_a_padded_frame():
    mask = torch.ones(10, 20, dtype=torch.bool)
    placed = mask_in_square(mask, 32, Preprocess(img_size=64, resize="pad"))
    assert placed.shape == (1, 1, 32, 32)
    assert (placed[0, 0, :16] == 1).all() and (placed[0, 0, 16:] == 0).all()
    assert (mask_in_square(mask, 32, Preprocess(img_size=64, resize="square")) == 1).all()


def test_the_file_of_logits_uses_freed_places_again():
    file = LogitFile(side=4)
    low = torch.randn(2, 1, 4, 4)
    file.write([1, 2], 0, low, torch.tensor([[1.5], [-2.5]]))
    file.write([1], 1, low[1:], torch.zeros(1, 1))
    result = file.read(2, 0, torch.device("cpu"))
    close(result.low, low[1:], atol=1e-2)
    assert result.object_logits.tolist() == [[-2.5]]
    file.write([2], 0, low[:1], torch.zeros(1, 1))
    close(file.read(2, 0, torch.device("cpu")).low, low[:1], atol=1e-2)
    file.forget(1)
    assert file.read(1, 0, torch.device("cpu")) is None
    file.write([5, 6, 7], 3, low[[0, 1, 0]], torch.zeros(3, 1))
    assert sorted(file._slots.values()) == [0, 1, 2, 3]
    close(file.read(2, 0, torch.device("cpu")).low, low[:1], atol=1e-2)
    file.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": [[10, 10]], "labels": [1], "frame_idx": 6}, "frame 6 does not exist.*frames 0 to 5"),
        ({"points": [[10, 10]], "labels": [1], "frame_idx": -1}, "frame -1 does not exist"),
        ({"points": [[170, 10]], "labels": [1]}, r"point \(170, 10\) lies outside the picture of 160 x 90"),
        ({"points": [[10, 10]], "labels": [1], "rel_coordinates": True}, "rel_coordinates=False"),
        ({"points": [[10, 10]], "labels": [2]}, "label of a point is 1"),
        ({"points": [[10, 10]], "labels": [1, 0]}, "as many labels"),
        ({"points": [[10, 10, 4]], "labels": [1]}, "as many labels"),
        ({"points": [], "labels": []}, "as many labels"),
        ({"points": [[10, float("nan")]], "labels": [1]}, "finite"),
        ({"points": "here", "labels": [1]}, "must be numbers"),
        ({"points": [[10, 10]]}, "belong together"),
        ({}, "no prompt"),
        ({"box": [10, 10, 10, 20]}, "has no area"),
        ({"box": [10, 10, 20]}, "four numbers"),
        ({"box": [10, 10, 20, 91]}, "outside the picture"),
        ({"box": [10, 10, 20, 20], "clear_old_points": False}, "clear_old_points=True"),
        ({"points": [[10, 10]], "labels": [1], "obj_id": "dog"}, "whole number, got 'dog'"),
    ],
)
def test_prompts_that_are_refused(predictor, session, arguments, message):
    arguments = {"frame_idx": 0, "obj_id": 1, "rel_coordinates": False, **arguments}
    with pytest.raises(ValueError, match=message):
        predictor.add_new_points(session, **arguments)
    assert session.obj_ids == []


def test_other_things_that_are_refused(predictor, session):
    for mask in (np.zeros((HEIGHT, WIDTH + 1)), np.zeros((2, HEIGHT, WIDTH))):
        with pytest.raises(ValueError, match=r"wanted \(90, 160\), the rows and columns of the video"):
            predictor.add_new_mask(session, 0, 1, mask)
    with pytest.raises(ValueError, match="no object 3 in this session; known: none yet"):
        predictor.remove_object(session, 3)
    with pytest.raises(ValueError, match="nothing to track"):
        predictor.propagate_in_video(session)
    click(predictor, session, 0, obj_id=1)
    with pytest.raises(ValueError, match="direction 'up' is unknown"):
        predictor.propagate_in_video(session, direction="up")
    with pytest.raises(ValueError, match="frame 99 does not exist"):
        predictor.propagate_in_video(session, 99)
    with pytest.raises(ValueError, match="must not be negative"):
        predictor.propagate_in_video(session, 0, -1)
    with pytest.raises(FileNotFoundError):
        predictor.init_state("nowhere.mp4")


def test_the_light_builder_wants_a_student_or_a_compressed_memory(teacher_file, tmp_path):
    with pytest.raises(ValueError, match=r"neither a student .* nor a compressed memory"):
        build_efficientsam3_video_predictor(teacher_file)
    config = TrackerConfig.preset("tiny")
    torch.manual_seed(0)
    memory = build_memory(config, TINY_MEMORY)
    tensors = dict(load_weights(teacher_file).tensors)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("tracker.transformer.")}
    for name, module in (("memory_attention", memory.attention), ("spatial_perceiver", memory.perceiver)):
        tensors |= {f"tracker.{name}.{key}": value for key, value in module.state_dict().items()}
    save_weights(tmp_path / "light.pt", tensors, {"memory": TINY_MEMORY.to_meta()})
    predictor = build_efficientsam3_video_predictor(tmp_path / "light.pt", device="cpu")
    with predictor.start_session(pictures(4)) as session:
        add_box(predictor, session, 0, obj_id=1)
        predictor.add_new_mask(session, 0, 2, rectangle())
        found = run(predictor, session)
        assert session.objects[1].bank.num_tokens < 4 * 32
    assert list(found) == [0, 1, 2, 3] and all(masks.low_masks.isfinite().all() for masks in found.values())
