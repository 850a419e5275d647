"""Following objects through a clip: the tracker's own steps, frame after frame, with one memory or another.

The first frame is prompted and does not look at memory, so that it is the same for teacher and student and done once.
From then on a frame sees what was remembered of the frames before it, made of the follower's own masks.

Letters: V clips, B objects, T frames, K proposed masks, C channels, D memory channels, G side of the feature map,
M = 4 G side of the masks, N memory tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sam3.model.memory_bank import MemoryBank, MemoryRecord
from sam3.model.sam3_video import Sam3VideoModel
from sam3.model.tracker import FrameFeatures, ObjectMasks, Sam3Tracker
from sam3.model.tracker_memory import CompressedMemory, DenseMemory, GatheredMemory
from stage2.data.batch import ClipBatch

Memory = DenseMemory | CompressedMemory
# Frame t, its memory-conditioned map (B, C, G, G), and the masks that the heads made of that.
Visit = Callable[[int, Tensor, ObjectMasks], None]
# Kind of a prompt, the objects (long) that are prompted so, and their masks in frame 0.
VisitPrompted = Callable[[str, Tensor, ObjectMasks], None]
Result = TypeVar("Result")


@dataclass
class Clip:
    """What all followers share. frames: features of the T frames, each of V clips. rows: (B,) clip of each object.
    first: masks in frame 0. first_map: what is to be remembered of it, (B, D, G, G)."""

    frames: Sequence[FrameFeatures]
    rows: Tensor
    first: ObjectMasks
    first_map: Tensor

    def features(self, t: int) -> FrameFeatures:
        """Of frame t, for each object."""
        return features_of(self.frames[t], self.rows)


class TrackerRollout:
    """Runs a tracker over clips whose features are known. No module: whoever holds it neither trains, saves nor moves
    the tracker. Gradients flow through all steps, masks that are remembered among them.

    Args:
        tracker: on its device; how it is to be trained, if at all, is its owner's matter.
        recompute: where gradients flow, keep what was remembered of each frame and its conditioned map and masks only,
            and compute a frame's steps again in the backward pass.
    """

    def __init__(self, tracker: Sam3Tracker, recompute: bool = True):
        self.tracker = tracker
        self.recompute = recompute

    def begin(self, frames: Sequence[FrameFeatures], batch: ClipBatch, visit: VisitPrompted | None = None) -> Clip:
        """The prompted first frame; `visit` is called for each kind of prompt. frames: features of all T frames."""
        rows = batch.clip_of_object
        first = self._prompted(frames[0], batch, visit)
        top = maps_of(frames[0].top, rows)
        first_map = self.tracker.encode_memory(top, first.low, first.object_logits, from_prompt=True)
        return Clip(frames, rows, first, first_map)

    def follow(self, clip: Clip, visit: Visit, memory: Memory | None = None, length: int | None = None) -> None:
        """Goes through frames 1 to T - 1 with a memory (the model's own if left out), calling `visit` at each.

        length: frames of the video that begins with the clip, by which the distances of pointers are told; T if left
        out.
        """
        bank, num_frames = MemoryBank(), len(clip.frames)
        bank.add(0, self._remember(clip.first_map, clip.first, memory), cond=True)
        for t in range(1, num_frames):
            gathered = self.tracker.gather(bank.plan(t, length or num_frames), bank.records, memory)
            conditioned, heads, memory_map = self._step(clip, t, gathered, memory)
            visit(t, conditioned, heads)
            if memory_map is not None:
                bank.add(t, self._remember(memory_map, heads, memory), cond=False)

    def follow_both(self, clip: Clip, visit: Visit, target: Callable[[int, Tensor], None], memory: Memory) -> None:
        """As `follow`, while the model's own memory looks at the same masks: `target(t, map)` gets what it makes of
        them. Cheaper than a second roll-out by decoder and memory encoder."""
        own, other, num_frames = MemoryBank(), MemoryBank(), len(clip.frames)
        own.add(0, self.tracker.remember(clip.first_map, clip.first), cond=True)
        other.add(0, self._remember(clip.first_map, clip.first, memory), cond=True)
        for t in range(1, num_frames):
            with torch.no_grad():
                dense = self.tracker.gather(own.plan(t, num_frames), own.records)
                target(t, self.tracker.condition(maps_of(clip.frames[t].top, clip.rows), dense))
            gathered = self.tracker.gather(other.plan(t, num_frames), other.records, memory)
            conditioned, heads, memory_map = self._step(clip, t, gathered, memory)
            visit(t, conditioned, heads)
            if memory_map is not None:
                other.add(t, self._remember(memory_map, heads, memory), cond=False)
                with torch.no_grad():
                    own.add(t, self.tracker.remember(memory_map, heads), cond=False)

    # One frame --------------------------------------------------------------------------------------------------------

    def _step(
        self, clip: Clip, t: int, gathered: GatheredMemory, memory: Memory | None
    ) -> tuple[Tensor, ObjectMasks, Tensor | None]:
        """Look at the memory, decode, and make what is to be remembered: conditioned map, masks, memory map.

        Of the last frame nothing is remembered: None.
        """

        def run(tokens: Tensor) -> tuple[Tensor, ObjectMasks, Tensor | None]:
            features = clip.features(t)  # here, so that copies for each object do not wait for the backward pass
            conditioned = self.tracker.condition(features.top, replace(gathered, tokens=tokens), memory)
            heads = self.tracker.predict_masks(conditioned, features.high_res, len(tokens))
            if t + 1 == len(clip.frames):
                return conditioned, heads, None
            return conditioned, heads, self.tracker.encode_memory(features.top, heads.low, heads.object_logits, False)

        return self._recomputed(run, gathered.tokens)

    def _remember(self, memory_map: Tensor, heads: ObjectMasks, memory: Memory | None) -> MemoryRecord:
        """A Perceiver has activations too."""
        return self._recomputed(lambda values: self.tracker.remember(values, heads, memory), memory_map)

    def _recomputed(self, function: Callable[[Tensor], Result], values: Tensor) -> Result:
        """`function(values)`, once more in the backward pass if activations are not to be kept.

        By `values` torch knows whose random numbers and autocast to bring back then; it looks at tensors only.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return function(values)
        return checkpoint(function, values, use_reentrant=False)

    def _prompted(self, features: FrameFeatures, batch: ClipBatch, visit: VisitPrompted | None) -> ObjectMasks:
        """From the features of the first frames, of each of V clips. Each kind of prompt in a pass of its own, so that
        none gets padding that inference would not give it."""
        parts, order = [], []
        for kind, count in (("mask", 0), ("box", 2), ("click", 1)):
            rows = batch.rows_of(kind)
            if not rows:
                continue
            index = torch.tensor(rows).to(features.top.device, non_blocking=True)
            own = features_of(features, batch.clip_of_object[index])
            if kind == "mask":
                mask = batch.masks[index, :1].float()
                side = 16 * self.tracker.config.grid  # as the predictor enlarges a mask that it is given
                parts.append(self.tracker.take_mask(own, F.interpolate(mask, (side, side), mode="bilinear")))
            else:
                conditioned = self.tracker.condition(own.top, None)
                points = (batch.points[index, :count], batch.labels[index, :count])
                parts.append(self.tracker.predict_masks(conditioned, own.high_res, len(rows), points))
            order += rows
            if visit is not None:
                visit(kind, index, parts[-1])
        back = torch.tensor(order).argsort().to(features.top.device, non_blocking=True)

        def join(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])[back]

        low = join("low")  # as for candidates and ious: of each prompt, those of the chosen mask
        return ObjectMasks(low, low, torch.ones_like(join("object_logits")), join("object_logits"), join("pointer"))


