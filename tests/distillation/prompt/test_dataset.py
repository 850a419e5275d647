"""Batches of pictures with prompts or all masks: what is in them, what takes the place of the unusable, and stores."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distillation.prompt.batch import PromptBatch
from distillation.prompt.config import DatasetSettings
from distillation.prompt.dataset import MAX_SKIPPED, PromptDataset, draw_all, open_dataset
from distillation.prompt.layouts import open_split
from distillation.prompt.object_mask import ObjectMask
from distillation.prompt.prompts import Prompts, stack
from sam3.engine import batch as batches
from sam3.engine.loader import build_loader
from sam3.engine.sampler import EpochSampler
from sam3.transforms import Preprocess, read_image
from tests.distillation.prompt.folders import rectangle, write_mask, write_picture
from tests.samples import write_sa1b

PREPROCESS = Preprocess(64, "pad", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
ALL = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")
PER_PICTURE = ALL[:2]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """a, 40 x 80, three masks; b, 80 x 40, two; c without; d, 64 x 64, one."""
    root = tmp_path / "set" / "train"
    write_picture(root, "a", (40, 80), [(4, 4, 44, 34), (10, 10, 30, 30), (50, 4, 76, 36)])
    write_picture(root, "b", (80, 40), [(4, 4, 34, 34), (4, 40, 34, 76)])
    write_picture(root, "c", (40, 40), [])
    write_picture(root, "d", (64, 64), [(8, 8, 40, 40)])
    return root


def dataset(path: Path, training: bool = True, stores=None, components=(), seed: int = 0, **values) -> PromptDataset:
    options = {"stores": stores, "components": components, "seed": seed}
    return open_dataset(str(path), DatasetSettings(**values), PREPROCESS, training=training, **options)


def same(one: PromptBatch, other: PromptBatch) -> bool:
    assert (one.keys, one.counts, one.epoch, one.skipped) == (other.keys, other.counts, other.epoch, other.skipped)
    pairs = [(one.images, other.images), (one.sizes, other.sizes), (one.masks, other.masks)]
    if one.prompts is not None:
        prompts = zip(vars(one.prompts).values(), vars(other.prompts).values(), strict=True)
        pairs += [pair for pair in prompts if pair[0] is not None]
    return all(torch.equal(a, b) for a, b in pairs)


class Store:
    """A teacher's features of all pictures of a source: values that tell picture, prompt and component apart."""

    def __init__(self, path: Path, seed: int = 0, tap: str = "input_keys", **values) -> None:
        source = open_split(path)
        self.settings = DatasetSettings(**values)
        self.pictures = {key: draw_all(source, key, self.settings, PREPROCESS, seed) for key in source.keys()}  # noqa: SIM118
        self.tap = tap

    def is_per_prompt(self, component: str) -> bool:
        return self.tap == "output_keys" if component == "prompt_embed" else component != "encoder_patch"

    def prompts(self, key: str) -> tuple[Prompts, list[str]]:
        return self.pictures[key]

    def row(self, key: str, mask_name: str) -> int:
        if mask_name not in self.pictures[key][1]:
            raise ValueError(f"no prompt of {mask_name!r}")
        return self.pictures[key][1].index(mask_name)

    def read(self, key: str, component: str, row: int | None = None) -> Tensor:
        if key == "d" and component == "encoder_patch":
            raise FileNotFoundError("no d_enc_patch.npy")
        value = torch.full((2, 3), float(ord(key)))
        if not self.is_per_prompt(component):
            return value
        number = self.settings.grid_points**2 if self.settings.mode == "everything" else len(self.pictures[key][1])
        rows = value.repeat(number, 1, 1) + torch.arange(number)[:, None, None] / 10
        return rows if row is None else rows[row]


# What a batch holds ---------------------------------------------------------------------------------------------------


