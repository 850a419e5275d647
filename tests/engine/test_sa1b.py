"""Listing pictures and reading SA-1B annotations."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3.engine.image_list import ImageList, list_folder
from sam3.engine.sa1b import (
    annotation_path,
    decode_segmentation,
    list_sa1b,
    list_unannotated,
    pixel_of_runs,
    read_annotations,
    run_lengths,
    sample_runs,
)
from tests.samples import write_sa1b


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_lists_sorted_keys_with_annotations_only(tmp_path):
    write_sa1b(tmp_path, num_train=3, num_val=1)
    touch(tmp_path, "images/train/sa_0.jpg", "images/train/._sa_1.jpg", "images/train/notes.txt")
    images = list_sa1b(tmp_path, "train")
    assert images.keys() == ["sa_1", "sa_2", "sa_3"]
    assert images.skipped == 1
    assert images.path(1) == tmp_path / "images" / "train" / "sa_2.jpg"
    assert images.path(1).exists()
    assert images.key(2) == "sa_3"
    assert list_sa1b(tmp_path, "val").keys() == ["sa_4"]
    assert images.head(2).keys() == ["sa_1", "sa_2"]
    assert images.head(-1) is images
    assert images.select({"sa_3", "sa_1", "other"}).keys() == ["sa_1", "sa_3"]
    assert len(images.select([])) == 0


def test_without_annotation_folder_all_pictures_count(tmp_path):
    touch(tmp_path, "images/train/b.JPG", "images/train/a.png", "annotations/val/c.json")
    assert list_sa1b(tmp_path, "train").keys() == ["a", "b"]


def test_names_pictures_without_annotations(tmp_path):
    write_sa1b(tmp_path, num_train=2, num_val=0)
    touch(tmp_path, "images/train/sa_9.jpg", "images/train/sa_0.png", "annotations/train/other.json")
    assert list_unannotated(tmp_path, "train") == ["sa_0", "sa_9"]
    touch(tmp_path, "images/val/b.jpg", "images/val/a.jpg")
    assert list_unannotated(tmp_path, "val") == ["a", "b"]


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    names = [f"images/train/sa_{i}.jpg" for i in (3, 10, 2)]
    touch(tmp_path, *names)
    digest = list_sa1b(tmp_path, "train").digest()
    real = os.scandir

    class Reversed:
        def __init__(self, folder):
            self.entries = sorted(real(folder), key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("sam3.engine.image_list.os.scandir", Reversed)
    images = list_sa1b(tmp_path, "train")
    assert images.keys() == ["sa_10", "sa_2", "sa_3"]
    assert images.digest() == digest
    assert images.head(2).digest() != digest


def test_nothing_to_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"reorg_sa1b\.py"):
        list_sa1b(tmp_path, "train")
    touch(tmp_path, "images/train/a.jpg", "annotations/train/b.json")
    with pytest.raises(FileNotFoundError, match="the 1 there have no JSON"):
        list_sa1b(tmp_path, "train")


def test_one_key_for_two_pictures(tmp_path):
    touch(tmp_path, "images/train/a.jpg", "images/train/a.png")
    with pytest.raises(ValueError, match=r"'a': images/train/a\.jpg and images/train/a\.png"):
        list_sa1b(tmp_path, "train")


def test_a_million_keys_stay_small():
    images = ImageList.build("root", ((f"sa_{i}", f"images/train/sa_{i}.jpg") for i in range(200_000)))
    assert (images._keys.nbytes + images._files.nbytes) / len(images) < 40


# Folders ----------------------------------------------------------------------------------------------------------


def test_folder_is_searched_through(tmp_path):
    touch(tmp_path, "b.jpg", "sub/a.PNG", "sub/deep/c.webp", ".hidden/d.jpg", "sub/readme.md")
    images = list_folder(tmp_path)
    assert images.keys() == ["b", "sub/a", "sub/deep/c"]
    assert images.path(1) == tmp_path / "sub" / "a.PNG"


def test_folder_with_a_loop_of_links_ends(tmp_path):
    touch(tmp_path / "root", "x/a.jpg")
    touch(tmp_path, "elsewhere/b.jpg")
    (tmp_path / "root" / "x" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    assert list_folder(tmp_path / "root").keys() == ["linked/b", "x/a"]


def test_folder_split_is_stable_and_complete(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(300)))
    train, val = (set(list_folder(tmp_path, split, 0.2).keys()) for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 300
    assert 35 < len(val) < 85
    touch(tmp_path, *(f"new{i}.jpg" for i in range(50)))
    assert {key for key in list_folder(tmp_path, "val", 0.2).keys() if not key.startswith("new")} == val  # noqa: SIM118
    assert len(list_folder(tmp_path, "val", 0.0)) == 0


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no pictures"):
        list_folder(tmp_path)
    with pytest.raises(ValueError, match="val_fraction"):
        list_folder(tmp_path, "val", 1.0)
    with pytest.raises(ValueError, match="'test' is unknown"):
        list_folder(tmp_path, "test")
    touch(tmp_path, "a\nb.jpg")
    with pytest.raises(ValueError, match="line break"):
        list_folder(tmp_path)
    (tmp_path / "a\nb.jpg").unlink()
    touch(tmp_path, os.fsdecode(b"\xff.jpg"))
    with pytest.raises(ValueError, match="not UTF-8"):
        list_folder(tmp_path)


# Annotations ------------------------------------------------------------------------------------------------------


def test_reads_boxes_points_and_masks(tmp_path):
    write_sa1b(tmp_path, num_train=1, num_val=0, height=90, width=130)
    found = read_annotations(annotation_path(tmp_path, "train", "sa_1"))
    assert (found.height, found.width, len(found)) == (90, 130, 2)
    # The sample's boxes are (16, 11, 43, 30) and (65, 45, 43, 22) as xywh.
    assert found.boxes.tolist() == [[16, 11, 59, 41], [65, 45, 108, 67]]
    assert found.points.tolist() == [[37.5, 26.0], [86.5, 56.0]]
    assert found.areas.tolist() == [43 * 30, 43 * 22]
    assert torch.allclose(found.predicted_iou, torch.tensor([0.9, 0.9]))
    masks = found.masks()
    assert masks.shape == (2, 90, 130)
    assert masks[0, 11:41, 16:59].all()
    assert masks.sum((1, 2)).tolist() == [43 * 30, 43 * 22]
    assert torch.equal(found.masks([1])[0], masks[1])


def test_every_form_of_segmentation():
    expected = np.zeros((4, 5), bool)
    expected[1:3, 2:4] = True
    compressed = coco_mask.encode(np.asfortranarray(expected.astype(np.uint8)))
    # Column by column: 9 zeros, 2 ones, 2 zeros, 2 ones, 5 zeros.
    forms = [
        {"size": [4, 5], "counts": compressed["counts"].decode()},
        {"size": [4, 5], "counts": compressed["counts"]},
        {"size": [4, 5], "counts": [9, 2, 2, 2, 5]},
        [[2, 1, 4, 1, 4, 3, 2, 3]],
    ]
    for form in forms:
        assert np.array_equal(decode_segmentation(form, 4, 5), expected)
    two = decode_segmentation([[0, 0, 1, 0, 1, 1, 0, 1], [3, 3, 4, 3, 4, 4, 3, 4]], 4, 5)
    assert two.sum() == 2
    assert not decode_segmentation([], 4, 5).any()
    with pytest.raises(ValueError, match="size"):
        decode_segmentation(forms[0], 5, 4)
    with pytest.raises(ValueError, match="21 pixels"):
        decode_segmentation({"size": [4, 5], "counts": [9, 2, 2, 2, 6]}, 4, 5)


def test_no_annotations_and_left_out_fields_are_fine(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"image": {"height": 3, "width": 4}, "annotations": []}))
    empty = read_annotations(path)
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert empty.points.shape == (0, 2)
    assert empty.masks().shape == (0, 3, 4)
    entry = {"bbox": [0, 1, 2, 2], "segmentation": {"size": [3, 4], "counts": [12]}}
    path.write_text(json.dumps({"image": {"height": 3, "width": 4}, "annotations": [entry]}))
    plain = read_annotations(path)
    assert plain.boxes.tolist() == [[0, 1, 2, 3]]
    assert plain.points.isnan().all()
    assert plain.areas.isnan().all()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"image": {"height": 3}, "annotations": []}', '{"image": {"height": 3, "width": 4}}',
     '{"image": {"height": 3, "width": 4}, "annotations": [{"bbox": [1, 2]}]}',
     '{"image": {"height": 3, "width": 4}, "annotations": [{"segmentation": []}]}', "\x00\x01"],
)  # fmt: skip
def test_broken_json_names_the_file(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json is damaged"):
        read_annotations(tmp_path / "bad.json")


def test_damaged_segmentation_is_named(tmp_path):
    path = tmp_path / "a.json"
    entry = {"bbox": [0, 0, 1, 1], "segmentation": {"size": [3, 4], "counts": [7]}}
    path.write_text(json.dumps({"image": {"height": 3, "width": 4}, "annotations": [entry]}))
    with pytest.raises(ValueError, match=r"segmentation 0 of .*a\.json cannot be decoded"):
        read_annotations(path).masks()
    with pytest.raises(FileNotFoundError, match=r"^no annotation file .*none\.json; fetch it"):
        read_annotations(tmp_path / "none.json")


def test_every_form_of_segmentation_goes_to_pycocotools(tmp_path):
    compressed = coco_mask.encode(np.asfortranarray(np.eye(3, 4, dtype=np.uint8)))
    text = {"size": [3, 4], "counts": compressed["counts"].decode()}
    forms = [text, {"size": [3, 4], "counts": [0, 1, 3, 1, 3, 1, 3]}, [[0, 0, 2, 0, 2, 2, 0, 2]], []]
    path = tmp_path / "a.json"
    entries = [{"bbox": [0, 0, 1, 1], "segmentation": form} for form in forms]
    path.write_text(json.dumps({"image": {"height": 3, "width": 4}, "annotations": entries}))
    found = read_annotations(path)
    rles = [found.rle(index) for index in range(4)]
    assert rles[0] == compressed
    assert coco_mask.area(rles).tolist() == [3, 3, 4, 0]
    assert np.array_equal(coco_mask.decode(rles).transpose(2, 0, 1).astype(bool), found.masks().numpy())


# Runs -------------------------------------------------------------------------------------------------------------


def random_mask(height, width, seed):
    """Blobs and single pixels: long and short runs, and differences of both signs."""
    draw = np.random.default_rng(seed)
    mask = draw.random((height, width)) < 0.02
    top, left = draw.integers(0, (height + 1) // 2), draw.integers(0, (width + 1) // 2)
    mask[top : top + height // 2, left : left + width // 2] = True
    return mask


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (200, 31), (40, 900)])
def test_runs_agree_with_pycocotools(height, width):
    for seed in range(5):
        mask = random_mask(height, width, seed)
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        runs = run_lengths(rle, height, width)
        assert runs[1::2].sum() == coco_mask.area(rle) == mask.sum()
        assert np.array_equal(decode_segmentation(rle, height, width), mask)
        rows, columns = np.arange(0, height, 3), np.arange(0, width, 2)
        assert np.array_equal(sample_runs(runs, height, rows, columns), mask[::3, ::2])
        rows, columns = np.arange(2 * height) // 2, np.arange(3 * width) // 3  # every pixel several times
        assert np.array_equal(sample_runs(runs, height, rows, columns), mask[rows[:, None], columns])
        pixels = [pixel_of_runs(runs, height, share) for share in (np.arange(mask.sum()) + 0.5) / mask.sum()]
        column_first = [(row, column) for column, row in np.argwhere(mask.T).tolist()]
        assert pixels == column_first


def test_pixels_of_hand_made_runs():
    # 3 rows, 4 columns; pixels 2, 3, 4 and 9 down the columns are inside: (2, 0), (0, 1), (1, 1), (0, 3).
    runs = run_lengths({"size": [3, 4], "counts": [2, 3, 4, 1, 2]}, 3, 4)
    found = [pixel_of_runs(runs, 3, share) for share in (0.0, 0.24, 0.25, 0.5, 0.75, 0.999)]
    assert found == [(2, 0), (2, 0), (0, 1), (1, 1), (0, 3), (0, 3)]
    assert pixel_of_runs(run_lengths({"size": [3, 4], "counts": [12]}, 3, 4), 3, 0.5) is None
    assert pixel_of_runs(run_lengths({"size": [3, 4], "counts": [12, 0]}, 3, 4), 3, 0.5) is None
    # Beginning inside: the first run is 0.
    assert pixel_of_runs(run_lengths({"size": [3, 4], "counts": [0, 12]}, 3, 4), 3, 0.0) == (0, 0)
    assert sample_runs(runs, 3, np.array([0, 2]), np.array([0, 1, 3])).tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("counts", "message"),
    [("9", "cover 9 pixels"), ("R", "cut off"), ("", "cut off"), ("9!", "characters"), ("oooooooooooo0", "60 bits"),
     ([13, -1], "cover 12 pixels"), (["x"], "invalid")],
)  # fmt: skip
def test_damaged_runs_are_refused(counts, message):
    """pycocotools itself reads beyond such counts or does not end."""
    with pytest.raises(ValueError, match=message):
        run_lengths({"size": [3, 4], "counts": counts}, 3, 4)
