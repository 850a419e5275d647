"""Drawing: colours differ, masks tint what they cover, odd boxes do not stop it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3.visualize import (
    answer_panel,
    distinct_colors,
    draw_objects,
    object_color,
    overlay_masks,
    overlay_prompts,
    picture_table,
    prompt_panels,
    table_rows,
)


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


def test_overlay_of_objects_by_id():
    frame = np.full((40, 60, 3), 100, dtype=np.uint8)
    first, second, absent = (np.zeros((40, 60), dtype=bool) for _ in range(3))
    first[20:36, 10:30] = True
    second[30:40, 20:50] = True
    drawn = overlay_masks(frame, {3: first, 8: second, 5: absent}, show_ids=False)
    assert (drawn[25, 15] == (50 + 0.5 * object_color(3)).astype(np.uint8)).all()
    assert (drawn[20, 12] == object_color(3)).all(), "the contour is solid"
    assert (drawn[33, 20] == object_color(8)).all(), "the later object lies on top"
    assert (drawn[39, 40] == object_color(8)).all(), "the picture's edge closes a contour"
    changed = (drawn != 100).any(-1)
    assert (changed == (first | second)).all()
    assert (frame == 100).all(), "the frame itself is left alone"
    assert (object_color(3) == distinct_colors(5)[3]).all(), "a colour depends on the id alone"
    labelled = overlay_masks(frame, {3: first, 5: absent})
    assert (labelled[20:34, 10:18] == 0).all(-1).any(), "the id stands on black"
    assert (overlay_masks(frame, {5: absent}) == frame).all()


def test_overlay_has_thicker_contours_on_larger_frames():
    mask = np.zeros((800, 900), dtype=bool)
    mask[100:300, 100:300] = True
    drawn = overlay_masks(np.zeros((800, 900, 3), dtype=np.uint8), {1: mask}, opacity=0, show_ids=False)
    assert drawn.any(-1)[200].nonzero()[0].tolist() == [100, 101, 298, 299]


def test_overlay_refuses_masks_of_another_size():
    with pytest.raises(ValueError, match=r"mask of object 2 has the shape \(4, 5\), its frame \(40, 60\)"):
        overlay_masks(np.zeros((40, 60, 3), dtype=np.uint8), {2: np.ones((4, 5), dtype=bool)})


def test_overlay_of_prompts():
    frame = np.full((90, 120, 3), 100, dtype=np.uint8)
    drawn = overlay_prompts(frame, 4, [(20, 30), (90.5, 60)], [1, 0], [(40, 40, 70, 500)])
    assert (drawn[30, 20] == 255).all()
    assert (drawn[60, 90] == 0).all()
    assert (drawn[60, 40] == object_color(4)).all()
    assert (drawn[89, 50] == object_color(4)).all(), "the box is brought onto the picture"
    assert (frame == 100).all()
    assert (overlay_prompts(frame, 4) == frame).all()


def test_answers_fill_their_column_of_a_table():
    frame = np.full((50, 100, 3), 100, dtype=np.uint8)
    mask = np.zeros((50, 100), dtype=bool)
    mask[20:40, 60:90] = True
    plain = answer_panel(frame, {}, width=204)
    assert plain.size == (200, 100)
    assert np.all(np.asarray(plain) == 100)
    drawn = answer_panel(frame, {3: mask}, width=204, text="red star", note="IoU 0.50", point=np.array([10.5, 25.0]))
    pixels = np.asarray(drawn)
    assert (pixels[60, 150] == ((100 + object_color(3).astype(int)) / 2).astype(int)).all()
    assert (pixels[50, 21] == 255).all()
    assert (pixels[:26, :60] == 0).any() and (pixels[-26:, :60] == 0).any()  # the words' background
    assert (frame == 100).all()
    rows = table_rows([[plain, drawn], [plain.resize((200, 40)), plain]], 204)
    assert rows == [
        {"top": 26, "height": 100, "width": 200, "step": 204},
        {"top": 26 + 100 + 4, "height": 100, "width": 200, "step": 204},
    ]
    sheet = np.asarray(picture_table([[plain, drawn], [plain.resize((200, 40)), plain]], ["a", "b"], 204))
    assert (sheet[26:126, 204:404] == pixels).all()
