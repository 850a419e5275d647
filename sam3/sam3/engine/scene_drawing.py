"""Draws one object of a scene: its outline from a distance function, its paint, its light and its rim.

Letters: `h w` rows and columns of the part of the picture that an object touches; `u v` a pixel's place in the frame of
the object, which is turned and scaled so that every shape lies within the unit circle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from sam3.engine.scene_names import PLAIN, Kind

# Red, green, blue of each colour, and of the darker or paler paint of its stripes, dots and checks. A second paint is a
# shade of the first, never near another named colour: pale red would be pink.
PAINTS = {
    "red": ((214, 36, 38), ((92, 6, 10),)),
    "orange": ((246, 136, 20), ((140, 66, 0), (255, 224, 178))),
    "yellow": ((246, 222, 38), ((146, 112, 0),)),
    "green": ((46, 160, 58), ((12, 70, 22), (188, 234, 186))),
    "cyan": ((48, 206, 216), ((6, 92, 106), (212, 248, 250))),
    "blue": ((38, 72, 216), ((10, 20, 92), (176, 194, 252))),
    "purple": ((128, 48, 170), ((52, 12, 76),)),
    "pink": ((248, 146, 188), ((176, 58, 112), (255, 238, 246))),
    "white": ((244, 244, 244), ((122, 122, 126),)),
    "black": ((26, 26, 28), ((134, 134, 138),)),
}
JITTER = 10  # the most that red, green and blue of an object differ from its colour's, to either side
LIGHT = (0.0, 0.18)  # change of brightness from the middle of an object to its edge
RIM_PX, RIM_STRENGTH = (0.8, 2.2), (0.4, 0.9)  # width in pixels of a picture of BASE_SIZE, and how dark
PERIODS = (3.0, 4.6)  # stripes, rows of dots or pairs of checks across an object
MIN_PERIOD_PX = 6.5  # in a picture of BASE_SIZE, so that they can be seen
DOT_RADIUS = 0.3  # in periods
BASE_SIZE = 224


@dataclass(frozen=True)
class Pose:
    """x, y: the centre, as shares of the picture's side; diameter: of the circle around the shape, likewise;
    angle: radians, clockwise.
    """

    x: float
    y: float
    diameter: float
    angle: float


@dataclass(frozen=True)
class Look:
    """How an object is painted.

    palette: float32 `(3, 3)`, its paint, the second paint and the rim in 0..255; light: change of brightness along u
    and v; rim_px: width in a picture of BASE_SIZE; periods, texture_angle (radians), shift: of its texture.
    """

    kind: Kind
    palette: np.ndarray
    light: tuple[float, float]
    rim_px: float
    periods: float
    texture_angle: float
    shift: tuple[float, float]


@dataclass(frozen=True)
class Sprite:
    """One object drawn. area: rows and columns of the picture; cover: float32 `(h, w)` in 0..1; colour: float32
    `(3, h, w)` in 0..255.
    """

    area: tuple[slice, slice]
    cover: np.ndarray
    colour: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Pixels that it covers by half or more: bool `(h, w)`."""
        return self.cover >= 0.5


def draw_look(kind: Kind, generator: np.random.Generator) -> Look:
    """Everything about an object's paint that its name leaves open."""
    base, seconds = PAINTS[kind.colour]
    paint, second = np.array([base, seconds[int(generator.integers(len(seconds)))]]) + generator.uniform(
        -JITTER, JITTER, (2, 3)
    )
    strength = generator.uniform(*RIM_STRENGTH)
    rim = paint * (1 - strength) if kind.colour != "black" else paint + 110 * strength
    light, direction = generator.uniform(*LIGHT), generator.uniform(0, 2 * math.pi)
    return Look(
        kind=kind,
        palette=np.clip([paint, second, rim], 0, 255).astype(np.float32),
        light=(light * math.cos(direction), light * math.sin(direction)),
        rim_px=generator.uniform(*RIM_PX),
        periods=generator.uniform(*PERIODS),
        texture_angle=generator.uniform(0, math.pi),
        shift=(generator.random(), generator.random()),
    )


def draw_object(look: Look, pose: Pose, size: int) -> Sprite | None:
    """The object in a square picture of `size` pixels, without what others cover; None if it is wholly outside."""
    radius = pose.diameter * size / 2
    area, x, y = _local_grid(pose, radius, size)
    if not (len(x) and len(y)):
        return None
    cos, sin = np.float32(math.cos(pose.angle) / radius), np.float32(math.sin(pose.angle) / radius)
    u, v = cos * x + sin * y[:, None], cos * y[:, None] - sin * x
    inside = np.float32(radius) * -SHAPES[look.kind.shape](u, v)  # pixels from the edge
    cover = np.clip(inside + np.float32(0.5), 0, 1)
    rim = np.clip(np.float32(look.rim_px * size / BASE_SIZE + 0.5) - inside, 0, 1)
    light = 1 + np.float32(look.light[0]) * u + np.float32(look.light[1]) * v
    weights = np.empty((3, *u.shape), np.float32)  # of the three paints
    ground = light * (1 - rim)
    second = 0 if look.kind.texture == PLAIN else ground * _texture(look, u, v, radius, size)
    weights[0], weights[1], weights[2] = ground - second, second, rim
    colour = (look.palette.T @ weights.reshape(3, -1)).reshape(weights.shape)
    return Sprite(area, cover, np.clip(colour, 0, 255, out=colour))


