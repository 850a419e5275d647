from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.make_sample_prompts import main
from sam3.engine.sa1b import read_annotations
from tests.samples import write_sa1b


@pytest.fixture
def sa1b(tmp_path: Path) -> Path:
    """sa_1 to sa_3 to train on, sa_4 and sa_5 to validate; 90 x 130 and so on, two masks each, the larger one first."""
    root = tmp_path / "sa1b"
    write_sa1b(root, num_train=3, num_val=2)
    return root


def make(sa1b: Path, output: Path, *extra: str) -> int:
    return main(["--sa1b", str(sa1b), "--output", str(output), *extra])


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout(sa1b: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    assert make(sa1b, root) == 0
    wanted = {"sample.json"}
    for split, keys in (("train", ("sa_1", "sa_2", "sa_3")), ("val", ("sa_4", "sa_5"))):
        for key in keys:
            wanted |= {f"{split}/image/{key}.jpg", *(f"{split}/mask/{key}/obj_0{i}.png" for i in range(2))}
    assert set(files(root)) == wanted
    assert (root / "val/image/sa_4.jpg").read_bytes() == (sa1b / "images/val/sa_4.jpg").read_bytes()


def test_masks_are_the_largest_first(sa1b: Path, tmp_path: Path) -> None:
    path = sa1b / "annotations/train/sa_1.json"
    document = json.loads(path.read_text())
    document["annotations"].reverse()
    path.write_text(json.dumps(document))
    assert make(sa1b, tmp_path / "set") == 0
    annotations = read_annotations(path)
    for place, index in ((0, 1), (1, 0)):
        mask = np.asarray(Image.open(tmp_path / f"set/train/mask/sa_1/obj_0{place}.png"))
        assert mask.shape == (90, 130) and set(np.unique(mask)) == {0, 255}
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box == annotations.boxes[index].tolist() and len(rows) == annotations.areas[index]


def test_empty_masks_are_left_out(sa1b: Path, tmp_path: Path) -> None:
    path = sa1b / "annotations/train/sa_1.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["segmentation"]["counts"] = [90 * 130]
    path.write_text(json.dumps(document))
    assert make(sa1b, tmp_path / "set") == 0
    assert [path.name for path in (tmp_path / "set/train/mask/sa_1").iterdir()] == ["obj_00.png"]


def test_numbers(sa1b: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    assert make(sa1b, root, "--num-train", "2", "--num-val", "0", "--max-masks", "1") == 0
    assert set(files(root)) == {
        "sample.json",
        *(f"train/{part}" for key in ("sa_1", "sa_2") for part in (f"image/{key}.jpg", f"mask/{key}/obj_00.png")),
    }
    with pytest.raises(ValueError, match=r"holds 2 annotated pictures of val, wanted 3; lower --num-val"):
        make(sa1b, tmp_path / "other", "--num-val", "3")
    assert not (tmp_path / "other").exists()
    for wrong in ("--num-train", "--max-masks"):
        with pytest.raises(SystemExit):
            make(sa1b, tmp_path / "other", wrong, "0")


def test_the_same_arguments_give_the_same_files(sa1b: Path, tmp_path: Path) -> None:
    assert make(sa1b, tmp_path / "one") == make(sa1b, tmp_path / "two") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_second_run_makes_what_is_missing(sa1b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    make(sa1b, root)
    before = files(root)
    kept = root / "val/mask/sa_4/obj_00.png"
    changed = kept.stat().st_mtime_ns
    (root / "train/image/sa_2.jpg").unlink()
    shutil.rmtree(root / "train/mask/sa_2")
    capsys.readouterr()
    assert make(sa1b, root) == 0
    assert "(1 to make)" in capsys.readouterr().out
    assert files(root) == before and kept.stat().st_mtime_ns == changed
    assert make(sa1b, root) == 0
    assert capsys.readouterr().out == f"{root} is complete: 3 train and 2 val pictures\n"


def test_other_arguments_and_foreign_folders_are_refused(sa1b: Path, tmp_path: Path) -> None:
    make(sa1b, tmp_path / "set")
    with pytest.raises(ValueError, match="made with other arguments"):
        make(sa1b, tmp_path / "set", "--max-masks", "1")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="was not made by this script"):
        make(sa1b, foreign)
    assert files(foreign) == {"thesis.txt": b"precious"}


def test_nothing_to_read(tmp_path: Path, sa1b: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere/images/train; .*make_sample_sa1b.py"):
        make(tmp_path / "nowhere", tmp_path / "set")
    shutil.rmtree(sa1b / "annotations/val")
    with pytest.raises(FileNotFoundError, match=r"no folder .*annotations/val"):
        make(sa1b, tmp_path / "set")
    shutil.rmtree(sa1b / "images/val")
    assert make(sa1b, tmp_path / "set") == 0  # a set need not have a val split
