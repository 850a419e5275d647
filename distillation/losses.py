"""How far a student is from its teacher: eight terms, all in float32 and outside autocast.

Letters: `B` pictures, `N` queries of one side, `M` matched pairs of all pictures together, `K` any number of maps, `C`
channels, `L` tokens, `h w` rows and columns of the student's map, `H W` of the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distillation.config import FEATURE_LOSSES, LOSSES, PRESENCE_SPACES
from distillation.hungarian import Pair, resize

GIOU_EPS = 1e-7
# Pixels of all the maps that are compared at a time, 8 MiB of float32: few enough for a processor's cache, and many
# enough for an accelerator.
SLICE_PIXELS = 2**21

Outputs = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DistillationLoss(nn.Module):
    """The weighted sum of eight terms, one method each, with the student's s and the teacher's outputs t:

    mask_loss             mean over pairs of Dice + BCE of their masks
    box_l1_loss           mean over pairs and coordinates of |s - t|
    box_giou_loss         mean over pairs of 1 - GIoU
    logit_loss            mean over pairs of BCE with the probability of t
    presence_loss         mean of (s - t)^2
    semantic_seg_loss     mean over pictures of Dice + BCE
    fpn_feature_loss      mean over levels of the mean of (s - t)^2
    encoder_feature_loss  mean of (s - t)^2, as maps

    Means over pairs are taken in each picture, then over pictures. The student's maps are resized to the teacher's
    size; the teacher gets no gradient. Where s = t the L1, GIoU and square terms are 0, BCE is the entropy of the
    targets, and Dice is 0 only for hard masks.

    weights: of each term; a term of weight 0, or left out, is not computed. dice_eps: see `dice_and_bce`.
    presence_space: `logit`, or `prob` to compare probabilities. score_weighting: in the mask and box terms each pair of
    a picture counts by the teacher's `p(query) p(presence)`, as a part of their sum.
    ValueError for unknown terms and spaces.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        dice_eps: float = 1.0,
        presence_space: str = "logit",
        score_weighting: bool = False,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(weights) - set(LOSSES)):
            raise ValueError(f"no loss term is named {', '.join(unknown)}; there are {', '.join(LOSSES)}")
        if presence_space not in PRESENCE_SPACES:
            raise ValueError(f"presence_space is {presence_space!r}; choose one of {', '.join(PRESENCE_SPACES)}")
        self.weights = {name: float(weights.get(name, 0)) for name in LOSSES}
        self.dice_eps, self.presence_space, self.score_weighting = dice_eps, presence_space, score_weighting

    def forward(self, student: Outputs, teacher: Outputs, pairs: Sequence[Pair], with_features: bool) -> dict[str, Any]:
        """Outputs of the same pictures as in `distillation.teachers.teacher`, and pairs as from `HungarianMatcher`.

        Returns scalars: `total_loss`; `raw` and `weighted`, each a dict of all eight terms, 0 for those left out.
        Without pairs the first four are 0 and still part of the graph. Without `with_features` the features of
        either side may be None or absent.
        """
        masks = student["pred_masks"]
        raw = {name: masks.new_zeros((), dtype=torch.float32) for name in LOSSES}
        with torch.autocast(masks.device.type, enabled=False):
            matched = MatchedPairs.build(student, teacher, pairs, self.score_weighting)
            for name, weight in self.weights.items():
                if weight and (with_features or name not in FEATURE_LOSSES):
                    raw[name] = getattr(self, name)(student, teacher, matched)
            weighted = {name: self.weights[name] * term for name, term in raw.items()}
            return {"total_loss": sum(weighted.values()), "raw": raw, "weighted": weighted}

    def mask_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        ours, theirs = matched.select(student, teacher, "pred_masks")
        return (matched.weight * dice_and_bce(ours, theirs, self.dice_eps)).sum()

    def box_l1_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        ours, theirs = matched.select(student, teacher, "pred_boxes")
        return (matched.weight * (ours.float() - theirs.float()).abs().mean(1)).sum()

    def box_giou_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        ours, theirs = matched.select(student, teacher, "pred_boxes")
        return (matched.weight * (1 - paired_giou(ours.float(), theirs.float()))).sum()

    def logit_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        ours, theirs = (logits.float() for logits in matched.select(student, teacher, "pred_logits"))
        return (matched.share * F.binary_cross_entropy_with_logits(ours, theirs.sigmoid(), reduction="none")).sum()

    def presence_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        ours, theirs = student["presence_logits"].float(), teacher["presence_logits"].detach().float()
        if self.presence_space == "prob":
            ours, theirs = ours.sigmoid(), theirs.sigmoid()
        return F.mse_loss(ours, theirs)

    def semantic_seg_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        ours, theirs = (side["semantic_seg"].flatten(0, 1) for side in (student, teacher))
        return dice_and_bce(ours, theirs, self.dice_eps).mean()

    def fpn_feature_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        levels = zip(student["fpn_features"], teacher["fpn_features"], strict=True)
        return torch.stack([feature_mse(ours, theirs) for ours, theirs in levels]).mean()

    def encoder_feature_loss(self, student: Outputs, teacher: Outputs, matched: MatchedPairs) -> Tensor:
        ours, theirs = (tokens_to_map(side["encoder_output"], side["encoder_hw"]) for side in (student, teacher))
        return feature_mse(ours, theirs)


