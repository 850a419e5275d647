from __future__ import annotations

import logging
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.engine import checkpoint, rng
from sam3.engine.checkpoint import Position


def packed(epoch: int = 0, step: int = 0, complete: bool = True, **others) -> dict:
    model = {"weight": torch.full((2,), float(epoch))}
    return checkpoint.pack(model, Position(epoch, step, 0 if complete else 3), epoch_complete=complete, **others)


def test_contents_are_plain_and_load_without_unpickling_code(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=True)
    path = checkpoint.save(
        tmp_path,
        packed(
            3,
            optimizer=optimizer.state_dict(),
            rng=[rng.get_state(), rng.get_state()],
            config={"OUTPUT": Path("x"), "BETAS": (0.9, 0.99)},
            meta={"backbone": "toy"},
        ),
    )
    assert path.name == "ckpt_epoch_3.pth"
    found = torch.load(path, weights_only=True)
    assert found["config"] == {"OUTPUT": "x", "BETAS": (0.9, 0.99)}
    assert (found["world_size"], found["epoch"], found["meta"]) == (2, 3, {"backbone": "toy"})
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_epoch_3.pth"]


def test_other_objects_cannot_be_stored():
    with pytest.raises(TypeError, match="cannot hold a set"):
        packed(meta={"a": {1, 2}})


def test_nan_is_not_saved():
    with pytest.raises(ValueError, match="b holds NaN or infinite values after step 7"):
        checkpoint.pack({"a": torch.ones(1), "b": torch.tensor([float("inf")])}, Position(0, 7), epoch_complete=True)


def test_positions():
    assert checkpoint.position_of(packed(3, 40)) == Position(4, 40, 0)
    assert checkpoint.position_of(packed(3, 40, complete=False)) == Position(3, 40, 3)


def test_newest_goes_by_number_not_by_time_or_text(tmp_path):
    for epoch, step, complete in ((10, 0, True), (9, 0, True), (10, 950, False), (10, 1000, False), (2, 0, True)):
        checkpoint.save(tmp_path, packed(epoch, step, complete))
    (tmp_path / "ckpt_epoch_x.pth").touch()
    (tmp_path / "ckpt_best.pth").touch()
    os.utime(tmp_path / "ckpt_epoch_2.pth", (2e9, 2e9))
    assert [p.name for p in checkpoint.listed(tmp_path)] == [
        "ckpt_epoch_10.pth",
        "ckpt_epoch_10_step_1000.pth",
        "ckpt_epoch_10_step_950.pth",
        "ckpt_epoch_9.pth",
        "ckpt_epoch_2.pth",
    ]
    assert checkpoint.newest(tmp_path).name == "ckpt_epoch_10.pth"


