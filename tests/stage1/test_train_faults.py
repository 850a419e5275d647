"""Training on bad input, on data of another run, and beside another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sam3.engine.locks import FileLock
from tests.samples import TINY_RECORD
from tests.stage1.runs import TRAIN, assert_same_weights, finish, metrics, start, student_arguments, train


def test_data_that_does_not_fit_is_refused(exported: Path, teacher_file: Path, sa1b: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"preprocess.resize: found 'pad', wanted 'square'"):
        train(exported, sa1b, tmp_path, DATA__RESIZE="square")
    with pytest.raises(ValueError, match=r"shape.*\[96, 16, 16\].*\[32, 16, 16\]"):
        train(exported, sa1b, tmp_path, DISTILL__EMBED_DIM=32)
    with pytest.raises(ValueError, match=r"preprocess.img_size: found 224, wanted 448"):
        train(exported, sa1b, tmp_path, DATA__IMG_SIZE=448)
    with pytest.raises(FileNotFoundError, match=r"no embedding shards in .*nowhere.*save_stage1_embeddings.sh"):
        train(tmp_path / "nowhere", sa1b, tmp_path)
    with pytest.raises(
        ValueError, match=r"a batch of 9 on each of 1 processes needs 9 samples, but the data set has 8"
    ):
        train(exported, sa1b, tmp_path, DATA__BATCH_SIZE=9)
    with pytest.raises(ValueError, match=r"SAVE_TEACHER_EMBED True, so it is a teacher's config"):
        train(exported, sa1b, tmp_path, DISTILL__SAVE_TEACHER_EMBED=True)
    with pytest.raises(ValueError, match=r"unknown backbone 'repvit_m9'"):
        train(exported, sa1b, tmp_path, MODEL__BACKBONE="repvit_m9")


def test_pictures_without_embedding_are_named_or_left_out(exported: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    for folder, suffix in (("images", "jpg"), ("annotations", "json")):
        shutil.copy(data / f"{folder}/train/sa_1.{suffix}", data / f"{folder}/train/sa_77.{suffix}")
    with pytest.raises(ValueError, match=r"no teacher embedding for 1 of 9 pictures in .*: sa_77; write them"):
        train(exported, data, tmp_path / "run")
    assert train(exported, data, tmp_path / "run", DATA__SKIP_BAD_IMAGES=True, TRAIN__EPOCHS=1) == 0


def test_an_unreadable_picture_stops_or_is_skipped(exported: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    half = data / "images/train/sa_2.jpg"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"sa_2.jpg is truncated"):
        train(exported, data, tmp_path / "run", TRAIN__AUTO_RESUME=False)
    assert train(exported, data, tmp_path / "run2", DATA__SKIP_BAD_IMAGES=True, TRAIN__EPOCHS=1) == 0


@pytest.mark.parametrize("teacher", ["stored", "online"])
def test_a_batch_without_any_readable_picture_changes_nothing(
    teacher: str, exported: Path, teacher_file: Path, sa1b: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    (data / "images/train/sa_2.jpg").write_bytes(b"")
    opts = {"DATA__SKIP_BAD_IMAGES": True, "DATA__BATCH_SIZE": 1, "TRAIN__EPOCHS": 2}
    opts |= {"DISTILL__TEACHER": teacher, "DISTILL__TEACHER_CHECKPOINT": teacher_file}
    if teacher == "stored":
        del opts["DISTILL__TEACHER_CHECKPOINT"]
    assert train(exported, data, tmp_path / "run", **opts) == 0
    assert max(metrics(tmp_path / "run", "train/skipped_steps")) == 0
    assert capsys.readouterr().out.count("left out (picture 1 that cannot be used): ") == 1


def test_a_shard_cut_in_the_middle_names_it(exported: Path, sa1b: Path, tmp_path: Path):
    store = tmp_path / "export/embeddings"
    shutil.copytree(exported / "embeddings", store)
    values = store / "rank0-values.bin"
    values.write_bytes(values.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"rank0-values.bin has 539716 bytes = 10.98 records of 49156, but rank0-keys.txt"
    ):
        train(tmp_path / "export", sa1b, tmp_path / "run")


def test_crc_is_checked_on_demand(exported: Path, sa1b: Path, tmp_path: Path):
    store = tmp_path / "export/embeddings"
    shutil.copytree(exported / "embeddings", store)
    values = bytearray((store / "rank0-values.bin").read_bytes())
    for record in range(8):
        values[record * TINY_RECORD + 100] ^= 1
    (store / "rank0-values.bin").write_bytes(values)
    with pytest.raises(ValueError, match="does not match its checksum"):
        train(tmp_path / "export", sa1b, tmp_path / "run", DISTILL__VERIFY_CRC=True)


def test_another_students_folder_is_not_resumed(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    with pytest.raises(ValueError, match=r"backbone is 'efficientvit_b0' there and 'efficientvit_b1' here"):
        train(exported, sa1b, output, MODEL__BACKBONE="efficientvit_b1")
    with pytest.raises(ValueError, match=r"SEED is 0 there and 5 here"):
        train(exported, sa1b, output, SEED=5)
    with pytest.raises(ValueError, match=r"TRAIN.OPTIMIZER.NAME is 'adamw' there and 'sgd' here"):
        train(exported, sa1b, output, TRAIN__OPTIMIZER__NAME="sgd")
    assert (output / "config.json").read_text() == (trained / "config.json").read_text()


def test_a_truncated_newest_checkpoint_is_passed_over(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    last = output / "ckpt_epoch_1.pth"
    last.write_bytes(last.read_bytes()[:5000])
    assert train(exported, sa1b, output) == 0
    assert_same_weights(last, trained / "ckpt_epoch_1.pth")


def test_nan_in_the_store_is_not_learnt(exported: Path, sa1b: Path, tmp_path: Path):
    store = tmp_path / "export/embeddings"
    shutil.copytree(exported / "embeddings", store)
    values = bytearray((store / "rank0-values.bin").read_bytes())
    nan = torch.tensor(float("nan"), dtype=torch.float16).numpy().tobytes()
    for record in range(8):
        values[record * TINY_RECORD + 4 : record * TINY_RECORD + 6] = nan
    (store / "rank0-values.bin").write_bytes(values)
    with pytest.raises(ValueError, match=r"gradients were not finite in \d+ steps in a row"):
        train(tmp_path / "export", sa1b, tmp_path / "run", TRAIN__MAX_BAD_STEPS=3)


def test_the_listing_is_compared_between_processes(
    monkeypatch: pytest.MonkeyPatch, exported, sa1b: Path, tmp_path: Path
):
    monkeypatch.setattr("sam3.engine.distributed.gather_objects", lambda value: [value, "another digest"])
    with pytest.raises(ValueError, match="processes of this run see different pictures"):
        train(exported, sa1b, tmp_path)


def test_a_val_split_on_one_machine_only_is_noticed(
    monkeypatch: pytest.MonkeyPatch, exported: Path, sa1b: Path, tmp_path: Path
):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    shutil.rmtree(data / "images/val")
    answers = iter([lambda value: [value, value], lambda value: [value, "what the other machine sees"]])
    monkeypatch.setattr("sam3.engine.distributed.gather_objects", lambda value: next(answers)(value))
    with pytest.raises(ValueError, match=r"processes of this run see different pictures in .* \(val\)"):
        train(exported, data, tmp_path / "run")


def test_a_dry_run_notices_a_disk_too_small(exported: Path, sa1b: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"2 checkpoints needs .* but only 1.00 kB are free"):
        train(exported, sa1b, tmp_path / "run", "--dry-run")


def test_sync_bn_needs_cuda(exported: Path, sa1b: Path, tmp_path: Path):
    code, text = finish(start(TRAIN, student_arguments(exported, sa1b, tmp_path, "--use-sync-bn"), 2))
    assert code == 1 and "SYNC_BN" in text


def test_two_runs_do_not_share_a_folder(exported: Path, sa1b: Path, tmp_path: Path):
    with FileLock(tmp_path / ".train.lock", "holding the folder for this test"):
        code, text = finish(start(TRAIN, student_arguments(exported, sa1b, tmp_path)))
    assert code == 1 and "another process is training in" in text


def test_other_loss_weights_do_not_go_on(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match=r"DISTILL.COSINE is 20.0 there and 0.5 here"):
        train(exported, sa1b, tmp_path / "run", DISTILL__COSINE=0.5)


def test_weights_for_other_pictures_are_refused(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    payload = torch.load(trained / "ckpt_epoch_1.pth", weights_only=True)
    payload["meta"]["preprocess"]["resize"] = "square"
    other = tmp_path / "other.pth"
    torch.save(payload, other)
    wanted = r"other.pth was trained on pictures prepared otherwise: found .*'square'.*, wanted .*'pad'"
    for flags in (["--pretrained", str(other)], ["--eval", "--resume", str(other)]):
        with pytest.raises(ValueError, match=wanted):
            train(exported, sa1b, tmp_path / "run", *flags)