class Rollout(TrackerRollout):
    """Runs a frozen video model over clips.

    Args:
        model: in eval mode, frozen, on its device.
        recompute: see `TrackerRollout`.
    """

    def __init__(self, model: Sam3VideoModel, recompute: bool = True):
        self.model = model.eval().requires_grad_(False)
        super().__init__(self.model.tracker, recompute)

    @torch.no_grad()
    def start(self, batch: ClipBatch) -> Clip:
        """Features of all frames, and the prompted first one."""
        return self.begin([self._encode(batch, t) for t in range(batch.num_frames)], batch)

    def _encode(self, batch: ClipBatch, t: int) -> FrameFeatures:
        if batch.embeddings is not None:
            return self.model.encode(batch.embeddings[:, t].to(self.model.dtype))
        images = self.model.preprocess.normalise(batch.images[:, t], batch.sizes)
        return self.model.encode(images.to(self.model.dtype))


def maps_of(maps: Tensor, rows: Tensor) -> Tensor:
    """Maps of V clips for each object, (B, ...) by the clips `rows` (B,); those of one clip (1, ...) are shared."""
    return maps if len(maps) == 1 else maps[rows]


def features_of(features: FrameFeatures, rows: Tensor) -> FrameFeatures:
    """`maps_of` for all that is known of a frame."""
    return features if len(features.top) == 1 else features.select(rows)
