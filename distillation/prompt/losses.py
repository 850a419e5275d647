"""The four distillation losses between a student and one teacher, and the task loss of prompted masks.

All are computed in float32 outside autocast; the four leave float64 as it is. Student first; the teacher gets no
gradient, and its maps are resized to the student's. Means over nothing are 0 and part of the graph.

Letters: `B` pictures, `P` prompts, `C` channels, `T` mask tokens, `H W` rows and columns of a feature, `K` masks of a
prompt, `h w` rows and columns of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.prompt.projection import least_spread
from sam3.engine.losses import mask_bce, mask_focal
from sam3.engine.metrics import mask_iou

COS_MODES = ("pixel", "flat")
MSE_REDUCTIONS = ("mean", "sum_channels")
TOKEN_REDUCTIONS = ("token_mean", "batchmean")
KL_FORMS = ("bernoulli", "positive")
FOCAL_FORMS = ("symmetric", "positive")
MASK_SELECTS = ("teacher_best", "independent_best", "all")
TASK_TERMS = ("bce", "focal", "dice", "iou")

COS_EPS = 1e-6
DICE_EPS = 1e-6
MASK_STRIDE = 4  # pixels of the input that one pixel of a low-resolution mask covers, each way
# How near 0 and 1 a predicted IoU counts as a probability; it bounds the gradient of `foreground_loss` to 1000.
SURE = 1e-3


@dataclass(frozen=True)
class Parts:
    """total: the scalar to train on. parts: its terms by name (`mse`, `cos`, `kl`, `focal`), scalars before their
    weights; those of weight 0 are left out. spread: with a trainable projection, `least_spread` of what it gives.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    spread: Tensor | None = None