def _local_grid(pose: Pose, radius: float, size: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Rows and columns that the object can touch, and the distance of their pixels from its centre, float32."""
    spans, distances = [], []
    for centre in (pose.y * size, pose.x * size):
        first = min(max(math.floor(centre - radius - 1), 0), size)
        last = min(max(math.ceil(centre + radius + 1), first), size)
        spans.append(slice(first, last))
        distances.append(np.arange(first + 0.5 - centre, last - centre, dtype=np.float32))
    return (spans[0], spans[1]), distances[1], distances[0]


def _texture(look: Look, u: np.ndarray, v: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Share of the second paint at each pixel, `(h, w)` in 0..1, with edges about a pixel wide."""
    period = max(2 * radius / look.periods, MIN_PERIOD_PX * size / BASE_SIZE) / radius
    cos, sin = math.cos(look.texture_angle) / period, math.sin(look.texture_angle) / period
    edge = np.float32(radius * period)  # pixels in a period
    a = _triangle(np.float32(cos) * u + np.float32(sin) * v + np.float32(look.shift[0]))
    if look.kind.texture == "striped":
        return np.clip(np.float32(0.5) + edge * (a - np.float32(0.28)), 0, 1)
    b = _triangle(np.float32(cos) * v - np.float32(sin) * u + np.float32(look.shift[1]))
    if look.kind.texture == "dotted":
        return np.clip(np.float32(0.5) + edge * (np.float32(DOT_RADIUS) - np.sqrt(a * a + b * b)), 0, 1)
    a, b = edge * (a - np.float32(0.25)), edge * (b - np.float32(0.25))
    return np.clip(np.float32(0.5) + np.sign(a * b) * np.minimum(np.abs(a), np.abs(b)), 0, 1)


def _triangle(x: np.ndarray) -> np.ndarray:
    """Distance to the next whole number, 0 to 0.5."""
    return np.abs(x - np.rint(x))


# Distance functions: float32 `(h, w)` u and v -> signed distance to the outline in radii, negative inside. Some are
# only bounds of it away from the outline; near it all are exact but at corners.
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(u: np.ndarray, v: np.ndarray, x: float = 0, y: float = 0, radius: float = 1) -> np.ndarray:
    return np.sqrt((u - np.float32(x)) ** 2 + (v - np.float32(y)) ** 2) - np.float32(radius)


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height))


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _box(u, v, 0.7, 0.7)


def _triangle_shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Equal sides, its point up."""
    slanted = np.float32(math.sqrt(0.75)) * np.abs(u) - np.float32(0.5) * v
    return np.maximum(slanted, v) - np.float32(0.5)


def _fold(u: np.ndarray, v: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
    """The plane folded into half of one of `times` equal sectors, whose middle lies along the first axis."""
    sector = np.float32(2 * math.pi / times)
    angle = np.arctan2(u, -v)
    angle -= sector * np.rint(angle / sector)
    radius = np.sqrt(u * u + v * v)
    return radius * np.cos(angle), radius * np.sin(np.abs(angle))


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = _fold(u, v, 5)
    # The edge runs from the outer corner (1, 0) to the inner one.
    inner = 0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5)
    length = math.hypot(inner[1], 1 - inner[0])
    return np.float32(inner[1] / length) * (a - 1) + np.float32((1 - inner[0]) / length) * b


def _flower(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = _fold(u, v, 5)
    return np.minimum(_circle(a, b, 0.62, 0, 0.38), _circle(a, b, 0, 0, 0.55))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A square on its corner, with a half circle on each of its upper sides."""
    half, slant = 0.5, math.sqrt(0.5)
    lower = v - np.float32(0.25)
    a, b = np.float32(slant) * (np.abs(u) - lower), np.float32(slant) * (np.abs(u) + lower)
    return np.minimum(_box(a, b, half, half), _circle(a, b, half, 0, half))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(_circle(u, v, 0, 0, 0.74)) - np.float32(0.26)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_circle(u, v), -_circle(u, v, 0.5, 0, 0.8))


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Points up: a head with equal sides on a shaft."""
    head = _triangle_shape(u / np.float32(0.72), (v + np.float32(0.28)) / np.float32(0.72)) * np.float32(0.72)
    return np.minimum(head, _box(u, v - np.float32(0.3), 0.23, 0.66))


def _oval(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    ratio = 0.55
    a, b = u, v / np.float32(ratio)
    length = np.sqrt(a * a + b * b) + np.float32(1e-6)
    slope = np.sqrt(a * a + (b / np.float32(ratio)) ** 2) + np.float32(1e-6)
    return length * (length - 1) / slope


def _drop(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A circle and the two tangents to it from a point above."""
    centre, radius = 0.4, 0.6
    slope = radius / (1 + centre)  # sine of half the angle at the point
    tangents = np.float32(math.sqrt(1 - slope * slope)) * np.abs(u) - np.float32(slope) * (v + 1)
    end = v - np.float32(centre - radius * slope)  # where the tangents touch
    return np.minimum(_circle(u, v, 0, centre, radius), np.maximum(tangents, end))


SHAPES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle_shape,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "arrow": _arrow,
    "oval": _oval,
    "flower": _flower,
    "drop": _drop,
}
# How many turns bring a shape back onto itself; 0: all.
SYMMETRY = {
    "circle": 0,
    "ring": 0,
    "oval": 2,
    "triangle": 3,
    "square": 4,
    "cross": 4,
    "star": 5,
    "flower": 5,
    **dict.fromkeys(("heart", "crescent", "arrow", "drop"), 1),
}
AXIS = {"crescent": math.pi / 2}  # of mirror symmetry, radians clockwise from upwards, where it is not upright


@cache
def fill(shape: str) -> float:
    """Area of `shape`, as a share of the square around the unit circle."""
    steps = (np.arange(256, dtype=np.float32) - 127.5) / 128
    u, v = np.meshgrid(steps, steps)
    return float((SHAPES[shape](u, v) <= 0).mean())
