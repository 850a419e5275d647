"""The three layouts of files, and what is said of those that do not fit."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillation.prompt.layouts import CocoSource, FolderSource, PromptSource, Sa1bSource, open_split
from sam3.engine.sa1b import annotation_path, read_annotations
from tests.distillation.prompt.folders import rectangle, write_mask, write_picture
from tests.samples import write_sa1b

SIZE = (30, 50)
BOX = (5, 6, 25, 20)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """cat with two masks, dog with one, emu without."""
    root = tmp_path / "set" / "train"
    write_picture(root, "dog", SIZE, [BOX], suffix=".PNG")
    write_picture(root, "cat", SIZE, [BOX, (1, 2, 9, 8)])
    write_picture(root, "emu", SIZE, [])
    return root


def write_coco(root: Path) -> None:
    """b.jpg with a box as a polygon and a crowd, a.jpg with two masks, c.jpg without."""

    def polygon(x: int, y: int, width: int, height: int) -> list[list[int]]:
        return [[x, y, x + width, y, x + width, y + height, x, y + height]]

    (root / "trainval").mkdir(parents=True)
    images, annotations = [], []
    for number, name in enumerate(("b", "a", "c")):
        Image.new("RGB", (50, 30)).save(root / "trainval" / f"{name}.jpg")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": 30, "width": 50})
    for image, box, crowd in ((0, (1, 1, 9, 9), 1), (0, (5, 6, 20, 14), 0), (1, (0, 0, 8, 8), 0), (1, (4, 2, 9, 8), 0)):
        annotations.append({"image_id": image, "iscrowd": crowd, "bbox": box, "area": 1, "segmentation": polygon(*box)})
    (root / "annotations").mkdir()
    document = {"images": images, "annotations": annotations}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document))


def contents(source: PromptSource) -> dict[str, list[str]]:
    return {key: source.objects(key) for key in source.keys()}  # noqa: SIM118 - no dict


def test_folders(split: Path):
    source = open_split(split)
    assert isinstance(source, FolderSource)
    assert contents(source) == {"cat": ["obj_0", "obj_1"], "dog": ["obj_0"], "emu": []}
    assert [source.count(key) for key in source.keys()] == [2, 1, 0]  # noqa: SIM118
    assert source.image_path("dog") == split / "image" / "dog.PNG"
    assert (source.mask("cat", "obj_0", SIZE).array() == rectangle(SIZE, BOX)).all()
    assert source.mask("cat", "obj_1", SIZE).box().tolist() == [1, 2, 9, 8]
    with pytest.raises(KeyError, match="'ant'"):
        source.image_path("ant")


def test_other_names_of_the_folders(split: Path):
    (split / "image").rename(split / "photos")
    (split / "mask").rename(split / "things")
    assert contents(open_split(split, "auto", "photos", "things"))["dog"] == ["obj_0"]
    with pytest.raises(
        FileNotFoundError, match=r"no data set at .*train: wanted the folder .*train/image .*instances_tr"
    ):
        open_split(split)
    with pytest.raises(FileNotFoundError, match=r"no folder .*train/image; set dataset.train_dataset"):
        open_split(split, "folder")


def test_masks_may_be_of_any_kind(split: Path):
    """A suffix in capitals, colours, a palette, two levels; other files are no masks."""
    folder, mask = split / "mask" / "dog", rectangle(SIZE, BOX)
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    grey.save(folder / "one.PNG")
    grey.convert("1").save(folder / "bits.png")
    Image.fromarray(mask[..., None] * np.array([0, 0, 200], np.uint8)).save(folder / "blue.png")
    grey.convert("P").save(folder / "palette.png")
    (folder / "notes.txt").write_text("no mask")
    (folder / ".hidden.png").write_text("no mask")
    source = open_split(split)
    assert source.objects("dog") == ["bits", "blue", "obj_0", "one", "palette"]
    assert source.count("dog") == 5
    for name in source.objects("dog"):
        assert (source.mask("dog", name, SIZE).array() == mask).all(), name


def test_foreground_is_what_exceeds_127(split: Path):
    levels = np.array([[0, 127, 128, 255]], np.uint8).repeat(4, 0)
    Image.fromarray(levels).save(split / "mask" / "dog" / "levels.png")
    assert open_split(split).mask("dog", "levels", (4, 4)).box().tolist() == [2, 0, 4, 4]


def test_damaged_masks_are_named(split: Path):
    folder = split / "mask" / "dog"
    write_mask(folder / "large.png", rectangle((31, 50), BOX))
    (folder / "broken.png").write_bytes((folder / "obj_0.png").read_bytes()[:60])
    Image.fromarray(rectangle(SIZE, BOX).astype(np.uint8)).save(folder / "ones.png")
    source = open_split(split)
    with pytest.raises(ValueError, match=r"large\.png is of 50 x 31 pixels, its picture .*dog\.PNG of 50 x 30"):
        source.mask("dog", "large", SIZE)
    with pytest.raises(ValueError, match=r"cannot read mask .*broken\.png"):
        source.mask("dog", "broken", SIZE)
    with pytest.raises(ValueError, match=r"ones\.png is empty: its largest value is 1, .* exceeds 127"):
        source.mask("dog", "ones", SIZE)
    (folder / "obj_0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask .*obj_0\.png"):
        source.mask("dog", "obj_0", SIZE)
    shutil.copy(folder / "large.png", folder / "large.PNG")
    with pytest.raises(ValueError, match="differ only in the case"):
        source.objects("dog")


def test_two_pictures_with_one_name_and_none_at_all(split: Path):
    shutil.copy(split / "image" / "cat.jpg", split / "image" / "cat.png")
    with pytest.raises(ValueError, match=r"two pictures for the key 'cat': cat\.jpg and cat\.png; rename one"):
        open_split(split)
    for path in (split / "image").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no pictures in .*image; .*make_sample_prompts"):
        open_split(split)


def test_sa1b(tmp_path: Path):
    write_sa1b(tmp_path, num_train=3, num_val=1)
    annotation_path(tmp_path, "train", "sa_2").unlink()
    source = open_split(tmp_path / "train")
    assert isinstance(source, Sa1bSource)
    assert contents(source) == {"sa_1": ["0", "1"], "sa_2": [], "sa_3": ["0", "1"]}
    assert [source.count(key) for key in source.keys()] == [2, 0, 2]  # noqa: SIM118
    assert source.image_path("sa_3") == tmp_path / "images" / "train" / "sa_3.jpg"
    annotations = read_annotations(annotation_path(tmp_path, "train", "sa_1"))
    mask = source.mask("sa_1", "1", (90, 130))
    assert mask.box().tolist() == annotations.boxes[1].tolist() and mask.area == annotations.areas[1]
    with pytest.raises(ValueError, match=r"sa_1\.json is of 130 x 90 pixels, its picture .*sa_1\.jpg of 130 x 91"):
        source.mask("sa_1", "1", (91, 130))
    assert contents(open_split(tmp_path / "val")) == {"sa_4": ["0", "1"]}


def test_sa1b_as_it_unpacks(tmp_path: Path):
    write_sa1b(tmp_path / "set", num_train=2, num_val=1)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "set").rglob("sa_*"):
        shutil.copy(path, flat)
    source = open_split(flat)
    assert contents(source) == {key: ["0", "1"] for key in ("sa_1", "sa_2", "sa_3")}
    sorted_ = open_split(tmp_path / "set" / "train")
    assert (source.mask("sa_1", "0", (90, 130)).runs == sorted_.mask("sa_1", "0", (90, 130)).runs).all()


def test_damaged_annotations_are_named(tmp_path: Path):
    write_sa1b(tmp_path, num_train=1, num_val=0)
    annotation_path(tmp_path, "train", "sa_1").write_text('{"annotations": [')
    with pytest.raises(ValueError, match=r"sa_1\.json is damaged"):
        open_split(tmp_path / "train").objects("sa_1")


def test_coco(tmp_path: Path):
    write_coco(tmp_path)
    source = open_split(tmp_path / "train")
    assert isinstance(source, CocoSource)
    assert contents(source) == {"a": ["0", "1"], "b": ["0"]}
    assert [source.count(key) for key in source.keys()] == [2, 1]  # noqa: SIM118
    assert source.image_path("a") == tmp_path / "trainval" / "a.jpg"
    assert source.mask("b", "0", SIZE).box().tolist() == [5, 6, 25, 20]
    assert source.mask("a", "1", SIZE).box().tolist() == [4, 2, 13, 10]
    with pytest.raises(ValueError, match=r"instances_train2017\.json is of 50 x 30 pixels, its picture .*b\.jpg of"):
        source.mask("b", "0", (50, 30))
    with pytest.raises(FileNotFoundError, match=r"no data set at .*val: "):
        open_split(tmp_path / "val")


def test_sources_travel_to_workers(tmp_path: Path, split: Path):
    write_sa1b(tmp_path / "sa1b", num_train=2, num_val=0)
    write_coco(tmp_path / "coco")
    for path in (split, tmp_path / "sa1b" / "train", tmp_path / "coco" / "train"):
        source = open_split(path)
        before = contents(source)
        assert contents(pickle.loads(pickle.dumps(source))) == before


def test_a_path_may_be_relative(split: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(split)
    assert open_split(".").keys() == ["cat", "dog", "emu"]
