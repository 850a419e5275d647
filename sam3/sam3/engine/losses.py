"""Pure functions from tensors to losses; all are computed in float32, whatever comes in.

Autocast changes nothing here: it lowers matrix products, and there are none.

Letters: `B` images, `C` channels, `H W` rows and columns of the embedding grid or of a mask, `R` prompt rows, `K` masks
of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

MSE_REDUCTIONS = ("channel_mean", "channel_sum")
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


def build_valid_mask(sizes: Tensor, img_size: int, grid: int) -> Tensor:
    """Which cells of the grid look at the picture rather than at the padding.

    sizes: `(B, 2)` integer rows and columns of each picture inside its `img_size` square.
    Returns float `(B, 1, grid, grid)`, ones in a top-left block, zeros elsewhere.

    A cell is valid if ones over the picture, resized bilinearly (no antialias) to the grid, exceed 0.5 there along both
    axes. The centre of row i lies at `(i + 1/2) img_size / grid - 1/2` and the ones fall to 0.5 at `h - 1/2`, which
    leaves `ceil(h grid / img_size - 1/2)` rows: for 1008 -> 72 `(h + 6) // 14`. No plane of `img_size` is ever built.
    """
    valid = (2 * grid * sizes.to(torch.int64) + img_size - 1) // (2 * img_size)  # (B, 2), the ceiling in integers
    steps = torch.arange(grid, device=sizes.device)
    rows = steps < valid[:, :1]  # (B, grid)
    columns = steps < valid[:, 1:]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1).float()


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor, reduction: str = "channel_mean") -> Tensor:
    """Squared error over the valid cells of each image, then the mean over images: a scalar.

    prediction, target: `(B, C, H, W)`; mask: `(B, 1, H, W)` of zeros and ones.
    `channel_mean`: sum over C, H, W of (p - t)^2 m / (C max(1, sum m)), a true mean per element.
    `channel_sum`: the same without the C below, C times as large.
    """
    return masked_mse_per_image(prediction, target, mask, reduction).mean()


def masked_mse_per_image(prediction: Tensor, target: Tensor, mask: Tensor, reduction: str = "channel_mean") -> Tensor:
    """The terms of `masked_mse`, one of each image: `(B,)`; 0 where nothing is valid."""
    if reduction not in MSE_REDUCTIONS:
        raise ValueError(f"MSE reduction {reduction!r} is unknown; choose one of {', '.join(MSE_REDUCTIONS)}")
    error = (prediction.float() - target.float()).square().sum(1, keepdim=True)  # (B, 1, H, W)
    if reduction == "channel_mean":
        error = error / prediction.shape[1]
    return _mean_over_valid(error, mask)[:, 0]


def masked_cosine(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """One minus the cosine of the channel vectors, over the valid cells of each image, then over images: a scalar."""
    return (1 - masked_cosine_per_image(prediction, target, mask)).mean()


def masked_cosine_per_image(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine similarity of the channel vectors over the valid cells: `(B,)` in -1..1; 1 where nothing is valid."""
    distance = 1 - F.cosine_similarity(prediction.float(), target.float(), dim=1, eps=1e-8).unsqueeze(1)
    return 1 - _mean_over_valid(distance, mask)[:, 0]


@torch.no_grad()
def mask_targets(
    teacher_logits: Tensor, temperature: float = 1.0, hard: bool = False, threshold: float = 0.0
) -> Tensor:
    """What a student's masks are to become: float32 probabilities in 0..1, shape of `teacher_logits`, no gradient.

    Soft: `sigmoid(teacher / temperature)`; the student's logits go into the losses divided by the same temperature
    (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). Hard: 1 where `teacher > threshold`, else 0.
    """
    if hard:
        return (teacher_logits > threshold).float()
    return (teacher_logits.float() / temperature).sigmoid_()


def mask_bce(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy of each mask, a mean over its own valid pixels: `(R, K)`, 0 where nothing is valid.

    logits: `(R, K, H, W)`; targets: the same in 0..1; valid: `(R, 1, H, W)` of zeros and ones.
    `-(t log p + (1 - t) log(1 - p))` with `p = sigmoid(logit)`, computed from the logit and thus finite for any. With
    soft targets its least value is their entropy, not 0.
    """
    _check_masks(logits, targets, valid)
    # The weight is multiplied in place, forward and backward: no further tensor of the masks' size.
    weight = valid.float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), weight, reduction="none")
    return loss.sum((2, 3)) / weight.sum((2, 3)).clamp(min=1)


def mask_dice(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Soft dice loss of each mask over its own valid pixels: `(R, K)` in 0..1, 0 where nothing is valid.

    logits: `(R, K, H, W)`; targets: the same in 0..1; valid: `(R, 1, H, W)` of zeros and ones.
    `1 - (2 sum(p t) + 1) / (sum p + sum t + 1)` with `p = sigmoid(logit)` (Milletari et al. 2016, V-Net, without its
    squares in the denominator; the ones keep empty masks defined). With soft targets it is not 0 at `p = t`.
    """
    _check_masks(logits, targets, valid)
    valid = valid.float()
    # Targets meet p only after padding has left it, so that the backward pass keeps no masked copy of them.
    p = logits.float().sigmoid() * valid
    overlap = (p * targets).sum((2, 3))
    total = p.sum((2, 3)) + (targets * valid).sum((2, 3))
    return 1 - (2 * overlap + 1) / (total + 1)


def mask_focal(
    logits: Tensor, targets: Tensor, valid: Tensor, alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA
) -> Tensor:
    """Focal loss of each mask, a mean over its own valid pixels: `(R, K)`, 0 where nothing is valid.

    logits: `(R, K, H, W)`; targets: the same in 0..1; valid: `(R, 1, H, W)` of zeros and ones.
    `a (1 - q)^gamma bce` with `q = p t + (1 - p)(1 - t)` and `a = alpha t + (1 - alpha)(1 - t)` (Lin et al. 2017,
    "Focal Loss for Dense Object Detection", whose t is 0 or 1; soft targets mix the two linearly).
    """
    _check_masks(logits, targets, valid)
    loss = sigmoid_focal_loss(logits.float(), targets.float(), alpha, gamma, reduction="none")
    return _mean_over_valid(loss, valid.float())


def mask_soft_iou(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """One minus the soft IoU of each mask over its own valid pixels: `(R, K)` in 0..1, 0 where nothing is valid.

    logits: `(R, K, H, W)`; targets: the same in 0..1; valid: `(R, 1, H, W)` of zeros and ones.
    `1 - (sum(p t) + 1) / (sum p + sum t - sum(p t) + 1)` with `p = sigmoid(logit)`.
    """
    _check_masks(logits, targets, valid)
    valid = valid.float()
    p = logits.float().sigmoid() * valid
    overlap = (p * targets).sum((2, 3))
    total = p.sum((2, 3)) + (targets * valid).sum((2, 3))
    return 1 - (overlap + 1) / (total - overlap + 1)


def _mean_over_valid(values: Tensor, mask: Tensor) -> Tensor:
    """values: `(B, K, H, W)`, mask: `(B, 1, H, W)` -> `(B, K)`: sum of values where the mask is one, over its ones."""
    return (values * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)


def _check_masks(logits: Tensor, targets: Tensor, valid: Tensor) -> None:
    """Broadcasting would take a mask of another row without a word."""
    assert targets.shape == logits.shape, f"targets {tuple(targets.shape)} for logits {tuple(logits.shape)}"
    wanted = (len(logits), 1, *logits.shape[2:])
    assert valid.shape == wanted, f"valid is {tuple(valid.shape)}, wanted {wanted}"
