"""Names of what is drawn in scenes: a shape, its colour and its texture, such as "striped red square".

Train and val share every word but no pair of a property and a shape: each shape keeps NUM_HELD colours and one texture
for val. A model that knows "red square" and "orange circle" from training has to put "orange square" together itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np

from sam3.engine.image_list import SPLITS

SHAPES = (
    *("circle", "square", "triangle", "star", "heart", "cross"),
    *("ring", "crescent", "arrow", "oval", "flower", "drop"),
)
# Neighbours in this row are held out together, so they are chosen to be unlike.
COLOURS = ("red", "white", "blue", "orange", "black", "green", "pink", "cyan", "purple", "yellow")
PLAIN = "plain"  # in both splits with every shape; no phrase says it
TEXTURES = (PLAIN, "striped", "dotted", "checkered")
PARTS = ("shape", "colour", "texture")
WORDS = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES[1:]}
NUM_HELD = 3  # colours of each shape that only val shows

NEAR = 0.6  # share of absent phrases that are sought among near misses
MAX_ABSENT = 10
TRIES = 4  # draws for each absent phrase that is wanted

T = TypeVar("T")


@dataclass(frozen=True)
class Name:
    """What a phrase asks for: a shape, and the properties that it names (None: any)."""

    shape: str
    colour: str | None = None
    texture: str | None = None

    @property
    def text(self) -> str:
        """Such as "heart", "red heart", "dotted heart", "dotted red heart"."""
        return " ".join(word for word in (self.texture, self.colour, self.shape) if word)

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of PARTS it names."""
        return tuple(part for part in PARTS if getattr(self, part))

    def fits(self, kind: Kind) -> bool:
        """Whether an object of `kind` has all that is named."""
        return self.shape == kind.shape and self.colour in (None, kind.colour) and self.texture in (None, kind.texture)


def name_of(text: str) -> Name:
    """The name that reads so. ValueError for another phrase."""
    *properties, shape = text.split() or ("",)
    found = {part: word for word in properties for part in PARTS[1:] if word in WORDS[part]}
    name = Name(shape, found.get("colour"), found.get("texture"))
    if shape not in SHAPES or name.text != text:
        raise ValueError(f"{text!r} names none of the objects in scenes, such as 'dotted red heart'")
    return name


@dataclass(frozen=True)
class Kind:
    """What an object is."""

    shape: str
    colour: str
    texture: str

    @property
    def names(self) -> tuple[Name, ...]:
        """All names that fit it, the shortest first: two of a plain object, four of another."""
        names = (Name(self.shape), Name(self.shape, self.colour))
        if self.texture == PLAIN:
            return names
        return (*names, Name(self.shape, None, self.texture), Name(self.shape, self.colour, self.texture))


@dataclass(frozen=True)
class Phrase:
    """A text prompt and the objects that it means, by their place in the scene; none if it is absent."""

    text: str
    matches: tuple[int, ...]


def require_split(split: str) -> None:
    """Raises ValueError unless `split` is train or val."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")


@cache
def allowed(split: str, shape: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Colours and textures, without plain, that `shape` has in `split`."""
    require_split(split)
    number = SHAPES.index(shape)
    held = {COLOURS[(NUM_HELD * number + i) % len(COLOURS)] for i in range(NUM_HELD)}
    held.add(TEXTURES[1 + number % (len(TEXTURES) - 1)])
    colours, textures = (tuple(w for w in WORDS[p] if (w in held) == (split == "val")) for p in ("colour", "texture"))
    return colours, textures


@cache
def kinds_of(split: str) -> tuple[Kind, ...]:
    """Every kind of object that `split` shows."""
    return tuple(
        Kind(shape, colour, texture)
        for shape in SHAPES
        for colour in allowed(split, shape)[0]
        for texture in (PLAIN, *allowed(split, shape)[1])
    )


@cache
def combinations(split: str) -> np.ndarray:
    """bool (shapes, colours, textures), which kinds `split` shows; plain is the first texture."""
    shown = np.zeros((len(SHAPES), len(COLOURS), len(TEXTURES)), bool)
    for kind in kinds_of(split):
        shown[SHAPES.index(kind.shape), COLOURS.index(kind.colour), TEXTURES.index(kind.texture)] = True
    return shown


def is_shown(kind: Kind, split: str) -> bool:
    """Whether `split` shows such objects."""
    place = SHAPES.index(kind.shape), COLOURS.index(kind.colour), TEXTURES.index(kind.texture)
    return bool(combinations(split)[place])


@cache
def related(split: str, part: str, word: str) -> tuple[Kind, ...]:
    """The kinds of `split` whose `part` (shape, colour or texture) is `word`."""
    return tuple(kind for kind in kinds_of(split) if getattr(kind, part) == word)


def is_allowed(name: Name, split: str) -> bool:
    """Whether each property in `name` goes with its shape in `split`."""
    colours, textures = allowed(split, name.shape)
    return name.colour in (None, *colours) and name.texture in (None, *textures)


def make_phrases(objects: Sequence[Kind], split: str, generator: np.random.Generator) -> list[Phrase]:
    """All names that fit one of `objects`, then about as many, up to MAX_ABSENT, that fit none, NEAR of these near
    misses.
    """
    present = list(dict.fromkeys(name for kind in objects for name in kind.names))
    taken = set(present)
    absent: list[Name] = []
    wanted = min(len(present), MAX_ABSENT)
    for _ in range(TRIES * wanted):
        if len(absent) == wanted:
            break
        if generator.random() < NEAR:
            name = miss(pick(present, generator), objects, split, generator)
        else:
            name = pick(pick(kinds_of(split), generator).names, generator)
        if name not in taken and is_allowed(name, split):
            taken.add(name)
            absent.append(name)
    found = [tuple(i for i, kind in enumerate(objects) if name.fits(kind)) for name in present]
    return [
        *(Phrase(name.text, matches) for name, matches in zip(present, found, strict=True)),
        *(Phrase(name.text, ()) for name in absent),
    ]


def miss(name: Name, objects: Sequence[Kind], split: str, generator: np.random.Generator) -> Name:
    """`name` with one word changed, if possible to one that another object has: "red circle" where there are a red
    square and a blue circle.
    """
    part = pick(name.parts, generator)
    words = {word: None for kind in objects if (word := getattr(kind, part)) not in (getattr(name, part), PLAIN)}
    names = [changed for word in words if is_allowed(changed := replace(name, **{part: word}), split)]
    return pick(names, generator) if names else replace(name, **{part: pick(WORDS[part], generator)})


def pick(choices: Sequence[T], generator: np.random.Generator) -> T:
    """One of `choices`, each as likely. (The generator's own `choice` turns them into an array first.)"""
    return choices[int(generator.integers(len(choices)))]
