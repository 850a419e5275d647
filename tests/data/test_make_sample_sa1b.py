from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data.make_sample_sa1b import (
    MAX_MASKS,
    annotate,
    choose_regions,
    find_masks,
    iou_table,
    main,
    plan,
)
from sam3.engine.sa1b import annotation_path, decode_runs, list_sa1b, read_annotations
from sam3.engine.sample_set import bundled_paths, list_photos
from sam3.engine.scene_grounds import read_grounds, split_grounds
from sam3.engine.scenes import make_scene


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures of two bright rectangles on a dark ground; one is grey, one has an alpha channel."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        picture = np.full((96, 128, 3), 20, np.uint8)
        picture[10:40, 10 + i : 60] = (200, 60, 30)
        picture[50:90, 70:120] = (30, 200, 90)
        image = Image.fromarray(picture)
        image = image.convert({4: "L", 5: "RGBA"}.get(i, "RGB"))
        image.save(folder / f"photo{i}.png")
    return folder


def make(photos: Path, output: Path, *extra: str) -> int:
    counts = ["--num-train", "6", "--num-val", "2", "--crops", "2", "--workers", "1"]
    return main(["--images", str(photos), "--output", str(output), *counts, *extra])


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout_and_fields(photos: Path, tmp_path: Path) -> None:
    assert make(photos, tmp_path / "set") == 0
    root = tmp_path / "set"
    assert sorted(path.stem for path in (root / "images/train").glob("*.jpg")) == [f"sa_{i}" for i in range(1, 7)]
    assert sorted(path.stem for path in (root / "annotations/val").glob("*.json")) == ["sa_7", "sa_8"]
    document = json.loads((root / "annotations/train/sa_1.json").read_text())
    assert document["image"] == {"image_id": 1, "width": 128, "height": 96, "file_name": "sa_1.jpg"}
    assert Image.open(root / "images/train/sa_1.jpg").size == (128, 96)
    assert len(document["annotations"]) >= 2
    for entry in document["annotations"]:
        fields = "id segmentation bbox area predicted_iou stability_score crop_box point_coords"
        assert list(entry) == fields.split()
        mask = coco_mask.decode(entry["segmentation"])
        assert mask.shape == (96, 128) and entry["segmentation"]["size"] == [96, 128]
        assert entry["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        x, y, w, h = entry["bbox"]
        assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        ((px, py),) = entry["point_coords"]
        assert mask[int(py), int(px)] == 1
        assert 0 <= entry["predicted_iou"] <= entry["stability_score"] <= 1
        assert entry["crop_box"] == [0.0, 0.0, 128.0, 96.0]


def test_the_same_arguments_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "a")
    make(photos, tmp_path / "b")
    make(photos, tmp_path / "c", "--seed", "1")
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")


def test_a_second_run_finds_it_complete_and_repairs_what_is_missing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(photos, tmp_path / "set")
    before = files(tmp_path / "set")
    capsys.readouterr()
    assert make(photos, tmp_path / "set") == 0
    assert "already complete: 6 train and 2 val pictures" in capsys.readouterr().out
    (tmp_path / "set/annotations/train/sa_3.json").unlink()
    assert make(photos, tmp_path / "set") == 0
    assert "(1 to make)" in capsys.readouterr().out
    assert files(tmp_path / "set") == before


def test_other_arguments_or_a_foreign_folder_are_refused(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "set")
    with pytest.raises(ValueError, match="made with other arguments"):
        make(photos, tmp_path / "set", "--max-side", "64")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").touch()
    with pytest.raises(ValueError, match="not made by this script"):
        make(photos, tmp_path / "foreign")


def test_no_photo_serves_both_splits() -> None:
    photos = [Path(f"{i}.jpg") for i in range(14)]
    pictures = plan(photos, 48, 8, 4, seed=0)
    by_split = {s: [(p.photo, p.crop) for p in pictures if p.split == s] for s in ("train", "val")}
    assert (len(by_split["train"]), len(by_split["val"])) == (48, 8)
    assert not {photo for photo, _ in by_split["train"]} & {photo for photo, _ in by_split["val"]}
    assert len(set(by_split["train"] + by_split["val"])) == 56
    assert {crop for _, crop in by_split["train"][:12]} == {0}, "whole photos come first"


def test_plan_needs_enough_photos() -> None:
    with pytest.raises(
        ValueError, match=r"48 train and 8 val pictures need 12 \+ 2 photos at --crops 4, but there are 3"
    ):
        plan([Path(f"{i}.jpg") for i in range(3)], 48, 8, 4, seed=0)


def test_large_photos_are_made_smaller(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "set", "--max-side", "64")
    assert Image.open(tmp_path / "set/images/train/sa_1.jpg").size == (64, 48)


def test_turned_and_16_bit_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.zeros((60, 100, 3), np.uint8)).save(folder / "a.jpg", exif=exif)
    Image.fromarray(np.full((60, 100), 257 * 128, np.uint16)).save(folder / "b.png")
    argv = ["--images", str(folder), "--output", str(tmp_path / "set"), "--crops", "1", "--workers", "1"]
    assert main([*argv, "--num-train", "2", "--num-val", "0"]) == 0
    pictures = [Image.open(path) for path in (tmp_path / "set/images/train").iterdir()]
    assert {picture.size for picture in pictures} == {(60, 100), (100, 60)}
    assert {int(np.asarray(picture).mean()) for picture in pictures} == {0, 128}


