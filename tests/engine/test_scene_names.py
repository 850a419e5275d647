from __future__ import annotations

import numpy as np
import pytest

from sam3.engine.image_list import SPLITS
from sam3.engine.scene_names import (
    COLOURS,
    PLAIN,
    SHAPES,
    TEXTURES,
    WORDS,
    Kind,
    Name,
    allowed,
    combinations,
    is_allowed,
    is_shown,
    kinds_of,
    make_phrases,
    miss,
    name_of,
)

RED_SQUARE, BLUE_CIRCLE = Kind("square", "red", PLAIN), Kind("circle", "blue", "dotted")


def test_names_of_an_object() -> None:
    assert [name.text for name in RED_SQUARE.names] == ["square", "red square"]
    assert [name.text for name in BLUE_CIRCLE.names] == ["circle", "blue circle", "dotted circle", "dotted blue circle"]


def test_a_name_fits_what_has_all_its_properties() -> None:
    assert Name("square").fits(RED_SQUARE) and Name("square", "red").fits(RED_SQUARE)
    assert not Name("square", "blue").fits(RED_SQUARE) and not Name("circle", "red").fits(RED_SQUARE)
    assert Name("circle", None, "dotted").fits(BLUE_CIRCLE)
    assert not Name("circle", None, "striped").fits(BLUE_CIRCLE) and not Name("square", "red", "dotted").fits(
        RED_SQUARE
    )


def pairs(split: str) -> set[tuple[str, str]]:
    return {(word, k.shape) for k in kinds_of(split) for word in (k.colour, k.texture) if word != PLAIN}


def test_splits_share_every_word_and_no_pair() -> None:
    assert not pairs("train") & pairs("val")
    assert len(pairs("train") | pairs("val")) == len(SHAPES) * (len(COLOURS) + len(TEXTURES) - 1)
    assert (len(kinds_of("train")), len(kinds_of("val"))) == (12 * 7 * 3, 12 * 3 * 2)
    for split in ("train", "val"):
        assert {k.shape for k in kinds_of(split)} == set(SHAPES)
        assert {k.colour for k in kinds_of(split)} == set(COLOURS)
        assert {k.texture for k in kinds_of(split)} == set(TEXTURES)
    for colour in COLOURS:
        assert len([shape for shape in SHAPES if colour in allowed("val", shape)[0]]) >= 3, "one to mistake it for"


def test_what_is_held_out_is_fixed() -> None:
    """Weights are published with figures for these; another split would need new ones."""
    assert allowed("val", "circle") == (("red", "white", "blue"), ("striped",))
    assert allowed("val", "square") == (("orange", "black", "green"), ("dotted",))
    assert allowed("val", "star") == (("red", "white", "yellow"), ("striped",))
    assert not is_allowed(Name("circle", "red"), "train") and is_allowed(Name("circle", "red"), "val")
    assert not is_allowed(Name("circle", "red", "dotted"), "val"), "one of its pairs is from train"
    assert is_allowed(Name("circle"), "train") and is_allowed(Name("circle"), "val")


def test_phrases_by_hand() -> None:
    objects = [RED_SQUARE, BLUE_CIRCLE, Kind("square", "red", "striped")]
    phrases = make_phrases(objects, "train", np.random.default_rng(0))
    present = {phrase.text: phrase.matches for phrase in phrases if phrase.matches}
    assert present == {
        "square": (0, 2),
        "red square": (0, 2),
        "circle": (1,),
        "blue circle": (1,),
        "dotted circle": (1,),
        "dotted blue circle": (1,),
        "striped square": (2,),
        "striped red square": (2,),
    }
    absent = [phrase.text for phrase in phrases if not phrase.matches]
    assert len(absent) == len(set(absent)) == 8 and not set(absent) & set(present)
    assert all(phrase.matches for phrase in phrases[:8]) and not any(phrase.matches for phrase in phrases[8:])


@pytest.mark.parametrize("split", ["train", "val"])
def test_absent_phrases_are_of_the_split_and_true_of_nothing(split: str) -> None:
    generator = np.random.default_rng(1)
    near = total = 0
    for _ in range(60):
        kinds = kinds_of(split)
        objects = [kinds[i] for i in generator.integers(len(kinds), size=5)]
        words = {word for k in objects for word in (k.shape, k.colour, k.texture)}
        for phrase in make_phrases(objects, split, generator):
            name = parse(phrase.text)
            assert is_allowed(name, split)
            assert phrase.matches == tuple(i for i, kind in enumerate(objects) if name.fits(kind))
            if not phrase.matches:
                total += 1
                near += set(phrase.text.split()) <= words and len(name.parts) > 1
    assert near > 0.2 * total, "each word is true of something, but not together"


def parse(text: str) -> Name:
    words = dict.fromkeys(("colour", "texture"))
    for word in text.split():
        (part,) = (part for part, known in WORDS.items() if word in known)
        words[part] = word
    return Name(**words)


def test_a_miss_changes_one_word_to_another_objects() -> None:
    generator = np.random.default_rng(0)
    red_heart, white_drop = Kind("heart", "red", PLAIN), Kind("drop", "white", PLAIN)
    found = {miss(Name("heart", "red"), [red_heart, white_drop], "train", generator).text for _ in range(50)}
    assert found == {"white heart", "red drop"}
    found = {miss(Name("square", "red"), [RED_SQUARE, BLUE_CIRCLE], "train", generator).text for _ in range(200)}
    assert "blue square" in found and len(found) > 10, "train has no red circle, so the shape may be any"
    assert all(miss(Name("square"), [RED_SQUARE], "train", generator).shape in SHAPES for _ in range(20))


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="split 'test' is unknown; choose one of train, val"):
        allowed("test", "circle")


def test_names_are_read_from_their_text():
    for kind in kinds_of("val"):
        for name in kind.names:
            assert name_of(name.text) == name
    for text in ("red", "square red", "big square", "red red square", ""):
        with pytest.raises(ValueError):
            name_of(text)


@pytest.mark.parametrize("split", SPLITS)
def test_combinations_are_those_of_the_kinds(split: str):
    assert combinations(split).sum() == len(kinds_of(split))
    shown = [Kind(s, c, t) for s in SHAPES for c in COLOURS for t in TEXTURES if is_shown(Kind(s, c, t), split)]
    assert set(shown) == set(kinds_of(split))
