"""Drawing: colours differ, masks tint what they cover, odd boxes do not stop it."""

from __future__ import annotations

import numpy as np
import torch

from sam3.visualize import distinct_colors, draw_objects, prompt_panels


def test_colors_differ():
    colors = distinct_colors(12).astype(int)
    gaps = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(12, dtype=int)
    assert gaps.min() > 40


def test_a_mask_tints_its_pixels_and_no_others():
    image, mask = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(1, 1, 40, 60, dtype=torch.bool)
    mask[..., 20:30, 30:50] = True
    drawn = np.asarray(draw_objects(image, mask, torch.tensor([[0.0, 0.0, 3.0, 3.0]]), torch.tensor([0.9])))
    color = distinct_colors(1)[0]
    assert (drawn[25, 40] == color // 2).all()
    assert (drawn[20, 40] == color).all(), "the outline is solid"
    assert not drawn[35, 55].any()
    assert (drawn[0, 0] == color).all(), "the box"
    assert not image.any(), "the picture itself is left alone"


def test_boxes_beyond_the_picture_and_no_objects_at_all():
    image = torch.full((3, 20, 30), 9, dtype=torch.uint8)
    boxes = torch.tensor([[-50.0, -5.0, 500.0, 90.0], [40.0, 30.0, 60.0, 50.0]])
    masks = torch.ones(2, 1, 20, 30, dtype=torch.bool)
    assert draw_objects(image, masks, boxes, torch.tensor([0.2, 0.8])).size == (30, 20)
    empty = draw_objects(image, masks[:0], boxes[:0], torch.zeros(0))
    assert (np.asarray(empty) == 9).all()


def test_panels_show_prompt_and_masks():
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    mask = torch.zeros(10, 15, dtype=torch.bool)
    mask[:5] = True  # the upper half, at a quarter of the resolution
    photo, masked = map(
        np.asarray, prompt_panels(image, [mask], torch.tensor([5.0, 30, 15, 38]), torch.tensor([50, 30]))
    )
    color = distinct_colors(1)[0]
    assert (photo[34, 5] == color).all(), "the box"
    assert (photo[30, 50] == 255).all(), "the point"
    assert (photo[10, 30] == 100).all()
    assert (masked[10, 30] == (50 + 0.5 * color).astype(np.uint8)).all()
    assert (masked[25, 30] == 100).all()
    assert (masked[30, 50] == 255).all()


def test_panels_without_prompt_and_masks():
    (photo,) = prompt_panels(torch.full((3, 8, 8), 7, dtype=torch.uint8), [])
    assert (np.asarray(photo) == 7).all()
