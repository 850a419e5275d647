"""Generated clips as training and validation get them."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch

from sam3.engine.scene_videos import Clip, make_clip
from sam3.engine.scenes import number_of_scene
from stage2.data.batch import ABSENT, PRESENT, UNKNOWN
from stage2.data.prompts import PromptSampling
from stage2.supervised.dataset import ClipDraws, SceneClips, ValidationClips, states_of, well_seen
from tests.stage2.supervised.clips import CELLS, PREPROCESS, SIDE, clips


def same(one, other) -> bool:
    values = ((getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


def test_a_clip_follows_from_seed_epoch_and_index():
    mixed = PromptSampling(0.4, 0.3, 0.3)

    def made(seed: int = 1) -> SceneClips:
        return SceneClips(50, PREPROCESS, CELLS, ClipDraws((2,)), mixed, seed)

    assert same(made().load([3]), made().load([3]))
    both = made().load([7, 3])
    alone = made().load([3])
    rows = (both.clip_of_object == 1).nonzero()[:, 0]
    assert torch.equal(both.images[1], alone.images[0])
    assert torch.equal(both.masks[rows], alone.masks)
    assert torch.equal(both.points[rows], alone.points)
    assert [both.kinds[row] for row in rows] == alone.kinds
    assert not torch.equal(made().load([3], epoch=1).images, alone.images)
    assert not torch.equal(made(seed=2).load([3]).images, alone.images)


def test_the_number_of_frames_goes_by_the_epoch():
    data = SceneClips(50, PREPROCESS, CELLS, ClipDraws((2, 3)), PromptSampling(0, 0, 1))
    assert [data.load([0], epoch).num_frames for epoch in (0, 1, 2)] == [2, 3, 3]
    assert data.load([0], 1).images.shape == (1, 3, 3, SIDE, SIDE)


def test_splits_share_no_clip():
    val = ValidationClips(5, PREPROCESS, CELLS, 2).load([0, 1])
    train = SceneClips(5, PREPROCESS, CELLS, ClipDraws((2,), max_span=1, reversal=0), PromptSampling(0, 0, 1), 0)
    assert val.keys[0].removeprefix("val/") == (of_train := train.load([0])).keys[0].removeprefix("train/")
    assert not torch.equal(val.images[0], of_train.images[0])
    wanted = make_clip(number_of_scene(0, 0), SIDE, 2, "train")
    assert np.array_equal(of_train.images[0].permute(0, 2, 3, 1).numpy(), wanted.frames)


def test_states_tell_absent_objects_and_slivers():
    masks = torch.zeros(1, 3, 10, 10, dtype=torch.bool)
    masks[0, 0, :5] = True
    masks[0, 2, 0, 0] = True  # a hundredth
    assert states_of(masks, 0.02).tolist() == [[PRESENT, ABSENT, UNKNOWN]]
    assert states_of(masks, 0.0).tolist() == [[PRESENT, ABSENT, PRESENT]]


def test_masks_and_prompts_belong_to_the_objects():
    found = []
    for index in range(6):
        batch = clips(4, max_objects=2, reversal=1.0).load([index])
        assert 1 <= len(batch.kinds) <= 2
        assert batch.states[:, 0].eq(PRESENT).all()
        assert torch.equal(batch.masks.any(-1).any(-1), batch.states == PRESENT)
        cells = ((batch.points[:, 0] + 0.5) * CELLS / SIDE).long()
        near = torch.nn.functional.max_pool2d(batch.masks[:, 0].float(), 3, 1, 1)  # a pixel's cell may be a border's
        assert near[torch.arange(len(cells)), cells[:, 1], cells[:, 0]].all()
        found += batch.states.flatten().tolist()
    assert PRESENT in found


def test_a_piece_begins_where_something_is_seen():
    masks = np.zeros((6, 1, 10, 10), dtype=bool)
    masks[:3, 0, :5] = True  # gone after the third frame
    frames = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 10, 10, 3), dtype=np.uint8)
    whole = Clip(frames, masks, [])
    data = clips(2, reversal=0.5)
    starts = set()
    for seed in range(40):
        picked, of_object = data._piece(whole, 2, np.random.default_rng(seed))
        numbers = picked[:, 0, 0, 0].tolist()
        assert of_object.shape == (1, 2, 10, 10)
        assert of_object[0, :, 0, 0].tolist() == [number < 3 for number in numbers]
        assert abs(numbers[1] - numbers[0]) == 1
        starts.add(tuple(numbers))
    assert starts == {(0, 1), (1, 2), (2, 3), (1, 0), (2, 1)}
    assert well_seen(masks[3]).tolist() == []


def test_validation_shows_all_objects_in_full_and_clicks_into_their_middle():
    data = ValidationClips(3, PREPROCESS, CELLS, 12)
    batch = data.load([0, 1, 2])
    assert same(batch, data.load([0, 1, 2], epoch=5))
    assert batch.full_masks.shape == (len(batch.kinds), 12, SIDE, SIDE)
    assert torch.equal(batch.full_masks.flatten(2).any(2), batch.states == PRESENT)
    assert (batch.states == ABSENT).any()
    assert batch.kinds == ["click"] * len(batch.kinds)
    x, y = batch.points[:, 0].round().long().unbind(1)
    assert batch.full_masks[torch.arange(len(x)), 0, y, x].all()
    for row, clip in enumerate(batch.clip_of_object.tolist()):
        truth = make_clip(number_of_scene(0, clip), SIDE, 12, "val").masks
        place = row - batch.clip_of_object.tolist().index(clip)
        assert np.array_equal(batch.full_masks[row].numpy(), truth[:, place])


def test_clips_are_pieces_of_longer_ones():
    def whole(max_span: float, index: int) -> bool:
        batch = clips(3, max_span=max_span, reversal=0.0).load([index])
        frames = make_clip(int(batch.keys[0].removeprefix("train/")), SIDE, 3, "train").frames
        return np.array_equal(batch.images[0].permute(0, 2, 3, 1).numpy(), frames)

    assert all(whole(1.0, index) for index in range(3))
    assert {whole(2.0, index) for index in range(5)} == {False, True}
