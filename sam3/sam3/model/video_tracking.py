"""The steps of tracking objects through a video: features of a frame, a prompt's masks, memory, a frame's masks.

Letters: B objects, P points of an object, G side of the feature map, S side of the model's square, H W rows and columns
of the video. Mask logits "low" have the side 4 G.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from sam3.model.mask_cleaning import fill_holes, remove_specks, require_opencv
from sam3.model.memory_bank import MemoryBank, MemoryRecord, memory_score
from sam3.model.memory_plan import MemoryPlan, PlanSettings
from sam3.model.sam3_video import Sam3VideoModel
from sam3.model.tracker import NO_OBJECT_LOGIT, FrameFeatures, ObjectMasks
from sam3.model.video_prompts import first_and_last, mask_in_square
from sam3.model.video_session import FrameMasks, ObjectResult, PromptedFrame, VideoObject, VideoSession

CACHED_FEATURES = 2  # frames: the one that is prompted, and the one that is tracked
PREVIOUS_LIMIT = 32.0  # earlier masks are shown to the model as logits within +- this
CLEANED_LOGIT = 0.1  # of cells that become object when a hole is filled; its negative for specks


class VideoTracking:
    """What is done to a `VideoSession` with a model; prompts come checked, in pixels of the model's input."""

    def __init__(
        self, model: Sam3VideoModel, autocast_dtype: torch.dtype | None, memory_selection: bool, fill_hole_area: int
    ):
        """See `Sam3VideoPredictor`."""
        if fill_hole_area < 0:
            raise ValueError(f"fill_hole_area (={fill_hole_area}) must not be negative")
        if fill_hole_area:
            require_opencv()
        self.model = model.eval()
        self.tracker = model.tracker
        self.preprocess = model.preprocess
        self.device = model.device
        self.autocast_dtype = autocast_dtype
        self.memory_selection = memory_selection
        self.fill_hole_area = fill_hole_area

    def new_object(self) -> VideoObject:
        """One of which nothing is known."""
        config = self.tracker.config
        settings = PlanSettings(config.num_maskmem, config.max_cond_frames, config.max_obj_ptrs)
        return VideoObject(MemoryBank(settings, self.memory_selection))

    # Prompts ----------------------------------------------------------------------------------------------------------

    def prompt_points(self, session: VideoSession, frame: int, obj_id: int, points: Tensor, labels: Tensor) -> None:
        """Finds an object by points (P, 2) with labels (P,), going on from its mask in this frame if it has one."""
        known = session.objects.get(obj_id)
        earlier = None if known is None else session.result(obj_id, frame, self.device)
        with self._inference():
            features = self.features(session, frame)
            coords, marks = (part[None].to(self.device) for part in first_and_last(points, labels))
            heads = self.tracker.predict_masks(
                self.tracker.condition(features.top, None),
                features.high_res,
                num_objects=1,
                points=(coords, marks),
                mask_logits=None if earlier is None else self._as_prompt(earlier.low),
            )
            heads = replace(heads, low=self._clean(heads.low))
        self._set_prompt(session, frame, obj_id, PromptedFrame(points, labels, heads))

    def prompt_mask(self, session: VideoSession, frame: int, obj_id: int, mask: Tensor) -> None:
        """Takes an object's mask, bool (H, W), and its pixels from the other objects that were prompted there."""
        mask = mask.to(self.device)
        with self._inference():
            seen = mask_in_square(mask, 16 * self.tracker.config.grid, self.preprocess)
            heads = self.tracker.take_mask(self.features(session, frame), seen)
            low = (1 - 2 * mask_in_square(mask, self.tracker.low_side, self.preprocess)) * NO_OBJECT_LOGIT
            for other_id, other in session.objects.items():
                if other_id != obj_id and frame in other.prompted:
                    other.prompted[frame] = _take_away(other.prompted[frame], low, mask)
        heads = replace(heads, low=low, candidates=low)
        nothing = torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
        self._set_prompt(session, frame, obj_id, PromptedFrame(*nothing, heads, mask))

    def remember_prompts(self, session: VideoSession) -> None:
        """Puts prompts that are new since the last time into the objects' memory."""
        with self._inference():
            for frame in sorted(session.changed):
                self._remember_prompts_of(session, frame)
        session.changed.clear()

    def _remember_prompts_of(self, session: VideoSession, frame: int) -> None:
        """All objects that were prompted in a frame, each pixel belonging to one of them."""
        targets = [target for target in session.objects.values() if frame in target.prompted]
        if not targets:
            return
        features = self.features(session, frame)
        heads = _join_heads([target.prompted[frame].heads for target in targets])
        logits = without_overlap(self.tracker.upsample(heads.low))
        memory = self.tracker.encode_memory(features.top, logits, heads.object_logits, from_prompt=True)
        for target, record in zip(targets, _split(self.tracker.remember(memory, heads)), strict=True):
            target.bank.add(frame, record, cond=True)

    def _set_prompt(self, session: VideoSession, frame: int, obj_id: int, prompted: PromptedFrame) -> None:
        if obj_id not in session.objects:
            session.objects[obj_id] = self.new_object()
        session.set_prompt(obj_id, frame, prompted)

    def _as_prompt(self, low: Tensor) -> Tensor:
        return low.clamp(-PREVIOUS_LIMIT, PREVIOUS_LIMIT)

    # Frames -----------------------------------------------------------------------------------------------------------

    def track(self, session: VideoSession, t: int, reverse: bool, picture: Tensor | None = None) -> FrameMasks:
        """One frame, uint8 (3, H, W), of all objects; those whose result is known and still holds are left as it is."""
        self.remember_prompts(session)
        groups: dict[MemoryPlan, list[int]] = {}
        for obj_id, target in session.objects.items():
            if target.prompted and t not in target.prompted and target.tracked.get(t) != reverse:
                plan = target.plan(t, session.num_frames, reverse)
                groups.setdefault(plan, []).append(obj_id)
        with self._inference():
            for plan, obj_ids in groups.items():
                heads = self._track_group(session, t, plan, obj_ids, self.features(session, t, picture))
                session.keep_tracked(obj_ids, t, reverse, self._clean(heads.low), heads.object_logits.float())
        return self.frame_masks(session, t)

    def _track_group(
        self, session: VideoSession, t: int, plan: MemoryPlan, obj_ids: Sequence[int], features: FrameFeatures
    ) -> ObjectMasks:
        """Objects that read the same frames, in one batch."""
        banks = [session.objects[obj_id].bank for obj_id in obj_ids]
        gathered = self.tracker.gather(plan, _join_records(banks, plan))
        conditioned = self.tracker.condition(features.top, gathered)
        heads = self.tracker.predict_masks(conditioned, features.high_res, len(obj_ids))
        memory = self.tracker.encode_memory(features.top, heads.low, heads.object_logits, from_prompt=False)
        best_ious = heads.ious.amax(dim=1)  # (B,)
        for i, (bank, record) in enumerate(zip(banks, _split(self.tracker.remember(memory, heads)), strict=True)):
            if self.memory_selection:
                record = replace(record, score=memory_score(record.object_logits, best_ious[i : i + 1]))
            bank.add(t, record, cond=False)
            bank.prune(t, session.num_frames)
        return heads

    def features(self, session: VideoSession, frame: int, picture: Tensor | None = None) -> FrameFeatures:
        """Of one frame, uint8 (3, H, W) or read from the video; those of the last few frames are kept."""
        if frame not in session.features:
            square, fitted = self.preprocess.fit(session.frames[frame] if picture is None else picture)
            pixels = square[None].to(self.device, non_blocking=True)
            images = self.preprocess.normalise(pixels, torch.tensor([fitted])).to(self.model.dtype)
            session.features[frame] = self.model.encode(images)
            if len(session.features) > CACHED_FEATURES:
                session.features.popitem(last=False)
        session.features.move_to_end(frame)
        return session.features[frame]

    def frame_masks(self, session: VideoSession, frame: int) -> FrameMasks:
        """What is known of all objects in a frame."""
        nothing = self._nothing()
        with self._inference():
            known = [session.result(obj_id, frame, self.device) or nothing for obj_id in session.objects]
            low = torch.cat([nothing.low[:0], *(result.low for result in known)])
            object_logits = torch.cat([nothing.object_logits[:0], *(result.object_logits for result in known)])
            video_masks = self.preprocess.maps_to_image(low, session.size)
            for i, target in enumerate(session.objects.values()):
                given = target.prompted[frame].mask if frame in target.prompted else None
                if given is not None:
                    video_masks[i, 0] = torch.where(given, -NO_OBJECT_LOGIT, NO_OBJECT_LOGIT)
        return FrameMasks(frame, session.obj_ids, low, video_masks, object_logits)

    def _nothing(self) -> ObjectResult:
        """Of an object of which nothing is known in a frame."""
        shapes = (1, 1, self.tracker.low_side, self.tracker.low_side), (1, 1)
        return ObjectResult(*(torch.full(shape, NO_OBJECT_LOGIT, device=self.device) for shape in shapes))

    def _clean(self, low: Tensor) -> Tensor:
        if not self.fill_hole_area:
            return low
        filled = fill_holes(low, self.fill_hole_area, CLEANED_LOGIT)
        return remove_specks(filled, self.fill_hole_area, -CLEANED_LOGIT)

    @contextmanager
    def _inference(self):
        dtype = self.autocast_dtype
        with torch.inference_mode(), nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            yield


