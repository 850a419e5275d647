from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sam3.engine import scene_videos
from sam3.engine.scene_drawing import Pose, draw_look
from sam3.engine.scene_names import PLAIN, Kind, kinds_of
from sam3.engine.scene_videos import MARGIN, MAX_OBJECTS, WAYS, Actor, cast_actors, make_clip, nearest_exit, view
from sam3.engine.scenes import MIN_AREA

SIZE = 64
STILL = Actor(
    draw_look(Kind("circle", "red", PLAIN), np.random.default_rng(0)),
    start=Pose(0.25, 0.5, 0.2, 1.0),
    way="wander",
    goal=(0.75, 0.25),
    sway=(0.0, 0.0),
    turn=0.5,
    breath=0.0,
    phase=0.0,
)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("seed", range(8))
def test_a_clip(seed: int, split: str) -> None:
    clip = make_clip(seed, SIZE, 6, split)
    count = len(clip.objects)
    assert clip.frames.shape == (6, SIZE, SIZE, 3) and clip.frames.dtype == np.uint8
    assert clip.masks.shape == (6, count, SIZE, SIZE) and clip.masks.dtype == bool and 1 <= count <= MAX_OBJECTS
    assert (clip.masks.sum(1) <= 1).all()
    assert clip.masks[0].mean((1, 2)).min() >= MIN_AREA, "all are in the first frame"
    assert set(clip.objects) <= set(kinds_of(split))
    again = make_clip(seed, SIZE, 6, split)
    assert (clip.frames == again.frames).all() and (clip.masks == again.masks).all()


def test_objects_move_hide_leave_and_return() -> None:
    clips = [make_clip(seed, SIZE, 12, "train") for seed in range(40)]
    hidden = returned = left = 0
    for clip in clips:
        assert (clip.masks[0] != clip.masks[6]).any()
        seen = clip.masks.any((2, 3))
        gone = ~seen
        left += int(gone[-1].sum())
        returned += sum(bool(gone[:, i].any() and seen[-1, i]) for i in range(seen.shape[1]))
        areas = clip.masks.sum((2, 3))
        hidden += int((areas[:-1] > 1.5 * areas[1:]).sum())
    assert min(hidden, returned, left) > 5


def test_steps_are_small_and_motion_spans_the_clip() -> None:
    short, long = make_clip(3, SIZE, 5, "train"), make_clip(3, SIZE, 9, "train")
    assert short.objects == long.objects and (short.masks == long.masks[::2]).all()


def test_the_way_of_an_object_by_hand() -> None:
    assert STILL.pose(0) == STILL.start
    assert STILL.pose(0.5) == Pose(0.5, 0.375, 0.2, 1.25) and STILL.pose(1) == Pose(0.75, 0.25, 0.2, 1.5)
    meeting = replace(STILL, way="meet")
    assert (meeting.pose(0.6).x, meeting.pose(0.6).y) == pytest.approx((0.75, 0.25))
    returning = replace(STILL, way="return", goal=nearest_exit(STILL.start))
    assert returning.pose(0.5).x < -0.1 and returning.pose(1).x == pytest.approx(0.25)
    assert replace(returning, way="leave").pose(1).x < -0.1
    swaying = replace(STILL, sway=(0.1, 0.0), breath=0.2, goal=(0.25, 0.5))
    assert swaying.pose(0.25).x == pytest.approx(0.35) and swaying.pose(0.25).diameter == pytest.approx(0.22)


def test_nobody_is_seen_at_the_exit() -> None:
    generator = np.random.default_rng(0)
    actors = [actor for _ in range(60) for actor in cast_actors("train", generator)]
    assert {actor.way for actor in actors} == set(WAYS)
    for actor in actors:
        if actor.way == "leave":
            for share in np.linspace(0.5, 1, 9):
                pose = actor.pose(float(share))
                assert max(-pose.x, pose.x - 1, -pose.y, pose.y - 1) >= 0.49 * pose.diameter


def test_the_camera() -> None:
    ground = np.arange(3 * 84 * 84, dtype=np.float32).reshape(3, 84, 84)
    assert (view(ground, 64, np.array([0, 0])) == ground[:, 10:74, 10:74]).all()
    assert (view(ground, 64, np.array([3, -4])) == ground[:, 6:70, 13:77]).all()
    view(ground, 64, np.array([0, 0]))[:] = 0
    assert ground.any(), "the ground is left as it is"


@pytest.mark.parametrize("drift", [-MARGIN, MARGIN])
@pytest.mark.parametrize("size", [65, 160, 192])
def test_the_camera_goes_as_far_as_it_may(size: int, drift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drifting(np.random.Generator):
        def uniform(self, low=0.0, high=1.0, size=None):
            return np.full(2, drift) if (low, high, size) == (-MARGIN, MARGIN, 2) else super().uniform(low, high, size)

    monkeypatch.setattr(scene_videos, "scene_generator", lambda *_: Drifting(np.random.PCG64(0)))
    monkeypatch.setattr(scene_videos, "DRIFT", 1)
    assert make_clip(0, size, 2, "train").frames.shape == (2, size, size, 3)


@pytest.mark.parametrize(("size", "side"), [(64, 84), (160, 212), (224, 296)])
def test_the_ground_reaches_as_far_as_the_camera(size: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another side would make other clips of the same numbers."""
    sides = []
    draw = scene_videos.draw_ground
    monkeypatch.setattr(scene_videos, "draw_ground", lambda side, *rest: sides.append(side) or draw(side, *rest))
    make_clip(0, size, 1, "train")
    assert set(sides) == {side}


def test_no_frames() -> None:
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        make_clip(0, SIZE, 0, "train")
    assert make_clip(0, SIZE, 1, "val").frames.shape[0] == 1
