"""Which pictures a run takes: caps, agreement of processes, pictures without an embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
from yacs.config import CfgNode

from sam3.engine import coverage
from sam3.engine.image_list import ImageList
from tests.engine.toy_pictures import write_toy_store


def pictures(count: int, first: int = 0) -> ImageList:
    return ImageList.build(Path("set"), [(f"toy_{i}", f"toy_{i}.jpg") for i in range(first, first + count)])


def config(**data) -> CfgNode:
    keys = {"DATA_PATH": "set", "NUM_SAMPLES": -1, "NUM_VAL_SAMPLES": -1, "DEBUG": False}
    return CfgNode({"DATA": {**keys, **data}})


def no_split(split: str) -> ImageList:
    raise FileNotFoundError(f"no folder {split}")


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged, whatever another test made of the loggers."""
    found: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(coverage.logger, level, found.append)
    return found


def test_caps_of_both_splits():
    splits = {"train": pictures(150), "val": pictures(120)}
    for keys, train, val in (
        ({}, 150, 120),
        ({"NUM_SAMPLES": 3, "NUM_VAL_SAMPLES": 2}, 3, 2),
        ({"DEBUG": True}, 100, 100),
        ({"DEBUG": True, "NUM_SAMPLES": 7, "NUM_VAL_SAMPLES": 110}, 7, 100),
    ):
        assert len(coverage.train_images(config(**keys), splits.__getitem__)) == train
        assert len(coverage.val_images(config(**keys), splits.__getitem__)) == val
    assert coverage.val_images(config(NUM_VAL_SAMPLES=0), no_split) is None
    with pytest.raises(ValueError, match="pass --data-path"):
        coverage.train_images(config(DATA_PATH=""), splits.__getitem__)


def test_a_val_split_may_be_absent_a_train_split_may_not(messages: list[str]):
    assert coverage.val_images(config(), no_split) is None
    assert messages == ["no val split (no folder val): there will be no validation"]
    assert coverage.val_images(config(), lambda split: pictures(0)) is None
    with pytest.raises(FileNotFoundError, match="no folder train"):
        coverage.train_images(config(), no_split)


@pytest.mark.parametrize("mine", [pictures(3), None])
def test_processes_must_see_the_same(monkeypatch: pytest.MonkeyPatch, mine: ImageList | None):
    coverage.require_same_everywhere(mine, "set (val)")
    monkeypatch.setattr("sam3.engine.distributed.gather_objects", lambda own: [own, pictures(2).digest()])
    with pytest.raises(ValueError, match=r"see different pictures in set \(val\); every machine must see the same"):
        coverage.require_same_everywhere(mine, "set (val)")


def test_missing_embeddings_are_counted_and_ten_are_named(tmp_path: Path, messages: list[str]):
    reader = write_toy_store(tmp_path / "store", 4)
    complete = pictures(4)
    assert coverage.with_embedding(complete, reader, skip=False) == (complete, [])
    wanted = [f"toy_{i}" for i in range(4, 16)]
    named = ", ".join(sorted(wanted)[:10])  # lists are sorted by key
    text = f"no teacher embedding for 12 of 16 pictures in {reader.folder}: {named} and 2 more"
    with pytest.raises(ValueError) as error:
        coverage.with_embedding(pictures(16), reader, skip=False)
    assert str(error.value).startswith(f"{text}; write them with ")
    assert not messages
    left, missing = coverage.with_embedding(pictures(16), reader, skip=True)
    assert left.keys() == complete.keys() and missing == sorted(wanted)
    assert messages == [f"{text}; they are left out"]
    with pytest.raises(ValueError, match="no teacher embedding for 2 of 2 pictures"):
        coverage.with_embedding(pictures(2, first=10), reader, skip=True)


def test_val_pictures_without_embedding_cost_a_warning(tmp_path: Path, messages: list[str]):
    reader = write_toy_store(tmp_path / "store", 4)
    assert coverage.val_with_embedding(None, reader) == (None, [])
    left, missing = coverage.val_with_embedding(pictures(5), reader)
    assert left.keys() == pictures(4).keys() and missing == ["toy_4"]
    assert messages == [f"no teacher embedding for 1 of 5 val pictures in {reader.folder}: toy_4; they are left out"]
    assert coverage.val_with_embedding(pictures(2, first=10), reader) == (None, ["toy_10", "toy_11"])
