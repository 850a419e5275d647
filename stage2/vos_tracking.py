"""How a video is tracked to be scored: each object is prompted once, by its truth, and followed to the end.

The prompt comes where the object is first seen in an annotated frame; all frames after it are tracked, also those
without annotations (DAVIS calls this semi-supervised). Source: Pont-Tuset et al., The 2017 DAVIS Challenge on Video
Object Segmentation, 2017; Ravi et al., SAM 2, 2024.

Letters: B objects, H W rows and columns of the video.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor

from sam3.engine.vos_folders import AnnotatedVideo
from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.video_session import FrameMasks, VideoSession
from sam3.video_frames import VideoFrames, open_video

PROMPTS = ("mask", "box", "click")
UNTIMED_FRAMES = 2  # the prompted one, and the first that reads a memory, which warms the device up


@dataclass
class TrackedVideo:
    """What came out of one video.

    size: (H, W). first_seen: object -> number of the frame with its prompt; objects that are never seen are not in it.
    num_timed, seconds: frames that were timed, and how long they took together.
    """

    size: tuple[int, int]
    first_seen: dict[int, int]
    num_timed: int = 0
    seconds: float = 0.0
    _packed: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)  # one bit a pixel

    def keep(self, number: int, objects: list[int], masks: np.ndarray) -> None:
        """Masks bool (B, H, W) of a frame."""
        for row, packed in zip(objects, np.packbits(masks.reshape(len(masks), -1), axis=1), strict=True):
            self._packed[number, row] = packed

    def mask(self, number: int, row: int) -> np.ndarray:
        """Bool (H, W) of an object in an annotated frame; all False where it was not tracked."""
        packed = self._packed.get((number, row))
        if packed is None:
            return np.zeros(self.size, dtype=bool)
        height, width = self.size
        return np.unpackbits(packed, count=height * width).view(bool).reshape(height, width)


def check_video(video: AnnotatedVideo) -> None:
    """Raises ValueError or FileNotFoundError for a video that cannot be scored: frames or annotations are missing."""
    numbers, _ = video.frames.numbers, video.annotated
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    if missing:
        raise ValueError(
            f"{video.frames.folder} lacks {len(missing)} frames between {numbers[0]} and {numbers[-1]}, such as "
            f"{missing[0]}; all frames are tracked, so extract or fetch them"
        )


def find_prompts(video: AnnotatedVideo) -> dict[int, int]:
    """Object -> the first annotated frame in which it is to be seen; objects that never are have no entry."""
    found = {}
    for row in range(video.num_objects):
        seen = (number for number in video.numbers_of(row) if video.mask(number, row).any())
        if (number := next(seen, None)) is not None:
            found[row] = number
    return found


def split_overlapping(video: AnnotatedVideo, prompts: Mapping[int, int]) -> list[list[int]]:
    """The objects in groups of which no two overlap in a frame where both are prompted; mostly there is one.

    A session gives each pixel of a prompted frame to one object, while SA-V has objects that are part of others.
    """
    groups: list[list[int]] = []
    for row, number in prompts.items():
        mask = video.mask(number, row)
        for group in groups:
            rivals = (other for other in group if prompts[other] == number)
            if not any((mask & video.mask(number, other)).any() for other in rivals):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def track_video(
    predictor: Sam3VideoPredictor, video: AnnotatedVideo, kind: str, exclusive: bool
) -> Generator[int, None, TrackedVideo]:
    """Yields the index of each frame once all objects are tracked in it; returns what was found.

    Args:
        kind: of the prompts, one of PROMPTS.
        exclusive: leave each pixel to the object with the highest logit, as DAVIS wants it.

    Raises ValueError or FileNotFoundError for frames and masks that are damaged, or not of one size.
    """
    prompts = find_prompts(video)
    annotated, first = set(video.annotated), video.frames.numbers[0]
    with open_video(video.frames.folder) as frames, ExitStack() as stack:
        result = TrackedVideo(_shared_size(video, frames), prompts)
        sessions: list[VideoSession] = []
        streams: list[tuple[int, Iterator[FrameMasks]]] = []  # with the index of their first frame
        for group in split_overlapping(video, prompts):
            session = stack.enter_context(predictor.start_session(frames))
            session.features = sessions[0].features if sessions else session.features  # each frame is encoded once
            sessions.append(session)
            places = {row: prompts[row] - first for row in group}
            stream = stack.enter_context(closing(follow(predictor, session, video, places, kind)))
            streams.append((min(places.values()), stream))
        order = range(min((start for start, _ in streams), default=len(frames)), len(frames))
        began = 0.0
        for done, index in enumerate(order):
            if done == UNTIMED_FRAMES:
                began = time.perf_counter()
            for start, stream in streams:
                if start <= index:
                    _keep(result, next(stream), first + index, annotated, exclusive)
            yield index
        if len(order) > UNTIMED_FRAMES:
            result.num_timed, result.seconds = len(order) - UNTIMED_FRAMES, time.perf_counter() - began
    return result


def _keep(result: TrackedVideo, found: FrameMasks, number: int, annotated: set[int], exclusive: bool) -> None:
    """What is needed of a frame; waits until the device has computed it."""
    if number in annotated:
        result.keep(number, found.obj_ids, binary_masks(found.video_masks, exclusive))
    else:
        found.object_logits.cpu()


def _shared_size(video: AnnotatedVideo, frames: VideoFrames) -> tuple[int, int]:
    """(H, W) of frames and masks; ValueError if they differ."""
    if (frames.height, frames.width) != video.size:
        raise ValueError(
            f"the frames of {video.name} have {(frames.height, frames.width)} rows and columns, its masks "
            f"{video.size}; fetch both from one place"
        )
    return video.size


def follow(
    predictor: Sam3VideoPredictor, session: VideoSession, video: AnnotatedVideo, places: Mapping[int, int], kind: str
) -> Iterator[FrameMasks]:
    """The masks of some objects, from the first prompted frame to the last of the video.

    places: object -> index of the frame with its prompt, which is given when tracking gets there.
    """

    def prompt(index: int) -> None:
        for row, place in places.items():
            if place == index:
                mask = video.mask(video.frames.numbers[index], row)
                add_prompt(predictor, session, index, row, mask, kind)

    start = min(places.values())
    prompt(start)
    for found in predictor.propagate_in_video(session, start):
        yield found
        prompt(found.frame_idx + 1)


def add_prompt(
    predictor: Sam3VideoPredictor, session: VideoSession, index: int, row: int, mask: np.ndarray, kind: str
) -> None:
    """Shows an object by its mask, bool (H, W), by the box around it, or by a click in its middle."""
    if kind == "mask":
        predictor.add_new_mask(session, index, row, mask)
    elif kind == "box":
        predictor.add_new_points_or_box(session, index, row, box=box_around(mask), rel_coordinates=False)
    else:
        points, labels = [middle_of(mask)], [1]
        predictor.add_new_points_or_box(session, index, row, points, labels, rel_coordinates=False)


def box_around(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a mask (H, W) in pixels; its outermost pixels lie inside."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def middle_of(mask: np.ndarray) -> tuple[float, float]:
    """x, y of the centre of the pixel that lies deepest inside a mask (H, W); beyond the picture nothing is inside."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return float(column) + 0.5, float(row) + 0.5


def binary_masks(logits: Tensor, exclusive: bool) -> np.ndarray:
    """Logits (B, 1, H, W) -> bool (B, H, W) on the CPU."""
    logits = logits[:, 0]
    masks = logits > 0
    if exclusive:
        masks &= logits.argmax(dim=0) == torch.arange(len(logits), device=logits.device)[:, None, None]
    return masks.cpu().numpy()
