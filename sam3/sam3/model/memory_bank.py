"""What the tracker remembers of an object, for as long as a frame can still read it.

Letters: B objects that are tracked together, N spatial tokens of a frame, C channels, D memory channels.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from sam3.model.memory_plan import MemoryPlan, PlanSettings, plan_memory, recent_frames


@dataclass(frozen=True, eq=False)
class MemoryRecord:
    """One frame.

    tokens: (B, N, D) bfloat16 spatial memory, or None once no frame can read it. pointer: (B, C).
    object_logits: (B, 1), above 0 where the object is seen. score: 0..1, see `memory_score`, None if it was not asked
    for or the frame is a conditioning frame.
    """

    tokens: Tensor | None
    pointer: Tensor
    object_logits: Tensor
    score: float | None = None


def memory_score(object_logits: Tensor, ious: Tensor) -> float:
    """How far a frame is worth remembering, 0..1: mean certainty that the objects are seen, times mean predicted IoU.

    Args:
        object_logits: (B, 1); the certainty is `2 sigmoid(logit) - 1`, or 0 below a logit of 0.
        ious: (B,) predicted IoU of the chosen masks, 0..1.
    """
    certainty = (2 * object_logits.float().sigmoid() - 1).clamp(min=0)
    return (certainty.mean() * ious.float().mean()).item()


@dataclass
class MemoryBank:
    """Records by frame: `cond` of the frames with a prompt, in their order, and `others` of the tracked frames.

    A frame is in one of the two. With `selection`, plans read the best recent frames (those need scores) instead of the
    last ones.
    """

    settings: PlanSettings = field(default_factory=PlanSettings)
    selection: bool = False
    cond: dict[int, MemoryRecord] = field(default_factory=dict)
    others: dict[int, MemoryRecord] = field(default_factory=dict)

    @property
    def records(self) -> Mapping[int, MemoryRecord]:
        """All records by frame."""
        return ChainMap(self.cond, self.others)

    @property
    def num_tokens(self) -> int:
        """Spatial tokens that are kept, per object."""
        return sum(record.tokens.shape[1] for record in self.records.values() if record.tokens is not None)

    def add(self, frame: int, record: MemoryRecord, cond: bool) -> None:
        """Stores a frame as conditioning frame or not, in the place of what was known of it."""
        target, rest = (self.cond, self.others) if cond else (self.others, self.cond)
        rest.pop(frame, None)
        target[frame] = record

    def remove(self, frame: int) -> None:
        """Forgets a frame; one that is not known is no error."""
        self.cond.pop(frame, None)
        self.others.pop(frame, None)

    def plan(self, t: int, num_frames: int, reverse: bool = False) -> MemoryPlan:
        """What to read at frame `t`; `records` has it all."""
        return plan_memory(t, list(self.cond), self.others, num_frames, reverse, self._scores(), self.settings)

    def prune(self, t: int, num_frames: int) -> None:
        """Forgets what tracking cannot read any more, after frame `t` was added.

        Tracking goes on from `t` or starts again from a conditioning frame, forwards or backwards. So what is kept lies
        around those, and is bounded by the number of conditioning frames however long the video is: of each side of
        such a frame `num_maskmem - 1` maps and `max_obj_ptrs` pointers. Conditioning frames themselves all stay.
        """
        scores = self._scores()
        maps, pointers = {t}, {t}
        for anchor in (t, *self.cond):
            for reverse in (False, True):
                recent = recent_frames(anchor, num_frames, reverse, scores, self.settings)
                maps.update(recent[: self.settings.num_recent])
                pointers.update(recent)
        for frame in [frame for frame in self.others if frame not in pointers]:
            del self.others[frame]
        for frame, record in self.others.items():
            if record.tokens is not None and frame not in maps:
                self.others[frame] = replace(record, tokens=None)

    def _scores(self) -> dict[int, float] | None:
        if not self.selection:
            return None
        return {frame: record.score for frame, record in self.others.items() if record.score is not None}
