"""Which pictures are found, in what order, which of them validate, and which stand in for those nobody can read."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from distillation.config import DistillationConfig
from distillation.dataset import MAX_SKIPPED, SA1BDistillDataset
from distillation.listing import Pictures, scan_sa1b, split_pictures
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import EmbeddingReader, store_meta
from sam3.engine.loader import build_loader
from sam3.engine.sa1b import read_annotations
from sam3.engine.sampler import EpochSampler
from tests.parity.fill import image
from tests.samples import write_sa1b

SHAPE = (3, 4, 4)  # of a trunk's map


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def touch_pairs(folder: Path, *keys: str) -> None:
    touch(folder, *(f"{key}.{suffix}" for key in keys for suffix in ("jpg", "json")))


def listed(*numbers: int) -> Pictures:
    return Pictures.by_number(Path("nowhere"), [f"sa_{number}.jpg" for number in numbers])


# Scanning -------------------------------------------------------------------------------------------------------------


def test_the_plan_s_split_on_empty_files(tmp_path):
    """33,558 pictures: 32,558 to train on, the last 1,000 by number for validation."""
    numbers = [7 * i + 1 for i in range(33_558)]  # of one to six digits, so that the order of letters would differ
    touch_pairs(tmp_path, *(f"sa_{number}" for number in numbers))
    pictures = scan_sa1b(tmp_path)
    train, val = split_pictures(pictures, num_val=1000)
    assert (len(pictures), len(train), len(val), pictures.skipped) == (33_558, 32_558, 1_000, 0)
    assert pictures.keys() == [f"sa_{number}" for number in numbers]
    assert pictures.keys() != sorted(pictures.keys())
    assert val.keys() == [f"sa_{number}" for number in numbers[-1000:]]
    assert train.keys() == [f"sa_{number}" for number in numbers[:-1000]]
    assert not set(train.keys()) & set(val.keys())


def test_order_is_by_number_then_by_name(tmp_path):
    touch_pairs(tmp_path, "sa_10", "sa_9", "sa_2_b", "sa_2_a", "sa_02", "sa_100", "sa_0000000011")
    keys = ["sa_02", "sa_2_a", "sa_2_b", "sa_9", "sa_10", "sa_0000000011", "sa_100"]
    pictures = scan_sa1b(tmp_path)
    assert pictures.keys() == keys
    assert [pictures.key(i) for i in range(len(pictures))] == keys
    assert [pictures.path(i) for i in (0, -1)] == [tmp_path / "sa_02.jpg", tmp_path / "sa_100.jpg"]


def test_other_files_are_no_pictures(tmp_path):
    touch_pairs(tmp_path, "sa_1", "sa_2", "holiday", "sa_x", "my_sa_3", ".sa_4", "sa_", f"sa_{'9' * 19}")
    touch(tmp_path, "sa_5.png", "sa_5.json", "sa_6.jpg.part", "sa_6.json", "sa_7.JPEG", "sa_7.json")
    assert scan_sa1b(tmp_path).keys() == ["sa_1", "sa_2", "sa_7"]


def test_pictures_without_json_are_counted_or_taken(tmp_path):
    touch_pairs(tmp_path, "sa_1", "sa_3")
    touch(tmp_path, "sa_2.jpg", "sa_4.jpg", "sa_5.json")
    pictures = scan_sa1b(tmp_path)
    assert (pictures.keys(), pictures.skipped) == (["sa_1", "sa_3"], 2)
    everything = scan_sa1b(tmp_path, require_json=False)
    assert (everything.keys(), everything.skipped) == (["sa_1", "sa_2", "sa_3", "sa_4"], 0)


def test_images_and_annotations_folders(tmp_path):
    touch(tmp_path / "images", "sa_11.jpg", "sa_2.jpg", "sa_3.jpg")
    touch(tmp_path / "annotations", "sa_2.json", "sa_11.json")
    pictures = scan_sa1b(tmp_path)
    assert (pictures.keys(), pictures.skipped) == (["sa_2", "sa_11"], 1)
    assert pictures.path(1) == tmp_path / "images/sa_11.jpg"
    assert pictures.annotation_path(1) == tmp_path / "annotations/sa_11.json"


def test_both_parts_of_the_sorted_layout_are_one_list(tmp_path):
    """The folders' own split says nothing: the rule goes by number."""
    touch(tmp_path / "images/train", "sa_5.jpg", "sa_20.jpg")
    touch(tmp_path / "images/val", "sa_7.jpg", "sa_1.jpg")
    touch(tmp_path / "annotations/train", "sa_5.json", "sa_20.json")
    touch(tmp_path / "annotations/val", "sa_7.json", "sa_1.json")
    pictures = scan_sa1b(tmp_path)
    assert pictures.keys() == ["sa_1", "sa_5", "sa_7", "sa_20"]
    assert pictures.path(0) == tmp_path / "images/val/sa_1.jpg"
    assert pictures.annotation_path(3) == tmp_path / "annotations/train/sa_20.json"
    train, val = split_pictures(pictures, num_val=1)
    assert (train.keys(), val.keys()) == (["sa_1", "sa_5", "sa_7"], ["sa_20"])


