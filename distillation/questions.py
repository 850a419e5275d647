"""What is asked of models about annotated pictures, to measure them: phrases, example boxes, clicks.

Letters: `n` objects that are meant, `H W` rows and columns of the picture.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillation.supervised.scene_prompts import boxes_of, inner_point
from sam3.engine import sa1b
from sam3.transforms import read_image


@dataclass
class Question:
    """kind: text, box or click. wanted: the objects that are right, none for an absent phrase.

    text: a phrase, and whether it is among those that students were taught; box: left, top, right, bottom and
    point: x, y, in pixels.
    """

    kind: str
    wanted: list[int]
    text: str = ""
    taught: bool = False
    box: np.ndarray | None = None
    point: np.ndarray | None = None


@dataclass
class Task:
    """A picture, uint8 (3, H, W), what is asked of it, and the masks, bool (H, W), of the objects this is about."""

    image: Tensor
    questions: list[Question]
    masks: dict[int, Tensor]

    def truth(self, question: Question) -> Tensor:
        """bool (n, H, W)"""
        none = torch.zeros(0, *self.image.shape[1:], dtype=torch.bool)
        return torch.stack([self.masks[i] for i in question.wanted]) if question.wanted else none


def make_task(
    image: Path,
    annotations: Path,
    num_phrases: int,
    num_objects: int,
    rng: np.random.Generator,
    taught: Collection[str] = (),
) -> Task:
    """Up to `num_phrases` phrases that are true of something and as many that are not, and `num_objects` objects, each
    asked for by a box and by a click into its middle; all drawn by `rng`. Objects without a pixel are not asked for.

    Raises FileNotFoundError, or ValueError for a damaged file.
    """
    found = sa1b.read_annotations(annotations)
    seen = [i for i in range(len(found)) if found.runs(i)[1::2].any()]
    phrases = [(text, rows) for text, rows in sa1b.read_phrases(annotations) if set(rows) <= set(seen)]
    questions = []
    for present in (True, False):
        choices = [phrase for phrase in phrases if bool(phrase[1]) == present]
        chosen = [choices[i] for i in rng.permutation(len(choices))[:num_phrases]]
        questions += [Question("text", rows, text, text in taught) for text, rows in chosen]
    objects = [seen[i] for i in rng.permutation(len(seen))[:num_objects]]
    wanted = sorted({*objects, *(i for question in questions for i in question.wanted)})
    masks = {i: np.ascontiguousarray(sa1b.decode_runs(found.runs(i), found.height, found.width)) for i in wanted}
    questions += [Question("box", [i], box=boxes_of(masks[i][None])[0]) for i in objects]
    questions += [Question("click", [i], point=inner_point(masks[i], None) + 0.5) for i in objects]
    return Task(read_image(image), questions, {i: torch.from_numpy(mask) for i, mask in masks.items()})
