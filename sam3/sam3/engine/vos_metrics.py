"""How well objects are segmented through a video: J, F and J&F.

J and F are those of Perazzi et al., "A benchmark dataset and evaluation methodology for video object segmentation"
(CVPR 2016): J is the overlap of the regions, F the agreement of their boundaries. Which frames count, and how the
objects of several videos are averaged, follows DAVIS 2017 (Pont-Tuset et al., 2017) or SA-V (Ravi et al., "SAM 2",
2024).

Letters: `H W` rows and columns of a mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

BOUNDARY_TOLERANCE = 0.008  # of the picture's diagonal
RULES = ("sav", "davis")

# (frame number, object id) -> bool (H, W), or None where there is no mask
MaskOf = Callable[[int, int], np.ndarray | None]


def region_similarity(predicted: np.ndarray, truth: np.ndarray) -> float:
    """J, intersection over union of two bool (H, W) masks: 0..1; 1 where both are empty."""
    either = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / either if either else 1.0


def boundary_accuracy(predicted: np.ndarray, truth: np.ndarray, tolerance: int | None = None) -> float:
    """F, harmonic mean of precision and recall of the boundary of one bool (H, W) mask against another's: 0..1.

    A boundary pixel is right if the other boundary comes within `tolerance` pixels of it, measured between pixel
    centres; by default ceil(0.008 * diagonal). F is 1 where neither mask has a boundary, 0 where only one has.
    """
    if tolerance is None:
        tolerance = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*predicted.shape))
    first, second = boundary(predicted), boundary(truth)
    num_first, num_second = np.count_nonzero(first), np.count_nonzero(second)
    if not num_first or not num_second:
        return 1.0 if num_first == num_second else 0.0
    either = first | second
    part = tuple(_extent(either.any(axis)) for axis in (1, 0))  # distances between boundaries need nothing outside
    first, second = first[part], second[part]
    precision = np.count_nonzero(first & _near(second, tolerance)) / num_first
    recall = np.count_nonzero(second & _near(first, tolerance)) / num_second
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Bool (H, W): the pixels of a bool (H, W) mask, or beside it, unlike the one below, right, or below right.

    The picture's edge is no boundary.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[1:, :-1]) | (mask != padded[:-1, 1:]) | (mask != padded[1:, 1:])


def _extent(used: np.ndarray) -> slice:
    places = np.flatnonzero(used)
    return slice(places[0], places[-1] + 1)


def _near(pixels: np.ndarray, tolerance: int) -> np.ndarray:
    """Bool (H, W): within `tolerance` of one of the pixels that are set; the same as dilating them with a disk.

    Takes the same time for any tolerance, which a dilation does not.
    """
    distance = cv2.distanceTransform((~pixels).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance < tolerance + 1e-3  # distances are roots of whole numbers: none lies in between


@dataclass(frozen=True)
class ObjectScore:
    """Means of J and F (0..1) over the frames that count; NaN where none does."""

    j: float
    f: float
    num_frames: int

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2


@dataclass(frozen=True)
class VosSummary:
    """Means of J, F and J&F (0..1) over a data set. num_unscored: objects without a frame that counts, left out."""

    j: float
    f: float
    jf: float
    num_videos: int
    num_objects: int
    num_unscored: int


def evaluate_sequence(
    numbers: Sequence[int], objects: Sequence[int], predicted: MaskOf, truth: MaskOf
) -> dict[int, ObjectScore]:
    """Scores of the `objects` of one video, by the rule that SA-V and DAVIS 2017 (semi-supervised) share.

    Of each object count the frames with a true mask, without the first and the last of them. (DAVIS annotates all
    frames of all objects; SA-V every 4th.) An empty true mask counts: the object is absent there.

    Args:
        numbers: frames that may be annotated.
        predicted, truth: (number, object) -> bool (H, W), None where there is none. `predicted` is asked only for
            frames that count and must answer.

    Raises ValueError where a prediction is missing or has another size than the truth.
    """
    scores = {}
    for object_id in objects:
        masks = ((number, truth(number, object_id)) for number in sorted(numbers))
        annotated = ((number, mask) for number, mask in masks if mask is not None)
        next(annotated, None)  # the first holds the prompt
        values = [
            _frame_score(number, object_id, predicted(number, object_id), mask)
            for (number, mask), _ in itertools.pairwise(annotated)  # the last is never the former of two
        ]
        j, f = np.mean(values, axis=0).tolist() if values else (math.nan, math.nan)
        scores[object_id] = ObjectScore(j, f, len(values))
    return scores


def _frame_score(number: int, object_id: int, predicted: np.ndarray | None, truth: np.ndarray) -> tuple[float, float]:
    if predicted is None:
        raise ValueError(f"no predicted mask of object {object_id} in frame {number}; an absent object's mask is empty")
    if predicted.shape != truth.shape:
        raise ValueError(
            f"the predicted mask of object {object_id} in frame {number} has the shape {predicted.shape}, the true one "
            f"{truth.shape}; resize predictions to the original frame"
        )
    predicted, truth = predicted.astype(bool), truth.astype(bool)
    return region_similarity(predicted, truth), boundary_accuracy(predicted, truth)


def summarise(videos: Mapping[str, Mapping[int, ObjectScore]], rule: str) -> VosSummary:
    """Means over the objects of several videos, as `evaluate_sequence` scored them.

    rule: `sav` averages over the objects of a video, then over videos; `davis` over all objects alike.
    Raises ValueError for another rule, or if no object of any video has a frame that counts.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; choose one of {', '.join(RULES)}")
    scored = {
        name: [(score.j, score.f) for score in scores.values() if score.num_frames] for name, scores in videos.items()
    }
    scored = {name: values for name, values in scored.items() if values}
    if not scored:
        raise ValueError(
            f"no object in {len(videos)} videos has a frame to score; an object needs three annotated frames, as the "
            "first and the last do not count"
        )
    if rule == "sav":
        rows = [np.mean(values, axis=0) for values in scored.values()]
    else:
        rows = [np.array(value) for values in scored.values() for value in values]
    j, f = np.mean(rows, axis=0).tolist()
    num_objects = sum(map(len, scored.values()))
    return VosSummary(j, f, (j + f) / 2, len(scored), num_objects, sum(map(len, videos.values())) - num_objects)