def test_samples_are_objects_in_order(split: Path):
    data = dataset(split)
    assert len(data) == 6 == data.num_masks and data.num_pictures == 3
    assert data.picture_keys == ["a", "b", "d"]
    batch = data.load(range(6))
    assert batch.keys == ["a/obj_0", "a/obj_1", "a/obj_2", "b/obj_0", "b/obj_1", "d/obj_0"]
    assert len(batch) == 6 and batch.counts == [1] * 6 and batch.skipped == [] and batch.features is None
    assert batch.images.shape == (6, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.masks.shape == (6, 1, 16, 16) and batch.masks.dtype == torch.uint8
    assert batch.sizes.tolist() == [[32, 64]] * 3 + [[64, 32]] * 2 + [[64, 64]]
    assert len(batch.prompts) == 6


def test_picture_and_ground_truth_by_hand(split: Path):
    batch = dataset(split).load([5, 1])
    path = split / "image"
    assert torch.equal(batch.images[0], read_image(path / "d.jpg"))
    assert torch.equal(batch.images[1], PREPROCESS.fit(read_image(path / "a.jpg"))[0])
    # d is as large as the square: cell i sees pixel 4 i + 2, and the object lies from 8 to 40.
    wanted = torch.zeros(16, 16, dtype=torch.uint8)
    wanted[2:10, 2:10] = 1
    assert torch.equal(batch.masks[0, 0], wanted)
    # a is shrunk by 0.8, its second object lies from 8 to 24: cells 2 to 5 have their pixels 10, 14, 18, 22 there.
    wanted = torch.zeros(16, 16, dtype=torch.uint8)
    wanted[2:6, 2:6] = 1
    assert torch.equal(batch.masks[1, 0], wanted)


@pytest.mark.parametrize("mode", ["point", "box", "mixed"])
def test_prompts_lie_on_their_object(split: Path, mode: str):
    data = dataset(split, prompt_mode=mode, max_bbox_shift=0)
    boxes = {"a/obj_1": [8, 8, 24, 24], "d/obj_0": [8, 8, 40, 40]}  # in the frame
    kinds = set()
    for epoch in range(20):
        batch = data.load([1, 5], epoch)
        for row, key in enumerate(batch.keys):
            if mode == "box" or batch.prompts.labels[row, 0] == 2:
                corners = batch.prompts.boxes[row] if mode == "box" else batch.prompts.points[row, :2].flatten()
                assert corners.tolist() == pytest.approx(boxes[key])
                kinds.add("box")
            else:
                points = batch.prompts.points[row][batch.prompts.labels[row] == 1]
                low, high = points.min(), points.max()
                assert low >= boxes[key][0] and high < boxes[key][2] and 1 <= len(points) <= 3
                kinds.add("point")
    assert kinds == ({"box", "point"} if mode == "mixed" else {mode})


def test_everything_mode_gives_all_masks(split: Path):
    data = dataset(split, mode="everything")
    assert len(data) == 3
    batch = data.load([1, 0])
    assert batch.keys == ["b", "a"] and batch.counts == [2, 3] and batch.prompts is None
    assert batch.images.shape[0] == 2 and batch.masks.shape == (5, 1, 16, 16)
    single = dataset(split).load([3, 4, 0, 1, 2])
    assert torch.equal(batch.masks, single.masks)
    assert torch.equal(batch.images[1], single.images[2])


def test_sa1b_masks_are_those_of_the_annotations(tmp_path: Path):
    write_sa1b(tmp_path, num_train=3, num_val=0)
    source = open_split(tmp_path / "train")
    batch = dataset(tmp_path / "train", mode="everything").load([0, 1, 2])
    masks = iter(batch.masks[:, 0].numpy())
    for key in ("sa_1", "sa_2", "sa_3"):
        picture = read_image(source.image_path(key))
        for name in ("0", "1"):
            whole = source.mask(key, name, tuple(picture.shape[1:])).array()
            assert (ObjectMask.of_array(whole).low_res(PREPROCESS) == next(masks)).all()


def test_an_annotation_file_is_read_once_for_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from distillation.prompt import layouts

    write_sa1b(tmp_path, num_train=3, num_val=0)
    data, read = dataset(tmp_path / "train", mode="everything"), []
    real = layouts.read_annotations
    monkeypatch.setattr(layouts, "read_annotations", lambda path: (read.append(path.stem), real(path))[1])
    data.load([2, 0])
    assert read == ["sa_3", "sa_1"]


def test_batches_move_and_travel(split: Path):
    data = pickle.loads(pickle.dumps(dataset(split)))
    batch = data.load([0, 5])
    moved = batches.to_device(batch, torch.device("meta"))
    assert moved.images.is_meta and moved.prompts.points.is_meta and moved.keys == batch.keys and moved.counts == [1, 1]
    assert data.read_embeddings(batch) is batch and data.store is None


# What is random -------------------------------------------------------------------------------------------------------


def test_epochs_differ_in_training_only(split: Path):
    data = dataset(split)
    assert same(data.load(range(6), 3), data.load(range(6), 3))
    assert not torch.equal(data.load(range(6), 3).prompts.points, data.load(range(6), 4).prompts.points)
    assert data.load([0], 3).epoch == 3
    validating = dataset(split, training=False)
    assert same(validating.load(range(6), 3), validating.load(range(6), 7))
    assert same(validating.load(range(6), 3), data.load(range(6), 0))
    assert not torch.equal(dataset(split, seed=1).load(range(6)).prompts.points, data.load(range(6)).prompts.points)


def test_the_place_in_a_batch_changes_nothing(split: Path):
    data = dataset(split)
    together, alone = data.load([4, 2, 0], 1), data.load([2], 1)
    assert torch.equal(together.prompts[1].points, alone.prompts.points)


@pytest.mark.parametrize("mode", ["single", "everything"])
def test_workers_change_nothing(split: Path, mode: str):
    data = dataset(split, mode=mode)

    def batches_of(workers: int) -> list[PromptBatch]:
        sampler = EpochSampler(len(data), 2, seed=5, drop_last=False, padding=False)
        sampler.set_position(2)
        return list(build_loader(data, sampler, workers))

    for one, other in zip(batches_of(0), batches_of(2), strict=True):
        assert one.epoch == 2 and same(one, other)


# What cannot be used --------------------------------------------------------------------------------------------------


def test_the_next_object_takes_the_place_of_a_bad_one(split: Path):
    folder = split / "mask" / "a"
    write_mask(folder / "obj_0.png", rectangle((41, 80), (4, 4, 44, 34)))
    write_mask(folder / "obj_1.png", rectangle((40, 80), (10, 10, 15, 13)))  # 15 pixels
    batch = dataset(split).load([0, 3])
    assert batch.keys == ["a/obj_2", "b/obj_0"]
    assert [key for key, _ in batch.skipped] == ["a/obj_0", "a/obj_1"]
    assert "of 80 x 41 pixels, its picture" in batch.skipped[0][1]
    assert batch.skipped[1][1].endswith("a.jpg: its box of 5 x 3 pixels is below 16 pixels")
    assert same(dataclasses.replace(batch, skipped=[]), dataset(split).load([2, 3]))


def test_a_box_of_16_pixels_is_enough(split: Path):
    write_mask(split / "mask" / "d" / "obj_0.png", rectangle((64, 64), (9, 9, 13, 13)))
    assert dataset(split).load([5]).keys == ["d/obj_0"]


def test_objects_between_the_cells_are_left_out(split: Path):
    write_mask(split / "mask" / "d" / "obj_0.png", rectangle((64, 64), (0, 3, 64, 6)))  # cells see rows 2 and 6
    batch = dataset(split).load([5])
    assert batch.keys == ["a/obj_0"]
    assert "at 16 x 16, nothing is left of its 192 pixels" in batch.skipped[0][1]
    assert batch.skipped[1] == ("d", f"picture {split / 'image' / 'd.jpg'} shows no usable mask")


def test_the_next_picture_takes_the_place_of_a_bad_one(split: Path):
    path = split / "image" / "a.jpg"
    path.write_bytes(path.read_bytes()[:500])
    batch = dataset(split).load([1])
    assert batch.keys == ["b/obj_0"] and [key for key, _ in batch.skipped] == ["a"]
    assert "truncated" in batch.skipped[0][1]
    assert same(dataclasses.replace(batch, skipped=[]), dataset(split).load([3]))
    assert dataset(split, mode="everything").load([0]).keys == ["b"]


def test_damaged_annotations_cost_their_picture(tmp_path: Path):
    write_sa1b(tmp_path, num_train=3, num_val=0)
    data = dataset(tmp_path / "train")
    file = tmp_path / "annotations" / "train" / "sa_2.json"
    text = file.read_text()
    file.write_text(text[:-30])
    batch = data.load([3])
    assert batch.keys == ["sa_3/0"] and "sa_2.json is damaged" in batch.skipped[0][1]
    file.write_text(text.replace('"counts": "', '"counts": "~'))
    batch = data.load([3])
    assert batch.keys == ["sa_3/0"] and [key for key, _ in batch.skipped] == ["sa_2/1", "sa_2"]


def test_in_everything_mode_the_other_masks_stay(split: Path):
    (split / "mask" / "a" / "obj_1.png").write_bytes(b"no picture")
    batch = dataset(split, mode="everything").load([0, 1])
    assert batch.counts == [2, 2] and [key for key, _ in batch.skipped] == ["a/obj_1"]


def test_after_the_last_picture_comes_the_first(split: Path):
    (split / "image" / "d.jpg").write_bytes(b"")
    assert dataset(split).load([5]).keys == ["a/obj_0"]


def test_masks_before_the_wanted_one_serve_too(tmp_path: Path):
    write_picture(tmp_path / "set", "a", (40, 40), [(4, 4, 34, 34), (1, 1, 3, 3)])
    assert dataset(tmp_path / "set").load([1]).keys == ["a/obj_0"]


def test_too_many_in_a_row_are_an_error(tmp_path: Path):
    for number in range(MAX_SKIPPED + 2):
        write_picture(tmp_path, f"p{number:02d}", (20, 20), [(2, 2, 18, 18)])
    for number in range(MAX_SKIPPED):
        (tmp_path / "image" / f"p{number:02d}.jpg").write_bytes(b"")
    data = dataset(tmp_path)
    assert len(data.load([0]).skipped) == MAX_SKIPPED
    (tmp_path / "image" / f"p{MAX_SKIPPED}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"11 pictures in a row cannot be used, the last because: .*p10\.jpg is empty"):
        data.load([0])


def test_no_masks_at_all(tmp_path: Path):
    write_picture(tmp_path, "a", (20, 20), [])
    with pytest.raises(
        ValueError, match=r"none of the 1 pictures has a mask \(such as .*a\.jpg\); .*make_sample_prompts"
    ):
        dataset(tmp_path)


def test_pictures_are_counted_in_the_log(split: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "sam3.distillation"):
        dataset(split)
    assert "3 pictures with 6 masks; 1 pictures without any are left out" in caplog.text


# Prompts of all masks, as extraction wants them -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["point", "box", "mixed"])
def test_draw_all_gives_the_prompts_of_validation(split: Path, mode: str):
    write_mask(split / "mask" / "a" / "obj_1.png", rectangle((40, 80), (10, 10, 12, 12)))
    settings = DatasetSettings(prompt_mode=mode)
    drawn, names = draw_all(open_split(split), "a", settings, PREPROCESS, 7)
    assert names == ["obj_0", "obj_2"]
    batch = dataset(split, training=False, seed=7, prompt_mode=mode).load([0, 2])
    for found, wanted in zip(vars(drawn).values(), vars(batch.prompts).values(), strict=True):
        assert found is wanted is None or torch.equal(found, wanted)


def test_draw_all_of_nothing(split: Path):
    write_mask(split / "mask" / "d" / "obj_0.png", rectangle((64, 64), (0, 0, 2, 2)))
    for key in ("c", "d"):
        drawn, names = draw_all(open_split(split), key, DatasetSettings(), PREPROCESS, 0)
        assert len(drawn) == 0 and names == []
    (split / "image" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read picture .*a\.jpg"):
        draw_all(open_split(split), "a", DatasetSettings(), PREPROCESS, 0)


# Stores ---------------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_store_if_features_belong_to_them(split: Path):
    stores = {"one": Store(split, seed=3), "two": Store(split, seed=3)}
    batch = dataset(split, stores=stores, components=ALL).load([2, 3, 0], epoch=5)
    wanted = stack(
        [stores["one"].pictures["a"][0][2], stores["one"].pictures["b"][0][0], stores["one"].pictures["a"][0][0]]
    )
    assert torch.equal(batch.prompts.points, wanted.points) and torch.equal(batch.prompts.labels, wanted.labels)
    assert set(batch.features) == {"one", "two"}
    features = batch.features["two"]
    assert set(features) == {*ALL, "ious"}
    a, b = ord("a"), ord("b")
    for component, values in features.items():
        assert values.shape == (3, 2, 3)
        expected = [a, b, a] if component in PER_PICTURE else [a + 0.2, b, a]
        assert values[:, 0, 0].tolist() == pytest.approx(expected)


def test_prompts_are_drawn_if_features_belong_to_pictures(split: Path):
    store = Store(split, seed=3)
    batch = dataset(split, stores={"one": store}, components=PER_PICTURE).load([2, 3], epoch=5)
    assert same(batch, dataset(split).load([2, 3], epoch=5))
    assert set(batch.features["one"]) == set(PER_PICTURE)


def test_maps_behind_block_0_belong_to_prompts(split: Path):
    store = Store(split, seed=3, tap="output_keys")
    batch = dataset(split, stores={"one": store}, components=["prompt_embed"]).load([2], epoch=5)
    assert torch.equal(batch.prompts.points, store.pictures["a"][0][2].points)
    assert batch.features["one"]["prompt_embed"][0, 0, 0] == pytest.approx(ord("a") + 0.2)


def test_stores_with_different_prompts_do_not_go_together(split: Path):
    stores = {"one": Store(split, seed=3), "two": Store(split, seed=4)}
    with pytest.raises(ValueError, match="stores of one, two hold different prompts for the mask 'obj_0' of 'a'"):
        dataset(split, stores=stores, components=ALL).load([0])


def test_what_a_store_lacks_is_an_error(split: Path):
    with pytest.raises(FileNotFoundError, match="no d_enc_patch"):
        dataset(split, stores={"one": Store(split)}, components=ALL).load([5])
    store = Store(split)
    write_mask(split / "mask" / "a" / "obj_9.png", rectangle((40, 80), (10, 10, 30, 30)))
    with pytest.raises(ValueError, match="no prompt of 'obj_9'"):
        dataset(split, stores={"one": store}, components=["decoder_mask_token"]).load([3])


def test_features_of_grids_follow_one_another(split: Path):
    store = Store(split, mode="everything", grid_points=2)
    components = ("encoder_patch", "decoder_mask_token")
    data = dataset(split, stores={"one": store}, components=components, mode="everything", grid_points=2)
    patches, tokens = (data.load([1, 0]).features["one"][name] for name in components)
    assert patches[:, 0, 0].tolist() == [ord("b"), ord("a")]
    assert tokens.shape == (8, 2, 3)
    assert tokens[:, 0, 0].tolist() == pytest.approx([ord(k) + i / 10 for k in "ba" for i in range(4)])


def test_grey_pictures_and_large_ones(tmp_path: Path):
    write_picture(tmp_path, "a", (300, 500), [(20, 20, 400, 250)], suffix=".png")
    Image.fromarray(np.full((300, 500), 90, np.uint8)).save(tmp_path / "image" / "a.png")
    batch = dataset(tmp_path).load([0])
    assert batch.sizes.tolist() == [[38, 64]]
    assert (batch.images[0, :, :38] == 90).all() and (batch.images[0, :, 38:] == 0).all()
