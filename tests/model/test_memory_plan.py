"""Which frames are read: the worked example, both directions, with and without scores, and the ends of a video."""

from __future__ import annotations

import pytest

from sam3.model.memory_plan import MemoryPlan, PlanSettings, plan_memory, recent_frames, select_cond_frames

COND = (0, 3, 20, 30, 5)
OTHERS = (1, 2, 4, 6, 7, 8, 9, 10, 11)
GOOD = (2, 4, 6, 8, 9, 10, 11)


def example_scores() -> dict[int, float]:
    return {frame: 0.5 if frame in GOOD else 0.01 for frame in OTHERS}  # 0.01 itself is not enough


def test_worked_example():
    assert plan_memory(12, COND, OTHERS, num_frames=40) == MemoryPlan(
        spatial=((5, 6), (20, 6), (3, 6), (0, 6), (6, 5), (7, 4), (8, 3), (9, 2), (10, 1), (11, 0)),
        pointers=(
            (5, 7), (3, 9), (0, 12),
            (11, 1), (10, 2), (9, 3), (8, 4), (7, 5), (6, 6), (4, 8), (2, 10), (1, 11),
        ),
        span=15,
    )  # fmt: skip


def test_worked_example_with_selection():
    assert plan_memory(12, COND, OTHERS, 40, scores=example_scores()) == MemoryPlan(
        spatial=((5, 6), (20, 6), (3, 6), (0, 6), (4, 5), (6, 4), (8, 3), (9, 2), (10, 1), (11, 0)),
        pointers=((5, 7), (3, 9), (0, 12), (11, 1), (10, 2), (9, 3), (8, 4), (6, 5), (4, 6)),
        span=15,
    )


@pytest.mark.parametrize("scores", [None, example_scores()])
def test_backwards_is_the_mirror_image(scores):
    def mirror(frame):
        return 39 - frame

    forwards = plan_memory(12, COND, OTHERS, 40, scores=scores)
    mirrored_scores = scores and {mirror(frame): score for frame, score in scores.items()}
    backwards = plan_memory(
        mirror(12), [mirror(f) for f in COND], [mirror(f) for f in OTHERS], 40, reverse=True, scores=mirrored_scores
    )
    # of the conditioning frames, the closest before `t` leads in both directions
    first, second, *rest = ((mirror(frame), index) for frame, index in forwards.spatial)
    assert backwards.spatial == (second, first, *rest)
    assert backwards.pointers == tuple((mirror(frame), distance) for frame, distance in forwards.pointers)


def test_an_unselected_conditioning_frame_takes_an_empty_slot():
    plan = plan_memory(10, (9, 8, 7, 6, 5), (4,), num_frames=100)
    assert plan.spatial == ((9, 6), (8, 6), (7, 6), (6, 6), (4, 5), (5, 4))
    assert plan.pointers == ((9, 1), (8, 2), (7, 3), (6, 4), (5, 5), (4, 6))


def test_second_frame_reads_the_first():
    assert plan_memory(1, (0,), (), num_frames=2) == MemoryPlan(((0, 6),), ((0, 1),), span=1)


def test_first_frame_reads_a_later_prompt_but_not_its_pointer():
    assert plan_memory(0, (4,), (1, 2), num_frames=9) == MemoryPlan(((4, 6),), (), span=8)


def test_last_frame_backwards():
    scores = {8: 1.0}
    assert plan_memory(9, (4,), (8,), num_frames=10, reverse=True) == MemoryPlan(((4, 6),), (), span=9)
    assert plan_memory(9, (4,), (8,), 10, reverse=True, scores=scores) == MemoryPlan(((4, 6),), (), span=9)


def test_span_of_one_frame_is_not_zero():
    assert plan_memory(0, (0,), (), num_frames=1) == MemoryPlan(((0, 6),), ((0, 0),), span=1)


def test_pointers_end_where_the_video_does():
    plan = plan_memory(2, (0,), (1, 3, 4), num_frames=5, reverse=True)
    assert plan.spatial == ((0, 6), (4, 1), (3, 0))
    assert plan.pointers == ((3, 1), (4, 2))  # frame 0 is not passed yet


def test_pointers_reach_fifteen_frames():
    plan = plan_memory(50, (0,), range(1, 50), num_frames=100)
    assert plan.pointers == ((0, 50), *((50 - distance, distance) for distance in range(1, 16)))
    assert [frame for frame, _ in plan.spatial] == [0, 44, 45, 46, 47, 48, 49]


def test_settings():
    settings = PlanSettings(num_maskmem=3, max_cond_frames=1, max_obj_ptrs=2)
    plan = plan_memory(10, (0, 5), range(6, 10), 20, settings=settings)
    assert plan == MemoryPlan(((5, 2), (8, 1), (9, 0)), ((5, 5), (9, 1)), span=1)


def test_more_than_enough_conditioning_frames():
    frames = [0, 40, 10, 22, 18, 30]
    assert select_cond_frames(20, frames, 4) == [18, 22, 10, 30]  # 10 and 30 are as close: the earlier prompt first
    assert select_cond_frames(22, frames, 4) == [18, 22, 30, 10]  # the frame itself counts as after
    assert select_cond_frames(50, frames, 4) == [40, 30, 22, 18]  # none after
    assert select_cond_frames(20, frames, 6) == frames  # all, in their order
    assert select_cond_frames(20, frames, 1) == [18]


def test_selection_heads_with_the_very_last_frame():
    scores = {1: 0.5, 3: 0.9, 4: 0.0}
    assert recent_frames(5, 100, scores=scores) == [4, 3, 1]
    assert recent_frames(4, 100, scores=scores) == [3, 1]
    assert recent_frames(9, 100, scores=scores) == [8, 3, 1]
    assert recent_frames(2, 100, reverse=True, scores=scores) == [3]
    assert recent_frames(0, 100, reverse=True, scores=scores) == [1, 3]


def test_selection_never_looks_at_frame_zero_but_as_the_last():
    assert recent_frames(3, 100, scores={0: 1.0, 2: 1.0}) == [2]
    assert recent_frames(1, 100, scores={0: 1.0}) == [0]
    assert recent_frames(0, 100, scores={}) == []


def test_selection_keeps_fifteen_and_reads_all_but_the_oldest_pointer():
    scores = dict.fromkeys(range(1, 40), 1.0)
    plan = plan_memory(40, (0,), scores, 100, scores=scores)
    assert plan.pointers == ((0, 40), *((40 - rank, rank) for rank in range(1, 15)))
    scores[39] = 0.0  # the very last frame comes on top of the fifteen
    plan = plan_memory(40, (0,), scores, 100, scores=scores)
    assert plan.pointers == ((0, 40), *((40 - rank, rank) for rank in range(1, 16)))


def test_one_selected_frame_gives_no_pointer():
    plan = plan_memory(2, (0,), (1,), 100, scores={1: 1.0})
    assert plan == MemoryPlan(((0, 6), (1, 0)), ((0, 2),), span=15)
