"""Scenes of named objects with exact masks, drawn on the fly: what a small SAM3 learns to find, without any download.

One integer stands for one scene, in any process and on any machine; train and val never share a stream of random
numbers, nor a pair of a property and a shape (`sam3.engine.scene_names`). At another size the same integer gives the
same scene, but for noise and for objects at the limit of being too small.

Letters: `N` objects, `H W` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from sam3.engine.image_list import SPLITS
from sam3.engine.scene_drawing import AXIS, BASE_SIZE, Look, Pose, Sprite, draw_look, draw_object, fill
from sam3.engine.scene_grounds import draw_ground
from sam3.engine.scene_names import (
    PARTS,
    PLAIN,
    Kind,
    Phrase,
    kinds_of,
    make_phrases,
    pick,
    related,
    require_split,
)

SCENE, CLIP = 0, 1  # part of what seeds the random numbers
SET_SIZE = 10**7  # scenes of one data set at most
MIN_SIZE = 32  # pixels
MAX_OBJECTS = 8
COPIES = (0.4, 0.3, 0.2, 0.1)  # how often there are 1, 2, ... of the first kind
DIAMETER = (0.08, 0.45)  # of an object, as a share of the side
MIN_TEXTURED, MIN_TEXTURED_AREA = 0.16, 0.015  # diameter and area from which stripes, dots and checks can be told
MIN_AREA = 0.003  # share of the picture that must be seen of an object
MIN_SHOWN = 0.35  # share of the whole object that must be seen, so that its shape can be told
PLACES = 6  # tried for each object
CROWDED = 0.35  # share of the objects that may lie on others
BLURRED = 0.35  # share of the scenes
NOISE = (0.0, 14.0)  # the most that noise, the same in red, green and blue, changes a value of 0..255
EXPOSURE = (0.82, 1.08)


@dataclass(frozen=True)
class Scene:
    """image: uint8 `(H, W, 3)`; masks: bool `(N, H, W)`, of each object what no other covers, later objects in front;
    objects: what they are; phrases: those that are true of some objects, then about as many that are true of none;
    angles: how far each object is turned, radians, clockwise.
    """

    image: np.ndarray
    masks: np.ndarray
    objects: list[Kind]
    phrases: list[Phrase]
    angles: np.ndarray


def make_scene(
    seed: int, size: int, split: str, photos: Sequence[np.ndarray] | None = None, zoom: float = 1.0
) -> Scene:
    """The scene of number `seed` in `split` (train or val), a square of `size` pixels with 1 to MAX_OBJECTS objects.

    photos: grounds for a part of the scenes, uint8 `(H, W, 3)`, as `scene_grounds.read_grounds` gives them; other
    photos make other scenes. zoom: objects are so many times as large as usual, 1 to 2; at half the size and twice the
    zoom they are as many pixels wide and lie closer together. ValueError for an unknown split, a negative seed, a size
    below MIN_SIZE or another zoom.
    """
    if not 1 <= zoom <= 2:
        raise ValueError(f"objects are 1 to 2 times as large as usual, got a zoom of {zoom}")
    generator = scene_generator(SCENE, seed, size, split)
    objects: list[Kind] = []
    while not objects:  # what is too small to be seen is left out; hardly ever is that everything
        ground = draw_ground(size, photos, generator)
        looks = [draw_look(kind, generator) for kind in cast_kinds(split, MAX_OBJECTS, generator)]
        poses = place([look.kind for look in looks], DIAMETER, generator, zoom)
        sprites = [draw_object(look, pose, size) for look, pose in zip(looks, poses, strict=True)]
        kept = keep_visible(sprites, poses, looks, size, zoom)
        objects = [looks[i].kind for i in kept]
    phrases = make_phrases(objects, split, generator)
    masks = paste(ground, [sprites[i] for i in kept])
    angles = np.array([poses[i].angle for i in kept])
    return Scene(finish(ground, Finish.draw(generator), generator), masks, objects, phrases, angles)


def turned(scene: Scene, quarters: int, mirrored: bool = False) -> Scene:
    """The scene after so many quarter turns, counter-clockwise, and then, if `mirrored`, with left and right changed.

    All shapes are their own mirror images.
    """
    image, masks = np.rot90(scene.image, quarters), np.rot90(scene.masks, quarters, axes=(1, 2))
    angles = scene.angles - quarters * math.pi / 2
    if mirrored:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
        angles = np.array([-a - 2 * AXIS.get(kind.shape, 0) for a, kind in zip(angles, scene.objects, strict=True)])
    return replace(scene, image=np.ascontiguousarray(image), masks=np.ascontiguousarray(masks), angles=angles)


def number_of_scene(set_seed: int, place: int) -> int:
    """The seed of the scene or clip at `place`, from 0, of a data set that is made from `set_seed`."""
    if not 0 <= place < SET_SIZE:
        raise ValueError(f"a set holds at most {SET_SIZE} scenes, asked for number {place}; make several sets")
    return set_seed * SET_SIZE + place


def scene_generator(use: int, seed: int, size: int, split: str) -> np.random.Generator:
    """The random numbers of one scene (use: SCENE or CLIP). ValueError for arguments out of range."""
    require_split(split)
    if seed < 0 or size < MIN_SIZE:
        raise ValueError(f"wanted a seed from 0 and a size from {MIN_SIZE} pixels, got seed {seed} and size {size}")
    return np.random.default_rng([use, SPLITS.index(split), seed])


def cast_kinds(split: str, most: int, generator: np.random.Generator) -> list[Kind]:
    """What 1 to `most` objects are: some of one kind, and others that share a property with it or not."""
    asked = pick(kinds_of(split), generator)
    copies = 1 + int(np.searchsorted(np.cumsum(COPIES), generator.random()))
    cast = [asked] * min(copies, most)
    for _ in range(int(generator.integers(0, most - len(cast) + 1))):
        part = pick(PARTS, generator)
        chance = generator.random()
        if chance < 0.2:
            cast.append(pick(cast, generator))
        elif chance < 0.8 and getattr(asked, part) != PLAIN:
            cast.append(pick(related(split, part, getattr(asked, part)), generator))
        else:
            cast.append(pick(kinds_of(split), generator))
    return cast


def place(
    cast: Sequence[Kind], diameter: tuple[float, float], generator: np.random.Generator, zoom: float = 1.0
) -> list[Pose]:
    """Where each object lies, its size (within `diameter`, shares of the side, times `zoom`) and how it is turned.

    Small sizes are as likely as large ones, on a scale of ratios. Most objects keep clear of others, some may not.
    """
    poses: list[Pose] = []
    for kind in cast:
        least = max(diameter[0], least_diameter(kind))
        width = zoom * math.exp(generator.uniform(math.log(least), math.log(diameter[1])))
        limit = 0.7 if generator.random() < CROWDED else 0.1
        best, least_overlap = Pose(0, 0, 0, 0), math.inf
        for x, y in generator.uniform(0.3 * width, 1 - 0.3 * width, (PLACES, 2)).tolist():
            pose = Pose(x, y, width, 0)
            overlap = max((_overlap(pose, other) for other in poses), default=0)
            if overlap < least_overlap:
                best, least_overlap = pose, overlap
            if overlap <= limit:
                break
        poses.append(replace(best, angle=generator.uniform(0, 2 * math.pi)))
    return poses


@cache
def least_diameter(kind: Kind) -> float:
    """From which an object is neither left out for its size nor too small for its texture to be seen."""
    least = math.sqrt(1.3 * MIN_AREA / fill(kind.shape))
    if kind.texture == PLAIN:
        return least
    return max(least, MIN_TEXTURED, math.sqrt(MIN_TEXTURED_AREA / fill(kind.shape)))


def _overlap(a: Pose, b: Pose) -> float:
    """How far two circles reach into each other: 0 if they touch, 1 if the smaller one's far side is reached."""
    reach = (a.diameter + b.diameter) / 2 - math.hypot(a.x - b.x, a.y - b.y)
    return max(reach / min(a.diameter, b.diameter), 0)


