"""Tracks objects through a video from points, boxes and masks: the interface that SAM3's users know.

Each object has a memory of its own, so that objects may be added and removed at any time; those that read the same
frames go through the model together. The released predictor has one memory for all of a session's objects, and lets
none be added once tracking has begun. Two more differences follow: an object that was not prompted in a conditioning
frame of another one remembers nothing of that frame (there, that it was absent), and memory selection scores each
object by itself.

Letters: B objects, P points of an object, G side of the feature map, H W rows and columns of the video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam3.model.sam3_video import Sam3VideoModel
from sam3.model.video_prompts import BOX_LABELS, check_box, check_mask, check_points, input_coords
from sam3.model.video_service import VideoService
from sam3.model.video_session import FrameMasks, LogitFile, VideoSession
from sam3.model.video_tracking import VideoTracking
from sam3.video_frames import VideoFrames, open_video

DIRECTIONS = ("forward", "backward", "both")

Points = Sequence | np.ndarray | Tensor


class Sam3VideoPredictor:
    """Keeps a model; what belongs to a video lives in the `VideoSession` that its methods take.

    The same is to be had by requests, `handle_request` and `handle_stream_request`, with sessions known by name.
    """

    def __init__(
        self,
        model: Sam3VideoModel,
        autocast_dtype: torch.dtype | None = None,
        memory_selection: bool = False,
        fill_hole_area: int = 0,
        keep_logits: bool = True,
    ):
        """
        Args:
            model: put into eval mode; its `preprocess` says how frames are resized.
            autocast_dtype: e.g. `torch.bfloat16`: run the model's matrix products in it; left out, an autocast that
                the caller has switched on stays in force.
            memory_selection: remember the best of the recent frames instead of the last ones (waits for the device
                once per object and frame).
            fill_hole_area: fill holes and remove specks of at most so many cells of the low masks.
            keep_logits: keep the results of tracked frames in a temporary file (2 (4G)^2 bytes per object and frame,
                166 kB at full size). Without it a click on a frame that was tracked earlier does not start from the
                mask there, and tracking again tracks every object again.
        """
        self.tracking = VideoTracking(model, autocast_dtype, memory_selection, fill_hole_area)
        self.model = model
        self.keep_logits = keep_logits
        self._service = VideoService(self)

    # Sessions ---------------------------------------------------------------------------------------------------------

    def start_session(self, video: str | Path | Image.Image | Sequence[Image.Image] | VideoFrames) -> VideoSession:
        """Opens a video: a folder of `<number>.jpg`, a video file, a picture file, or Pillow pictures.

        One that is open already is closed with the session. Raises FileNotFoundError, ValueError or OSError where there
        is no video; see `sam3.video_frames.open_video`.
        """
        frames = video if isinstance(video, VideoFrames) else open_video(video)
        return VideoSession(frames, LogitFile(self.model.tracker.low_side) if self.keep_logits else None)

    init_state = start_session

    def reset_session(self, session: VideoSession) -> None:
        """Forgets all objects; the video stays open."""
        session.check()
        for obj_id in session.obj_ids:
            session.drop_object(obj_id)
        session.changed.clear()

    def close_session(self, session: VideoSession) -> None:
        """Frees all that the session holds; twice is fine."""
        session.close()

    # Prompts ----------------------------------------------------------------------------------------------------------

    def add_new_points_or_box(
        self,
        session: VideoSession,
        frame_idx: int,
        obj_id: int,
        points: Points | None = None,
        labels: Points | None = None,
        clear_old_points: bool = True,
        rel_coordinates: bool = True,
        box: Points | None = None,
    ) -> FrameMasks:
        """Says where an object is in a frame; a new `obj_id` makes a new object.

        If the object has a mask in this frame already, from a prompt or from tracking, the model goes on from it.

        Args:
            points: (P, 2) x, y; labels: (P,) 1 on the object, 0 beside it.
            clear_old_points: False adds the points to those given for this object and frame before.
            rel_coordinates: points and box are in 0..1 of the picture, else in its pixels.
            box: (4,) left, top, right, bottom; it replaces what was given before. Points may come with it.

        Returns:
            The masks of all objects in this frame.

        Raises ValueError: no such frame, nothing given, or a prompt that does not fit the video.
        """
        session.check(frame_idx)
        coords, marks = self._read_prompt(session, points, labels, rel_coordinates, box)
        if box is not None and not clear_old_points:
            raise ValueError("a box replaces what was given before; pass it with clear_old_points=True")
        _check_obj_id(obj_id)
        known = session.objects.get(obj_id)
        if not clear_old_points and known is not None and frame_idx in known.prompted:
            old = known.prompted[frame_idx]
            coords, marks = torch.cat((old.points, coords)), torch.cat((old.labels, marks))
        self.tracking.prompt_points(session, frame_idx, obj_id, coords, marks)
        return self.tracking.frame_masks(session, frame_idx)

    add_new_points = add_new_points_or_box

    def add_new_mask(self, session: VideoSession, frame_idx: int, obj_id: int, mask: np.ndarray | Tensor) -> FrameMasks:
        """Gives an object's mask in a frame, (H, W), where values above one half are the object.

        Its pixels are taken away from the other objects that were prompted in this frame. Returns and raises as
        `add_new_points_or_box`.
        """
        session.check(frame_idx)
        _check_obj_id(obj_id)
        self.tracking.prompt_mask(session, frame_idx, obj_id, check_mask(mask, session.size))
        return self.tracking.frame_masks(session, frame_idx)

    def clear_all_points_in_frame(self, session: VideoSession, frame_idx: int, obj_id: int) -> FrameMasks:
        """Takes back what was said of an object in a frame, which then counts as a tracked one.

        An object without any prompt left is not tracked until it gets one.
        """
        session.check(frame_idx, obj_id)
        if frame_idx not in session.objects[obj_id].prompted:
            raise ValueError(f"object {obj_id} has no prompt in frame {frame_idx}; nothing was changed")
        session.drop_prompt(obj_id, frame_idx)
        return self.tracking.frame_masks(session, frame_idx)

    def clear_all_points_in_video(self, session: VideoSession) -> None:
        """Takes back all prompts and all that was tracked; the objects stay, in their order."""
        obj_ids = session.obj_ids
        self.reset_session(session)
        session.objects.update((obj_id, self.tracking.new_object()) for obj_id in obj_ids)

    def remove_object(self, session: VideoSession, obj_id: int) -> list[int]:
        """Forgets an object, also in the middle of tracking; returns the ids of those that are left."""
        session.check(obj_id=obj_id)
        session.drop_object(obj_id)
        return session.obj_ids

    # Tracking ---------------------------------------------------------------------------------------------------------

    def propagate_in_video_preflight(self, session: VideoSession) -> None:
        """Puts new prompts into the objects' memory; `propagate_in_video` does this by itself."""
        session.check()
        self.tracking.remember_prompts(session)

    def propagate_in_video(
        self,
        session: VideoSession,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        direction: str = "forward",
    ) -> Iterator[FrameMasks]:
        """Tracks all objects, and yields each frame's masks as they come.

        Prompted frames keep the masks of their prompts. What was tracked in this direction before is not tracked again
        for objects whose prompts have not changed since. Prompts may be given, and objects removed, between two frames.

        Args:
            start_frame_idx: left out, the first prompted frame.
            max_frame_num_to_track: frames after the first one, in each direction; left out, all.
            direction: `forward`, `backward`, or `both`: forward first, then backward from the frame before the start.

        Raises ValueError: no prompt yet, no such frame or direction, or a closed session.
        """
        session.check(start_frame_idx)
        prompted = [frame for target in session.objects.values() for frame in target.prompted]
        if not prompted:
            raise ValueError("nothing to track: give points, a box or a mask first (add_new_points_or_box)")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction {direction!r} is unknown; choose one of {', '.join(DIRECTIONS)}")
        if max_frame_num_to_track is not None and max_frame_num_to_track < 0:
            raise ValueError(f"max_frame_num_to_track (={max_frame_num_to_track}) must not be negative")
        start = min(prompted) if start_frame_idx is None else start_frame_idx
        reach = session.num_frames if max_frame_num_to_track is None else max_frame_num_to_track
        first, last = max(start - reach, 0), min(start + reach, session.num_frames - 1)
        return self._propagate(session, start, first, last, direction)

    def handle_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answers one request, `{"type": ..., ...}`; see `VideoService.handle_request`."""
        return self._service.handle_request(request)

    def handle_stream_request(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Answers `{"type": "propagate_in_video", ...}` frame by frame; see `VideoService.handle_stream_request`."""
        return self._service.handle_stream_request(request)

    def _propagate(
        self, session: VideoSession, start: int, first: int, last: int, direction: str
    ) -> Iterator[FrameMasks]:
        passes = []
        if direction != "backward":
            passes.append((False, range(start, last + 1)))
        if direction != "forward":
            passes.append((True, range(start - (direction == "both"), first - 1, -1)))
        for reverse, order in passes:
            with closing(session.frames.read_ahead(order)) as pictures:
                for t, picture in pictures:
                    session.check()
                    yield self.tracking.track(session, t, reverse, picture)

    def _read_prompt(
        self, session: VideoSession, points: Points | None, labels: Points | None, relative: bool, box: Points | None
    ) -> tuple[Tensor, Tensor]:
        """Points in pixels of the model's input (P, 2) and labels (P,), the box's corners first."""
        if (points is None) != (labels is None):
            raise ValueError("points and labels belong together; give both, or neither")
        if points is None and box is None:
            raise ValueError("no prompt: give points with labels, or a box")
        coords, marks = [], []
        if box is not None:
            coords.append(check_box(box, session.size, relative))
            marks.append(torch.tensor(BOX_LABELS))
        if points is not None:
            pixels, signs = check_points(points, labels, session.size, relative)
            coords.append(pixels)
            marks.append(signs)
        return input_coords(torch.cat(coords), self.model.preprocess, session.size), torch.cat(marks)


def _check_obj_id(obj_id: int) -> None:
    if not isinstance(obj_id, (int, np.integer)) or isinstance(obj_id, bool):
        raise ValueError(f"an object's id is a whole number, got {obj_id!r}")
