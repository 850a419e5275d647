"""Clips made of still pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3.engine.sa1b import annotation_path, read_annotations
from sam3.engine.static_clips import Motion, annotated_masks, draw_path, move, static_clip
from tests.parity.fill import image
from tests.samples import write_sa1b

STILL = Motion(0, 0, 0, 0)


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_shift_by_whole_pixels():
    maps = torch.arange(12.0).reshape(1, 3, 4)
    right_and_down = torch.tensor([[[1.0, 0, 1], [0, 1, 2]]])
    expected = torch.zeros(3, 4)
    expected[2, 1:] = maps[0, 0, :3]
    torch.testing.assert_close(move(maps, right_and_down)[0, 0], expected)


def test_a_quarter_turn():
    maps = torch.arange(9.0).reshape(1, 3, 3)
    # (x, y) -> (-y, x) about the middle pixel (1, 1): right goes down.
    turn = torch.tensor([[[0.0, -1, 2], [1, 0, 0]]])
    torch.testing.assert_close(move(maps, turn)[0, 0], torch.tensor([[6.0, 3, 0], [7, 4, 1], [8, 5, 2]]))


def test_the_path_begins_where_it_is_and_ends_within_the_limits():
    motion = Motion(rotation_deg=10, shear_deg=0, shift=0.1, scale=0.5)
    ends = []
    for seed in range(200):
        matrices = draw_path(5, (90, 120), motion, draw(seed))
        torch.testing.assert_close(matrices[0], torch.eye(2, 3))
        ends.append(matrices[-1].double())
    ends = torch.stack(ends)
    size = torch.linalg.det(ends[:, :, :2]).sqrt()
    angle = torch.rad2deg(torch.atan2(ends[:, 1, 0], ends[:, 0, 0]))
    middle = torch.tensor([59.5, 44.5, 1], dtype=torch.float64)
    shift = ends @ middle - middle[:2]
    assert 1 / 1.5 <= size.min() < 0.75 and 1.35 < size.max() <= 1.5001
    assert -10.001 <= angle.min() < -8 and 8 < angle.max() <= 10.001
    assert (shift.abs().max(0).values <= torch.tensor([12.001, 9.001])).all()
    assert (shift.abs().max(0).values > torch.tensor([10, 7])).all()


def test_the_way_is_even():
    matrices = draw_path(5, (90, 120), Motion(0, 0, 0.2, 0), draw())
    steps = matrices[1:, :, 2] - matrices[:-1, :, 2]
    torch.testing.assert_close(steps, steps[:1].expand(4, 2))
    assert steps.abs().min() > 0.1


def test_clip_of_a_picture():
    picture = torch.from_numpy(image(60, 80, seed=1)).permute(2, 0, 1)
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 10:30, 20:50] = True
    clip = static_clip(picture, masks, 4, draw())
    assert clip.frames.shape == (4, 3, 60, 80) and clip.frames.dtype == torch.uint8
    assert clip.masks.shape == (4, 2, 60, 80) and clip.masks.dtype == torch.bool
    assert torch.equal(clip.frames[0], picture) and torch.equal(clip.masks[0], masks)
    assert not torch.equal(clip.frames[3], picture) and not torch.equal(clip.masks[3], masks)
    assert not clip.masks[:, 1].any(), "an empty mask stays empty"
    again, other = static_clip(picture, masks, 4, draw()), static_clip(picture, masks, 4, draw(1))
    assert torch.equal(again.frames, clip.frames) and torch.equal(again.masks, clip.masks)
    assert not torch.equal(other.masks, clip.masks)


def test_masks_move_with_the_pixels():
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 20:40, 25:55] = True
    picture = (masks * 255).to(torch.uint8).expand(3, 60, 80)
    clip = static_clip(picture, masks, 6, draw(3))
    assert torch.equal(clip.frames[:, 0] > 191, clip.frames[:, 1] > 191)
    inside = clip.frames[:, :1] >= 192  # beyond the picture it is grey, 128
    assert (inside ^ clip.masks).float().mean() < 0.01
    assert clip.masks.sum((1, 2, 3)).min() > 300


def test_one_frame_and_no_motion():
    picture = torch.from_numpy(image(9, 7, seed=1)).permute(2, 0, 1)
    masks = torch.ones(1, 9, 7, dtype=torch.bool)
    assert torch.equal(static_clip(picture, masks, 1, draw()).frames[0], picture)
    still = static_clip(picture, masks, 3, draw(), STILL)
    assert all(torch.equal(frame, picture) for frame in still.frames) and still.masks.all()


def test_an_object_can_leave():
    masks = torch.zeros(1, 20, 40, dtype=torch.bool)
    masks[0, 5:10, 36:40] = True
    picture = torch.zeros(3, 20, 40, dtype=torch.uint8)
    gone = [static_clip(picture, masks, 2, draw(seed), Motion(0, 0, 0.5, 0)) for seed in range(8)]
    left = [clip for clip in gone if not clip.masks[1].any()]
    assert left and all((clip.frames[1] == 128).any() for clip in gone), "beyond the picture it is grey"


def test_masks_of_annotations(tmp_path):
    (key,) = write_sa1b(tmp_path, num_train=1, num_val=0, height=90, width=130)
    annotations = read_annotations(annotation_path(tmp_path, "train", key))
    masks = annotated_masks(annotations, [1])
    expected = torch.zeros(90, 130, dtype=torch.bool)
    expected[45 : 45 + 22, 65 : 65 + 43] = True
    assert torch.equal(masks, expected[None])
    assert annotated_masks(annotations, []).shape == (0, 90, 130)


def test_wrong_sizes():
    with pytest.raises(ValueError, match=r"the picture has \(4, 5\) rows and columns, its masks \(5, 4\)"):
        static_clip(torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(1, 5, 4, dtype=torch.bool), 2, draw())
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        draw_path(0, (4, 4), STILL, draw())
