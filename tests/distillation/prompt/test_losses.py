"""The four distillation losses against numbers worked out by hand, and their gradients by formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.prompt.losses import (
    all_finite,
    cosine_distance,
    dense_mask_logits_loss,
    encoder_patch_loss,
    mask_token_loss,
    prompt_embed_loss,
    select_masks,
)
from distillation.prompt.projection import make_projection

LOG3 = math.log(3)  # sigmoid(log 3) = 3/4
SHAPES = {
    encoder_patch_loss: (2, 6, 4, 4),
    prompt_embed_loss: (2, 6, 4, 4),
    mask_token_loss: (2, 4, 6),
    dense_mask_logits_loss: (2, 1, 8, 8),
}
LOSSES = list(SHAPES)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(loss: Callable, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(*SHAPES[loss], dtype=dtype).requires_grad_(), normal(*SHAPES[loss], seed=1, dtype=dtype)


def cell(*values: float) -> Tensor:
    """One picture of one cell: `(1, C, 1, 1)`."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


# -- encoder_patch


def test_encoder_patch_by_hand() -> None:
    """(3, 4) against (4, 3): squares 1 and 1, cosine 24 / 25."""
    parts = encoder_patch_loss(cell(3, 4), cell(4, 3), w_l2=2.0, w_cos=10.0)
    assert parts.parts["mse"].item() == pytest.approx(1.0)
    assert parts.parts["cos"].item() == pytest.approx(0.04)
    assert parts.total.item() == pytest.approx(2 * 1.0 + 10 * 0.04)
    assert parts.spread is None


def test_cosine_of_cells_and_of_the_whole_picture() -> None:
    """Two cells, (1, 0) and (0, 2), against (1, 0) twice: cosines 1 and 0; as a whole 1 / (sqrt 5 sqrt 2)."""
    ours = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)  # channels, then cells
    theirs = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    assert encoder_patch_loss(ours, theirs, 0, 1).total.item() == pytest.approx(0.5)
    flat = encoder_patch_loss(ours, theirs, 0, 1, cos_mode="flat").total.item()
    assert flat == pytest.approx(1 - 1 / math.sqrt(10))


def test_the_cosine_of_nothing_is_defined() -> None:
    zero = torch.zeros(1, 4, 1, 1, requires_grad=True)
    loss = cosine_distance(zero, cell(1, 0, 0, 0)).sum()
    loss.backward()
    assert loss.item() == 1.0
    assert zero.grad.isfinite().all()


def test_the_projection_is_taught_and_the_teacher_is_not() -> None:
    ours, theirs = normal(2, 3, 4, 4, dtype=torch.float32).requires_grad_(), normal(2, 5, 4, 4, dtype=torch.float32)
    theirs.requires_grad_()
    projection = make_projection("learned", 5, 3)
    parts = encoder_patch_loss(ours, theirs, w_cos=0.0, projection=projection)
    parts.total.backward()
    assert theirs.grad is None
    assert projection.weight.grad.abs().sum() > 0
    # The gradient to what it gives is minus that of the student's side; its bias gathers it over cells.
    torch.testing.assert_close(projection.bias.grad, -ours.grad.sum((0, 2, 3)))
    spread = projection(theirs).std((0, 2, 3), correction=0).min()
    torch.testing.assert_close(parts.spread, spread.detach())


# -- prompt_embed


def test_prompt_embed_by_hand() -> None:
    """Lengths do not count: (3, 4) and (8, 6) are (0.6, 0.8) and (0.8, 0.6); cosine 0.96."""
    parts = prompt_embed_loss(cell(3, 4), cell(8, 6))
    assert parts.parts["mse"].item() == pytest.approx(0.04)
    assert parts.parts["cos"].item() == pytest.approx(0.04)
    assert parts.total.item() == pytest.approx(0.7 * 0.04 + 0.3 * 0.04)
    summed = prompt_embed_loss(cell(3, 4), cell(8, 6), mse_reduction="sum_channels")
    assert summed.parts["mse"].item() == pytest.approx(0.08)