@dataclass(frozen=True)
class MatchedPairs:
    """The pairs of all pictures one after another.

    ours, theirs: int64 `(M,)`, place of each query among the `B N` of its side. share: `(M,)`, what each pair counts in
    a mean over pairs, then pictures. weight: the same, or by the teacher's score.
    """

    ours: Tensor
    theirs: Tensor
    share: Tensor
    weight: Tensor

    @classmethod
    def build(
        cls, student: Outputs, teacher: Outputs, pairs: Sequence[Pair], score_weighting: bool = False
    ) -> MatchedPairs:
        """score_weighting: see `DistillationLoss`."""
        (pictures, num_ours), (_, num_theirs) = student["pred_logits"].shape, teacher["pred_logits"].shape
        assert len(pairs) == pictures, f"pairs of {len(pairs)} pictures for outputs of {pictures}"
        ours = torch.cat([rows + i * num_ours for i, (rows, _) in enumerate(pairs)])
        theirs = torch.cat([rows + i * num_theirs for i, (_, rows) in enumerate(pairs)])
        counts = [len(rows) for rows, _ in pairs]
        share = torch.cat([ours.new_full((n,), 1 / max(1, n * pictures), dtype=torch.float32) for n in counts])
        if not score_weighting:
            return cls(ours, theirs, share, share)
        query, presence = (teacher[name].detach().float().sigmoid() for name in ("pred_logits", "presence_logits"))
        parts = (query * presence).flatten().index_select(0, theirs).split(counts)
        least = torch.finfo(torch.float32).tiny
        return cls(ours, theirs, share, torch.cat([part / part.sum().clamp(min=least) / pictures for part in parts]))

    def select(self, student: Outputs, teacher: Outputs, name: str) -> tuple[Tensor, Tensor]:
        """Outputs `(M, ...)` of the pairs' queries, given as `(B, N, ...)`, in their types; the teacher's detached."""
        ours = student[name].flatten(0, 1).index_select(0, self.ours)
        return ours, teacher[name].detach().flatten(0, 1).index_select(0, self.theirs)


def dice_and_bce(ours: Tensor, theirs: Tensor, eps: float) -> Tensor:
    """Dice and binary cross-entropy of each mask, summed: `(K,)`, at the teacher's size.

    ours: `(K, h, w)`, theirs: `(K, H, W)`, logits. With `p` and `t` the probabilities of student and teacher:
    `1 - (2 sum(p t) + eps) / (sum p + sum t + eps)` (Milletari et al. 2016, V-Net, without its squares), and the mean
    of `softplus(logit) - logit t`, finite for any finite logit.
    """
    if len(ours) == 0:
        return ours.sum((1, 2))  # no values, yet part of the graph
    return _MapLoss.apply(ours[None], theirs[None], partial(_dice_and_bce, eps=eps))[0]


