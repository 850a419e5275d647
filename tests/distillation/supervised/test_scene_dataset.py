"""Scenes and prompts as batches: the same for the same seed, whole and padded, at more than one size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from distillation.supervised.batch import NOTHING, SceneBatch, coverage, pad_rows
from distillation.supervised.dataset import SceneDataset, words_of
from distillation.supervised.outlines import turns_of
from sam3.engine.loader import build_loader
from sam3.engine.sampler import EpochSampler
from sam3.engine.scene_names import COLOURS, SHAPES, TEXTURES
from sam3.engine.scenes import make_scene, number_of_scene
from sam3.model.video_prompts import BOX_LABELS
from sam3.transforms import Preprocess
from tests.distillation.supervised.scenes import GREEN_STAR, RED_SQUARE, STRIPED_RED

SIDE, PATCH = 64, 8
GRID = 4 * SIDE // PATCH  # cells of a mask


def dataset(split: str = "train", count: int = 8, view: int = SIDE, **options) -> SceneDataset:
    return SceneDataset(count, SIDE, Preprocess(view), PATCH, split, **options)


def assert_same(first: SceneBatch, second: SceneBatch):
    for field in dataclasses.fields(first):
        ours, theirs = getattr(first, field.name), getattr(second, field.name)
        if dataclasses.is_dataclass(ours):
            ours, theirs = list(vars(ours).values()), list(vars(theirs).values())
        for mine, other in zip(*(side if isinstance(side, list) else [side] for side in (ours, theirs)), strict=True):
            assert torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other, field.name


@pytest.fixture(scope="module")
def val() -> SceneBatch:
    return dataset("val", seed=3).load(list(range(8)), 0)


# The same again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [SIDE, 40])
def test_batches_follow_from_the_seed_in_any_process(view: int):
    sampler, data = EpochSampler(8, 3, seed=1), dataset(view=view, seed=5)
    here, there = (build_loader(data, sampler, workers, start_method="fork") for workers in (0, 1))
    for first, second in zip(list(here), list(there), strict=True):
        assert_same(first, second)
    again = dataset(view=view, seed=5)
    assert_same(data.load([6, 1, 4], 2), again.load([6, 1, 4], 2))


def test_order_moves_scenes_and_changes_none():
    data = dataset(seed=5, click_every=1)
    pair, turned, alone = data.load([2, 7], 0), data.load([7, 2], 0), data.load([7], 0)
    assert pair.keys == turned.keys[::-1] == ["2", "7"]
    assert torch.equal(pair.images, turned.images.flip(0)) and torch.equal(pair.images[1:], alone.images)
    assert pair.phrases == turned.phrases[2:] + turned.phrases[:2] and pair.phrases[2:] == alone.phrases
    for ours, theirs in ((pair.clicks, turned.clicks), (pair.corners, turned.corners)):
        each = len(ours) // 2
        assert each and torch.equal(ours.points, torch.cat((theirs.points[each:], theirs.points[:each])))


def test_seeds_epochs_and_places_give_other_scenes():
    first = dataset(seed=5).load([1], 0)
    for other in (dataset(seed=6).load([1], 0), dataset(seed=5).load([1], 1), dataset(seed=5).load([2], 0)):
        assert not torch.equal(first.images, other.images)
    assert torch.equal(dataset(count=4).load([1], 1).images, dataset(count=8).load([5], 0).images)  # none comes twice
    evaluated = dataset("val")
    assert_same(evaluated.load([1, 2], 0), evaluated.load([1, 2], 9))


# What a batch holds ---------------------------------------------------------------------------------------------------


def test_scenes_are_whole_and_padded(val: SceneBatch):
    scenes = [make_scene(number_of_scene(3, i), SIDE, "val") for i in range(8)]
    counts = [len(scene.objects) for scene in scenes]
    most = max(counts)
    assert min(counts) < most and val.images.shape == (8, 3, SIDE, SIDE)
    assert val.masks.shape == (8, most, GRID, GRID) and val.full_masks.shape == (8, most, SIDE, SIDE)
    for i, (scene, count) in enumerate(zip(scenes, counts, strict=True)):
        assert (val.images[i].permute(1, 2, 0).numpy() == scene.image).all()
        assert (val.full_masks[i, :count].numpy() == scene.masks).all()
        rows, columns = scene.masks[0].nonzero()
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert val.boxes[i, 0].tolist() == pytest.approx([edge / SIDE for edge in box])
        assert not val.full_masks[i, count:].any() and not val.masks[i, count:].any() and not val.boxes[i, count:].any()
        assert not val.wanted[val.image == i][:, count:].any()
        for row in (val.image == i).nonzero().flatten().tolist():
            if val.kinds[row] in ("text", "absent"):
                (phrase,) = (phrase for phrase in scene.phrases if phrase.text == val.phrases[row])
                assert val.wanted[row].nonzero().flatten().tolist() == list(phrase.matches)


def test_what_is_evaluated(val: SceneBatch):
    assert {"text", "absent", "box", "point"} == set(val.kinds)
    for row, kind in enumerate(val.kinds):
        assert val.wanted[row].any() == (kind != "absent")
        boxes, points = (int((~mask[row]).sum()) for mask in (val.exemplar_mask, val.point_mask))
        assert (boxes, points) == ((1, 0) if kind == "box" else (0, 1) if kind == "point" else (0, 0))
        shown, image = int(val.shown[row]), val.image[row]
        assert (shown >= 0) == (kind in ("box", "point"))
        if kind == "box":
            assert torch.equal(val.exemplars[row, 0], val.boxes[image, shown]) and val.wanted[row, shown]
        elif kind == "point":
            x, y = (val.points[row, 0] * SIDE).long().tolist()
            assert val.full_masks[image, shown, y, x]
    asked = [
        (int(i), *entry) for i, *entry in zip(val.image, val.kinds, val.phrases, strict=True) if entry[0] == "text"
    ]
    assert len(set(asked)) == len(asked)  # no phrase counts twice


def test_clicks_lie_on_their_objects(val: SceneBatch):
    pairs = torch.stack((val.clicks.image, val.clicks.object))
    assert torch.equal(pairs, torch.stack((val.corners.image, val.corners.object)))
    assert val.clicks.labels.tolist() == [[1]] * len(val.clicks)
    assert val.corners.labels.tolist() == [list(BOX_LABELS)] * len(val.corners)
    image, shown = pairs
    x, y = val.clicks.points[:, 0].long().T
    assert val.full_masks[image, shown, y, x].all()
    torch.testing.assert_close(val.corners.points.flatten(1), val.boxes[image, shown] * SIDE)


def test_clicks_to_train_on():
    data = dataset(prompts=3, clicks=5, click_every=2, seed=1)
    batch = data.load([0, 1, 2, 3], 0)
    assert batch.image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] and batch.full_masks is None
    assert batch.clicks.image.tolist() == [0] * 4 + [2] * 4 and batch.corners.image.tolist() == [0, 2]
    for image, shown, (x, y) in zip(batch.clicks.image, batch.clicks.object, batch.clicks.points[:, 0], strict=True):
        scene = make_scene(number_of_scene(1, int(image)), SIDE, "train")
        assert scene.masks[shown, int(y), int(x)]
    assert len(dataset(clicks=0).load([0, 1], 0).clicks) == 0
    assert dataset(clicks=0).load([0, 1], 0).corners.points.shape == (0, 2, 2)


def test_prompts_as_the_model_takes_them():
    batch = dataset(count=64, prompts=4).load(list(range(12)), 0)
    prompt = batch.prompt()
    count, boxes = batch.exemplar_mask.shape
    assert count == 48 and boxes == 2 and prompt.box_embeddings.shape == (2, 48, 4)
    row = (~batch.exemplar_mask).sum(1).argmax()  # a positive and a negative box
    assert batch.kinds[row] == "box_not" and prompt.box_labels[:, row].tolist() == [1, 0]
    left, top, right, bottom = batch.exemplars[row, 0].tolist()
    wanted = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    assert prompt.box_embeddings[0, row].tolist() == pytest.approx(wanted)
    assert prompt.point_mask.shape == (48, 1)
    cut = dataclasses.replace(batch, exemplars=batch.exemplars[:, :0], points=batch.points[:, :0])
    assert cut.prompt().box_embeddings.shape[0] == 0
    targets = batch.targets
    assert targets.masks.max() == 1 and torch.equal(targets.boxes[5], batch.boxes[1])


def test_padded_rows_by_hand():
    values, labels, mask = pad_rows(
        [[np.array((1, 2))], [], [np.array((3, 4)), np.array((5, 6))]], [[1], [], [0, 1]], 2
    )
    assert values.tolist() == [[[1, 2], [0, 0]], [[0, 0], [0, 0]], [[3, 4], [5, 6]]]
    assert labels[0, 0] == 1 and labels[2].tolist() == [0, 1]
    assert mask.tolist() == [[False, True], [True, True], [False, False]]
    assert pad_rows([[], []], [[], []], 4)[0].shape == (2, 0, 4)


def test_coverage_by_hand():
    """Pixels weigh less the farther they are from a cell's middle: 3/4 for its own, 1/4 for the next."""
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :, :2] = True
    masks[1] = True
    found = coverage(masks, 2)
    near, far = round(255 * 1.5 / 1.75), round(255 * 0.25 / 1.75)
    assert found[0].tolist() == [[near, far], [near, far]]
    assert (found[1] == 255).all() and not found[2].any() and found.dtype == torch.uint8


