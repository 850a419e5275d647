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
    clip_boxes,
    drop_outside,
    is_usable,
    list_sa1b,
    list_unannotated,
    pixel_of_runs,
    read_annotations,
    read_phrases,
    run_lengths,
    sample_runs,
)
from tests.samples import write_sa1b

NAN, INF = float("nan"), float("inf")


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
    # The first mask begins in column 16 at row 11, and has 43 columns of 30 pixels, 60 apart.
    assert found.runs(0).tolist() == [16 * 90 + 11, *[30, 60] * 42, 30, 90 - 41 + 71 * 90]
    assert [found.runs(index)[1::2].sum() for index in range(2)] == [43 * 30, 43 * 22]


def test_every_form_of_segmentation():
    expected = np.zeros((4, 5), np.uint8, order="F")
    expected[1:3, 2:4] = 1
    compressed = coco_mask.encode(expected)
    # Column by column: 9 zeros, 2 ones, 2 zeros, 2 ones, 5 zeros.
    forms = [
        {"size": [4, 5], "counts": compressed["counts"].decode()},
        {"size": [4, 5], "counts": compressed["counts"]},
        {"size": [4, 5], "counts": [9, 2, 2, 2, 5]},
        [[2, 1, 4, 1, 4, 3, 2, 3]],
    ]
    for form in forms:
        assert run_lengths(form, 4, 5).tolist() == [9, 2, 2, 2, 5]
    two = run_lengths([[0, 0, 1, 0, 1, 1, 0, 1], [3, 3, 4, 3, 4, 4, 3, 4]], 4, 5)
    assert two.tolist() == [0, 1, 14, 1, 4]  # pixels (0, 0) and (3, 3)
    assert run_lengths([], 4, 5).tolist() == [20]
    with pytest.raises(ValueError, match="size"):
        run_lengths(forms[0], 5, 4)
    with pytest.raises(ValueError, match="21 pixels"):
        run_lengths({"size": [4, 5], "counts": [9, 2, 2, 2, 6]}, 4, 5)


def test_no_annotations_and_left_out_fields_are_fine(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"image": {"height": 3, "width": 4}, "annotations": []}))
    empty = read_annotations(path)
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert empty.points.shape == (0, 2)
    assert empty.areas.shape == (0,)
    entry = {"bbox": [0, 1, 2, 2], "segmentation": {"size": [3, 4], "counts": [12]}}
    path.write_text(json.dumps({"image": {"height": 3, "width": 4}, "annotations": [entry]}))
    plain = read_annotations(path)
    assert plain.boxes.tolist() == [[0, 1, 2, 3]]
    assert plain.points.isnan().all()
    assert plain.areas.isnan().all()


def test_phrases_mean_objects_by_their_place(tmp_path):
    path = tmp_path / "a.json"
    entries = [{"id": 30}, {"id": 10}, {"id": 20}]
    phrases = [{"text": "red star", "ids": [10, 30]}, {"text": "star", "ids": []}]
    path.write_text(json.dumps({"annotations": entries, "phrases": phrases}))
    assert read_phrases(path) == [("red star", [1, 0]), ("star", [])]
    path.write_text(json.dumps({"annotations": entries}))
    assert read_phrases(path) == []
    for wrong in ([{"text": "x", "ids": [7]}], [{"ids": [10]}], [5], 3):
        path.write_text(json.dumps({"annotations": entries, "phrases": wrong}))
        with pytest.raises(ValueError, match=r"annotation file .*a\.json is damaged"):
            read_phrases(path)
    with pytest.raises(FileNotFoundError, match="none"):
        read_phrases(tmp_path / "none.json")


ENTRY = {"bbox": [0, 1, 2, 2], "segmentation": {"size": [3, 4], "counts": [12]}, "area": 4}
SIZE = {"height": 3, "width": 4}