def feature_mse(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean square difference of `(B, C, h, w)`, resized, and `(B, C, H, W)`: a scalar."""
    assert ours.shape[:2] == theirs.shape[:2], f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return _MapLoss.apply(ours, theirs, _square_error).mean()


class _MapLoss(torch.autograd.Function):
    """Resizes maps `(B, C, h, w)` to the size of their targets `(B, C, H, W)` and gives the loss of each: `(B, C)`.

    These maps are what a loss spends its time and memory on. So it takes a slice of the channels at a time and finds
    the gradient in the same go: all that waits for the backward pass is one float32 tensor `(B, C, h, w)`, where plain
    operations keep several of `(B, C, H, W)`. Targets get no gradient; half precision is widened slice by slice.

    rule: resized maps and targets -> loss of each map and its gradient to the resized map.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, rule: Rule) -> Tensor:
        dtype = torch.promote_types(ours.dtype, torch.float32)
        # Processors resize several times as fast with the channels innermost, which is worth the copy.
        layout = torch.channels_last if ours.device.type == "cpu" else torch.preserve_format
        size = theirs.shape[-2:]
        step = max(1, SLICE_PIXELS // (len(theirs) * size.numel()))
        slopes = torch.empty_like(ours, dtype=dtype) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, ours.shape[1], step):
            part = slice(start, start + step)
            with torch.set_grad_enabled(slopes is not None):
                small = ours[:, part].detach().to(dtype, memory_format=layout).requires_grad_(slopes is not None)
                large = resize(small, size)
            loss, slope = rule(large.detach(), theirs[:, part].to(dtype, memory_format=layout))
            losses.append(loss)
            if slopes is not None:
                slopes[:, part] = torch.autograd.grad(large, small, slope)[0]
        ctx.dtype = ours.dtype
        ctx.save_for_backward(slopes)
        return torch.cat(losses, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, :, None, None]).to(ctx.dtype), None, None


def _dice_and_bce(logits: Tensor, targets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rule of `dice_and_bce`; targets: logits too."""
    p, t = logits.sigmoid(), targets.sigmoid()
    work = F.softplus(logits).addcmul_(logits, t, value=-1)
    bce = work.mean((2, 3))
    top = 2 * torch.mul(p, t, out=work).sum((2, 3)) + eps
    bottom = p.sum((2, 3)) + t.sum((2, 3)) + eps
    # Dice by p: top / bottom^2 - 2 t / bottom, and p by the logit: p (1 - p). BCE by the logit: (p - t) / pixels.
    slope = torch.addcmul((top / bottom.square())[:, :, None, None], t, (-2 / bottom)[:, :, None, None], out=work)
    slope.mul_(p).addcmul_(slope, p, value=-1).add_(p.sub_(t), alpha=1 / p.shape[2:].numel())
    return 1 - top / bottom + bce, slope


def _square_error(maps: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of `feature_mse`: the mean over pixels of (map - target)^2."""
    error = maps - targets
    return error.square().mean((2, 3)), error.mul_(2 / error.shape[2:].numel())


def paired_giou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Generalised IoU of each pair of boxes (Rezatofighi et al. 2019): `(M, 4)` xyxy twice -> `(M,)` in -1..1."""
    (low_a, high_a), (low_b, high_b) = ours.split(2, 1), theirs.split(2, 1)
    inter = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(1)
    union = (high_a - low_a).prod(1) + (high_b - low_b).prod(1) - inter
    return inter / (union + GIOU_EPS) - (hull - union) / (hull + GIOU_EPS)


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, L, C)`, row by row -> `(B, C, *size)`, a view. Resized as a sequence, ends of rows would mix."""
    return tokens.unflatten(1, tuple(size)).permute(0, 3, 1, 2)
