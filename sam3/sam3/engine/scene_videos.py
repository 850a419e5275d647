"""Clips of named objects that move, turn, grow and shrink, with exact masks; see `sam3.engine.scenes`.

All objects are in the first frame. Some pass before or behind another, some leave, some leave and return; the camera
may drift. Motion spans the clip: more frames of the same number show the same motion in smaller steps.

Letters: `T` frames, `N` objects, `H W` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam3.engine.scene_drawing import Look, Pose, Sprite, draw_look, draw_object
from sam3.engine.scene_grounds import draw_ground
from sam3.engine.scene_names import Kind
from sam3.engine.scenes import CLIP, Finish, cast_kinds, finish, keep_visible, paste, place, scene_generator

MAX_OBJECTS = 6
DIAMETER = (0.12, 0.4)  # of an object, as a share of the side
WAYS = {"wander": 0.4, "meet": 0.3, "return": 0.2, "leave": 0.1}  # how often an object moves so
WANDER = 0.3  # the most that the end of a way is off its start, as a share of the side, along each axis
SWAY = 0.06  # the most that an object is off its way
TURN = math.radians(75)  # the most that it turns during the clip, to either side
BREATH = 0.2  # the most that it grows or shrinks, as a share of its size
MEET = 0.6  # share of the time after which one object passes where another was
AWAY, BACK = (0.1, 0.45), (0.55, 0.95)  # share of the time in which objects leave, and in which they return
DRIFT, MARGIN = 0.4, 0.16  # share of clips in which the camera moves; the most it does, as a share of the side


@dataclass(frozen=True)
class Clip:
    """frames: uint8 `(T, H, W, 3)`; masks: bool `(T, N, H, W)`, of each object what no other covers, all False where
    it is hidden or has left; objects: what they are, later ones in front.
    """

    frames: np.ndarray
    masks: np.ndarray
    objects: list[Kind]


@dataclass(frozen=True)
class Actor:
    """One object and its way. start: how it lies at the beginning; way: one of WAYS; goal: (x, y), where a wanderer
    ends, one that meets another passes, and one that leaves is out of sight; sway: along x and y;
    phase: of swaying and breathing, radians.
    """

    look: Look
    start: Pose
    way: str
    goal: tuple[float, float]
    sway: tuple[float, float]
    turn: float
    breath: float
    phase: float

    def pose(self, share: float) -> Pose:
        """Where it is after `share` of the time, 0 to 1; at 0 it is at its start."""
        way = self._progress(share)
        swing = math.sin(2 * math.pi * share + self.phase) - math.sin(self.phase)
        x, y = (
            start + way * (goal - start) + swing * sway
            for start, goal, sway in zip((self.start.x, self.start.y), self.goal, self.sway, strict=True)
        )
        return Pose(x, y, self.start.diameter * (1 + self.breath * swing / 2), self.start.angle + self.turn * share)

    def _progress(self, share: float) -> float:
        """How far it is on the way from start to goal: 1 there, 2 as far beyond it."""
        if self.way == "wander":
            return ease(share)
        if self.way == "meet":
            return share / MEET
        gone = ease((share - AWAY[0]) / (AWAY[1] - AWAY[0]))
        return gone if self.way == "leave" else gone - ease((share - BACK[0]) / (BACK[1] - BACK[0]))


def make_clip(seed: int, size: int, num_frames: int, split: str, photos: Sequence[np.ndarray] | None = None) -> Clip:
    """The clip of number `seed` in `split` (train or val): `num_frames` squares of `size` pixels with 1 to MAX_OBJECTS
    objects.

    photos: as for `make_scene`. ValueError for an unknown split, a negative seed, a size below MIN_SIZE or no frames.
    """
    if num_frames < 1:
        raise ValueError(f"a clip has at least 1 frame, got {num_frames}")
    generator = scene_generator(CLIP, seed, size, split)
    actors: list[Actor] = []
    while not actors:  # as in make_scene
        ground = draw_ground(size + 2 * round(size * MARGIN), photos, generator)  # as far as the camera may go
        actors = visible_actors(cast_actors(split, generator), size)
    drift = generator.uniform(-MARGIN, MARGIN, 2) if generator.random() < DRIFT else np.zeros(2)
    camera = Finish.draw(generator)
    frames, masks = [], []
    for share in np.linspace(0, 1, num_frames).tolist():
        shift = np.round(share * drift * size).astype(int)  # pixels along x and y, of the ground and what lies on it
        picture = view(ground, size, shift)
        masks.append(paste(picture, [draw_actor(actor, share, size, shift) for actor in actors]))
        frames.append(finish(picture, camera, generator))
    return Clip(np.stack(frames), np.stack(masks), [actor.look.kind for actor in actors])


def cast_actors(split: str, generator: np.random.Generator) -> list[Actor]:
    """The objects of a clip as they are drawn, hidden ones among them."""
    looks = [draw_look(kind, generator) for kind in cast_kinds(split, MAX_OBJECTS, generator)]
    starts = place([look.kind for look in looks], DIAMETER, generator)
    names, chances = list(WAYS), np.cumsum(list(WAYS.values()))
    actors = []
    for i, (look, start) in enumerate(zip(looks, starts, strict=True)):
        way = names[int(np.searchsorted(chances, generator.random() * chances[-1]))]
        if way == "meet" and len(starts) > 1:
            other = starts[(i + 1 + int(generator.integers(len(starts) - 1))) % len(starts)]
            goal = (other.x, other.y)
        elif way in ("leave", "return"):
            goal = nearest_exit(start)
        else:
            x, y = np.clip(np.array([start.x, start.y]) + generator.uniform(-WANDER, WANDER, 2), 0.1, 0.9).tolist()
            way, goal = "wander", (x, y)
        sway = generator.uniform(-SWAY, SWAY, 2).tolist()
        turn, breath = generator.uniform(-TURN, TURN), generator.uniform(-BREATH, BREATH)
        actors.append(Actor(look, start, way, goal, (sway[0], sway[1]), turn, breath, generator.uniform(0, 6.28)))
    return actors


def nearest_exit(start: Pose) -> tuple[float, float]:
    """A centre (x, y) so far beyond the nearest edge of the picture that nothing of the object is seen there, unless
    the camera drifts after it.
    """
    out = 0.5 * (1 + BREATH) * start.diameter + 2 * SWAY
    goals = ((-out, start.y), (1 + out, start.y), (start.x, -out), (start.x, 1 + out))
    return min(goals, key=lambda goal: abs(goal[0] - start.x) + abs(goal[1] - start.y))


def visible_actors(actors: Sequence[Actor], size: int) -> list[Actor]:
    """Those of which enough is seen in the first frame, from the back to the front."""
    looks, poses = [actor.look for actor in actors], [actor.start for actor in actors]
    sprites = [draw_object(look, pose, size) for look, pose in zip(looks, poses, strict=True)]
    return [actors[i] for i in keep_visible(sprites, poses, looks, size)]


def draw_actor(actor: Actor, share: float, size: int, shift: np.ndarray) -> Sprite | None:
    """The object after `share` of the time, seen by a camera that has moved by `shift` pixels along x and y."""
    pose = actor.pose(share)
    x, y = pose.x - shift[0] / size, pose.y - shift[1] / size
    return draw_object(actor.look, Pose(x, y, pose.diameter, pose.angle), size)


def view(ground: np.ndarray, size: int, shift: np.ndarray) -> np.ndarray:
    """What the camera sees of the ground: a copy, float32 `(3, size, size)`. In the middle of it at shift 0."""
    margin = (ground.shape[1] - size) // 2
    left, top = (int(margin + pixels) for pixels in shift)
    return ground[:, top : top + size, left : left + size].copy()


def ease(share: float) -> float:
    """0 up to 0, 1 from 1 on, and a smooth way between."""
    share = min(max(share, 0.0), 1.0)
    return share * share * (3 - 2 * share)
