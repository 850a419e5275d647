"""Refinement points on small maps whose errors are known."""

from __future__ import annotations

import pytest
import torch

from sam3.model.geometry_encoders import Prompt
from stage1_geometry_finetune.refinement import sample_error_points

SIDE = 8


def logits(*pixels: tuple[int, int], side: int = SIDE) -> torch.Tensor:
    """(1, side, side): 3 on the given (row, column), -3 elsewhere."""
    plane = torch.full((1, side, side), -3.0)
    for row, column in pixels:
        plane[0, row, column] = 3.0
    return plane


def block(rows: range, columns: range) -> torch.Tensor:
    return logits(*((row, column) for row in rows for column in columns))


EMPTY = logits()
EVERYWHERE = torch.ones(1, SIDE, SIDE, dtype=torch.bool)


def sample(student, teacher, uniforms, count=None, valid=EVERYWHERE, threshold=0.0):
    uniforms = torch.tensor([uniforms])
    counts = torch.tensor([uniforms.shape[1] if count is None else count])
    return sample_error_points(student, teacher, valid, uniforms, counts, threshold)


def test_a_missed_region_is_clicked_as_object():
    teacher = block(range(1, 3), range(2, 7))  # 10 pixels
    points, labels, mask = sample(EMPTY, teacher, [0.0])
    assert points.tolist() == [[[2.5 / 8, 1.5 / 8]]]  # x, y of row 1, column 2
    assert labels.tolist() == [[1]] and labels.dtype == torch.int64
    assert mask.tolist() == [[False]]


def test_a_region_too_much_is_clicked_as_background():
    student = block(range(1, 3), range(2, 7))
    points, labels, mask = sample(student, EMPTY, [0.55])  # rank 5 of 0..9: row 2, column 2
    assert points.tolist() == [[[2.5 / 8, 2.5 / 8]]]
    assert labels.tolist() == [[0]] and mask.tolist() == [[False]]


def test_both_kinds_of_error_in_one_map():
    student = block(range(2), range(5))  # pixels 0..9 are too much
    teacher = block(range(6, 8), range(3, 8))  # 10 pixels are missed
    points, labels, mask = sample(student, teacher, [0.0, 0.999999])
    assert labels.tolist() == [[0, 1]]
    assert points.tolist() == [[[0.5 / 8, 0.5 / 8], [7.5 / 8, 7.5 / 8]]]  # first and last error
    assert not mask.any()


def test_common_pixels_are_no_errors():
    student, teacher = block(range(4), range(5)), block(range(2, 6), range(5))
    points, labels, _ = sample(student, teacher, [0.49, 0.51])
    # 20 errors: rows 0, 1 (ranks 0..9) and rows 4, 5; rows 2, 3 are in both masks
    assert points[0, :, 1].tolist() == [1.5 / 8, 4.5 / 8]
    assert labels.tolist() == [[0, 1]]


