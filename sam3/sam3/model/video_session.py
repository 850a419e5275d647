"""What is known of one video while objects are tracked in it: prompts, memory, and the last results.

Letters: B objects, P points of an object, C channels, G side of the feature map, S side of the model's square, H W rows
and columns of the video. Mask logits "low" have the side 4 G.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam3.model.memory_bank import MemoryBank
from sam3.model.memory_plan import MemoryPlan
from sam3.model.tracker import FrameFeatures, ObjectMasks
from sam3.video_frames import VideoFrames


class FrameMasks(NamedTuple):
    """The objects in one frame, in the order in which they were added.

    low_masks: (B, 1, 4G, 4G) logits over the model's square. video_masks: (B, 1, H, W) logits, above 0 = object.
    object_logits: (B, 1), above 0 where the object is visible. An object of which nothing is known in this frame has
    masks of NO_OBJECT_LOGIT.
    """

    frame_idx: int
    obj_ids: list[int]
    low_masks: Tensor
    video_masks: Tensor
    object_logits: Tensor


@dataclass
class ObjectResult:
    """One object in one frame: low (1, 1, 4G, 4G) and object_logits (1, 1)."""

    low: Tensor
    object_logits: Tensor


@dataclass
class PromptedFrame:
    """One object in a frame where it was prompted.

    points: (P, 2) x, y in pixels of the S x S input, corners of a box first; labels: (P,) 1, 0, or 2 and 3 for corners.
    Both are empty for a mask. heads: what the model says of it, B = 1. mask: bool (H, W), the given one.
    """

    points: Tensor
    labels: Tensor
    heads: ObjectMasks
    mask: Tensor | None = None


@dataclass
class VideoObject:
    """One object: `prompted` by frame, and its memory.

    tracked: frames whose result is stored and still holds, with True where they were tracked backwards.
    """

    bank: MemoryBank
    prompted: dict[int, PromptedFrame] = field(default_factory=dict)
    tracked: dict[int, bool] = field(default_factory=dict)

    def note_tracked(self, frame: int, reverse: bool) -> None:
        """The result of a frame is stored; that of the one after it was made from another memory, and no longer holds.

        So tracking that comes upon frames which were tracked from elsewhere goes on through them.
        """
        self.tracked[frame] = reverse
        step = -1 if reverse else 1
        following = frame + step
        while following in self.prompted:
            following += step
        self.tracked.pop(following, None)

    def plan(self, t: int, num_frames: int, reverse: bool) -> MemoryPlan:
        """What to read at frame `t`, of what there is.

        Where tracking starts at a frame of the user's choice, the bank may have dropped the maps before it and kept
        their pointers.
        """
        plan = self.bank.plan(t, num_frames, reverse)
        records = self.bank.records
        return replace(plan, spatial=tuple(entry for entry in plan.spatial if records[entry[0]].tokens is not None))


class LogitFile:
    """Results of tracked frames as float16 in a temporary file, which is gone with the process.

    A click on a tracked frame starts from its earlier mask, and a long video has more of those than memory should hold.
    """

    def __init__(self, side: int):
        self._side = side
        self._file = tempfile.TemporaryFile(prefix="sam3_video_")  # noqa: SIM115 - open as long as the session
        self._slots: dict[tuple[int, int], int] = {}  # (object, frame) -> place in the file
        self._free: list[int] = []

    def write(self, obj_ids: Sequence[int], frame: int, low: Tensor, object_logits: Tensor) -> None:
        """Stores (B, 1, 4G, 4G) and (B, 1) of a frame, in the place of earlier ones."""
        rows = torch.cat((low.flatten(1), object_logits), dim=1).to("cpu", torch.float16).numpy()
        for obj_id, row in zip(obj_ids, rows, strict=True):
            slot = self._slots.get((obj_id, frame))
            if slot is None:
                slot = self._free.pop() if self._free else len(self._slots)
                self._slots[obj_id, frame] = slot
            self._file.seek(slot * row.nbytes)
            self._file.write(row.tobytes())

    def read(self, obj_id: int, frame: int, device: torch.device) -> ObjectResult | None:
        """What was stored, None if nothing was."""
        slot = self._slots.get((obj_id, frame))
        if slot is None:
            return None
        count = self._side**2 + 1
        self._file.seek(slot * count * 2)
        row = torch.from_numpy(np.frombuffer(self._file.read(count * 2), dtype=np.float16).copy())
        row = row.to(device).float()
        return ObjectResult(row[:-1].view(1, 1, self._side, self._side), row[-1:].view(1, 1))

    def forget(self, obj_id: int) -> None:
        """Frees the places of an object."""
        keys = [key for key in self._slots if key[0] == obj_id]
        self._free += [self._slots.pop(key) for key in keys]

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._slots.clear()


class VideoSession:
    """One video with its objects, made and changed by `Sam3VideoPredictor`.

    Holds one result of each object, not the masks of all frames. Call `close`, or use it in a `with` statement.

    changed: frames whose prompts are not in the objects' memory yet. features: of the last frames, on the device.
    logits: None if results of tracked frames are not to be kept.
    """

    def __init__(self, frames: VideoFrames, logits: LogitFile | None):
        self.frames = frames
        self.objects: dict[int, VideoObject] = {}
        self.changed: set[int] = set()
        self.features: OrderedDict[int, FrameFeatures] = OrderedDict()
        self.logits = logits
        self.latest: dict[int, tuple[int, ObjectResult]] = {}  # object -> frame last tracked, and what came out
        self.closed = False

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.frames.height, self.frames.width

    @property
    def obj_ids(self) -> list[int]:
        """In the order in which they were added."""
        return list(self.objects)

    def result(self, obj_id: int, frame: int, device: torch.device) -> ObjectResult | None:
        """What is known of an object in a frame: from a prompt, or else from tracking; None if nothing is."""
        if frame in self.objects[obj_id].prompted:
            heads = self.objects[obj_id].prompted[frame].heads
            return ObjectResult(heads.low, heads.object_logits)
        latest_frame, result = self.latest.get(obj_id, (None, None))
        if latest_frame == frame:
            return result
        return None if self.logits is None else self.logits.read(obj_id, frame, device)

    def keep_tracked(
        self, obj_ids: Sequence[int], frame: int, reverse: bool, low: Tensor, object_logits: Tensor
    ) -> None:
        """Takes results (B, 1, 4G, 4G) and (B, 1) of a tracked frame."""
        for i, obj_id in enumerate(obj_ids):
            self.latest[obj_id] = frame, ObjectResult(low[i : i + 1], object_logits[i : i + 1])
        if self.logits is not None:
            self.logits.write(obj_ids, frame, low, object_logits)
            for obj_id in obj_ids:
                self.objects[obj_id].note_tracked(frame, reverse)

    def set_prompt(self, obj_id: int, frame: int, prompted: PromptedFrame) -> None:
        """Makes `frame` a conditioning frame of a known object.

        What was tracked no longer holds, also of others that were prompted there: they share the frame's pixels.
        """
        self.objects[obj_id].prompted[frame] = prompted
        for target in self.objects.values():
            if frame in target.prompted:
                target.tracked.clear()
        self.changed.add(frame)

    def drop_prompt(self, obj_id: int, frame: int) -> None:
        """Turns a conditioning frame into one that was tracked; an object without prompts is known nowhere."""
        target = self.objects[obj_id]
        prompted = target.prompted.pop(frame)
        if not target.prompted:
            self._forget_results(obj_id)
            self.objects[obj_id] = VideoObject(MemoryBank(target.bank.settings, target.bank.selection))
            return
        if frame in target.bank.cond:
            target.bank.add(frame, target.bank.cond[frame], cond=False)
            self.keep_tracked([obj_id], frame, False, prompted.heads.low, prompted.heads.object_logits)
        target.tracked.clear()

    def drop_object(self, obj_id: int) -> None:
        """Forgets an object."""
        del self.objects[obj_id]
        self._forget_results(obj_id)

    def _forget_results(self, obj_id: int) -> None:
        self.latest.pop(obj_id, None)
        if self.logits is not None:
            self.logits.forget(obj_id)

    def check(self, frame: int | None = None, obj_id: int | None = None) -> None:
        """Raises ValueError if the session is closed, or there is no such frame or object."""
        if self.closed:
            raise ValueError("this session is closed; start another one with start_session")
        if frame is not None and not 0 <= frame < self.num_frames:
            raise ValueError(f"frame {frame} does not exist; {self.frames.title} has frames 0 to {self.num_frames - 1}")
        if obj_id is not None and obj_id not in self.objects:
            known = ", ".join(map(str, self.objects)) or "none yet"
            raise ValueError(f"there is no object {obj_id} in this session; known: {known}")

    def close(self) -> None:
        """Frees the frames, the memory and the temporary file; twice is fine."""
        self.closed = True
        self.frames.close()
        self.objects.clear()
        self.features.clear()
        self.latest.clear()
        if self.logits is not None:
            self.logits.close()

    def __enter__(self) -> VideoSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
