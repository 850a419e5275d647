"""Batches of geometry fine-tuning: what is in them, and that batches, order, workers and restarts change nothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from sam3.engine.batch import to_device
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import EmbeddingReader, store_meta
from sam3.engine.loader import build_loader
from sam3.engine.sa1b import annotation_path, list_sa1b, read_annotations
from sam3.engine.sampler import EpochSampler
from sam3.transforms import Preprocess, read_image
from stage1_geometry_finetune.data import GeometryDataset, grid_masks
from stage1_geometry_finetune.prompts import PromptSampling
from tests.samples import write_record, write_sa1b

SHAPE = (3, 4, 4)
PREPROCESS = Preprocess(img_size=56)
RANDOM = PromptSampling(max_prompts=3, prompt_mix=True, decode_iters=3, refine_points_min=1, refine_points_max=4)
FIELDS = (
    *("images", "sizes", "boxes", "targets", "points", "point_labels", "prompt_mask"),
    *("refine_uniforms", "refine_counts", "gt_masks"),
)


def value(key):
    return float(key.split("_")[1])


def write_objects(root, key, boxes, split="train"):
    """Replace the annotations of a picture: boxes xywh, their masks and centres."""
    path = annotation_path(root, split, key)
    document = json.loads(path.read_text())
    size = [document["image"]["height"], document["image"]["width"]]
    document["annotations"] = []
    for x, y, w, h in boxes:
        mask = np.zeros(size, np.uint8, order="F")
        mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
        counts = coco_mask.encode(mask)["counts"].decode()
        document["annotations"].append(
            {"bbox": [x, y, w, h], "segmentation": {"size": size, "counts": counts},
             "point_coords": [[x + w / 2, y + h / 2]]}
        )  # fmt: skip
    path.write_text(json.dumps(document))


@pytest.fixture
def data(tmp_path):
    """(root, images, store) with six pictures of 1, 2, ... 6 objects."""
    write_sa1b(tmp_path, num_train=6, num_val=0)
    images = list_sa1b(tmp_path, "train")
    for i, key in enumerate(images.keys()):
        write_objects(tmp_path, key, [(4.0 * n, 3.0 * n, 20.0 + n, 15.0) for n in range(i + 1)])
    with EmbeddingWriter(tmp_path / "store", store_meta(SHAPE)) as writer:
        for key in images.keys():  # noqa: SIM118
            writer.add(key, 0, torch.full(SHAPE, value(key)))
    return tmp_path, images, EmbeddingReader(tmp_path / "store")


def dataset(data, sampling=RANDOM, **options):
    root, images, store = data
    return GeometryDataset(images, root, "train", PREPROCESS, sampling, store, **options)


def sampler(count=6, batch_size=4, **options):
    return EpochSampler(count, batch_size, drop_last=False, padding=False, **options)


def rows_of(batches):
    """key -> everything about its picture, without padding."""
    rows = {}
    for batch in batches:
        for row, key in enumerate(batch.keys):
            objects = int((~batch.prompt_mask[row]).sum())
            rows[key] = {"kinds": batch.kinds[row]}
            for name in FIELDS:
                column = getattr(batch, name)
                whole = name in ("images", "sizes")
                rows[key][name] = None if column is None else column[row] if whole else column[row, :objects]
            if batch.embeddings is not None:
                rows[key]["embedding"] = batch.embeddings.data[row]
    return rows


def same(first, second):
    assert first.keys() == second.keys()
    for key, fields in first.items():
        for name, found in fields.items():
            other = second[key][name]
            assert torch.equal(found, other) if isinstance(found, torch.Tensor) else found == other, (key, name)
    return True


def test_batch_holds_what_the_parts_give(data):
    root, images, _ = data
    plain = PromptSampling(jitter=False, max_prompts=4)
    (batch,) = build_loader(dataset(data, plain), sampler(batch_size=6, shuffle=False), 0)
    assert batch.keys == images.keys()
    assert len(batch) == 6
    assert batch.images.dtype == torch.uint8
    assert batch.refine_uniforms is None
    assert batch.gt_masks is None
    assert batch.skipped == []
    assert batch.boxes.shape == (6, 4, 4)
    assert batch.points.shape == (6, 4, 2)
    for row, key in enumerate(batch.keys):
        fitted, size = PREPROCESS.fit(read_image(images.path(row)))
        assert torch.equal(batch.images[row], fitted)
        assert tuple(batch.sizes[row].tolist()) == size
        assert (batch.embeddings.values()[row] == value(key)).all()
        count = min(row + 1, 4)
        assert batch.prompt_mask[row].tolist() == [False] * count + [True] * (4 - count)
        assert batch.point_labels[row].tolist() == [1] * count + [0] * (4 - count)
        assert batch.kinds[row] == ["both"] * count
        for column in (batch.boxes, batch.targets, batch.points):
            assert not column[row, count:].any()
        assert torch.equal(batch.boxes[row], batch.targets[row])
        annotations = read_annotations(annotation_path(root, "train", key))
        if row < 4:  # all its objects, the largest (the last) first
            wanted = PREPROCESS.coords_to_input(annotations.boxes.flip(0), (annotations.height, annotations.width))
            assert torch.allclose(batch.boxes[row, :count], wanted)
    for column in (batch.boxes, batch.targets, batch.points):
        assert column.dtype == torch.float32
    assert batch.point_labels.dtype == torch.int64
    assert batch.prompt_mask.dtype == torch.bool


def test_a_batch_moves_as_a_whole(data):
    batch = dataset(data, load_masks=True, mask_size=16).load(range(6), 0)
    names = {field.name for field in dataclasses.fields(batch)}
    assert names == {*FIELDS, "keys", "kinds", "embeddings", "skipped"}
    moved = to_device(batch, torch.device("meta"))
    assert all(getattr(moved, name).device.type == "meta" for name in FIELDS)
    assert moved.kinds == batch.kinds
    assert batch.refine_uniforms.shape == (6, 3, 2, 4)
    assert batch.refine_counts.shape == (6, 3, 2)
    assert batch.gt_masks.shape == (6, 3, 16, 16)


# Randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_follows_from_seed_epoch_and_key(data, workers):
    source = dataset(data, seed=3, load_masks=True, mask_size=16)
    epochs = []
    for epoch in range(2):
        alone = rows_of(source.read_embeddings(source.load([index], epoch)) for index in range(6))
        epochs.append(alone)
        backwards = rows_of([source.read_embeddings(source.load([5, 4, 3, 2, 1, 0], epoch))])
        assert same(alone, backwards)
    order = sampler(batch_size=4, seed=9)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loader = build_loader(source, order, workers)
    for epoch in range(2):  # workers stay for the second and hear of it
        order.set_position(epoch)
        assert same(epochs[epoch], rows_of(loader))
    assert torch.equal(torch.get_rng_state(), state)
    for key in epochs[0]:
        assert not torch.equal(epochs[0][key]["boxes"], epochs[1][key]["boxes"])
        assert not torch.equal(epochs[0][key]["refine_uniforms"], epochs[1][key]["refine_uniforms"])


def test_seed_and_epoch_change_the_draw(data):
    def boxes(epoch=0, **options):
        return dataset(data, **options).load(range(6), epoch).boxes

    assert torch.equal(boxes(), boxes())
    assert not torch.equal(boxes(), boxes(seed=1))
    assert not torch.equal(boxes(0), boxes(1))
    assert torch.equal(boxes(0, no_rand=True), boxes(7, no_rand=True))
    assert not torch.equal(boxes(no_rand=True), boxes(no_rand=True, seed=1))


def test_validation_is_the_same_in_every_epoch_and_shows_annotated_boxes(data):
    source = dataset(data, training=False, mask_size=16)
    first, later = source.load(range(6), 0), source.load(range(6), 5)
    assert same(rows_of([first]), rows_of([later]))
    assert torch.equal(first.boxes, first.targets)
    assert {kind for kinds in first.kinds for kind in kinds} == {"both"}
    assert first.gt_masks.shape == (6, 3, 16, 16)
    only_points = dataset(data, PromptSampling(use_boxes=False), training=False, mask_size=16).load([0], 0)
    assert only_points.kinds == [["both"]]


# Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["pad", "square"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 192), (192, 128), (192, 192)])
def test_masks_lie_on_the_picture(tmp_path, rows, columns, resize):
    """A white object on black: the mask is where the fitted picture is white."""
    preprocess = Preprocess(img_size=96, resize=resize)
    boxes = [(16.0, 32.0, 64.0, 48.0), (columns - 24.0, rows - 16.0, 24.0, 16.0)]
    pixels = np.zeros((rows, columns, 3), np.uint8)
    for x, y, w, h in boxes:
        pixels[int(y) : int(y + h), int(x) : int(x + w)] = 255
    write_record(tmp_path, "val", "sa_1", pixels)
    Image.fromarray(pixels).save(tmp_path / "images" / "val" / "sa_1.jpg", format="PNG")  # no JPEG noise
    write_objects(tmp_path, "sa_1", boxes, "val")
    images = list_sa1b(tmp_path, "val")
    source = GeometryDataset(images, tmp_path, "val", preprocess, PromptSampling(), training=False, mask_size=96)
    batch = source.load([0], 0)
    white = batch.images[0, 0] > 127
    assert white.any()
    assert torch.equal(batch.gt_masks[0].any(0), white)
    for mask, box in zip(batch.gt_masks[0], batch.targets[0] * 96, strict=True):
        inside = mask.nonzero()
        top, left = inside.min(0).values.tolist()
        bottom, right = (inside.max(0).values + 1).tolist()
        assert torch.allclose(box, torch.tensor([left, top, right, bottom], dtype=torch.float32), atol=0.51)
    # A coarser grid takes the pixel at the centre of each cell: the third of 4 (centre at 2.0).
    coarse = dataclasses.replace(batch)
    coarse.gt_masks = grid_masks(read_annotations(annotation_path(tmp_path, "val", "sa_1")), [0, 1], preprocess, 24)
    assert torch.equal(coarse.gt_masks, batch.gt_masks[0][:, 2::4, 2::4])


def test_grid_mask_by_hand(tmp_path):
    """A picture of 4 x 8 pixels in a square of 4 with a grid of 4: every second pixel, the lower half is padding."""
    write_record(tmp_path, "train", "sa_1", np.zeros((4, 8, 3), np.uint8))
    write_objects(tmp_path, "sa_1", [(1.0, 0.0, 3.0, 3.0), (0.0, 0.0, 8.0, 4.0)])
    annotations = read_annotations(annotation_path(tmp_path, "train", "sa_1"))
    # Cell centres 0.5, 1.5, 2.5, 3.5 are at 1, 3, 5, 7 of the picture's 8 columns, and at 1, 3 of its 4 rows.
    masks = grid_masks(annotations, [0, 1], Preprocess(img_size=4), 4).int().tolist()
    assert masks[0] == [[1, 1, 0, 0], [0, 0, 0, 0], [0] * 4, [0] * 4]
    assert masks[1] == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]


def test_mask_nms_acts_with_masks_only(data):
    root = data[0]
    write_objects(root, "sa_1", [(0.0, 0.0, 40.0, 40.0), (0.0, 0.0, 30.0, 30.0)])
    sampling = PromptSampling(mask_nms=0.8)
    assert len(dataset(data, sampling).load([0], 0).kinds[0]) == 2
    assert len(dataset(data, sampling, training=False, mask_size=8).load([0], 0).kinds[0]) == 2
    for training in (True, False):
        found = dataset(data, sampling, training=training, load_masks=True, mask_size=8).load([0], 0)
        assert len(found.kinds[0]) == 1
    with pytest.raises(ValueError, match="mask_size"):
        dataset(data, training=False)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(data):
    """Picture -> what is said about it; picture 6 is sound."""
    root = data[0]
    (root / "images" / "train" / "sa_1.jpg").write_bytes(b"")
    annotation_path(root, "train", "sa_2").write_text('{"image":')
    annotation_path(root, "train", "sa_3").unlink()
    write_objects(root, "sa_4", [])
    write_objects(root, "sa_5", [(5.0, 5.0, 0.5, 20.0), (500.0, 5.0, 20.0, 20.0)])
    return {
        "sa_1": r"^picture .*sa_1\.jpg is empty",
        "sa_2": r"^annotation file .*sa_2\.json is damaged",
        "sa_3": r"^no annotation file .*sa_3\.json",
        "sa_4": r"^annotation file .*sa_4\.json lists no objects; remove .* DATA\.SKIP_BAD_IMAGES True",
        "sa_5": r"^none of the 2 objects in .*sa_5\.json can be a prompt .* DATA\.SKIP_BAD_IMAGES True",
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_raise_or_are_left_out(data, damaged, workers):
    for number, message in enumerate(damaged.values()):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            dataset(data).load([number], 0)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=damaged["sa_1"]):
        list(build_loader(dataset(data), sampler(shuffle=False), workers))
    source = dataset(data, skip_bad=True, load_masks=True, mask_size=8)
    first, second = build_loader(source, sampler(shuffle=False), workers)
    assert len(first) == 0
    assert first.images.shape == (0, 3, 56, 56)
    assert first.boxes.shape == (0, 0, 4)
    assert first.gt_masks.shape == (0, 0, 8, 8)
    assert first.kinds == []
    assert len(first.embeddings) == 0
    assert second.keys == ["sa_6"]
    assert (second.embeddings.values() == 6).all()
    assert [key for batch in (first, second) for key, _ in batch.skipped] == list(damaged)
    sound = dataset(data, load_masks=True, mask_size=8)
    assert same(rows_of([second]), rows_of([sound.read_embeddings(sound.load([5], 0))]))


def test_points_alone_need_a_point(data):
    root = data[0]
    path = annotation_path(root, "train", "sa_1")
    document = json.loads(path.read_text())
    document["annotations"][0]["point_coords"] = None
    path.write_text(json.dumps(document))
    assert dataset(data, PromptSampling()).load([0], 0).kinds == [["box"]]
    with pytest.raises(ValueError, match=r"can be a prompt .*, and a point\)"):
        dataset(data, PromptSampling(use_boxes=False)).load([0], 0)


def test_annotations_of_another_picture(data):
    path = annotation_path(data[0], "train", "sa_1")
    path.write_text(path.read_text().replace('"height": 90', '"height": 91'))
    with pytest.raises(ValueError, match=r"sa_1\.jpg has \(90, 130\) rows and columns, but .* one of \(91, 130\)"):
        dataset(data).load([0], 0)


def test_damaged_mask_matters_only_where_masks_are_loaded(data):
    path = annotation_path(data[0], "train", "sa_1")
    document = json.loads(path.read_text())
    document["annotations"][0]["segmentation"]["counts"] = "7"
    path.write_text(json.dumps(document))
    assert dataset(data).load([0], 0).keys == ["sa_1"]
    with pytest.raises(ValueError, match=r"segmentation 0 of .*sa_1\.json"):
        dataset(data, training=False, mask_size=8).load([0], 0)


def test_missing_embedding_raises_even_when_skipping(data):
    root, _, store = data
    write_record(root, "train", "sa_99", np.zeros((20, 20, 3), np.uint8))
    source = GeometryDataset(list_sa1b(root, "train"), root, "train", PREPROCESS, RANDOM, store, skip_bad=True)
    with pytest.raises(ValueError, match=r"^no teacher embedding for 'sa_99'"):
        list(build_loader(source, sampler(7), 0))