# Words and sizes ------------------------------------------------------------------------------------------------------


def test_what_has_no_word_is_left_out():
    """Places in WORDS: square is the second shape, star the fourth; red and green; striped is the first texture."""
    kinds = [RED_SQUARE, STRIPED_RED, GREEN_STAR]
    assert words_of(kinds).tolist() == [[1, 0, -1], [1, 0, 0], [3, 5, -1]]
    assert SHAPES[1] == "square" and COLOURS[5] == "green" and TEXTURES[1] == "striped"


def test_words_of_a_batch_are_padded():
    data = dataset(count=4)
    batch = data.load([0, 1, 2, 3], 0)
    counts = batch.masks.flatten(2).any(2).sum(1)
    assert counts.min() < counts.max()  # else nothing is padded
    for image, count in enumerate(counts.tolist()):
        scene = make_scene(number_of_scene(0, image), SIDE, "train")
        assert batch.words[image, :count].tolist() == words_of(scene.objects).tolist()
        assert (batch.words[image, count:] == -1).all()


def test_a_smaller_model_sees_larger_objects():
    """At 40 px instead of 64, an object covers a larger share of the picture, and about as many pixels."""
    small, usual = (dataset(view=side, count=60).load(list(range(60)), 0) for side in (40, SIDE))
    assert small.images.shape[-2:] == (40, 40) and small.masks.shape[-1] == 4 * 40 // PATCH
    areas = []
    for batch, side in ((small, 40), (usual, SIDE)):
        sides = (batch.boxes[..., 2:] - batch.boxes[..., :2])[batch.words[..., 0] >= 0] * side
        areas.append(sides.prod(1).sqrt().median().item())
    assert areas[0] == pytest.approx(areas[1], rel=0.2)
    assert {"text", "absent", "box"} <= set(small.kinds)