def test_the_square_error_of_unit_vectors_is_their_cosine() -> None:
    """2 (1 - cos) / C, so that with 256 channels the whole loss is 0.7 * 2 / 256 + 0.3 = 0.30547 times 1 - cos."""
    ours, theirs = normal(2, 256, 3, 3), normal(2, 256, 3, 3, seed=1)
    parts = prompt_embed_loss(ours, theirs)
    torch.testing.assert_close(parts.parts["mse"], 2 * parts.parts["cos"] / 256)
    torch.testing.assert_close(parts.total, (0.7 * 2 / 256 + 0.3) * parts.parts["cos"])
    summed = prompt_embed_loss(ours, theirs, mse_reduction="sum_channels")
    torch.testing.assert_close(summed.parts["mse"], 2 * summed.parts["cos"])
    flat = prompt_embed_loss(ours, theirs * torch.arange(1, 10).view(3, 3), cos_mode="flat")
    assert abs(flat.parts["mse"] - 2 * flat.parts["cos"] / 256) > 1e-5


# -- decoder_mask_token


def test_mask_tokens_by_hand() -> None:
    """The teacher's (3/4, 1/4) against (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2, at temperature 1 and 1/2."""
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    ours, theirs = torch.zeros(1, 1, 2), torch.tensor([[[LOG3, 0.0]]])
    assert mask_token_loss(ours, theirs, temperature=1.0).total.item() == pytest.approx(kl)
    assert mask_token_loss(ours, theirs / 2, w_kl=3.0).total.item() == pytest.approx(3 * kl)
    assert mask_token_loss(ours, theirs / 2, tau_squared=True).total.item() == pytest.approx(kl / 4)
    swapped = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert mask_token_loss(theirs, ours, temperature=1.0).total.item() == pytest.approx(swapped)


def test_mask_tokens_may_be_summed() -> None:
    ours, theirs = pair(mask_token_loss)
    mean, summed = (mask_token_loss(ours, theirs, reduction=how).total for how in ("token_mean", "batchmean"))
    torch.testing.assert_close(summed, 4 * mean)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature .* must be above 0"):
        mask_token_loss(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), temperature=temperature)


# -- dense_mask_logits


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def test_dense_masks_by_hand() -> None:
    """p_t = 3/4, p_s = 1/2."""
    parts = dense_mask_logits_loss(pixel(0.0), pixel(LOG3))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    focal = (0.75 + 0.25) * 0.25 * math.log(2)
    assert parts.parts["kl"].item() == pytest.approx(kl)
    assert parts.parts["focal"].item() == pytest.approx(focal)
    assert parts.total.item() == pytest.approx(0.6 * kl + 0.4 * focal)


def test_positive_forms_have_the_first_part_alone() -> None:
    parts = dense_mask_logits_loss(pixel(LOG3), pixel(0.0), kl_form="positive", focal_form="positive", gamma=1.0)
    assert parts.parts["kl"].item() == pytest.approx(0.5 * math.log(0.5 / 0.75))  # below 0
    assert parts.parts["focal"].item() == pytest.approx(0.5 * 0.25 * -math.log(0.75))


def test_hard_targets_give_the_usual_focal_loss() -> None:
    from torchvision.ops import sigmoid_focal_loss

    ours, hard = normal(2, 1, 4, 4), (normal(2, 1, 4, 4, seed=1) > 0).double()
    focal = dense_mask_logits_loss(ours, hard * 200 - 100, w_kl=0, w_focal=1).total
    torch.testing.assert_close(focal, sigmoid_focal_loss(ours, hard, alpha=-1, gamma=2, reduction="mean"))


