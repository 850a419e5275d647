"""What is asked about a scene whose objects are known: kinds of prompts, boxes and points."""

from __future__ import annotations

import numpy as np
import pytest

from distillation.supervised.scene_prompts import (
    TRAINING_MIX,
    boxes_of,
    choose_prompt,
    doubtful,
    inner_point,
    make_prompt,
    noisy_box,
    same_kind,
)
from sam3.engine.scene_names import Kind, Name, allowed, name_of
from sam3.engine.scenes import make_scene
from sam3.model.sam3_image_processor import VISUAL_PROMPT
from tests.distillation.supervised.scenes import BLUE_SQUARE, RED_SQUARE, STRIPED_RED, hand_made, squares

RED, BLUE, STAR = [True, False, True, False], [False, True, False, False], [False, False, False, True]
KINDS = (RED, BLUE, RED, STAR)  # for each object of `squares`, those of its kind
PHRASES = {"square": [True, True, True, False], "red square": RED}


def prompts(kind: str, count: int = 30):
    """Of a kind, about the squares."""
    return [make_prompt(kind, squares(), np.random.default_rng(seed)) for seed in range(count)]


def test_phrases():
    made = prompts("text")
    assert {prompt.text for prompt in made} == set(PHRASES)
    assert all(prompt.wanted.tolist() == PHRASES[prompt.text] for prompt in made)
    assert not any(prompt.boxes or prompt.points for prompt in made)


def test_phrases_of_what_is_not_there():
    for prompt in prompts("absent", 5):
        assert (prompt.text, prompt.wanted.tolist(), prompt.boxes, prompt.points) == ("red heart", [False] * 4, [], [])


@pytest.mark.parametrize(("kind", "used"), [("box", "boxes"), ("point", "points")])
def test_an_exemplar_means_its_whole_kind(kind: str, used: str):
    shown = set()
    for prompt in prompts(kind):
        ((at, label),) = getattr(prompt, used)
        assert (prompt.kind, prompt.text, label) == (kind, VISUAL_PROMPT, 1)
        assert prompt.wanted.tolist() == KINDS[at] and len(prompt.boxes) + len(prompt.points) == 1
        shown.add(at)
    assert shown == {0, 1, 2, 3}


def test_a_negative_box_lies_on_another_kind():
    for prompt in prompts("box_not"):
        (shown, first), (refused, second) = prompt.boxes
        assert (first, second) == (1, 0) and not prompt.wanted[refused]
        assert prompt.wanted.tolist() == KINDS[shown] and prompt.text == VISUAL_PROMPT


def test_a_phrase_with_a_box():
    for prompt in prompts("text_box"):
        ((shown, label),) = prompt.boxes
        assert label == 1 and prompt.wanted[shown] and prompt.wanted.tolist() == PHRASES[prompt.text]


def test_a_phrase_without_one_kind():
    """Where all red squares are taken out of "red square", nothing is left to ask for."""
    made = prompts("text_not", 60)
    assert None in made
    for prompt in filter(None, made):
        ((refused, label),) = prompt.boxes
        assert (prompt.text, label) == ("square", 0)
        assert prompt.wanted.tolist() == (BLUE if refused in (0, 2) else RED)


@pytest.mark.parametrize(
    ("kind", "phrases"),
    [
        ("box_not", {"square": (0, 1), "heart": ()}),  # there is one kind only
        ("text_not", {"square": (0, 1), "heart": ()}),
        ("absent", {"square": (0, 1)}),
        ("text", {"heart": ()}),
        ("text_box", {"heart": ()}),
    ],
)
def test_none_where_a_scene_has_no_room(kind: str, phrases: dict):
    scene = hand_made(12, [(RED_SQUARE, (0, 0, 3, 3)), (RED_SQUARE, (5, 5, 9, 9))], phrases)
    assert make_prompt(kind, scene, np.random.default_rng(0)) is None


def test_the_mix():
    """Every kind is asked; what the scene has no room for gives way to a box."""
    rng = np.random.default_rng(0)
    kinds = [choose_prompt(squares(), rng).kind for _ in range(400)]
    assert set(kinds) == set(TRAINING_MIX)
    assert kinds.count("text") == pytest.approx(400 * TRAINING_MIX["text"], abs=40)
    halves = [choose_prompt(squares(), rng, {"text": 3, "point": 3, "box": 0}).kind for _ in range(400)]
    assert set(halves) == {"text", "point"} and halves.count("text") == pytest.approx(200, abs=40)
    lone = hand_made(12, [(RED_SQUARE, (0, 0, 3, 3))])
    assert {choose_prompt(lone, rng).kind for _ in range(50)} == {"box", "point"}