def test_objects_are_not_made_smaller():
    with pytest.raises(ValueError, match=r"1 to 2 times as large as usual, got a zoom of 0.8"):
        dataset(view=80).load([0], 0)


# A few scenes, seen again and again --------------------------------------------------------------------------------


def test_a_limited_number_of_scenes_comes_back_turned():
    data = dataset(count=64, different=3, seed=2, prompts=1)
    batch = data.load(list(range(24)), 0)
    assert set(data._kept) == {0, 1, 2}
    for first in range(3):
        original = torch.from_numpy(make_scene(number_of_scene(2, first), SIDE, "train").image).permute(2, 0, 1)
        turns = [torch.rot90(original, times, (1, 2)) for times in range(4)]
        turns += [turn.flip(2) for turn in turns]
        seen = [[torch.equal(image, turn) for turn in turns].index(True) for image in batch.images[first::3]]
        assert len(set(seen)) > 1
    assert_same(batch, dataset(count=64, different=3, seed=2, prompts=1).load(list(range(24)), 0))


def test_instances_are_the_masks_in_one_map():
    data = dataset(seed=5)
    batch = data.load([0, 1], 0)
    for image in range(2):
        scene = make_scene(number_of_scene(5, image), SIDE, "train")
        shown = batch.instances[image].numpy()
        assert ((shown == NOTHING) == ~scene.masks.any(0)).all()
        for number, mask in enumerate(scene.masks):
            assert ((shown == number) == mask).all()
        assert batch.turns[image, : len(scene.masks)].tolist() == turns_of(scene).tolist()
        assert (batch.turns[image, len(scene.masks) :] == -1).all()