def test_dense_masks_of_sure_models_are_finite_and_not_negative() -> None:
    ours = torch.tensor([300.0, -300.0, 40.0, -20.0, 0.0, 90.0]).view(1, 1, 2, 3).requires_grad_()
    theirs = torch.tensor([-300.0, -300.0, 41.0, -10.0, 500.0, 90.0]).view(1, 1, 2, 3)
    parts = dense_mask_logits_loss(ours, theirs, gamma=0.5)
    parts.total.backward()
    assert parts.total.isfinite()
    assert ours.grad.isfinite().all()
    for x, y in zip(ours.flatten(), theirs.flatten(), strict=True):
        assert dense_mask_logits_loss(x.view(1, 1, 1, 1), y.view(1, 1, 1, 1), w_focal=0).total >= 0


def test_only_the_picture_counts_where_sizes_are_given() -> None:
    """A picture of 5 x 16 pixels in a square of 16 covers 2 x 4 of 4 x 4 mask pixels, one of 9 x 1 three of one column;
    both count alike."""
    ours, theirs = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    found = dense_mask_logits_loss(ours, theirs, sizes=torch.tensor([[5, 16], [9, 1]])).total
    first = dense_mask_logits_loss(ours[:1, :, :2], theirs[:1, :, :2]).total
    second = dense_mask_logits_loss(ours[1:, :, :3, :1], theirs[1:, :, :3, :1]).total
    torch.testing.assert_close(found, (first + second) / 2)
    with pytest.raises(ValueError, match="2 prompts, the teacher 1"):
        dense_mask_logits_loss(ours, theirs, sizes=torch.tensor([[5, 16]]))


def test_selected_masks() -> None:
    ours = torch.arange(6.0).view(2, 3, 1, 1)
    theirs = ours.expand(2, 3, 2, 2) + 10
    our_ious, their_ious = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.2, 0.9]]), torch.tensor([[0.1, 0.9, 0.2]] * 2)
    same = select_masks(ours, theirs, our_ious, their_ious)
    assert [side[:, 0, 0, 0].tolist() for side in same] == [[1, 4], [11, 14]]
    own = select_masks(ours, theirs, our_ious, their_ious, "independent_best")
    assert [side[:, 0, 0, 0].tolist() for side in own] == [[0, 5], [11, 14]]
    assert select_masks(ours, theirs, our_ious, their_ious, "all") == (ours, theirs)
    single = select_masks(ours[:, :1], theirs[:, :1], our_ious[:, :1], their_ious[:, :1])
    assert [side.shape for side in single] == [(2, 1, 1, 1), (2, 1, 2, 2)]
    with pytest.raises(ValueError, match="student has 2 x 3 prompts and masks, the teacher 2 x 1"):
        select_masks(ours, theirs[:, :1], our_ious, their_ious[:, :1])


