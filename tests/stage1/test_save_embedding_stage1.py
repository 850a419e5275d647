"""The export: whole, again, interrupted, shared between processes, and with bad input."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from sam3.engine import embedding_writer
from sam3.engine.embedding_verify import verify_store
from sam3.engine.embeddings import EmbeddingReader
from sam3.engine.weights import load_weights, save_weights
from sam3.model_builder import build_teacher_trunk
from sam3.transforms import Preprocess, read_image
from stage1 import save_embedding_stage1
from tests.parity.fill import image
from tests.samples import TINY_MAP, write_record, write_sa1b
from tests.stage1.runs import SAVE, finish, free_port, start, teacher_arguments

KEYS = [f"sa_{i}" for i in range(1, 12)]


def save(*arguments, **opts) -> int:
    return save_embedding_stage1.main(teacher_arguments(*arguments, **opts))


def test_output_tree_and_contents(exported: Path, teacher_file: Path, sa1b: Path):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    wanted = {"config.json", "env.json", "log_rank0.txt", "embeddings/meta.json"}
    wanted |= {f"embeddings/rank0-{part}" for part in ("keys.txt", "values.bin", "crc32.bin")}
    assert wanted <= names
    assert json.loads((exported / "config.json").read_text())["DISTILL"]["SAVE_TEACHER_EMBED"] is True
    reader = EmbeddingReader(exported / "embeddings")
    assert sorted(reader.keys()) == sorted(KEYS)
    assert reader.meta["shape"] == list(TINY_MAP)
    assert reader.meta["preprocess"] == Preprocess(img_size=224).to_meta()
    trunk = build_teacher_trunk(teacher_file, device="cpu")
    for key, split in (("sa_1", "train"), ("sa_10", "val")):
        square, size = Preprocess(img_size=224).fit(read_image(sa1b / "images" / split / f"{key}.jpg"))
        images = Preprocess(img_size=224).normalise(square[None], torch.tensor([size]))
        with torch.no_grad():
            expected = trunk(images)[-1][0].half().float()
        stored, _ = reader.read(key)
        assert torch.allclose(stored, expected, atol=2e-3), key


def test_running_again_adds_nothing_and_more_pictures_are_appended(exported: Path, teacher_file: Path, tmp_path: Path):
    data, output = tmp_path / "data", tmp_path / "export"
    write_sa1b(data, num_train=3, num_val=1)
    assert save(teacher_file, data, output) == 0
    values = output / "embeddings/rank0-values.bin"
    before = values.read_bytes()
    assert save(teacher_file, data, output) == 0
    assert values.read_bytes() == before
    for key in ("sa_5", "sa_6"):
        write_record(data, "train", key, image(60, 80, seed=9))
    assert save(teacher_file, data, output, "--batch-size", "2") == 0
    assert values.read_bytes()[: len(before)] == before
    assert verify_store(output / "embeddings", [f"sa_{i}" for i in range(1, 7)]).ok


def test_check_and_verify_modes(exported: Path, teacher_file: Path, sa1b: Path, tmp_path: Path):
    output = tmp_path / "export"
    shutil.copytree(exported, output)
    assert save(teacher_file, sa1b, output, "--check-saved-embed") == 0
    assert save(teacher_file, sa1b, output, "--verify-store") == 0
    values = output / "embeddings/rank0-values.bin"
    damaged = bytearray(values.read_bytes())
    damaged[5000] ^= 0x40
    values.write_bytes(damaged)
    assert save(teacher_file, sa1b, output, "--verify-store") == 1
    with pytest.raises(ValueError, match=r"record 0 \('sa_.*does not match its checksum"):
        save(teacher_file, sa1b, output, "--check-saved-embed")


def test_check_finds_embeddings_of_other_pictures(exported: Path, teacher_file: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    for key in ("sa_1", "sa_2", "sa_3"):
        shutil.copy(data / "images/train/sa_8.jpg", data / f"images/train/{key}.jpg")
    output = tmp_path / "export"
    shutil.copytree(exported, output)
    assert save(teacher_file, data, output, "--check-saved-embed") == 1
    assert save(teacher_file, data, output, "--check-saved-embed", "--check-tolerance", "10") == 0
    write_record(data, "train", "sa_99", image(60, 80, seed=9))  # a picture that the store lacks
    assert save(teacher_file, data, output, "--check-saved-embed", "--check-tolerance", "10") == 1


def test_dry_run_writes_nothing(teacher_file: Path, sa1b: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "export"
    assert save(teacher_file, sa1b, output, "--dry-run") == 0
    assert not output.exists()
    text = capsys.readouterr().out
    assert "11 in" in text and "540.94 kB to come" in text and "pictures/s" in text


def test_dry_run_passes_over_bad_pictures(teacher_file: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    (data / "images/train/sa_1.jpg").write_bytes(b"")
    assert save(teacher_file, data, tmp_path / "export", "--dry-run") == 0
    for path in data.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="nothing to time"):
        save(teacher_file, data, tmp_path / "export", "--dry-run")


def test_int8_store_takes_about_half(exported: Path, teacher_file: Path, sa1b: Path, tmp_path: Path):
    assert save(teacher_file, sa1b, tmp_path, DISTILL__STORE_DTYPE="int8") == 0
    half = (tmp_path / "embeddings/rank0-values.bin").stat().st_size
    whole = (exported / "embeddings/rank0-values.bin").stat().st_size
    assert half / whole < 0.51
    small, full = EmbeddingReader(tmp_path / "embeddings"), EmbeddingReader(exported / "embeddings")
    for key in KEYS:
        cosine = torch.nn.functional.cosine_similarity(small.read(key)[0].flatten(), full.read(key)[0].flatten(), dim=0)
        assert cosine >= 0.9999


def test_a_folder_of_pictures_is_enough(teacher_file: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "holiday"
    shutil.copytree(sa1b / "images/train", data / "beach")
    Image.new("RGB", (50, 40), "red").save(data / "logo.png")
    output = tmp_path / "export"
    assert save(teacher_file, data, output, DATA__DATASET="folder", DATA__VAL_FRACTION=0.3) == 0
    assert sorted(EmbeddingReader(output / "embeddings").keys()) == sorted(
        ["logo", *(f"beach/sa_{i}" for i in range(1, 9))]
    )


def test_sa1b_layout_without_annotations(teacher_file: Path, sa1b: Path, tmp_path: Path):
    shutil.copytree(sa1b / "images/train", tmp_path / "images/train")
    assert save(teacher_file, tmp_path, tmp_path / "export") == 0
    assert len(EmbeddingReader(tmp_path / "export/embeddings")) == 8


def test_two_processes_share_the_work_and_three_go_on(teacher_file: Path, sa1b: Path, tmp_path: Path):
    code, text = finish(start(SAVE, teacher_arguments(teacher_file, sa1b, tmp_path), 2))
    assert code == 0, text
    store = tmp_path / "embeddings"
    assert verify_store(store, KEYS).ok
    shards = [(store / f"rank{rank}-keys.txt").read_text().split() for rank in range(2)]
    assert sorted(shards[0] + shards[1]) == sorted(KEYS)
    assert min(map(len, shards)) >= 4
    # a second run finds nothing to do, with another number of processes
    before = (store / "rank0-values.bin").read_bytes()
    assert save(teacher_file, sa1b, tmp_path) == 0
    assert (store / "rank0-values.bin").read_bytes() == before


@pytest.mark.slow
def test_two_machines_meet_and_export(teacher_file: Path, sa1b: Path, tmp_path: Path):
    port = free_port()
    nodes = [
        start(
            SAVE,
            teacher_arguments(teacher_file, sa1b, tmp_path, "--device", "cpu"),
            1,
            *("--nnodes", "2", "--node_rank", str(node), "--rdzv_backend", "c10d"),
            *("--rdzv_id", "export", "--rdzv_endpoint", f"127.0.0.1:{port}"),
        )
        for node in range(2)
    ]
    for code, text in map(finish, nodes):
        assert code == 0, text
    assert verify_store(tmp_path / "embeddings", KEYS).ok
    assert (tmp_path / "embeddings/rank1-keys.txt").stat().st_size > 0


@pytest.mark.slow
def test_killed_at_random_moments_it_loses_and_repeats_nothing(teacher_file: Path, tmp_path: Path):
    data, output = tmp_path / "data", tmp_path / "export"
    keys = write_sa1b(data, num_train=60, num_val=4)
    arguments = teacher_arguments(teacher_file, data, output, DATA__BATCH_SIZE=1)
    moments = random.Random(0)
    values, kills, before = output / "embeddings/rank0-values.bin", 0, 0
    for _ in range(4):
        process = start(SAVE, arguments)
        while process.poll() is None and (not values.exists() or values.stat().st_size <= before):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        finish(process)
        kills += process.returncode == -signal.SIGKILL
        before = values.stat().st_size
    assert kills >= 2, "the export was over before it could be killed; make it longer"
    code, text = finish(start(SAVE, arguments))
    assert code == 0, text
    report = verify_store(output / "embeddings", keys)
    assert report.ok, report
    assert report.num_records == len(keys) and not report.duplicates


def test_sigterm_keeps_what_was_written(teacher_file: Path, tmp_path: Path):
    data, output = tmp_path / "data", tmp_path / "export"
    keys = write_sa1b(data, num_train=60, num_val=2)
    arguments = teacher_arguments(teacher_file, data, output, DATA__BATCH_SIZE=1)
    process = start(SAVE, arguments)
    values = output / "embeddings/rank0-values.bin"
    while process.poll() is None and (not values.exists() or values.stat().st_size == 0):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 128 + signal.SIGTERM, text
    assert "the same command goes on from there" in text
    report = verify_store(output / "embeddings")
    assert report.ok and 0 < report.num_records < len(keys)


def test_bad_pictures_are_listed_and_the_rest_is_stored(teacher_file: Path, sa1b: Path, tmp_path: Path):
    data, output = tmp_path / "data", tmp_path / "export"
    shutil.copytree(sa1b, data)
    half = data / "images/train/sa_2.jpg"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (data / "images/train/sa_3.jpg").write_bytes(b"")
    assert save(teacher_file, data, output) == 1
    listed = (output / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["sa_2", "sa_3"]
    assert "truncated" in listed[0] and "empty" in listed[1]
    assert sorted(EmbeddingReader(output / "embeddings").keys()) == sorted(set(KEYS) - {"sa_2", "sa_3"})
    assert save(teacher_file, data, output, DATA__SKIP_BAD_IMAGES=True) == 0
    shutil.copytree(sa1b, data, dirs_exist_ok=True)
    assert save(teacher_file, data, output) == 0
    assert not (output / "skipped.txt").exists()


def test_odd_pictures_are_read(teacher_file: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    images = data / "images/train"
    Image.open(images / "sa_1.jpg").save(images / "sa_1.png")
    (images / "sa_1.png").replace(images / "sa_1.jpg")  # a PNG under a .jpg name
    Image.open(images / "sa_2.jpg").convert("CMYK").save(images / "sa_2.jpg")
    Image.fromarray(torch.arange(64 * 64).reshape(64, 64).to(torch.uint16).numpy()).save(images / "sa_3.png")
    (images / "sa_3.png").replace(images / "sa_3.jpg")
    assert save(teacher_file, data, tmp_path / "export") == 0
    assert verify_store(tmp_path / "export/embeddings", KEYS).ok


def test_broken_annotations_do_not_matter(teacher_file: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    (data / "annotations/train/sa_1.json").write_text("{broken")
    (data / "annotations/train/sa_2.json").write_text("")
    assert save(teacher_file, data, tmp_path / "export") == 0


def test_other_settings_do_not_mix_into_one_store(exported: Path, teacher_file: Path, sa1b: Path, tmp_path: Path):
    output = tmp_path / "export"
    shutil.copytree(exported, output)
    with pytest.raises(ValueError, match=r"preprocess.resize: found 'pad', wanted 'square'"):
        save(teacher_file, sa1b, output, DATA__RESIZE="square")
    other = tmp_path / "other.pt"
    file = load_weights(teacher_file)
    save_weights(
        other, {key: tensor + 1 if key.endswith("ln_pre.bias") else tensor for key, tensor in file.tensors.items()}
    )
    for flags in ((), ("--dry-run",)):
        with pytest.raises(ValueError, match=r"teacher.sha256: found"):
            save(other, sa1b, output, *flags)
    assert (output / "config.json").read_text() == (exported / "config.json").read_text()


def test_nan_from_the_teacher_names_the_picture(teacher_file: Path, sa1b: Path, tmp_path: Path):
    broken = tmp_path / "nan.pt"
    file = load_weights(teacher_file)
    key = "detector.backbone.vision_backbone.trunk.blocks.3.mlp.fc2.bias"
    save_weights(broken, {**file.tensors, key: torch.full_like(file.tensors[key], float("nan"))})
    with pytest.raises(ValueError, match=r"the embedding of 'sa_1' holds NaN or Inf"):
        save(broken, sa1b, tmp_path / "export")


def test_a_disk_too_small_is_noticed_before_the_first_forward(
    teacher_file: Path, sa1b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 1000)
    monkeypatch.setattr(save_embedding_stage1, "build_teacher", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(OSError, match=r"storing 11 embeddings needs .* but only 1.00 kB are free"):
        save(teacher_file, sa1b, tmp_path / "export")


def test_a_disk_that_fills_up_keeps_whole_records(
    teacher_file: Path, sa1b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, written = embedding_writer._write_exactly, []

    def full_after_some(handle, parts):
        written.append(handle)
        if len(written) > 13:  # three writes a record: the fifth record's values
            raise OSError(28, "No space left on device")
        write(handle, parts)

    monkeypatch.setattr(embedding_writer, "_write_exactly", full_after_some)
    with pytest.raises(OSError, match=r"the disk of .* is full after \d records; they are safe"):
        save(teacher_file, sa1b, tmp_path)
    monkeypatch.undo()
    report = verify_store(tmp_path / "embeddings")
    assert report.ok and report.num_records == 4
    assert save(teacher_file, sa1b, tmp_path) == 0
    assert verify_store(tmp_path / "embeddings", KEYS).ok


def test_wrong_input_says_what_is_wrong(teacher_file: Path, sa1b: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no teacher checkpoint .*gone.pt; fetch it with"):
        save(tmp_path / "gone.pt", sa1b, tmp_path)
    with pytest.raises(ValueError, match=r"takes 224 px pictures .* DATA.IMG_SIZE is 448"):
        save(teacher_file, sa1b, tmp_path, DATA__IMG_SIZE=448)
    with pytest.raises(ValueError, match=r"DATA.IMG_SIZE \(=225\) must be a multiple of DISTILL.EMBED_SIZE \(=16\)"):
        save(teacher_file, sa1b, tmp_path, DATA__IMG_SIZE=225)
    with pytest.raises(ValueError, match=r"gives 96 channels, but DISTILL.EMBED_DIM is 1024; set DISTILL.EMBED_DIM 96"):
        save(teacher_file, sa1b, tmp_path / "dim", DISTILL__EMBED_DIM=1024)
    with pytest.raises(FileNotFoundError, match=r"no folder .*images/train; arrange the pictures"):
        save(teacher_file, tmp_path, tmp_path)
    truncated = tmp_path / "half.pt"
    truncated.write_bytes(teacher_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"half.pt is cut off"):
        save(truncated, sa1b, tmp_path / "half")
    with pytest.raises(ValueError, match=r"SAVE_TEACHER_EMBED False, so it is a student's config"):
        save(teacher_file, sa1b, tmp_path, DISTILL__SAVE_TEACHER_EMBED=False)
    with pytest.raises(SystemExit) as stop:
        save(teacher_file, sa1b, tmp_path, "--use-sync-bn")
    assert stop.value.code == 2


def test_replayed_augmentation_is_seen_by_teacher_and_check(teacher_file: Path, tmp_path: Path):
    data = tmp_path / "data"
    write_sa1b(data, num_train=4, num_val=0)
    assert save(teacher_file, data, tmp_path / "export", DISTILL__NO_RAND=False) == 0
    assert save(teacher_file, data, tmp_path / "export", "--check-saved-embed", DISTILL__NO_RAND=False) == 0
    with pytest.raises(ValueError, match=r"augmentation.enabled: found True, wanted False"):
        save(teacher_file, data, tmp_path / "export", "--check-saved-embed")


def test_unwritable_output_is_named(teacher_file: Path, sa1b: Path, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        save(teacher_file, sa1b, tmp_path / "file" / "export")


def test_a_name_in_both_splits_is_refused(teacher_file: Path, sa1b: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(sa1b, data)
    write_record(data, "val", "sa_1", image(60, 80))
    with pytest.raises(ValueError, match=r"two pictures for the key 'sa_1'"):
        save(teacher_file, data, tmp_path / "export")


def test_processes_wait_long_for_the_slowest(teacher_file: Path, sa1b: Path, tmp_path: Path, monkeypatch):
    """They meet only at the end of an export, hours after the fastest is through."""
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, timeout: pytest.exit(str(timeout.days)))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(pytest.exit.Exception, match="14"):
        save(teacher_file, sa1b, tmp_path)
