"""The video predictor by requests: dicts in, dicts of arrays out, sessions known by name.

Letters: n objects, H W rows and columns of the video.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sam3.model.video_prompts import TEXT_REFUSED
from sam3.model.video_session import FrameMasks, VideoSession

if TYPE_CHECKING:
    from sam3.model.sam3_video_predictor import Sam3VideoPredictor

# Request -> what it needs, and what it may have.
REQUESTS = {
    "start_session": ({"resource_path"}, {"session_id"}),
    "add_prompt": (
        {"session_id", "frame_index"},
        {"text", "obj_id", "points", "point_labels", "bounding_boxes", "bounding_box_labels", "mask"}
        | {"clear_old_points", "rel_coordinates"},
    ),
    "remove_object": ({"session_id", "obj_id"}, set()),
    "reset_session": ({"session_id"}, set()),
    "close_session": ({"session_id"}, set()),
}
STREAM_REQUESTS = {
    "propagate_in_video": ({"session_id"}, {"propagation_direction", "start_frame_index", "max_frame_num_to_track"}),
}


class VideoService:
    """Answers requests with a predictor, and keeps the sessions they name."""

    def __init__(self, predictor: Sam3VideoPredictor):
        self._predictor = predictor
        self._sessions: dict[str, VideoSession] = {}

    def handle_request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answers a request by its `type`:

        start_session: resource_path (anything that `open_video` takes), session_id (left out, a new one)
            -> session_id.
        add_prompt: session_id, frame_index, obj_id, and points with point_labels, or bounding_boxes (one, as left,
            top, width, height), or mask (H, W); clear_old_points, rel_coordinates (both True if left out; True takes
            coordinates in 0..1 of the picture, False in its pixels) -> frame_index, outputs.
        remove_object: session_id, obj_id; reset_session: session_id; close_session: session_id, no error if it is
            closed already -> is_success.

        outputs, as arrays: out_obj_ids int64 (n,), out_probs float32 (n,) that the object is visible, out_boxes_xywh
        float32 (n, 4) left, top, width, height in 0..1 of the picture (zeros for an empty mask), out_binary_masks bool
        (n, H, W); and frame_stats, a dict of counts.

        Raises ValueError: an unknown request, a field that is missing or unknown, no such session, or what the
        predictor refuses.
        """
        kind = _checked(request, REQUESTS)
        return getattr(self, f"_{kind}")(**{key: value for key, value in request.items() if key != "type"})

    def handle_stream_request(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Answers propagate_in_video: session_id, propagation_direction (both, forward or backward; both if left out),
        start_frame_index, max_frame_num_to_track; yields frame_index and outputs of each frame, as `handle_request`.
        """
        _checked(request, STREAM_REQUESTS)
        frames = self._predictor.propagate_in_video(
            self._session(request["session_id"]),
            request.get("start_frame_index"),
            request.get("max_frame_num_to_track"),
            request.get("propagation_direction", "both"),
        )
        return (_answer(frame) for frame in frames)

    def _start_session(self, resource_path: Any, session_id: str | None = None) -> dict[str, Any]:
        if session_id in self._sessions:
            raise ValueError(f"session '{session_id}' is open already; close it first, or take another name")
        session_id = session_id or str(uuid.uuid4())
        self._sessions[session_id] = self._predictor.start_session(resource_path)
        return {"session_id": session_id}

    def _add_prompt(
        self,
        session_id: str,
        frame_index: int,
        obj_id: int | None = None,
        text: str | None = None,
        points: Any = None,
        point_labels: Any = None,
        bounding_boxes: Any = None,
        bounding_box_labels: Any = None,
        mask: Any = None,
        clear_old_points: bool = True,
        rel_coordinates: bool = True,
    ) -> dict[str, Any]:
        session = self._session(session_id)
        if text is not None:
            raise ValueError(TEXT_REFUSED)
        if obj_id is None:
            raise ValueError("add_prompt needs obj_id, the number of the object that the prompt is about")
        if mask is not None:
            if points is not None or bounding_boxes is not None:
                raise ValueError("add_prompt takes a mask, or points and a box, not both")
            return _answer(self._predictor.add_new_mask(session, frame_index, obj_id, mask))
        box = None if bounding_boxes is None else _single_box(bounding_boxes, bounding_box_labels)
        masks = self._predictor.add_new_points_or_box(
            session, frame_index, obj_id, points, point_labels, clear_old_points, rel_coordinates, box
        )
        return _answer(masks)

    def _remove_object(self, session_id: str, obj_id: int) -> dict[str, Any]:
        self._predictor.remove_object(self._session(session_id), obj_id)
        return {"is_success": True}

    def _reset_session(self, session_id: str) -> dict[str, Any]:
        self._predictor.reset_session(self._session(session_id))
        return {"is_success": True}

    def _close_session(self, session_id: str) -> dict[str, Any]:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.close()
        return {"is_success": True}

    def _session(self, session_id: str) -> VideoSession:
        if session_id not in self._sessions:
            raise ValueError(f"there is no open session '{session_id}'; open one with a start_session request")
        return self._sessions[session_id]


def _checked(request: Mapping[str, Any], known: Mapping[str, tuple[set[str], set[str]]]) -> str:
    """The request's type; ValueError if it or its fields are not among the known ones."""
    kind = request.get("type")
    if kind not in known:
        raise ValueError(f"unknown request type {kind!r}; known: {', '.join(known)}")
    needed, optional = known[kind]
    fields = set(request) - {"type"}
    if not needed <= fields <= needed | optional:
        wrong = f"lacks {sorted(needed - fields)}" if needed - fields else f"has {sorted(fields - needed - optional)}"
        raise ValueError(f"a {kind} request {wrong}; it needs {sorted(needed)} and may have {sorted(optional)}")
    return kind


def _single_box(boxes: Any, labels: Any) -> Tensor:
    """The one box, left, top, width, height, as left, top, right, bottom."""
    given = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    signs = [1] if labels is None else torch.as_tensor(labels).flatten().tolist()
    if len(given) != 1 or signs != [1]:
        raise ValueError(
            f"add_prompt takes one box of the object, with the label 1, got {len(given)} boxes with labels {signs}; "
            "for what is not the object give points with the label 0"
        )
    return torch.cat((given[0, :2], given[0, :2] + given[0, 2:]))


def _answer(masks: FrameMasks) -> dict[str, Any]:
    binary = (masks.video_masks[:, 0] > 0).cpu()
    outputs = {
        "out_obj_ids": np.array(masks.obj_ids, dtype=np.int64),
        "out_probs": masks.object_logits[:, 0].float().sigmoid().cpu().numpy(),
        "out_boxes_xywh": _boxes(binary).numpy(),
        "out_binary_masks": binary.numpy(),
        "frame_stats": {"num_obj_tracked": len(masks.obj_ids)},
    }
    return {"frame_index": masks.frame_idx, "outputs": outputs}


def _boxes(masks: Tensor) -> Tensor:
    """bool (n, H, W) -> (n, 4) left, top, width, height in 0..1, zeros for an empty mask."""
    spans = []
    for axis in (1, 2):  # over rows: which columns are taken; over columns: which rows
        line = masks.any(dim=axis)  # (n, W), (n, H)
        length = line.shape[1]
        first, after = line.int().argmax(dim=1), length - line.flip(1).int().argmax(dim=1)  # the first of equals
        spans.append((first / length, torch.where(line.any(dim=1), after - first, 0) / length))
    (left, width), (top, height) = spans
    return torch.stack((left, top, width, height), dim=1).float()