@pytest.mark.parametrize(("errors", "count", "given"), [(9, 1, 0), (10, 1, 1), (19, 2, 0), (20, 2, 2), (20, 3, 0)])
def test_ten_errors_for_every_point(errors: int, count: int, given: int):
    teacher = logits(*((index // SIDE, index % SIDE) for index in range(errors)))
    points, labels, mask = sample(EMPTY, teacher, [0.1, 0.5, 0.9], count)
    assert mask.tolist() == [[slot >= given for slot in range(3)]]
    assert labels.tolist() == [[int(slot < given) for slot in range(3)]]
    assert points[0, given:].abs().sum() == 0


def test_no_points_wanted():
    assert sample(EMPTY, block(range(8), range(8)), [0.1, 0.5], count=0)[2].all()


def test_masks_that_agree_give_nothing():
    teacher = block(range(2, 6), range(2, 6))
    points, labels, mask = sample(2 * teacher, teacher, [0.0, 0.5, 0.999999])
    assert mask.all() and not points.any() and not labels.any()


def test_padding_gives_no_points():
    valid = EVERYWHERE.clone()
    valid[:, 4:] = False
    teacher = block(range(8), range(5))  # 20 errors on the picture, 20 in padding
    points, _, mask = sample(EMPTY, teacher, [0.0, 0.999999], valid=valid)
    assert not mask.any()
    assert points.tolist() == [[[0.5 / 8, 0.5 / 8], [4.5 / 8, 3.5 / 8]]]
    assert sample(EMPTY, teacher, [0.0, 0.5, 0.9], valid=valid)[2].all()  # 20 < 3 * 10


def test_threshold_binarises_both():
    teacher = block(range(2), range(5))
    assert sample(EMPTY, teacher, [0.5], threshold=3.0)[2].all()  # 3 does not exceed 3
    assert sample(EMPTY, teacher, [0.5], threshold=-4.0)[2].all()  # everything is mask in both
    assert not sample(EMPTY, teacher, [0.5], threshold=2.9)[2].any()


def test_every_error_pixel_of_a_full_mask_is_reached_once():
    """288 x 288 errors and as many evenly spaced uniforms: each pixel comes up exactly once, in order."""
    side = 288
    pixels = torch.arange(side * side)
    uniforms = ((pixels.double() + 0.5) / (side * side)).float()[None]
    plane = torch.ones(1, side, side, dtype=torch.bool)
    found = []
    # A tenth at a time: more points than that are refused.
    for part in uniforms.split(side * side // 10, dim=1):
        counts = torch.tensor([part.shape[1]])
        points, labels, mask = sample_error_points(-plane.float(), plane.float(), plane, part, counts, 0.0)
        assert labels.all() and not mask.any()
        found.append(points[0])
    x, y = (torch.cat(found) * side - 0.5).round().long().unbind(-1)
    assert torch.equal(y * side + x, pixels)


def test_the_last_float_below_one_hits_the_last_error():
    """0.99999994 times most counts rounds up to the count itself in float32."""
    last = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    for errors in (10, 33, 64):
        teacher = logits(*((index // SIDE, index % SIDE) for index in range(errors)))
        points, _, mask = sample(EMPTY, teacher, [last])
        assert not mask.any()
        assert points.tolist() == [[[((errors - 1) % SIDE + 0.5) / 8, ((errors - 1) // SIDE + 0.5) / 8]]]


def test_rows_have_their_own_errors_counts_and_numbers():
    teacher = torch.cat((block(range(2), range(5)), block(range(8), range(8)), EMPTY))
    student = torch.cat((EMPTY, EMPTY, block(range(4), range(5))))
    uniforms = torch.tensor([[0.0, 0.3, 0.6], [0.0, 0.5, 0.75], [0.5, 0.5, 0.5]])
    arguments = student, teacher, EVERYWHERE.expand(3, -1, -1), uniforms, torch.tensor([1, 3, 2]), 0.0
    points, labels, mask = sample_error_points(*arguments)
    assert mask.tolist() == [[False, True, True], [False, False, False], [False, False, True]]
    assert labels.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert points[1].tolist() == [[0.5 / 8, 0.5 / 8], [0.5 / 8, 4.5 / 8], [0.5 / 8, 6.5 / 8]]
    assert points[2].tolist() == [[0.5 / 8, 2.5 / 8]] * 2 + [[0, 0]]  # rank 10 of 20: row 2
    for first, second in zip(sample_error_points(*arguments), (points, labels, mask), strict=True):
        assert torch.equal(first, second)


def test_half_precision_logits_and_gradients_stay_out():
    teacher = block(range(2), range(5))
    student = EMPTY.clone().requires_grad_()
    points, labels, _ = sample(student.bfloat16(), teacher.half(), [0.95])
    assert not points.requires_grad and points.dtype == torch.float32
    assert points.tolist() == [[[4.5 / 8, 1.5 / 8]]] and labels.tolist() == [[1]]


def test_points_follow_the_valid_ones_of_a_prompt():
    """Two rows: the first has a point already, the second only padding."""
    prompt = Prompt(
        box_embeddings=torch.full((1, 2, 4), 0.5),
        point_embeddings=torch.tensor([[[0.3, 0.4], [0.0, 0.0]]]),
        point_labels=torch.tensor([[1, 0]]),
        point_mask=torch.tensor([[False], [True]]),
    )
    student = torch.cat((block(range(2), range(5)), EMPTY))
    teacher = torch.cat((EMPTY, block(range(4), range(5))))
    uniforms = torch.tensor([[0.0, 0.9], [0.0, 0.999]])
    points, labels, mask = sample_error_points(
        student, teacher, EVERYWHERE.expand(2, -1, -1), uniforms, torch.tensor([1, 2]), 0.0
    )
    prompt.append_points(points.transpose(0, 1), labels.T, mask)
    assert prompt.point_mask.tolist() == [[False, False, True], [False, False, True]]
    first, second = prompt.point_embeddings.transpose(0, 1)
    assert torch.equal(first, torch.tensor([[0.3, 0.4], [0.5 / 8, 0.5 / 8], [0, 0]]))
    assert torch.equal(second, torch.tensor([[0.5 / 8, 0.5 / 8], [4.5 / 8, 3.5 / 8], [0, 0]]))
    assert prompt.point_labels.T.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert prompt.box_mask.tolist() == [[False], [False]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    teacher = block(range(2), range(5))
    arguments = [part.cuda() for part in (EMPTY, teacher, EVERYWHERE, torch.tensor([[0.95]]), torch.tensor([1]))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        points, _, _ = sample_error_points(*arguments, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert points.tolist() == [[[4.5 / 8, 1.5 / 8]]]