def test_a_broken_picture_is_named(photos: Path, tmp_path: Path) -> None:
    (photos / "photo2.png").write_bytes((photos / "photo2.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"photo2\.png is not a readable picture"):
        make(photos, tmp_path / "set")


def test_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no pictures"):
        list_photos(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        list_photos(tmp_path / "nowhere")


@pytest.mark.parametrize("flags", [["--num-train", "0"], ["--crops", "0"], ["--max-side", "8"], ["--workers", "0"]])
def test_wrong_flags_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2


def make_scenes(photos: Path, output: Path, *extra: str) -> int:
    counts = ["--num-train", "4", "--num-val", "2", "--size", "64", "--workers", "1"]
    return main(["--scenes", "--images", str(photos), "--output", str(output), *counts, *extra])


def test_scenes_with_phrases(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    assert make_scenes(photos, root) == 0
    grounds = split_grounds(sorted(photos.iterdir()))
    assert not set(grounds["train"]) & set(grounds["val"])
    number = 0
    for split, count in (("train", 4), ("val", 2)):
        keys = list_sa1b(root, split).keys()
        assert len(keys) == count
        for key in keys:
            number = int(key.removeprefix("sa_"))
            scene = make_scene(number, 64, split, read_grounds(grounds[split], 64))
            path = annotation_path(root, split, key)
            annotations = read_annotations(path)
            masks = [decode_runs(annotations.runs(i), 64, 64) for i in range(len(annotations))]
            assert (np.stack(masks) == scene.masks).all()
            document = json.loads(path.read_text())
            ids = [entry["id"] for entry in document["annotations"]]
            assert [phrase["text"] for phrase in document["phrases"]] == [phrase.text for phrase in scene.phrases]
            for phrase, wanted in zip(document["phrases"], scene.phrases, strict=True):
                assert phrase["ids"] == [ids[i] for i in wanted.matches]
            picture = np.asarray(Image.open(root / f"images/{split}/{key}.jpg")).astype(int)
            assert picture.shape == (64, 64, 3) and np.abs(picture - scene.image).mean() < 12
    assert number == 6


def test_scenes_are_the_same_bytes_and_repaired(photos: Path, tmp_path: Path) -> None:
    make_scenes(photos, tmp_path / "a", "--workers", "2")
    make_scenes(photos, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    (tmp_path / "b/images/val/sa_6.jpg").unlink()
    make_scenes(photos, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with pytest.raises(ValueError, match="made with other arguments"):
        make_scenes(photos, tmp_path / "a", "--seed", "1")


@pytest.mark.parametrize(
    "flags",
    [["--scenes", "--crops", "2"], ["--scenes", "--max-side", "64"], ["--size", "64"], ["--scenes", "--size", "16"]],
)
def test_flags_without_effect_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2


def test_iou_table_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1]])
    others = np.array([[0, 1, 1, 1]])
    assert iou_table(labels, others).tolist() == [[0.5, 0.25], [0.0, 2 / 3]]


def test_regions_that_keep_their_shape_win() -> None:
    steady = np.zeros((20, 20), np.int64)
    steady[2:8, 2:8] = 1
    finer = steady.copy()
    finer[10:, :] = 2  # splits the ground, leaves the square
    regions = choose_regions([finer, steady, steady])
    assert regions[0] == (0, 1, 1.0, 1.0)
    assert sum(label == 1 for _, label, _, _ in regions) == 1, "the same square at other scales is no new region"


def test_masks_of_rectangles() -> None:
    picture = np.full((240, 320, 3), 20, np.uint8)
    picture[40:190, 50:170] = (200, 60, 30)
    truth = picture[..., 0] == 200
    best = max((mask & truth).sum() / (mask | truth).sum() for mask, _, _ in find_masks(picture))
    assert best > 0.9


def test_point_is_the_middle_of_the_thick_part() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4:13, 5:14] = True
    mask[8, 14:28] = True
    entry = annotate(7, mask, 0.5, 0.75)
    assert entry["point_coords"] == [[9.0, 8.0]]
    assert entry["bbox"] == [5.0, 4.0, 23.0, 9.0]
    assert (entry["id"], entry["area"]) == (7, 9 * 9 + 14)


def test_a_bundled_photo(tmp_path: Path) -> None:
    bundled = [Path(path) for path in bundled_paths() if Path(path).is_file()]
    assert len(bundled) >= 14, "48 + 8 pictures at 4 crops need 14 photos"
    (tmp_path / "photos").mkdir()
    coins = next(path for path in bundled if path.name == "coins.png")
    shutil.copy(coins, tmp_path / "photos")
    argv = ["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "set"), "--crops", "1", "--workers", "1"]
    assert main([*argv, "--num-train", "1", "--num-val", "0"]) == 0
    entries = json.loads((tmp_path / "set/annotations/train/sa_1.json").read_text())["annotations"]
    assert 20 <= len(entries) <= MAX_MASKS, "there are 24 coins"