def _full_precision(loss: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(loss)
    def run(student: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(student.device.type, enabled=False):
            return loss(student, *args, **kwargs)

    return run


@_full_precision
def encoder_patch_loss(
    f_s: Tensor,
    f_t: Tensor,
    w_l2: float = 1.0,
    w_cos: float = 1.0,
    *,
    cos_mode: str = "pixel",
    projection: nn.Module | None = None,
) -> Parts:
    """`w_l2 mean (f_s - f_t)^2 + w_cos mean(1 - cos(f_s, f_t))`.

    f_s: `(B, C, H, W)`; f_t: `(B, C', H', W')`, brought to C channels by the projection, which does get gradients.
    cos_mode: `pixel`, a cosine over the channels of each cell; `flat`, one over all of a picture's feature.
    """
    _check_choice("cos_mode", cos_mode, COS_MODES)
    target, spread = f_t.detach(), None
    if projection is not None:
        target = projection(target)
        if target.requires_grad:
            spread = least_spread(target)
    student, target = _comparable("encoder_patch", f_s, target)
    terms = {
        "mse": (w_l2, lambda: _mean((student - target).square())),
        "cos": (w_cos, lambda: _mean(cosine_distance(student, target, cos_mode))),
    }
    return _weighted(student, terms, spread)


@_full_precision
def prompt_embed_loss(
    f_s: Tensor,
    f_t: Tensor,
    w_mse: float = 0.7,
    w_cos: float = 0.3,
    *,
    cos_mode: str = "pixel",
    mse_reduction: str = "mean",
) -> Parts:
    """`w_mse mean (u_s - u_t)^2 + w_cos mean(1 - cos(f_s, f_t))` with `u = f / |f|` at each position.

    f_s, f_t: `(P, C, H, W)`. cos_mode: as in `encoder_patch_loss`. mse_reduction: `mean` over channels, or their sum.
    With `pixel` both terms say the same: `|u_s - u_t|^2 = 2 (1 - cos)`.
    """
    _check_choice("cos_mode", cos_mode, COS_MODES)
    _check_choice("mse_reduction", mse_reduction, MSE_REDUCTIONS)
    student, teacher = _comparable("prompt_embed", f_s, f_t.detach())

    def mse() -> Tensor:
        error = (F.normalize(student, dim=1, eps=COS_EPS) - F.normalize(teacher, dim=1, eps=COS_EPS)).square()
        return _mean(error) if mse_reduction == "mean" else _mean(error.sum(1))

    terms = {"mse": (w_mse, mse), "cos": (w_cos, lambda: _mean(cosine_distance(student, teacher, cos_mode)))}
    return _weighted(student, terms)


@_full_precision
def mask_token_loss(
    z_s: Tensor,
    z_t: Tensor,
    w_kl: float = 1.0,
    temperature: float = 0.5,
    *,
    tau_squared: bool = False,
    reduction: str = "token_mean",
) -> Parts:
    """`w_kl mean sum_c q_t (log q_t - log q_s)` with `q = softmax(z / temperature)` over the channels of each token.

    z_s, z_t: `(P, T, C)`. tau_squared: times `temperature^2`, which keeps gradients alike across temperatures (Hinton
    et al. 2015). reduction: `token_mean` over prompts and tokens; `batchmean` sums the tokens of a prompt.
    """
    _check_choice("reduction", reduction, TOKEN_REDUCTIONS)
    if temperature <= 0:
        raise ValueError(f"temperature (={temperature}) must be above 0")
    student, teacher = _comparable("decoder_mask_token", z_s, z_t.detach())

    def kl() -> Tensor:
        log_s, log_t = ((z / temperature).log_softmax(-1) for z in (student, teacher))
        value = (log_t.exp() * (log_t - log_s)).sum(-1)  # (P, T)
        value = _mean(value) if reduction == "token_mean" else _mean(value.sum(1))
        return value * temperature**2 if tau_squared else value

    return _weighted(student, {"kl": (w_kl, kl)})


@_full_precision
def dense_mask_logits_loss(
    x_s: Tensor,
    x_t: Tensor,
    w_kl: float = 0.6,
    w_focal: float = 0.4,
    gamma: float = 2.0,
    *,
    kl_form: str = "bernoulli",
    focal_form: str = "symmetric",
    sizes: Tensor | None = None,
) -> Parts:
    """`w_kl KL(p_t || p_s) + w_focal Focal(p_s, p_t)` of each pixel's probability `p = sigmoid(x)`, means over pixels.

    KL: `p_t log(p_t / p_s) + (1 - p_t) log((1 - p_t) / (1 - p_s))`; with `positive` only the first part, which may be
    negative. Focal: `-p_t (1 - p_s)^gamma log p_s - (1 - p_t) p_s^gamma log(1 - p_s)`; `positive`: the first part.
    Focal loss (Lin et al. 2017) is meant for hard targets; for soft ones its minimum is not quite at `p_s = p_t`.

    x_s, x_t: `(P, K, h, w)` logits. sizes: integer `(P, 2)`, rows and columns that each picture takes in the padded
    input: only pixels that look at it count, and all prompts alike. None: all pixels.
    """
    _check_choice("kl_form", kl_form, KL_FORMS)
    _check_choice("focal_form", focal_form, FOCAL_FORMS)
    student, teacher = _comparable("dense_mask_logits", x_s, x_t.detach())
    yes_s, no_s = F.logsigmoid(student), F.logsigmoid(-student)  # log p_s, log (1 - p_s)
    yes_t, no_t = F.logsigmoid(teacher), F.logsigmoid(-teacher)

    def kl() -> Tensor:
        value = yes_t.exp() * (yes_t - yes_s)
        if kl_form == "bernoulli":
            value = value + no_t.exp() * (no_t - no_s)
        return _mean_of_pictures(value, sizes)

    def focal() -> Tensor:
        value = -yes_t.exp() * (gamma * no_s).exp() * yes_s
        if focal_form == "symmetric":
            value = value - no_t.exp() * (gamma * yes_s).exp() * no_s
        return _mean_of_pictures(value, sizes)

    return _weighted(student, {"kl": (w_kl, kl), "focal": (w_focal, focal)})


def select_masks(
    student: Tensor, teacher: Tensor, student_ious: Tensor, teacher_ious: Tensor, mode: str = "teacher_best"
) -> tuple[Tensor, Tensor]:
    """Which of a prompt's masks are compared, of masks `(P, K, h, w)` with predicted IoUs `(P, K)`.

    `teacher_best`: of both the one that the teacher thinks best, `independent_best`: of each its own best, as
    `(P, 1, h, w)`; `all`: all K. The sides' `h w` may differ; another P or K is a ValueError.
    """
    _check_choice("mask_select", mode, MASK_SELECTS)
    _check_same("dense_mask_logits", student.shape[:2], teacher.shape[:2], "prompts and masks")
    if mode == "all" or student.shape[1] == 1:
        return student, teacher
    theirs = teacher_ious.detach().argmax(1)
    ours = theirs if mode == "teacher_best" else student_ious.detach().argmax(1)
    return _pick(student, ours), _pick(teacher, theirs)


@_full_precision
def task_loss(masks: Tensor, ious: Tensor, target: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """How far prompted masks are from the annotated ones: scalars `bce`, `focal`, `dice`, `iou` and their weighted sum
    `total`.

    masks: `(P, K, h, w)` logits. ious: `(P, K)`, as predicted. target: `(P, 1, h, w)` of zeros and ones. weights: of
    the four terms; one left out counts 0.

    Of several masks of a prompt the one with the least BCE + Dice is trained. Focal: alpha 0.25, gamma 2. Dice:
    `1 - (2 sum(p t) + e) / (sum p + sum t + e)` with e = 1e-6 (`sam3.engine.losses.mask_dice` has e = 1, which would
    excuse small masks). IoU: square error of every predicted IoU from that of the thresholded mask (Kirillov et al.
    2023, "Segment Anything").
    """
    if unknown := sorted(set(weights) - set(TASK_TERMS)):
        raise ValueError(f"no task loss is named {', '.join(unknown)}; there are {', '.join(TASK_TERMS)}")
    wanted = (len(masks), 1, *masks.shape[2:])
    if tuple(target.shape) != wanted:
        raise ValueError(f"masks {tuple(masks.shape)} need targets {wanted}, got {tuple(target.shape)}")
    masks, targets = masks.float(), target.float().expand_as(masks)
    valid = masks.new_ones(()).expand(wanted)
    bce, dice = mask_bce(masks, targets, valid), dice_loss(masks, targets)  # (P, K)
    found = mask_iou((masks > 0).flatten(0, 1), (targets > 0.5).flatten(0, 1)).view_as(ious)
    terms = {"iou": _mean((ious.float() - found).square())}
    if masks.shape[1] > 1:
        best = (bce + dice).detach().argmin(1)
        masks, bce, dice = _pick(masks, best), _pick(bce, best), _pick(dice, best)
    focal = mask_focal(masks, targets[:, :1], valid)
    terms |= {"bce": _mean(bce), "focal": _mean(focal), "dice": _mean(dice)}
    total = sum(weights.get(name, 0.0) * terms[name] for name in TASK_TERMS)
    return {"total": total, **{name: terms[name] for name in TASK_TERMS}}


@_full_precision
def foreground_loss(ious: Tensor, matched: Tensor) -> Tensor:
    """Whether a candidate is an object at all: BCE of its predicted IoU, taken as a probability, a mean over all.

    ious: `(P, K)` or `(P,)`; matched: bool, the same shape. An IoU outside `SURE .. 1 - SURE` counts as its nearest
    value inside, and gets no gradient.
    """
    _check_same("cls", ious.shape, matched.shape, "candidates")
    probability = ious.float().clamp(SURE, 1 - SURE)
    return _mean(F.binary_cross_entropy(probability, matched.float(), reduction="none"))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft Dice loss of each mask, see `task_loss`: `(P, K, h, w)` twice -> `(P, K)` in 0..1."""
    p = logits.sigmoid()
    overlap, total = (p * targets).sum((2, 3)), p.sum((2, 3)) + targets.sum((2, 3))
    return 1 - (2 * overlap + DICE_EPS) / (total + DICE_EPS)


def cosine_distance(first: Tensor, second: Tensor, mode: str = "pixel") -> Tensor:
    """`1 - cos` of `(B, C, H, W)`: over the channels of each cell `(B, H, W)`, or, `flat`, of each picture `(B,)`.

    `cos = <a, b> / max(|a| |b|, 1e-6)`.
    """
    if mode == "flat":
        first, second = first.flatten(1), second.flatten(1)
    norms = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    return 1 - (first * second).sum(1) / norms.clamp(min=COS_EPS)


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no tensor holds NaN or infinity: a bool scalar on their device, read when it suits the caller."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def _weighted(
    student: Tensor, terms: Mapping[str, tuple[float, Callable[[], Tensor]]], spread: Tensor | None = None
) -> Parts:
    """Computes the terms whose weight is not 0, and their weighted sum."""
    parts = {name: term() for name, (weight, term) in terms.items() if weight}
    total = sum((terms[name][0] * part for name, part in parts.items()), student.new_zeros(()))
    return Parts(total, {name: part.detach() for name, part in parts.items()}, spread)


def _comparable(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type of full precision, the teacher's maps at the student's size; ValueError for other mismatches."""
    if student.ndim != teacher.ndim:
        raise ValueError(f"{name}: the student has {tuple(student.shape)}, the teacher {tuple(teacher.shape)}")
    _check_same(name, student.shape[:1], teacher.shape[:1], "pictures or prompts")
    what = {"decoder_mask_token": "tokens", "dense_mask_logits": "masks"}.get(name, "channels")
    _check_same(name, student.shape[1:2], teacher.shape[1:2], what)
    dtype = torch.promote_types(torch.promote_types(student.dtype, torch.float32), teacher.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        teacher = F.interpolate(teacher, student.shape[2:], mode="bilinear", align_corners=False)
    _check_same(name, student.shape[2:], teacher.shape[2:], "channels")
    return student, teacher


def _mean_of_pictures(values: Tensor, sizes: Tensor | None) -> Tensor:
    """values: `(P, K, h, w)`, sizes: see `dense_mask_logits_loss`; the mean over pixels that count, then over masks."""
    if sizes is None:
        return _mean(values)
    _check_same("dense_mask_logits", values.shape[:1], sizes.shape[:1], "prompts")
    sides = (sizes.to(values.device, torch.int64) + MASK_STRIDE - 1) // MASK_STRIDE  # (P, 2), rounded up
    steps = (torch.arange(side, device=values.device) for side in values.shape[2:])
    rows, columns = (step < side[:, None] for step, side in zip(steps, sides.unbind(1), strict=True))
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # (P, 1, h, w)
    return _mean(torch.where(inside, values, 0).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1))


def _pick(values: Tensor, column: Tensor) -> Tensor:
    """One column of each row: `(P, K, ...)` and `(P,)` -> `(P, 1, ...)`."""
    return values[torch.arange(len(values), device=values.device), column].unsqueeze(1)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")


def _check_same(name: str, ours: Iterable[int], theirs: Iterable[int], what: str) -> None:
    if tuple(ours) != tuple(theirs):
        raise ValueError(f"{name}: the student has {_said(ours)} {what}, the teacher {_said(theirs)}")


def _said(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))