def keep_visible(
    sprites: Sequence[Sprite | None], poses: Sequence[Pose], looks: Sequence[Look], size: int, zoom: float = 1.0
) -> list[int]:
    """Which objects to draw, from the back to the front: those of which enough is seen. Small ones tend to the front.

    Enough is MIN_AREA of the picture, times `zoom` squared, and MIN_SHOWN of the whole object. One that is left out
    hides nothing.
    """
    taken = np.zeros((size, size), bool)
    kept = []
    for i in sorted(range(len(poses)), key=lambda i: poses[i].diameter):
        if (sprite := sprites[i]) is None:
            continue
        mask = sprite.mask
        seen = int((mask & ~taken[sprite.area]).sum())
        whole = fill(looks[i].kind.shape) * (poses[i].diameter * size) ** 2
        if seen >= MIN_AREA * (zoom * size) ** 2 and seen >= MIN_SHOWN * whole:
            taken[sprite.area] |= mask
            kept.append(i)
    return kept[::-1]


def paste(picture: np.ndarray, sprites: Sequence[Sprite | None]) -> np.ndarray:
    """Draw over `picture`, float32 `(3, H, W)`, in order; returns what is seen of each in the end, bool `(N, H, W)`."""
    masks = np.zeros((len(sprites), *picture.shape[1:]), bool)
    for i, sprite in enumerate(sprites):
        if sprite is None:
            continue
        part = picture[(slice(None), *sprite.area)]
        part += (sprite.colour - part) * sprite.cover
        mask = sprite.mask
        masks[(slice(i), *sprite.area)] &= ~mask
        masks[(i, *sprite.area)] = mask
    return masks


@dataclass(frozen=True)
class Finish:
    """What the camera does. noise: the most it changes a value; exposure: factor on all values."""

    noise: float
    exposure: float
    blurred: bool

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Finish:
        return cls(generator.uniform(*NOISE), generator.uniform(*EXPOSURE), generator.random() < BLURRED)


def finish(picture: np.ndarray, camera: Finish, generator: np.random.Generator) -> np.ndarray:
    """The picture, float32 `(3, H, W)`, as `camera` takes it: uint8 `(H, W, 3)`. Overwrites `picture`.

    The blur is even, so that edges stay where the masks have them.
    """
    if camera.blurred:
        for _ in range(max(1, round(picture.shape[1] / BASE_SIZE))):
            _blur(picture)
            _blur(picture.swapaxes(1, 2))
    noise = generator.integers(0, 256, picture.shape[1:], dtype=np.uint8) * np.float32(camera.noise / 128)
    noise += np.float32(0.5 - camera.noise)  # its middle to 0.5: what is cut off below is then rounded
    picture *= np.float32(camera.exposure)
    picture += noise
    np.clip(picture, 0, 255, out=picture)
    return np.dstack(picture.astype(np.uint8))


def _blur(planes: np.ndarray) -> None:
    """Mix each row of `(3, H, W)` with its neighbours, 1 2 1, in place; the first and the last row stay."""
    neighbours = planes[:, :-2] + planes[:, 2:]
    neighbours *= np.float32(0.25)
    planes[:, 1:-1] *= np.float32(0.5)
    planes[:, 1:-1] += neighbours