def with_entries(*changes, **image):
    return json.dumps({"image": SIZE | image, "annotations": [change | ENTRY | change for change in changes]})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "7", "null", "\x00\x01", '{"image": ' * 100_000),
        json.dumps({"image": SIZE}),
        json.dumps({"image": {"height": 3}, "annotations": []}),
        json.dumps({"image": [3, 4], "annotations": []}),
        *(json.dumps({"image": SIZE, "annotations": entries}) for entries in (None, {}, "ab", 1, [[]], [None], [7])),
        *(
            with_entries({}, **{side: value})
            for side in SIZE
            for value in (0, -3, 3.5, 1e30, 10**30, NAN, INF, "3", None)
        ),
        *(
            with_entries({"bbox": bbox})
            for bbox in ([1, 2], [0, 1, 2, 2, 9], [0, 1, 2, 2] * 2, [[0, 1, 2, 2]], [], 5, None)
        ),
        *(
            with_entries({"bbox": bbox})
            for bbox in (["0", 1, 2, 2], [None, 1, 2, 2], "0122", {"x": 1}, [10**400, 1, 2, 2])
        ),
        with_entries({"bbox": [0, 1, 2]}, {"bbox": [0, 1, 2, 2, 9]}),
        with_entries({"bbox": [0, 1]}, {"bbox": [2, 2]}),  # together as many numbers as one box
        *(with_entries({"point_coords": points}) for points in ([[]], [1, 2, 3], [1, 2], [[1, 2, 3]], [[1]], "ab", 5)),
        with_entries({"point_coords": [[1, 2]]}, {"point_coords": [[]]}),
        with_entries({"point_coords": {"x": 1}}),
        *(with_entries({"area": area}) for area in (None, [4], "4")),
        with_entries({"predicted_iou": [0.9, 0.8]}),
        json.dumps({"image": SIZE, "annotations": [{"bbox": [0, 1, 2, 2]}]}),
        json.dumps({"image": SIZE, "annotations": [{"segmentation": []}]}),
    ],
    ids=lambda text: text[:80],
)
def test_damaged_files_are_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"^annotation file .*bad\.json is damaged: .+; fetch it again$"):
        read_annotations(tmp_path / "bad.json")


def test_damage_is_described(tmp_path):
    path = tmp_path / "bad.json"
    for text, message in (
        (with_entries({}, height=0), "its height is 0, wanted a whole number from 1 to 65535"),
        (with_entries({}, width=INF), "its width is inf, wanted"),
        (with_entries({"bbox": [0, 1, 2, 2] * 2}), r"its bbox have the shape \(1, 8\), wanted \(1, 4\)"),
        (with_entries({"point_coords": [[]]}), r"its point_coords have the shape \(1, 0\), wanted \(1, 2\)"),
        (json.dumps({"image": SIZE, "annotations": {}}), "its annotations are a dict, wanted a list"),
        (json.dumps({"image": {"width": 4}, "annotations": []}), "it has no entry 'height'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"is damaged: {message}"):
            read_annotations(path)


def test_sizes_at_the_limits(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(with_entries(height=1, width=65535.0))
    found = read_annotations(path)
    assert (found.height, found.width) == (1, 65535)
    assert isinstance(found.width, int)
    path.write_text(with_entries(width=65536))
    with pytest.raises(ValueError, match="its width is 65536"):
        read_annotations(path)


def test_damaged_segmentation_is_named(tmp_path):
    path = tmp_path / "a.json"
    entry = {"bbox": [0, 0, 1, 1], "segmentation": {"size": [3, 4], "counts": [7]}}
    path.write_text(json.dumps({"image": {"height": 3, "width": 4}, "annotations": [entry]}))
    with pytest.raises(ValueError, match=r"segmentation 0 of .*a\.json cannot be decoded"):
        read_annotations(path).runs(0)
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
    whole = [sample_runs(found.runs(index), 3, np.arange(3), np.arange(4)) for index in range(4)]
    assert np.array_equal(coco_mask.decode(rles).transpose(2, 0, 1).astype(bool), whole)


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
        assert np.array_equal(sample_runs(runs, height, np.arange(height), np.arange(width)), mask)
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


# Boxes and points ---------------------------------------------------------------------------------------------------


def test_boxes_are_cut_at_the_edges_and_slivers_are_not_usable():
    boxes = np.array([
        [10, 10, 50, 50],
        [10, 10, 10.9, 50],  # narrower than a pixel
        [NAN, 10, 50, 50],
        [10, 10, INF, 50],
        [590, 10, 700, 50],  # ends beyond the picture: cut
        [599.5, 10, 700, 50],  # half a pixel is left
        [700, 10, 800, 50],
        [50, 50, 10, 10],
    ])  # fmt: skip
    clipped = clip_boxes(boxes, (400, 600))
    assert clipped[4].tolist() == [590, 10, 600, 50] and np.isnan(clipped[2:4]).all()
    assert is_usable(clipped).tolist() == [True, False, False, False, True, False, False, False]


def test_points_beyond_the_picture_are_dropped():
    points = np.array([[0, 0], [600, 400], [600.5, 3], [3, 401], [-1, 3], [NAN, 3], [INF, 3]])
    found = drop_outside(points, (400, 600))
    assert found[:2].tolist() == points[:2].tolist()
    assert np.isnan(found[2:]).all()
