"""What the program does about damaged files, files of another kind, and numbers that are none."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_distill
from distillation.teachers.fake import FakeTeacher
from sam3.engine import checkpoint
from tests.distillation.runs import PROGRAM, arguments, run
from tests.samples import write_sa1b
from tests.stage1.runs import assert_same_weights, finish, metrics, start

CACHE = {"cache_queries": 20, "cache_mask_size": 32, "save_every_steps": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sa1b: Path) -> Path:
    """Output of phase 1, an epoch of 4 steps; to be left as it is."""
    output = tmp_path_factory.mktemp("trained")
    assert run(sa1b, output) == 0
    return output / "phase1"


# Files to start from --------------------------------------------------------------------------------------------------


def test_weights_of_another_student_are_not_started_from(trained: Path, sa1b: Path, teacher_file: Path, tmp_path: Path):
    path = tmp_path / "other.pth"
    payload = torch.load(trained / "ckpt_epoch_0.pth", weights_only=True)
    payload["model"]["decoder.query_embed.weight"] = torch.zeros(7, 64)
    torch.save(payload, path)
    for init, message in (
        (path, r"other\.pth does not fit .* decoder\.query_embed\.weight \(7, 64\) instead of \(10, 64\)"),
        (teacher_file, r"sam3_tiny\.pt does not fit .* missing: .* unexpected: "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run(sa1b, tmp_path / "out", "--init", str(init))
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "out").rglob("*.pth"))


def test_the_newest_checkpoint_is_cut_off(trained: Path, sa1b: Path, tmp_path: Path):
    folder = shutil.copytree(trained, tmp_path / "phase1")
    newest = folder / "ckpt_epoch_0.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    assert run(sa1b, tmp_path, "--resume", "auto") == 0
    assert f"passed over: {newest} cannot be read" in (folder / "log_rank0.txt").read_text()
    assert_same_weights(trained / "ckpt_epoch_0.pth", newest)


def test_an_exported_student_is_neither_resumed_nor_exported(trained: Path, sa1b: Path, tmp_path: Path):
    path = trained / "student_fp16.pt"
    with pytest.raises(ValueError, match=r"student_fp16\.pt is an exported student, not a checkpoint; .* --init"):
        run(sa1b, tmp_path, "--resume", str(path))
    with pytest.raises(ValueError, match=r"student_fp16\.pt is an exported student"):
        train_distill.main(["--export", str(tmp_path / "again.pt"), "--init", str(path)])
    assert not (tmp_path / "again.pt").exists()


def test_a_checkpoint_of_another_stage_is_not_resumed(trained: Path, sa1b: Path, tmp_path: Path):
    path = tmp_path / "stage1.pth"
    payload = torch.load(trained / "ckpt_epoch_0.pth", weights_only=True)
    torch.save({**payload, "meta": {"backbone": "repvit_m1_1"}}, path)
    with pytest.raises(ValueError, match=r"checkpoint of another training .*meta has backbone"):
        run(sa1b, tmp_path / "out", "--resume", str(path))


def test_nothing_to_go_on_from(sa1b: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing to resume: no readable checkpoint in .*phase1"):
        run(sa1b, tmp_path, "--resume", "auto")
    with pytest.raises(ValueError, match=r"no checkpoint in .*phase1 to validate; pass one with --resume or --init"):
        run(sa1b, tmp_path, "--validate")


def test_transformers_that_does_not_know_sam3(sa1b: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.40.0"))
    with pytest.raises(
        ValueError, match=r"transformers 4\.40\.0 is too old for Sam3Model; pip install -U transformers"
    ):
        run(sa1b, tmp_path / "out", "--teacher", str(tmp_path), teacher_backend="hf")


# Caches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["trunk_cache", "output_cache"])
def test_a_cache_that_lacks_pictures(trained: Path, sa1b: Path, tmp_path: Path, mode: str):
    kind = {"trunk_cache": "trunk", "output_cache": "outputs"}[mode]
    cache = {"cache_dir": tmp_path / "cache", **CACHE}
    write_sa1b(tmp_path / "data", num_train=3, num_val=3)
    assert run(tmp_path / "data", tmp_path, "--write-cache", kind, **cache) == 0
    phase = "1" if mode == "trunk_cache" else "2"
    flags = ("--phase", phase, "--init", str(trained / "ckpt_epoch_0.pth"))
    with pytest.raises(ValueError, match=rf"lacks 5 of 11 pictures: .*--write-cache {kind} --cache-dir"):
        run(sa1b, tmp_path / "out", *flags, teacher_mode=mode, **cache)


# Numbers that are none ------------------------------------------------------------------------------------------------


class BadTeacher(FakeTeacher):
    """Gives NaN where `bad` says so, of the passes in their order."""

    passes = 0

    def run_heads(self, maps, prompt_index, features):
        outputs = super().run_heads(maps, prompt_index, features)
        if type(self).bad(self.passes):
            outputs["pred_masks"] = torch.full_like(outputs["pred_masks"], torch.nan)
        self.passes += 1
        return outputs


def test_passes_without_numbers_are_skipped_and_counted(sa1b: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("distillation.teachers.build.CLASSES", {"fake": BadTeacher})
    monkeypatch.setattr(BadTeacher, "bad", lambda number: number in (0, 1, 4, 9), raising=False)
    assert run(sa1b, tmp_path) == 0
    assert metrics(tmp_path / "phase1", "train/skipped") == [1, 0, 0.5, 0]
    assert metrics(tmp_path / "phase1", "train/total_loss")[0] == 0
    assert metrics(tmp_path / "phase1", "val/skipped") == [1]
    assert "skipped sa_" in (tmp_path / "phase1/log_rank0.txt").read_text()


def test_a_validation_without_numbers(sa1b: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("distillation.teachers.build.CLASSES", {"fake": BadTeacher})
    monkeypatch.setattr(BadTeacher, "bad", lambda number: number > 7, raising=False)
    with pytest.raises(ValueError, match=r"none of the validation pictures could be used; .*--num-val"):
        run(sa1b, tmp_path)
    assert list((tmp_path / "phase1").glob("ckpt_epoch_0*.pth"))  # what was trained is not lost


# Pictures, processes, disks -------------------------------------------------------------------------------------------


def test_an_unreadable_picture_is_replaced_and_logged(tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=8, num_val=3)
    path = tmp_path / "data/images/train/sa_2.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert run(tmp_path / "data", tmp_path / "out") == 0
    assert len(metrics(tmp_path / "out/phase1", "train/total_loss")) == 4
    assert "sa_2" in (tmp_path / "out/phase1/log_rank0.txt").read_text()


def test_an_output_that_cannot_be_written(sa1b: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/phase1"):
        run(sa1b, tmp_path / "file")


def test_too_little_space_is_noticed_in_a_dry_run(sa1b: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"an output of \d+ checkpoints needs .* only 1\.00 kB are free"):
        run(sa1b, tmp_path / "out", "--dry-run")


def test_a_signal_ends_the_run_after_a_checkpoint(trained: Path, sa1b: Path, tmp_path: Path):
    process = start(PROGRAM, arguments(sa1b, tmp_path, save_every_steps=0, phase1_epochs=50))
    limit = time.monotonic() + 120
    numbers = tmp_path / "phase1/metrics.jsonl"  # empty until the first step, from which on signals are awaited
    while not (numbers.is_file() and numbers.stat().st_size) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 128 + signal.SIGTERM, text
    path = checkpoint.newest(tmp_path / "phase1")
    assert path is not None and checkpoint.load(path)["step"] >= 1
    assert not (tmp_path / "phase1/student_fp16.pt").exists()
