"""COCO and LVIS."""

from __future__ import annotations

import json

import pytest

from sam3.engine.coco import list_coco, read_coco


def entry(image_id, crowd=0):
    return {
        "image_id": image_id,
        "iscrowd": crowd,
        "bbox": [1, 1, 2, 1],
        "area": 2,
        "segmentation": [[1, 1, 3, 1, 3, 2, 1, 2]],
    }


def write_coco(root, name="instances_train2017.json", **changes):
    document = {
        "images": [
            {"id": 7, "height": 4, "width": 6, "file_name": "c.jpg"},
            {"id": 8, "height": 4, "width": 6, "coco_url": "http://images.cocodataset.org/train2017/a.jpg"},
            {"id": 9, "height": 4, "width": 6, "file_name": "nothing.jpg"},
            {"id": 10, "height": 4, "width": 6, "file_name": "crowd.jpg"},
        ],
        "annotations": [entry(7), entry(7), entry(8), entry(10, crowd=1)],
        **changes,
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(document))
    (root / "trainval").mkdir(exist_ok=True)
    for file in ("c.jpg", "a.jpg", "nothing.jpg", "crowd.jpg"):
        (root / "trainval" / file).touch()


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("coco", "instances_train2017.json"),
        ("lvis", "lvis_v1_train.json"),
        ("cocofied_lvis", "lvis_v1_train_cocofied.json"),
    ],
)
def test_lists_annotated_pictures(tmp_path, dataset, name):
    write_coco(tmp_path, name)
    images = list_coco(tmp_path, "train", dataset)
    assert images.keys() == ["a.jpg", "c.jpg"]
    assert images.path(0) == tmp_path / "trainval" / "a.jpg"
    assert images.skipped == 2  # nothing.jpg and crowd.jpg


def test_annotations_of_one_picture(tmp_path):
    write_coco(tmp_path)
    split = read_coco(tmp_path, "train")
    found = split.annotations("c.jpg")
    assert found.boxes.tolist() == [[1, 1, 3, 2]] * 2
    assert [found.runs(index)[1::2].sum() for index in range(2)] == [2, 2]
    with pytest.raises(KeyError):
        split.annotations("nothing.jpg")


def test_ignore_list(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "annotations" / "ignore.json").write_text('["c.jpg"]')
    assert list_coco(tmp_path, "train").keys() == ["a.jpg"]


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json"):
        list_coco(tmp_path, "train")
    with pytest.raises(ValueError, match="'voc' is unknown"):
        list_coco(tmp_path, "train", "voc")
    write_coco(tmp_path, annotations=[])
    with pytest.raises(ValueError, match="no picture with annotations"):
        list_coco(tmp_path, "train")
    write_coco(tmp_path, annotations=[entry(99)])
    with pytest.raises(ValueError, match="no entry 99"):
        list_coco(tmp_path, "train")
    write_coco(tmp_path)
    (tmp_path / "trainval" / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 pictures of .* such as a\.jpg"):
        list_coco(tmp_path, "train")
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        list_coco(tmp_path, "train")