def _take_away(prompted: PromptedFrame, low: Tensor, mask: Tensor) -> PromptedFrame:
    """The same without the pixels of a mask that another object was given: low (1, 1, 4G, 4G) and bool (H, W)."""
    rest = torch.where(low > 0, NO_OBJECT_LOGIT, prompted.heads.low)
    own = None if prompted.mask is None else prompted.mask & ~mask
    return replace(prompted, heads=replace(prompted.heads, low=rest), mask=own)


def _join_heads(parts: Sequence[ObjectMasks]) -> ObjectMasks:
    """One batch of objects; the proposals that were not chosen are left out."""
    low, object_logits, pointer = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("low", "object_logits", "pointer")
    )
    ious = torch.cat([part.ious.amax(dim=1, keepdim=True) for part in parts])
    return ObjectMasks(low, low, ious, object_logits, pointer)


def _join_records(banks: Sequence[MemoryBank], plan: MemoryPlan) -> dict[int, MemoryRecord]:
    """What the banks of B objects hold of the frames that `plan` names, as records of one batch."""
    if len(banks) == 1:
        return dict(banks[0].records)
    maps = {frame for frame, _ in plan.spatial}
    joined = {}
    for frame in maps | {frame for frame, _ in plan.pointers}:
        records = [bank.records[frame] for bank in banks]
        joined[frame] = MemoryRecord(
            torch.cat([record.tokens for record in records]) if frame in maps else None,
            torch.cat([record.pointer for record in records]),
            torch.cat([record.object_logits for record in records]),
        )
    return joined


def _split(record: MemoryRecord) -> list[MemoryRecord]:
    """One record for each of B objects, with memory of its own: banks forget at different times."""
    if len(record.pointer) == 1:
        return [record]
    columns = (record.tokens, record.pointer, record.object_logits)
    return [MemoryRecord(*(column[i : i + 1].clone() for column in columns)) for i in range(len(record.pointer))]


def without_overlap(logits: Tensor) -> Tensor:
    """Mask logits (B, 1, h, w) where each pixel is left to the object with the highest; the others get at most -10."""
    owner = logits.argmax(dim=0, keepdim=True)  # (1, 1, h, w)
    own = torch.arange(len(logits), device=logits.device)[:, None, None, None]
    return torch.where(owner == own, logits, logits.clamp(max=-10.0))
