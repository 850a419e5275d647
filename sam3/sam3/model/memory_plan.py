"""Which remembered frames the tracker reads at a frame: index arithmetic only, no tensors.

Frames with a prompt are the conditioning frames; what was tracked in between are the others. A frame gives spatial
tokens (its map) and a pointer (one vector of the object). Distances count along the direction of tracking.

Source: Ravi et al. 2024, SAM 2 (arXiv:2408.00714); the selection by score is SAM 3's, Carion et al. 2025
(arXiv:2511.16719).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest


@dataclass(frozen=True)
class PlanSettings:
    """Sizes of the memory; the defaults are those of the released model."""

    num_maskmem: int = (
        7  # temporal codes: the last is that of conditioning frames, the others count back from the newest
    )
    max_cond_frames: int = 4  # conditioning frames that are read
    max_obj_ptrs: int = 16  # pointers reach this many frames, the current one counted
    min_score: float = 0.01  # selection passes over frames that do not score higher

    @property
    def num_recent(self) -> int:
        """Other frames whose spatial tokens are read."""
        return self.num_maskmem - 1

    def pointer_span(self, num_frames: int) -> int:
        """Largest distance of a pointer."""
        return min(num_frames, self.max_obj_ptrs) - 1


@dataclass(frozen=True)
class MemoryPlan:
    """What to read, in this order.

    spatial: (frame, index of its temporal code), conditioning frames first, then the others from old to new.
    pointers: (frame, distance), conditioning frames first, then the others from new to old.
    span: by which the distances are divided, at least 1.
    """

    spatial: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]
    span: int


def plan_memory(
    t: int,
    cond_frames: Sequence[int],
    other_frames: Collection[int],
    num_frames: int,
    reverse: bool = False,
    scores: Mapping[int, float] | None = None,
    settings: PlanSettings = PlanSettings(),
) -> MemoryPlan:
    """Plans the reading at frame `t` of a video of `num_frames`.

    Args:
        cond_frames: conditioning frames in the order in which they were prompted.
        other_frames: tracked frames without a prompt.
        reverse: track towards frame 0.
        scores: of the other frames, from 0 to 1. When given, the best recent frames are read instead of the last ones,
            and their rank takes the place of their distance. Frames without a score are passed over.

    Returns:
        The plan. Conditioning frames give spatial tokens from both sides, but a pointer only if tracking has passed
        them.
    """
    selected = select_cond_frames(t, cond_frames, settings.max_cond_frames)
    available = set(other_frames) | (set(cond_frames) - set(selected))
    recent = recent_frames(t, num_frames, reverse, scores, settings)
    direction = -1 if reverse else 1

    spatial = [(frame, settings.num_maskmem - 1) for frame in selected]
    ranked = [(frame, rank) for rank, frame in enumerate(recent, start=1) if frame in available]
    spatial += [(frame, rank - 1) for frame, rank in reversed(ranked) if rank <= settings.num_recent]

    span = settings.pointer_span(num_frames)
    # The released model never reads the pointer of the oldest frame that it selected.
    last = span if scores is None else min(span, len(recent) - 1)
    distances = [(frame, (t - frame) * direction) for frame in selected]
    pointers = [(frame, distance) for frame, distance in distances if distance >= 0]
    pointers += [(frame, rank) for frame, rank in ranked if rank <= last]
    return MemoryPlan(tuple(spatial), tuple(pointers), max(span, 1))


def select_cond_frames(t: int, cond_frames: Sequence[int], limit: int) -> list[int]:
    """At most `limit` conditioning frames: all in their order if they are no more than that.

    Else the closest before `t`, the closest at or after `t`, then the closest of the rest.
    """
    if len(cond_frames) <= limit:
        return list(cond_frames)
    before = max((frame for frame in cond_frames if frame < t), default=None)
    after = min((frame for frame in cond_frames if frame >= t), default=None)
    selected = [frame for frame in (before, after) if frame is not None]
    rest = [frame for frame in cond_frames if frame not in selected]
    return (selected + nsmallest(limit - len(selected), rest, key=lambda frame: abs(frame - t)))[:limit]


def recent_frames(
    t: int,
    num_frames: int,
    reverse: bool = False,
    scores: Mapping[int, float] | None = None,
    settings: PlanSettings = PlanSettings(),
) -> list[int]:
    """Frames before `t` (after it in `reverse`) that may be read there, the newest first; not all need to exist.

    Their number is bounded however long the video is. Without `scores` these are simply the last frames. With them, the
    last ones that score more than `settings.min_score`, headed by the very last frame whatever its score.
    """
    span = settings.pointer_span(num_frames)
    if scores is None:
        reach = max(span, settings.num_recent)
        if reverse:
            return list(range(t + 1, min(t + reach, num_frames - 1) + 1))
        return list(range(t - 1, max(t - reach, 0) - 1, -1))
    if t == (num_frames - 1 if reverse else 0):
        return []
    good = (frame for frame, score in scores.items() if score > settings.min_score)
    if reverse:
        recent, newest = nsmallest(span, (frame for frame in good if frame > t)), t + 1
    else:  # the released model never looks at frame 0
        recent, newest = nlargest(span, (frame for frame in good if 0 < frame < t)), t - 1
    return recent if newest in recent else [newest, *recent]