def test_annotation_paths_lead_to_the_files(tmp_path):
    write_sa1b(tmp_path, num_train=2, num_val=1)
    pictures = scan_sa1b(tmp_path)
    assert [len(read_annotations(pictures.annotation_path(i))) for i in range(3)] == [2, 2, 2]
    touch_pairs(tmp_path / "flat/images", "sa_1")  # a flat folder that bears the other layout's name
    flat = scan_sa1b(tmp_path / "flat/images")
    assert flat.annotation_path(0) == tmp_path / "flat/images/sa_1.json"


def test_a_json_of_the_other_part_does_not_count(tmp_path):
    touch(tmp_path / "images/train", "sa_1.jpg", "sa_2.jpg")
    touch(tmp_path / "annotations/train", "sa_1.json")
    touch(tmp_path / "annotations/val", "sa_2.json")
    pictures = scan_sa1b(tmp_path)
    assert (pictures.keys(), pictures.skipped) == (["sa_1"], 1)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent; fetch .*data/download_sa1b\.sh.*--data"):
        scan_sa1b(tmp_path / "absent")


def test_no_pictures(tmp_path):
    touch(tmp_path, "sa_1.json", "sa_2.tar")
    with pytest.raises(FileNotFoundError) as error:
        scan_sa1b(tmp_path)
    message = str(error.value)
    for part in ("sa_<number>.jpg", str(tmp_path), "images/train", "data/download_sa1b.sh", "data/reorg_sa1b.py"):
        assert part in message
    assert "\n" not in message


def test_pictures_but_no_json(tmp_path):
    touch(tmp_path / "images", "sa_1.jpg", "sa_2.jpg")
    with pytest.raises(FileNotFoundError, match=r"none of the 2 pictures .* require_json=false"):
        scan_sa1b(tmp_path)
    assert len(scan_sa1b(tmp_path, require_json=False)) == 2


@pytest.mark.parametrize("folders", [("images/train", "images/val"), ("images", "images/train"), ("", "images")])
def test_two_pictures_of_one_key(tmp_path, folders):
    for folder in folders:
        touch(tmp_path / folder, "sa_1.jpg", f"sa_2{len(folder)}.jpg")
    with pytest.raises(ValueError, match=r"two pictures for the key 'sa_1': .*sa_1\.jpg and .*sa_1\.jpg; remove one"):
        scan_sa1b(tmp_path, require_json=False)


def test_two_suffixes_of_one_key(tmp_path):
    touch_pairs(tmp_path, "sa_1")
    touch(tmp_path, "sa_1.jpeg")
    with pytest.raises(ValueError, match=r"sa_1\.jpe?g and sa_1\.jpe?g"):
        scan_sa1b(tmp_path)


# Splitting ------------------------------------------------------------------------------------------------------------


def test_num_train_drops_the_last_of_the_training_part():
    pictures = listed(30, 1, 200, 4, 1000, 55)
    train, val = split_pictures(pictures, num_val=2, num_train=3)
    assert (train.keys(), val.keys()) == (["sa_1", "sa_4", "sa_30"], ["sa_200", "sa_1000"])
    train, val = split_pictures(pictures, num_val=2, num_train=50)
    assert (train.keys(), val.keys()) == (["sa_1", "sa_4", "sa_30", "sa_55"], ["sa_200", "sa_1000"])


@pytest.mark.parametrize("num_val", [3, 4, 1000])
def test_as_few_pictures_as_validation_takes(num_val):
    with pytest.raises(ValueError, match=rf"holds 3 pictures.* last {num_val} .*lower num_val \(--num-val\)"):
        split_pictures(listed(1, 2, 3), num_val)


def test_one_more_picture_than_validation_takes():
    train, val = split_pictures(listed(1, 2, 3), 2)
    assert (train.keys(), val.keys()) == (["sa_1"], ["sa_2", "sa_3"])


def test_part_and_digest():
    pictures = listed(5, 3, 40)
    assert pictures.part(0, 2).keys() == ["sa_3", "sa_5"]
    assert pictures.part(1).keys() == ["sa_5", "sa_40"]
    assert pictures.part(0, 99).digest() == pictures.digest() == listed(40, 5, 3).digest()
    assert pictures.part(1).digest() != pictures.digest()


def test_a_spawned_worker_gets_its_part_only():
    pictures = listed(*range(100_000))
    part = pickle.dumps(pictures.part(99_990))
    assert len(part) < 2000
    assert pickle.loads(part).keys() == [f"sa_{number}" for number in range(99_990, 100_000)]


# Standing in ----------------------------------------------------------------------------------------------------------