def test_newest_passes_over_files_cut_short(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sam3"), "propagate", True)
    for epoch in range(3):
        path = checkpoint.save(tmp_path, packed(epoch))
    content = path.read_bytes()
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert checkpoint.newest(tmp_path).name == "ckpt_epoch_1.pth"
    assert "passed over" in caplog.text
    assert "ckpt_epoch_2.pth" in caplog.text
    assert checkpoint.newest(tmp_path / "none") is None


def save_step(folder: Path, step: int, name: str) -> Path:
    return checkpoint.save(folder, packed(0) | {"step": step}, name)


def test_newest_of_a_run_that_counts_steps(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sam3"), "propagate", True)
    best = save_step(tmp_path, 30, checkpoint.BEST)
    assert checkpoint.newest(tmp_path) is None  # it may be of a run that counts epochs
    for step in (9, 20, 100):
        save_step(tmp_path, step, checkpoint.step_name(step))
    assert [path.name for path in checkpoint.listed(tmp_path)] == [
        *("ckpt_step_100.pth", "ckpt_step_20.pth", "ckpt_step_9.pth"),
    ]
    (tmp_path / "ckpt_step_100.pth").write_bytes(b"cut")
    assert checkpoint.newest(tmp_path) == best
    latest = save_step(tmp_path, 30, checkpoint.LATEST)
    assert checkpoint.newest(tmp_path) == latest  # as far as the best
    save_step(tmp_path, 40, checkpoint.step_name(40))
    assert checkpoint.newest(tmp_path).name == "ckpt_step_40.pth"
    (tmp_path / "ckpt_step_40.pth").unlink()
    latest.write_bytes(latest.read_bytes()[:100])
    assert checkpoint.newest(tmp_path) == best
    assert "ckpt_latest.pth cannot be read" in caplog.text
    checkpoint.prune(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt_step_100.pth", "ckpt_best.pth", "ckpt_latest.pth"}


def test_prune_and_leftovers(tmp_path):
    for epoch in range(4):
        checkpoint.save(tmp_path, packed(epoch))
    checkpoint.save(tmp_path, packed(0), checkpoint.BEST)
    (tmp_path / ".ckpt_epoch_4.pth.123.tmp").touch()
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.listed(tmp_path)) == 4
    checkpoint.prune(tmp_path, 2)
    checkpoint.remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt_epoch_2.pth", "ckpt_epoch_3.pth", "ckpt_best.pth"}


def test_resume_path(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        checkpoint.resume_path(tmp_path, "auto", auto_resume=False)
    assert checkpoint.resume_path(tmp_path, "", auto_resume=True) is None
    assert checkpoint.resume_path(tmp_path, "a.pth", auto_resume=True) == Path("a.pth")
    path = checkpoint.save(tmp_path, packed(1))
    assert checkpoint.resume_path(tmp_path, "a.pth", auto_resume=True) == path
    assert checkpoint.resume_path(tmp_path, "a.pth", auto_resume=False) == Path("a.pth")
    assert checkpoint.resume_path(tmp_path, "auto", auto_resume=False) == path
    assert checkpoint.resume_path(tmp_path, "", auto_resume=False) is None


def test_what_cannot_be_resumed_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        checkpoint.load(tmp_path / "gone.pth")
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"not a checkpoint to resume from, it lacks optimizer.*MODEL\.PRETRAINED"):
        checkpoint.load(tmp_path / "weights.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="not a checkpoint to resume from"):
        checkpoint.load(tmp_path / "list.pth")


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_not_run(tmp_path, write):
    write({"model": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_fitting_and_foreign_checkpoints():
    meta = {"backbone": "rv", "preprocess": {"img_size": 1008, "mean": (1.0, 2.0)}}
    config = {"DATA": {"IMG_SIZE": 1008, "BATCH_SIZE": 4}}
    payload = packed(meta={**meta, "more": 1}, config=config)
    lists = {"backbone": "rv", "preprocess": {"img_size": 1008, "mean": [1.0, 2.0]}}
    checkpoint.check_fits(payload, "c.pth", meta=lists, config=config, config_keys=["DATA.IMG_SIZE"])
    other = {"DATA": {"IMG_SIZE": 512, "BATCH_SIZE": 8}}
    with pytest.raises(ValueError, match=r"c\.pth belongs to another run") as caught:
        checkpoint.check_fits(
            payload,
            "c.pth",
            meta={"backbone": "tv", "preprocess": {"img_size": 512}, "teacher": "t"},
            config=other,
            config_keys=["DATA.IMG_SIZE", "DATA.NEW"],
        )
    text = str(caught.value)
    assert "backbone is 'rv' there and 'tv' here" in text
    assert "preprocess.img_size is 1008 there and 512 here" in text
    assert "teacher is absent there and 't' here" in text
    assert "DATA.IMG_SIZE is 1008 there and 512 here" in text
    assert "BATCH_SIZE" not in text
    assert "NEW" not in text


def test_a_file_that_was_renamed_is_the_same_file():
    payload = packed(meta={"teacher": {"name": "sam3.pt", "sha256": "ab"}, "student": {"name": "a"}})
    same = {"teacher": {"name": "teachers/sam3_copy.pt", "sha256": "ab"}}
    checkpoint.check_fits(payload, "c.pth", meta=same)
    with pytest.raises(ValueError, match=r"run: teacher.sha256 is 'ab' there and 'cd' here\. R"):
        checkpoint.check_fits(payload, "c.pth", meta={"teacher": {"name": "sam3.pt", "sha256": "cd"}})
    for meta, message in (
        ({"student": {"name": "b"}}, "student.name is 'a' there and 'b' here"),  # a name is all there is
        ({"teacher": {"name": "other.pt"}}, "teacher.name is 'sam3.pt' there and 'other.pt' here"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.check_fits(payload, "c.pth", meta=meta)


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw() -> tuple:
        numbers = np.random.rand(), np.random.randn()  # noqa: NPY002 - the global generator is what is tested
        return float(torch.rand(())), *numbers, random.random(), random.gauss(0, 1)

    rng.seed_everything(5)
    draw()
    path = checkpoint.save(tmp_path, packed(rng=[rng.get_state()]))
    expected = draw()
    draw()
    rng.set_state(checkpoint.load(path)["rng"][0])
    assert draw() == expected
    with rng.preserved(seed=1):
        inside = draw()
    after = draw()
    rng.set_state(checkpoint.load(path)["rng"][0])
    draw()
    assert draw() == after
    rng.reseed(1)
    assert draw() == inside


@pytest.mark.skipif(os.name == "nt", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_up_while_saving_leaves_the_old_file(tmp_path):
    import resource

    path = checkpoint.save(tmp_path, packed(1))
    big = packed(1) | {"model": {"weight": torch.zeros(1_000_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*ckpt_epoch_1.pth .*is the disk full"):
            checkpoint.save(tmp_path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert checkpoint.load(path)["model"]["weight"].tolist() == [1, 1]


def test_an_entry_that_older_checkpoints_lack_counts_as_what_they_were_made_with():
    payload = {"meta": {"backbone": "x"}, "config": {}}
    checkpoint.check_fits(payload, "c.pth", meta={"backbone": "x", "output_stride": 32})
    with pytest.raises(ValueError, match="output_stride is 32 there and 16 here"):
        checkpoint.check_fits(payload, "c.pth", meta={"backbone": "x", "output_stride": 16})
