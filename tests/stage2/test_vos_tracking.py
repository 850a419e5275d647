"""How a video is tracked to be scored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sam3.engine.vos_folders import list_annotated_videos
from sam3.tracker_builder import build_sam3_video_predictor
from stage2 import vos_tracking
from stage2.vos_tracking import (
    binary_masks,
    box_around,
    check_video,
    find_prompts,
    middle_of,
    split_overlapping,
    track_video,
)
from tests.stage2.vos import LOWER, NOTHING, UPPER, Predictor, rectangle, write_sav

NUMBERS = range(0, 17, 4)


def track(video, predictor: Predictor, kind: str = "mask"):
    """The indices of the frames as they came, and the result."""
    steps, seen = track_video(predictor, video, kind, exclusive=False), []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


def write(tmp_path: Path, *objects: dict[int, np.ndarray]):
    write_sav(tmp_path, {"v": list(objects)})
    return list_annotated_videos(tmp_path, "val")[0]


def test_prompt_of_a_mask() -> None:
    mask = rectangle(5, 8, height=5, width=9)
    assert box_around(mask) == (8, 5, 17, 10)
    assert middle_of(mask) == (10.5, 7.5), "the first of the pixels that lie three deep"
    assert middle_of(rectangle(0, 0, height=3, width=3)) == (1.5, 1.5), "the picture's edge is an edge of the mask"
    assert box_around(rectangle(3, 4, 1, 1)) == (4, 3, 5, 4) and middle_of(rectangle(3, 4, 1, 1)) == (4.5, 3.5)


def test_pixels_that_two_objects_claim() -> None:
    logits = torch.tensor([[3.0, 1.0, -1.0], [2.0, 4.0, -2.0]]).view(2, 1, 1, 3)
    assert binary_masks(logits, exclusive=False)[:, 0].tolist() == [[True, True, False], [True, True, False]]
    assert binary_masks(logits, exclusive=True)[:, 0].tolist() == [[True, False, False], [False, True, False]]


def test_late_and_absent_objects(tmp_path: Path) -> None:
    whole = dict.fromkeys(NUMBERS, UPPER)
    late = {0: NOTHING, 4: NOTHING, 8: LOWER, 12: LOWER}
    video = write(tmp_path, whole, late, dict.fromkeys(NUMBERS, NOTHING), {12: LOWER})
    assert find_prompts(video) == {0: 0, 1: 8, 3: 12}
    predictor = Predictor(lambda name, t, row: UPPER if row == 0 else LOWER)
    seen, result = track(video, predictor)
    assert seen == list(range(17))
    (session,) = predictor.sessions
    assert list(session.prompts) == [(0, 0), (8, 1), (12, 3)]
    assert (session.prompts[8, 1] == LOWER).all()
    assert (result.mask(4, 0) == UPPER).all() and (result.mask(16, 3) == LOWER).all()
    assert not result.mask(4, 1).any() and (result.mask(8, 1) == LOWER).all(), "tracked from its prompt on"
    assert not result.mask(16, 2).any()
    assert not result.mask(5, 0).any(), "frames without annotations are not kept"


def test_tracking_begins_with_the_first_object_there_is(tmp_path: Path) -> None:
    video = write(tmp_path, {8: UPPER, 12: UPPER})
    seen, result = track(video, Predictor(lambda name, t, row: UPPER))
    assert seen == list(range(8, 17)) and result.num_timed == 7


def test_nothing_to_track(tmp_path: Path) -> None:
    seen, result = track(write(tmp_path, dict.fromkeys(NUMBERS, NOTHING)), Predictor(lambda *_: UPPER))
    assert seen == [] and result.first_seen == {} and (result.num_timed, result.seconds) == (0, 0)


def test_overlapping_prompts_go_to_sessions_of_their_own(tmp_path: Path) -> None:
    part = rectangle(6, 6, 4, 4)
    video = write(tmp_path, {0: UPPER, 4: UPPER}, {0: part, 4: part}, {0: LOWER, 4: LOWER}, {4: LOWER, 8: LOWER})
    assert split_overlapping(video, find_prompts(video)) == [[0, 2, 3], [1]], "3 overlaps 2, but elsewhere"
    masks = [UPPER, part, LOWER, LOWER]
    predictor = Predictor(lambda name, t, row: masks[row])
    seen, result = track(video, predictor)
    assert seen == list(range(17))
    first, second = predictor.sessions
    assert second.features is first.features, "each frame is encoded once"
    assert (first.prompts[0, 0] == UPPER).all() and (second.prompts[0, 1] == part).all()
    for row, mask in enumerate(masks):
        assert (result.mask(8, row) == mask).all()


def test_time_is_that_of_the_frames_after_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(vos_tracking, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    frames = iter([100.0, 50.0, *[0.5] * 15])  # seconds of each

    def tick() -> None:
        clock.now += next(frames)

    _, result = track(write(tmp_path, dict.fromkeys(NUMBERS, UPPER)), Predictor(lambda *_: UPPER, tick))
    assert (result.num_timed, result.seconds) == (15, 7.5)


@pytest.mark.parametrize("kind, wanted", [("box", (5, 5, 25, 15)), ("click", ([(9.5, 9.5)], [1]))])
def test_boxes_and_clicks(tmp_path: Path, kind: str, wanted) -> None:
    predictor = Predictor(lambda *_: UPPER)
    track(write(tmp_path, dict.fromkeys(NUMBERS, UPPER)), predictor, kind)
    assert predictor.sessions[0].prompts == {(0, 0): wanted}


def test_missing_frames_are_refused(tmp_path: Path) -> None:
    video = write(tmp_path, dict.fromkeys(NUMBERS, UPPER))
    check_video(video)
    for number in (3, 9):
        video.frames.path(number).unlink()
    video = list_annotated_videos(tmp_path, "val")[0]
    with pytest.raises(ValueError, match="lacks 2 frames between 0 and 16, such as 3; all frames are tracked"):
        check_video(video)


def test_with_a_real_model(teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects in sessions of their own, and late ones, come out as they do alone; a frame is encoded once for all."""
    predictor = build_sam3_video_predictor(teacher_file, device="cpu", keep_logits=False)
    encoded = []
    encode = predictor.model.encode
    monkeypatch.setattr(predictor.model, "encode", lambda images: encoded.append(1) or encode(images))
    objects = [dict.fromkeys(NUMBERS, mask) for mask in (UPPER, rectangle(6, 6, 6, 12))] + [{4: LOWER, 8: LOWER}]
    write_sav(tmp_path, {"v": objects, **{f"v{row}": [masks] for row, masks in enumerate(objects)}}, num_frames=17)
    together, *alone = list_annotated_videos(tmp_path, "val")
    assert split_overlapping(together, find_prompts(together)) == [[0, 2], [1]]
    _, result = track(together, predictor)
    assert len(encoded) == 17
    for row, video in enumerate(alone):
        _, single = track(video, predictor)
        # A batch of two rounds otherwise, which random weights let grow from frame to frame.
        for number in (single.first_seen[0], 8, 16) if row == 1 else (single.first_seen[0], 8):
            difference = (result.mask(number, row) != single.mask(number, 0)).mean()
            assert difference <= (0 if row == 1 else 0.01), (row, number)
