"""Augmentation: what moves moves alike, in all frames and masks; colours by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3.transforms import Preprocess
from stage2.data.augmentation import Augmentation, Change, Jitter, affine, apply, augment, draw_change, recolour
from stage2.data.batch import ABSENT, PRESENT, UNKNOWN
from stage2.data.clips import Scene
from stage2.data.mask_grid import grid_masks

HEIGHT, WIDTH, FRAMES = 40, 60, 4
PLAIN = Augmentation(0.0, 0.0, 0.0, Jitter(), Jitter(), 0.0)
WHITE, DARK = 250, 20


def scene(num_objects: int = 2, top: int = 8, left: int = 20) -> Scene:
    """Object i is a white block on a dark ground, a pixel further to the right in each frame."""
    masks = torch.zeros(num_objects, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    for i in range(num_objects):
        for t in range(FRAMES):
            masks[i, t, top + 12 * i : top + 12 * i + 10, left + t : left + t + 16] = True
    pictures = [torch.where(masks[:, t].any(0), WHITE, DARK).to(torch.uint8).expand(3, -1, -1) for t in range(FRAMES)]
    frames = [("video", 4 * t) for t in range(FRAMES)]
    return Scene(frames, pictures, masks, torch.full((num_objects, FRAMES), PRESENT))


def changed(augmentation: Augmentation, seed: int = 0, of: Scene | None = None) -> Scene:
    return augment(of or scene(), augmentation, np.random.default_rng(seed))


def test_nothing_asked_for_changes_nothing():
    found, wanted = changed(PLAIN), scene()
    assert torch.equal(found.masks, wanted.masks) and torch.equal(found.states, wanted.states)
    assert all(torch.equal(a, b) for a, b in zip(found.pictures, wanted.pictures, strict=True))


def test_a_flip_turns_pictures_and_masks():
    found, wanted = changed(Augmentation(1.0, 0.0, 0.0, Jitter(), Jitter(), 0.0)), scene()
    assert torch.equal(found.masks, wanted.masks.flip(-1))
    assert all(torch.equal(a, b.flip(-1)) for a, b in zip(found.pictures, wanted.pictures, strict=True))


def test_quarter_turn_and_shear_by_hand():
    turn = affine(90.0, 0.0, (5, 5))  # x, y = 4, 2 (right of the middle) goes to 2, 4 (below it)
    torch.testing.assert_close(turn @ torch.tensor([4.0, 2.0, 1.0]), torch.tensor([2.0, 4.0]))
    lean = affine(0.0, 45.0, (5, 7))  # middle 3, 2; a row lower goes one further to the right
    torch.testing.assert_close(lean @ torch.tensor([3.0, 3.0, 1.0]), torch.tensor([4.0, 3.0]))
    torch.testing.assert_close(lean @ torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 2.0]))


@pytest.mark.parametrize("seed", range(6))
def test_masks_stay_on_the_objects(seed: int):
    """Pictures show where the objects are, so that it can be read off them in every frame, in the square too."""
    found = changed(Augmentation(0.5, 25.0, 20.0, Jitter(), Jitter(), 0.0), seed)
    square = Preprocess(img_size=64, resize="square")
    grid = grid_masks(found.masks, square, 64)
    for t, picture in enumerate(found.pictures):
        for white, masks in ((picture, found.masks[:, t]), (square.fit(picture)[0], grid[:, t])):
            bright = (white.float().mean(0) > 135 + 40).float()  # beyond the edges all is grey, 127
            union = masks.any(0).float()
            iou = (bright * union).sum() / ((bright + union) > 0).sum()
            assert iou > 0.85, (t, iou)
    assert not torch.equal(found.masks, scene().masks)


def test_all_frames_move_by_the_same_matrix():
    still = scene()
    still.masks = still.masks[:, :1].expand(-1, FRAMES, -1, -1).clone()
    still.pictures = [still.pictures[0]] * FRAMES
    found = changed(Augmentation(0.5, 25.0, 20.0, Jitter(0.2, 0.1, 0.1), Jitter(), 0.0), 3, still)
    assert all(torch.equal(found.masks[:, 0], found.masks[:, t]) for t in range(FRAMES))
    assert all(torch.equal(found.pictures[0], picture) for picture in found.pictures)
    jittered = changed(Augmentation(0.5, 25.0, 20.0, Jitter(), Jitter(0.2, 0.1, 0.1), 0.0), 3, still)
    assert torch.equal(jittered.masks, found.masks)
    assert not torch.equal(jittered.pictures[0], jittered.pictures[1])


def test_objects_that_leave_are_absent_and_dropped_if_they_begin_outside():
    away = torch.tensor([[1.0, 0.0, 38.0], [0.0, 1.0, 0.0]])  # columns 20 + t .. 36 + t go to 58 + t .. 74 + t
    found = apply(scene(), Change(False, away, torch.ones(FRAMES, 3)))
    assert found.states.tolist() == [[PRESENT, PRESENT, ABSENT, ABSENT]] * 2
    partly = scene()
    partly.states[1] = torch.tensor([PRESENT, UNKNOWN, ABSENT, PRESENT])
    partly.masks[1, 1:3] = False
    kept = apply(partly, Change(False, None, torch.ones(FRAMES, 3)))
    assert kept.states.tolist() == partly.states.tolist()


def test_there_is_always_an_object_in_the_first_frame(monkeypatch: pytest.MonkeyPatch):
    corner = scene(num_objects=1, top=0, left=0)
    corner.masks[:] = False
    corner.masks[:, :, 0, :3] = True  # rotation takes it out of the picture
    lost = 0
    for seed in range(12):
        change = draw_change(Augmentation(), FRAMES, corner.size, np.random.default_rng(seed))
        lost += not apply(corner, change).begun_by().any()
        found = changed(Augmentation(), seed, corner)
        assert found.begun_by().all() and len(found.states) == 1
        assert found.masks[:, 0].flatten(1).any(1).all()
    assert lost >= 3
    # of two objects, the one that stays is kept alone
    both = scene()
    both.masks[0] = corner.masks[0]
    counts = {len(changed(Augmentation(), seed, both).states) for seed in range(12)}
    assert counts == {1, 2}


def test_colours_by_hand():
    picture = torch.tensor([[[100.0, 50.0]], [[100.0, 50.0]], [[100.0, 50.0]]])  # grey: 100 and 50, mean 75
    ones = torch.ones(3)
    torch.testing.assert_close(recolour(picture, ones), picture)
    torch.testing.assert_close(recolour(picture, torch.tensor([1.2, 1.0, 1.0])), picture * 1.2)
    torch.testing.assert_close(recolour(picture, torch.tensor([1.0, 2.0, 1.0]))[0], torch.tensor([[125.0, 25.0]]))
    torch.testing.assert_close(recolour(picture, torch.tensor([2.0, 2.0, 1.0]))[0], torch.tensor([[250.0, 50.0]]))
    assert recolour(picture, torch.tensor([3.0, 1.0, 1.0])).max() == 255
    red = torch.tensor([200.0, 0.0, 0.0])[:, None, None]  # its grey is 59.8
    torch.testing.assert_close(recolour(red, torch.tensor([1.0, 1.0, 0.0])).flatten(), torch.full((3,), 59.8))
    torch.testing.assert_close(
        recolour(red, torch.tensor([1.0, 1.0, 0.5])).flatten(), torch.tensor([129.9, 29.9, 29.9])
    )


def test_greyscale_and_limits_of_the_factors():
    colourful = scene()
    colourful.pictures = [torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in range(FRAMES)]
    grey = changed(Augmentation(0.0, 0.0, 0.0, Jitter(), Jitter(), 1.0), of=colourful)
    for picture in grey.pictures:
        assert (picture.float().amax(0) - picture.float().amin(0)).max() <= 1
    drawn = torch.cat([Jitter(0.1, 0.03, 0.0).draw(100, np.random.default_rng(i)) for i in range(5)])
    assert (drawn - 1).abs().amax(0).tolist() == pytest.approx([0.1, 0.03, 0.0], abs=2e-3)
    assert drawn.mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.01)


def test_one_limit_at_zero_leaves_the_rest_as_it_was():
    size = (HEIGHT, WIDTH)
    first = draw_change(Augmentation(), FRAMES, size, np.random.default_rng(1))
    second = draw_change(Augmentation(shear=0.0, degrees=0.0), FRAMES, size, np.random.default_rng(1))
    assert second.matrix is None and first.matrix is not None
    assert first.flip == second.flip and torch.equal(first.factors, second.factors)