# -- all four


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_sides_have_no_loss(loss: Callable) -> None:
    ours, _ = pair(loss, torch.float32)
    parts = loss(ours, ours.detach().clone())
    assert abs(parts.parts["kl"] if loss is dense_mask_logits_loss else parts.total) <= 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss: Callable) -> None:
    ours, theirs = pair(loss)
    theirs.requires_grad_()
    loss(ours, theirs).total.backward()
    assert theirs.grad is None
    assert ours.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_another_batch_is_refused(loss: Callable) -> None:
    ours, theirs = pair(loss)
    for wrong in (theirs[:1], theirs[:, :1] if loss is not dense_mask_logits_loss else theirs.repeat(1, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"the student has .*, the teacher"):
            loss(ours, wrong)
    with pytest.raises(ValueError, match="the student has"):
        loss(ours, theirs[0])


@pytest.mark.parametrize("loss", [encoder_patch_loss, prompt_embed_loss, dense_mask_logits_loss])
def test_the_teacher_is_brought_to_the_students_size(loss: Callable) -> None:
    ours, theirs = pair(loss)
    large = normal(*theirs.shape[:2], 6, 6, seed=2)
    small = F.interpolate(large, ours.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(loss(ours, large).total, loss(ours, small).total, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_full_precision(loss: Callable) -> None:
    ours, theirs = pair(loss)
    assert loss(ours, theirs).total.dtype == torch.float64
    halves = ours.detach().bfloat16(), theirs.half()
    widened = loss(*(half.float() for half in halves))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*halves)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, widened.total, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_compare_is_no_loss(loss: Callable) -> None:
    ours, theirs = pair(loss)
    total = loss(ours[:0], theirs[:0]).total
    total.backward()
    assert total.item() == 0
    assert torch.equal(ours.grad, torch.zeros_like(ours))


def test_parts_of_weight_0_are_left_out() -> None:
    ours, theirs = pair(encoder_patch_loss)
    assert set(encoder_patch_loss(ours, theirs, w_cos=0).parts) == {"mse"}
    nothing = encoder_patch_loss(ours, theirs, 0, 0)
    assert nothing.parts == {}
    assert nothing.total.item() == 0


def test_all_finite() -> None:
    good, bad = torch.zeros(3), torch.tensor([0.0, float("inf")])
    assert all_finite([good, good.half()]).item() is True
    assert all_finite([good, bad]).item() is False
    assert all_finite([bad * float("nan"), good]).item() is False
    assert all_finite([good]).shape == ()


@pytest.mark.parametrize(
    ("loss", "option", "message"),
    [
        (encoder_patch_loss, {"cos_mode": "row"}, "cos_mode 'row' is unknown; choose one of pixel, flat"),
        (prompt_embed_loss, {"mse_reduction": "sum"}, "choose one of mean, sum_channels"),
        (mask_token_loss, {"reduction": "mean"}, "choose one of token_mean, batchmean"),
        (dense_mask_logits_loss, {"kl_form": "both"}, "choose one of bernoulli, positive"),
        (dense_mask_logits_loss, {"focal_form": "both"}, "choose one of symmetric, positive"),
    ],
)
def test_unknown_options(loss: Callable, option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(*pair(loss), **option)


# -- gradients by formula, in float64


def gradient(loss: Callable, ours: Tensor, theirs: Tensor, *args, **kwargs) -> Tensor:
    return torch.autograd.grad(loss(ours, theirs, *args, **kwargs).total, ours)[0]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_gradient_of_the_square_error() -> None:
    ours, theirs = pair(encoder_patch_loss)
    close(gradient(encoder_patch_loss, ours, theirs, 1.0, 0.0), 2 * (ours - theirs) / ours.numel())


@pytest.mark.parametrize("loss", [encoder_patch_loss, prompt_embed_loss])
def test_gradient_of_the_cosine(loss: Callable) -> None:
    ours, theirs = pair(loss)
    unit_s, unit_t = ours / ours.norm(dim=1, keepdim=True), theirs / theirs.norm(dim=1, keepdim=True)
    cos = (unit_s * unit_t).sum(1, keepdim=True)
    wanted = -(unit_t - cos * unit_s) / ours.norm(dim=1, keepdim=True) / cos.numel()
    close(gradient(loss, ours, theirs, 0.0, 1.0), wanted)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_of_the_tokens(temperature: float) -> None:
    ours, theirs = pair(mask_token_loss)
    wanted = (ours / temperature).softmax(-1) - (theirs / temperature).softmax(-1)
    close(gradient(mask_token_loss, ours, theirs, 1.0, temperature), wanted / (temperature * 2 * 4))


def test_gradient_of_the_pixels_kl() -> None:
    ours, theirs = pair(dense_mask_logits_loss)
    wanted = (ours.sigmoid() - theirs.sigmoid()) / ours.numel()
    close(gradient(dense_mask_logits_loss, ours, theirs, 1.0, 0.0), wanted)


@pytest.mark.parametrize("g", [0.5, 2.0, 3.0])
def test_gradient_of_the_pixels_focal_loss(g: float) -> None:
    ours, theirs = pair(dense_mask_logits_loss)
    p, t = ours.sigmoid(), theirs.sigmoid()
    yes = t * (1 - p) ** g * (g * p * p.log() - (1 - p))
    no = (1 - t) * p**g * (p - g * (1 - p) * (1 - p).log())
    close(gradient(dense_mask_logits_loss, ours, theirs, 0.0, 1.0, g), (yes + no) / ours.numel())