def test_what_training_never_shows_in_that_paint_is_doubtful():
    """Squares keep black, green and pink for val, and stripes, dots or checks of one sort."""
    shown, kept = allowed("train", "square"), allowed("val", "square")
    red, black = shown[0][0], kept[0][0]
    texture, other = shown[1][0], kept[1][0]
    kinds = [
        *(Kind("circle", red, "plain"), Kind("circle", black, "plain")),
        *(Kind("circle", red, texture), Kind("circle", red, other), Kind("square", black, "plain")),
    ]
    assert doubtful(Name("square"), kinds).tolist() == [False, True, False, True, False]
    assert doubtful(Name("square", red), kinds).tolist() == [False, False, False, True, False]
    assert doubtful(Name("square", None, texture), kinds).tolist() == [False] * 5
    assert doubtful(Name("square", shown[0][1]), kinds).tolist() == [False] * 5  # the colour alone tells them apart


@pytest.mark.parametrize("kind", ["text", "absent", "box"])
def test_prompts_say_what_is_doubtful(kind: str):
    scene = make_scene(11, 96, "train")
    for seed in range(6):
        prompt = make_prompt(kind, scene, np.random.default_rng(seed))
        expected = np.zeros(len(scene.objects)) if kind == "box" else doubtful(name_of(prompt.text), scene.objects)
        assert (prompt.doubtful == expected).all() and not (prompt.doubtful & prompt.wanted).any()


def test_a_kind_is_shape_colour_and_texture():
    assert same_kind([RED_SQUARE, STRIPED_RED, BLUE_SQUARE, RED_SQUARE], 0).tolist() == [True, False, False, True]


def test_boxes_of_masks():
    masks = np.zeros((3, 4, 6), bool)
    masks[0, 1:3, 2:5] = True
    masks[1, 3, 5] = True
    masks[2, 0, 0] = masks[2, 2, 4] = True
    boxes = boxes_of(masks)
    assert boxes.tolist() == [[2, 1, 5, 3], [5, 3, 6, 4], [0, 0, 5, 3]] and boxes.dtype == np.float32


def test_noisy_boxes_stay_near_and_inside():
    box = np.array((0, 10, 40, 30), np.float32)
    noisy = np.stack([noisy_box(box, 40, np.random.default_rng(seed)) for seed in range(300)])
    assert noisy.dtype == np.float32 and noisy.min() >= 0 and noisy.max() <= 40
    off = (noisy - box)[:, [1, 3]]  # what the picture's border does not cut: a twentieth of the height, which is 20
    assert off.std() == pytest.approx(1.0, abs=0.1) and abs(off.mean()) < 0.2
    assert (noisy[:, 0] == 0).any() and (noisy[:, 0] > 0).any()


def test_a_box_never_shrinks_to_nothing():
    box = np.array((3, 3, 4, 4), np.float32)
    for seed in range(50):
        left, top, right, bottom = noisy_box(box, 10, np.random.default_rng(seed))
        assert right - left >= 1 and bottom - top >= 1


def test_the_innermost_point_of_a_mask():
    mask = np.zeros((9, 12), bool)
    mask[2:7, 5:10] = True
    assert inner_point(mask, None).tolist() == [7, 4]  # x, y
    mask[:] = False
    mask[:5, :5] = True  # the picture's corner is no middle
    assert inner_point(mask, None).tolist() == [2, 2]
    mask[:] = False
    mask[0, :] = mask[:, 0] = True  # thin, with a knob
    mask[5:8, 0:3] = True
    assert inner_point(mask, None).tolist() == [1, 6]


def test_any_point_of_a_mask():
    mask = np.zeros((5, 5), bool)
    mask[1, 1:4] = mask[3, 3] = True
    rng = np.random.default_rng(0)
    assert {tuple(inner_point(mask, rng).tolist()) for _ in range(60)} == {(1, 1), (2, 1), (3, 1), (3, 3)}