def flat_set(root: Path, count: int, size: tuple[int, int] = (40, 50)) -> Pictures:
    """sa_0.jpg, sa_1.jpg, ... without annotations; picture i shows `image(..., seed=i)`."""
    for number in range(count):
        Image.fromarray(image(*size, seed=number)).save(root / f"sa_{number}.jpg", quality=90)
    return scan_sa1b(root, require_json=False)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:600])


def dataset(pictures: Pictures, training: bool = True, **options) -> SA1BDistillDataset:
    return SA1BDistillDataset(pictures, DistillationConfig(image_size=28), training=training, **options)


def loader_of(data: SA1BDistillDataset, num_workers: int, count: int):
    """The first `count` pictures in order, two at a time."""
    return build_loader(data, EpochSampler(count, 2, shuffle=False, drop_last=False), num_workers)


def test_the_next_picture_stands_in_for_an_unreadable_one(tmp_path):
    pictures = flat_set(tmp_path, 5)
    truncate(pictures.path(1))
    pictures.path(2).write_bytes(b"")
    pictures.path(4).unlink()
    data = dataset(pictures)
    batch = data.load(range(5))
    assert batch.keys == ["sa_0", "sa_3", "sa_3", "sa_3", "sa_0"]
    assert torch.equal(batch.images[1], data.load([3]).images[0])
    assert torch.equal(batch.images[4], data.load([0]).images[0])
    assert [key for key, _ in batch.skipped] == ["sa_1", "sa_2", "sa_2", "sa_4"]
    reasons = dict(batch.skipped)
    assert "sa_1.jpg is truncated" in reasons["sa_1"]
    assert "sa_2.jpg is empty" in reasons["sa_2"]
    assert "no picture" in reasons["sa_4"]
    # What is drawn stays with the place in the epoch.
    intact = dataset(flat_set(tmp_path, 5)).load(range(5))
    assert torch.equal(batch.prompt_index, intact.prompt_index)


def test_a_sample_s_substitute_is_logged_and_annotated(tmp_path, caplog):
    write_sa1b(tmp_path, num_train=3, num_val=0)
    pictures = scan_sa1b(tmp_path)
    truncate(pictures.path(0))
    with caplog.at_level(logging.WARNING):
        sample = dataset(pictures, training=False, load_annotations=True)[0]
    assert sample["image_id"] == "sa_2"
    assert sample["original_size"] == (sample["annotations"].height, sample["annotations"].width) == (130, 92)
    assert [record.getMessage().count("sa_1.jpg is truncated") for record in caplog.records] == [1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_reports_each_unreadable_picture_once(tmp_path, caplog, num_workers):
    pictures = flat_set(tmp_path, 6)
    truncate(pictures.path(4))
    loader = loader_of(dataset(pictures), num_workers, count=6)
    with caplog.at_level(logging.WARNING):
        batches = [batch for _ in range(2) for batch in loader]
    assert [key for batch in batches for key in batch.keys] == ["sa_0", "sa_1", "sa_2", "sa_3", "sa_5", "sa_5"] * 2
    assert [len(batch.skipped) for batch in batches] == [0, 0, 1] * 2
    assert sum("sa_4.jpg is truncated" in record.getMessage() for record in caplog.records) == 1


def test_unreadable_pictures_and_a_trunk_cache(tmp_path):
    """The cache need not know the picture that nobody could read, but must know the one that is taken."""
    pictures = flat_set(tmp_path, 3)
    truncate(pictures.path(0))
    with EmbeddingWriter(tmp_path / "store", store_meta(SHAPE)) as writer:
        writer.add("sa_1", 0, torch.full(SHAPE, 1.0))
    data = dataset(pictures, store=EmbeddingReader(tmp_path / "store"))
    (batch,) = loader_of(data, 0, count=1)
    assert batch.keys == ["sa_1"]
    assert (batch.embeddings.values() == 1).all()
    truncate(pictures.path(1))
    with pytest.raises(ValueError, match="no teacher embedding for 'sa_2'"):
        data.load([0])


def test_too_many_unreadable_pictures_in_a_row(tmp_path):
    pictures = flat_set(tmp_path, 14)
    for index in range(2, 2 + MAX_SKIPPED):
        truncate(pictures.path(index))
    data = dataset(pictures)
    batch = data.load([2])
    assert (batch.keys, len(batch.skipped)) == (["sa_12"], MAX_SKIPPED)
    truncate(pictures.path(12))
    with pytest.raises(ValueError, match=r"11 pictures in a row .*sa_12\.jpg is truncated") as error:
        data.load([2])
    assert "\n" not in str(error.value)
    assert data.load([3]).keys == ["sa_13"]


def test_a_small_set_is_not_tried_twice(tmp_path):
    pictures = flat_set(tmp_path, 3)
    for index in range(3):
        truncate(pictures.path(index))
    with pytest.raises(ValueError, match=r"3 pictures in a row .*sa_0\.jpg is truncated"):
        dataset(pictures).load([1])
