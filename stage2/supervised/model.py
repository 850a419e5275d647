"""SAM3 whose tracker learns from clips with true masks: all its parts, behind the frozen trunk and detector.

Letters: V clips, B objects, R objects that share a kind of prompt, T frames, K proposed masks of an object, S side of
the input, M side of the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.engine.losses import FOCAL_ALPHA, FOCAL_GAMMA, build_valid_mask
from sam3.model.sam3_image import Sam3Image
from sam3.model.tracker import FrameFeatures, ObjectMasks, Sam3Tracker
from stage2.data.batch import PRESENT, ClipBatch, mean_per_clip
from stage2.model import frame_terms, mean_over_frames, occlusion_loss
from stage2.rollout import TrackerRollout

TERMS = {"focal": "focal", "dice": "dice", "iou": "mask", "score": "score"}  # losses of masks -> names in `frame_terms`
UNREAD = ("no_mem_pos_enc",)  # of the tracker: stands in the file, and nothing reads it


@dataclass(frozen=True)
class TrackWeights:
    """Weights of the losses. first: of all terms of the first frame. The others are described in `SupervisedTracker`;
    focal_alpha and focal_gamma belong to the focal loss."""

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    score: float = 1.0
    occlusion: float = 1.0
    first: float = 1.0
    focal_alpha: float = FOCAL_ALPHA
    focal_gamma: float = FOCAL_GAMMA

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ValueError(f"LOSS.{name.upper()} must be at least 0, got {value}")


class SupervisedTracker(nn.Module):
    """Clips in, losses out. Children are named so that the state dict has the layout of sam3.pt.

    Trained are `tracker` and, with train_neck, the detector's second neck, which only the tracker and clicks use. The
    tracker follows the objects by what it remembers of its own masks, and gradients flow through all of that.

    total = track + first * (the same terms of the first frame), with track =
    focal * focal + dice * dice     of the proposal that fits best, where the object is seen
    + iou * iou                     1 - soft IoU of that proposal
    + score * score                 |predicted IoU - IoU| of all proposals
    + occlusion * occlusion         cross-entropy of the object logit, where it is known whether the object is there
    as means over the objects and frames 1 to T - 1 of a clip, then over clips.

    In the first frame clicks and boxes are scored, and after each click a second one where the first mask is wrong, so
    that clicks on single pictures are not forgotten. A mask that is given leaves nothing to score.
    """

    def __init__(
        self,
        detector: Sam3Image,
        tracker: Sam3Tracker,
        weights: TrackWeights = TrackWeights(),
        train_neck: bool = True,
    ) -> None:
        super().__init__()
        self.detector, self.tracker = detector.requires_grad_(False), tracker
        self.weights = weights
        self.rollout = TrackerRollout(tracker, recompute=False)
        for name in UNREAD:
            getattr(tracker, name).requires_grad_(False)
        self._convs = list(detector.backbone.vision_backbone.sam2_convs[:3])  # the coarsest level has no reader
        for conv in self._convs:
            conv.requires_grad_(train_neck)
        self.train()

    def train(self, mode: bool = True) -> SupervisedTracker:
        """Without dropout, as no clip is seen twice: in training the mask decoder alone behaves in another way, a lone
        mask is then always its first."""
        super().train(False)
        self.training = mode
        self.tracker.sam_mask_decoder.train(mode)
        return self

    def no_weight_decay_keywords(self) -> tuple[str, ...]:
        """Embeddings and codes; and, as parts of names, the mask decoder's attention between tokens and the image
        (cross_attn_token_to_image and the like). All of it is trained by AdamW without decay, with the optimizer `muon`
        too (see `sam3.engine.muon`)."""
        return ("_embed", "_token", "mask_tokens", "tpos_enc", "no_obj_ptr", "no_mem")

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Scalars `total` with gradients, and for the log the unweighted terms, and `first`, the weighted sum of those
        of the first frame. Every clip has an object. Draws from torch's generator."""
        valid = self._valid(batch)
        first: list[tuple[Tensor, dict[str, Tensor]]] = []
        terms: dict[int, dict[str, Tensor]] = {}
        frames = self.encode(batch)

        def visit_prompted(kind: str, rows: Tensor, heads: ObjectMasks) -> None:
            if kind != "mask":
                first.append((rows, self._terms(heads, batch.masks[rows, 0], valid[rows])))
            if kind == "click":
                corrected = self.correct(frames[0], batch, rows, heads)
                first.append((rows, self._terms(corrected, batch.masks[rows, 0], valid[rows])))

        def visit(t: int, conditioned: Tensor, heads: ObjectMasks) -> None:
            terms[t] = self._terms(heads, batch.masks[:, t], valid)

        clip = self.rollout.begin(frames, batch, visit_prompted)
        self.rollout.follow(clip, visit, length=self._draw_length(batch))
        present = (batch.states[:, 1:] == PRESENT).float()
        losses = {name: mean_over_frames(terms, term, present, batch) for name, term in TERMS.items()}
        losses["occlusion"] = occlusion_loss(terms, batch)
        of_first = self._weigh(first_losses(first, batch)) if first else torch.zeros_like(losses["focal"])
        total = self._weigh(losses) + self.weights.first * of_first
        # The same names on all processes, whatever their prompts.
        return {"total": total, **{name: loss.detach() for name, loss in {**losses, "first": of_first}.items()}}

    def encode(self, batch: ClipBatch) -> list[FrameFeatures]:
        """Of T frames, of V clips each; all in one pass, without gradients of the trunk."""
        preprocess, trunk = self.detector.preprocess, self.detector.backbone.vision_backbone.trunk
        num_frames = batch.num_frames
        images = batch.images.transpose(0, 1).flatten(0, 1)  # (T V, 3, S, S)
        with torch.no_grad():
            grid = trunk(preprocess.normalise(images, batch.sizes.repeat(num_frames, 1)))[-1]
        joined = self.tracker.prepare_features([conv(grid) for conv in self._convs])
        return [joined.select(slice(t * len(batch), (t + 1) * len(batch))) for t in range(num_frames)]

    def correct(self, features: FrameFeatures, batch: ClipBatch, rows: Tensor, heads: ObjectMasks) -> ObjectMasks:
        """The masks of `rows` after one more click, on the likeliest mask of their first one.

        features: of the first frames, of V clips. heads: of the R objects `rows` after their first click.
        """
        own = features.select(batch.clip_of_object[rows])
        best = heads.ious.argmax(1)
        seen = heads.candidates.detach()[torch.arange(len(rows), device=best.device), best][:, None]  # (R, 1, M, M)
        xy, labels = wrong_cells(seen[:, 0], batch.masks[rows, 0], self.tracker.config.img_size)
        points = (
            torch.cat((batch.points[rows, :1], xy[:, None]), dim=1),
            torch.cat((batch.labels[rows, :1], labels[:, None]), dim=1),
        )
        conditioned = self.tracker.condition(own.top, None)
        return self.tracker.predict_masks(conditioned, own.high_res, len(rows), points, seen)

    @torch.no_grad()
    def follow(self, frames: Sequence[FrameFeatures], batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """What is found of the objects: masks bool (B, T, S, S), and whether they are there, bool (B, T).

        frames: from `encode`.
        """
        clip = self.rollout.begin(frames, batch)
        found = [clip.first]
        self.rollout.follow(clip, lambda t, conditioned, heads: found.append(heads))
        masks = torch.stack([self.tracker.upsample(heads.low)[:, 0] > 0 for heads in found], dim=1)
        return masks, torch.cat([heads.object_logits > 0 for heads in found], dim=1)

    def _terms(self, heads: ObjectMasks, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        weights = self.weights
        return frame_terms(
            heads,
            target,
            valid,
            focal_weight=weights.focal,
            dice_weight=weights.dice,
            focal_alpha=weights.focal_alpha,
            focal_gamma=weights.focal_gamma,
        )

    def _weigh(self, losses: dict[str, Tensor]) -> Tensor:
        return sum(getattr(self.weights, name) * loss for name, loss in losses.items())

    def _draw_length(self, batch: ClipBatch) -> int:
        """Frames of the video that the clip is said to begin: codes of pointers depend on it, and clips to track are
        mostly longer than those to train on."""
        longest = max(batch.num_frames, self.tracker.config.max_obj_ptrs)
        return int(torch.randint(batch.num_frames, longest + 1, ()))

    def _valid(self, batch: ClipBatch) -> Tensor:
        """(B, 1, M, M), ones over the frames, zeros over the padding."""
        valid = build_valid_mask(batch.sizes, self.detector.preprocess.img_size, self.tracker.low_side)
        return valid[batch.clip_of_object]


def first_losses(parts: Sequence[tuple[Tensor, dict[str, Tensor]]], batch: ClipBatch) -> dict[str, Tensor]:
    """Losses of the first frame, by the names of `TrackWeights`; a clip with nothing to score counts as 0.

    parts: objects, all of which are there, and their terms.
    """
    clips = batch.clip_of_object[torch.cat([rows for rows, _ in parts])]

    def mean(values: Tensor) -> Tensor:
        return mean_per_clip(values, torch.ones_like(values), clips, len(batch))

    joined = {name: torch.cat([terms[name] for _, terms in parts]) for name in parts[0][1]}
    losses = {name: mean(joined[term]) for name, term in TERMS.items()}
    losses["occlusion"] = mean(F.softplus(-joined["object_logits"]))  # -log sigmoid
    return losses


@torch.no_grad()
def wrong_cells(masks: Tensor, true: Tensor, img_size: int) -> tuple[Tensor, Tensor]:
    """A click for each object on a random cell where mask and truth differ, or on any cell if none does.

    masks: (R, M, M) logits; true: bool (R, M, M). Returns x, y in pixels of the input, (R, 2), and labels (R,): 1 on
    the object, 0 beside it. Draws from torch's generator.
    """
    side = masks.shape[-1]
    wrong = ((masks > 0) != true).flatten(1)
    chances = torch.where(wrong.any(1, keepdim=True), wrong, True).float()
    cell = torch.multinomial(chances, 1)  # (R, 1)
    xy = torch.cat((cell % side, cell // side), dim=1).add(0.5) * (img_size / side) - 0.5
    return xy, true.flatten(1).gather(1, cell)[:, 0].long()
