"""What is asked about a scene: phrases, exemplar boxes and points, alone and together, and which objects that means.

Boxes are xyxy in pixels, as objects' boxes; N objects of a scene.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import distance_transform_edt

from sam3.engine.scene_names import Kind, Name, is_shown, name_of
from sam3.engine.scenes import Scene
from sam3.model.sam3_image_processor import VISUAL_PROMPT

# How often a training prompt is of each kind, if nothing else is said; kinds without room give way to `box`.
TRAINING_MIX = {
    "text": 0.36,
    "absent": 0.18,
    "box": 0.22,
    "point": 0.08,
    "box_not": 0.06,
    "text_box": 0.06,
    "text_not": 0.04,
}
BOX_NOISE = 0.05  # standard deviation of an exemplar's corners, of its sides


@dataclass
class ScenePrompt:
    """kind: a key of TRAINING_MIX. wanted, doubtful: N bool, see `Targets`. boxes, points: objects that exemplars lie
    on, with their labels."""

    kind: str
    text: str
    wanted: np.ndarray
    doubtful: np.ndarray
    boxes: list[tuple[int, int]] = field(default_factory=list)  # (object, label)
    points: list[tuple[int, int]] = field(default_factory=list)


def choose_prompt(scene: Scene, rng: np.random.Generator, mix: Mapping[str, float] = TRAINING_MIX) -> ScenePrompt:
    """A prompt of a random kind for a scene with at least one object; mix: kind -> share, of any sum."""
    shares = np.array(list(mix.values()))
    kind = str(rng.choice(list(mix), p=shares / shares.sum()))
    return make_prompt(kind, scene, rng) or make_prompt("box", scene, rng)


def make_prompt(kind: str, scene: Scene, rng: np.random.Generator) -> ScenePrompt | None:
    """A prompt of this kind; None where the scene has no room for it.

    An exemplar stands for its whole kind: all objects of its shape, colour and texture are wanted. A negative one takes
    its kind out.
    """
    if kind in ("box", "point", "box_not"):
        shown = int(rng.integers(len(scene.objects)))
        wanted = same_kind(scene.objects, shown)
        prompt = ScenePrompt(kind, VISUAL_PROMPT, wanted, np.zeros_like(wanted))
        (prompt.points if kind == "point" else prompt.boxes).append((shown, 1))
        if kind == "box_not":
            others = np.flatnonzero(~wanted)
            if not len(others):
                return None
            prompt.boxes.append((int(rng.choice(others)), 0))
        return prompt
    phrases = [phrase for phrase in scene.phrases if bool(phrase.matches) != (kind == "absent")]
    if not phrases:
        return None
    phrase = phrases[int(rng.integers(len(phrases)))]
    wanted = np.zeros(len(scene.objects), bool)
    wanted[list(phrase.matches)] = True
    prompt = ScenePrompt(kind, phrase.text, wanted, doubtful(name_of(phrase.text), scene.objects))
    if kind == "text_box":
        prompt.boxes.append((int(rng.choice(phrase.matches)), 1))
    elif kind == "text_not":
        refused = int(rng.choice(phrase.matches))
        prompt.boxes.append((refused, 0))
        prompt.wanted = wanted & ~same_kind(scene.objects, refused)
        if not prompt.wanted.any():
            return None
    return prompt


def doubtful(name: Name, objects: Sequence[Kind]) -> np.ndarray:
    """N bool: objects that differ from `name` in their shape alone, and in whose paint training never shows that shape.

    Such as a red circle, asked for "square" where red squares are kept for val: to learn from it that it is no square
    would be to learn that no red thing is one.
    """

    def unseen(kind: Kind) -> bool:
        other = replace(kind, shape=name.shape)
        return kind.shape != name.shape and name.fits(other) and not is_shown(other, "train")

    return np.array([unseen(kind) for kind in objects], bool)


def same_kind(objects: Sequence[Kind], index: int) -> np.ndarray:
    """N bool: the objects of the kind of `index`, itself among them."""
    return np.array([other == objects[index] for other in objects])


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """bool (N, H, W), none empty -> the pixels' boxes, float32 (N, 4) xyxy, right and bottom behind the last pixel."""
    across, down = masks.any(1), masks.any(2)
    (height, width), ends = masks.shape[1:], (across, down)
    left, top = (side.argmax(1) for side in ends)
    right, bottom = width - across[:, ::-1].argmax(1), height - down[:, ::-1].argmax(1)
    return np.stack((left, top, right, bottom), axis=1).astype(np.float32)


def noisy_box(box: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A box as a hand would draw it: corners off by a part of the sides, still inside the picture."""
    sides = np.tile(box[2:] - box[:2], 2)
    noisy = np.clip(box + rng.normal(0, BOX_NOISE, 4) * sides, 0, size)
    return noisy.astype(np.float32) if (noisy[2:] - noisy[:2] >= 1).all() else box


def inner_point(mask: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """A pixel (x, y) of a mask: any of them, or, without `rng`, the one farthest from what is not the mask."""
    rows, columns = np.nonzero(mask)
    if rng is not None:
        at = int(rng.integers(len(rows)))
        return np.array((columns[at], rows[at]), np.float32)
    top, left = rows.min(), columns.min()
    cut = np.pad(mask[top : rows.max() + 1, left : columns.max() + 1], 1)  # the picture's border is a border too
    y, x = np.unravel_index(distance_transform_edt(cut).argmax(), cut.shape)
    return np.array((x - 1 + left, y - 1 + top), np.float32)
