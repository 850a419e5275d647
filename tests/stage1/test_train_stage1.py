"""Training: what it writes, that it learns, exact resume, several processes, bad input."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from sam3.engine.checkpoint import newest
from sam3.engine.locks import FileLock
from stage1 import save_embedding_stage1, train_stage1
from tests.samples import write_sa1b
from tests.stage1.runs import (
    TRAIN,
    assert_same_weights,
    finish,
    free_port,
    start,
    student_arguments,
    teacher_arguments,
)


def train(*arguments, **opts) -> int:
    return train_stage1.main(student_arguments(*arguments, **opts))


def metrics(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_output_tree_and_checkpoint_contents(trained: Path, exported: Path):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "env.json", "log_rank0.txt", "metrics.jsonl", "ckpt_best.pth"} <= names
    assert {"ckpt_epoch_0.pth", "ckpt_epoch_1.pth"} <= names
    payload = torch.load(trained / "ckpt_epoch_1.pth", weights_only=True)
    assert len(payload["model"]) == 194
    assert all(key.startswith(("backbone.model.", "head.")) for key in payload["model"])
    assert payload["meta"]["backbone"] == "efficientvit_b0"
    assert payload["meta"]["preprocess"]["resize"] == "pad"
    store_meta = json.loads((exported / "embeddings/meta.json").read_text())
    assert payload["meta"]["teacher"] == store_meta["teacher"]
    assert payload["config"]["TRAIN"]["EPOCHS"] == 2


def test_every_epoch_is_validated(trained: Path):
    assert len(metrics(trained, "val/mse")) == 2
    assert len(metrics(trained, "val/cosine_p50")) == 2
    assert len(metrics(trained, "train/loss_total")) == 8


def test_the_student_learns(exported: Path, sa1b: Path, tmp_path: Path):
    assert train(exported, sa1b, tmp_path, TRAIN__EPOCHS=8, TRAIN__BASE_LR=3e-3) == 0
    loss, cosine = metrics(tmp_path, "train/loss_total"), metrics(tmp_path, "val/cosine")
    assert sum(loss[-4:]) < 0.85 * sum(loss[:4])
    assert cosine[-1] > cosine[0] + 0.1


def test_the_dumped_config_starts_the_same_run(trained: Path, tmp_path: Path):
    output = tmp_path / "again"
    arguments = ["--cfg", str(trained / "config.json"), "--output", str(output)]
    assert train_stage1.main(arguments) == 0
    assert_same_weights(output / "ckpt_epoch_1.pth", trained / "ckpt_epoch_1.pth")


def test_online_teacher_trains_to_the_same_weights(
    trained: Path, teacher_file: Path, exported: Path, sa1b: Path, tmp_path
):
    # One picture a batch, because the size of a batch may change the last bits of what the teacher gives.
    export = tmp_path / "export"
    assert save_embedding_stage1.main(teacher_arguments(teacher_file, sa1b, export, DATA__BATCH_SIZE=1)) == 0
    opts = {"DATA__BATCH_SIZE": 1, "TRAIN__EPOCHS": 1}
    assert train(export, sa1b, tmp_path / "stored", **opts) == 0
    opts |= {"DISTILL__TEACHER": "online", "DISTILL__TEACHER_CHECKPOINT": teacher_file}
    assert train(tmp_path / "no store", sa1b, tmp_path / "online", **opts) == 0
    assert_same_weights(tmp_path / "online/ckpt_epoch_0.pth", tmp_path / "stored/ckpt_epoch_0.pth")


def test_stopped_in_mid_epoch_it_goes_on_to_the_same_weights(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    assert train(exported, sa1b, tmp_path, SAVE_STEPS=3, TRAIN__MAX_STEPS=0) == 0
    assert_same_weights(tmp_path / "ckpt_epoch_1.pth", trained / "ckpt_epoch_1.pth")
    for name in ("ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "ckpt_epoch_1_step_6.pth", "ckpt_best.pth"):
        (tmp_path / name).unlink()
    assert newest(tmp_path).name == "ckpt_epoch_0_step_3.pth"
    assert train(exported, sa1b, tmp_path) == 0
    assert_same_weights(tmp_path / "ckpt_epoch_1.pth", trained / "ckpt_epoch_1.pth")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(exported: Path, sa1b: Path, tmp_path: Path):
    arguments = student_arguments(exported, sa1b, tmp_path, SAVE_STEPS=1)
    moments, kills = random.Random(1), 0
    for _ in range(4):
        process = start(TRAIN, arguments)
        before = set(tmp_path.glob("ckpt_epoch_*.pth"))
        while process.poll() is None and set(tmp_path.glob("ckpt_epoch_*.pth")) == before:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        finish(process)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    code, text = finish(start(TRAIN, arguments))
    assert code == 0, text
    # The reference runs likewise in a program of its own: the number of threads decides the last bits of a sum.
    code, text = finish(start(TRAIN, student_arguments(exported, sa1b, tmp_path / "whole")))
    assert code == 0, text
    assert_same_weights(tmp_path / "ckpt_epoch_1.pth", tmp_path / "whole/ckpt_epoch_1.pth")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_save_before_the_end(number: signal.Signals, trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    arguments = student_arguments(exported, sa1b, tmp_path, TRAIN__EPOCHS=200, SAVE_FREQ=1000, DATA__NUM_WORKERS=1)
    process = start(TRAIN, arguments)
    lines = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.02)
    process.send_signal(number)
    code, text = finish(process)
    assert code == 128 + number, text
    assert "the same command goes on from there" in text
    assert newest(tmp_path) is not None
    payload = torch.load(newest(tmp_path), weights_only=True)
    assert payload["step"] >= 1


def test_two_processes_train_and_one_goes_on(exported: Path, sa1b: Path, tmp_path: Path):
    code, text = finish(start(TRAIN, student_arguments(exported, sa1b, tmp_path, TRAIN__EPOCHS=1), 2))
    assert code == 0, text
    assert "effective batch 4" in text
    assert (tmp_path / "log_rank1.txt").exists()
    assert train(exported, sa1b, tmp_path, "--batch-size", "4") == 0
    assert "ckpt_epoch_1.pth" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_two_machines_meet_and_train_to_the_weights_of_one(exported: Path, sa1b: Path, tmp_path: Path):
    port = free_port()
    nodes = [
        start(
            TRAIN,
            student_arguments(exported, sa1b, tmp_path / "two nodes", "--device", "cpu"),
            1,
            *("--nnodes", "2", "--node_rank", str(node), "--rdzv_backend", "c10d"),
            *("--rdzv_id", "train", "--rdzv_endpoint", f"127.0.0.1:{port}"),
        )
        for node in range(2)
    ]
    for code, text in map(finish, nodes):
        assert code == 0, text
    code, text = finish(start(TRAIN, student_arguments(exported, sa1b, tmp_path / "one node"), 2))
    assert code == 0, text
    assert_same_weights(tmp_path / "two nodes/ckpt_epoch_1.pth", tmp_path / "one node/ckpt_epoch_1.pth")


def test_dry_run_and_throughput_write_nothing(exported: Path, sa1b: Path, tmp_path: Path, capsys):
    output = tmp_path / "run"
    assert train(exported, sa1b, output, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "4 an epoch, 2 epochs, effective batch 2" in text and "time " in text
    assert "8 train, 3 val" in text
    assert not output.exists()
    assert train(exported, sa1b, output, "--throughput") == 0
    assert "images/s" in capsys.readouterr().out
    assert not list(output.glob("ckpt*"))


def test_evaluate_prints_the_metrics_of_a_checkpoint(trained: Path, exported: Path, sa1b: Path, tmp_path: Path, capsys):
    assert train(exported, sa1b, tmp_path, "--eval", "--resume", str(trained / "ckpt_epoch_1.pth")) == 0
    wanted = metrics(trained, "val/mse")[-1]
    assert f"val/mse {wanted:.5g}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no checkpoint in .* to evaluate"):
        train(exported, sa1b, tmp_path / "empty", "--eval")


def test_evaluate_takes_the_file_that_is_named(trained: Path, exported: Path, sa1b: Path, tmp_path: Path, capsys):
    """Also if the output folder holds a newer one."""
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    first, last = metrics(trained, "val/mse")
    for flag in ("--resume", "--pretrained"):
        assert train(exported, sa1b, output, "--eval", flag, str(output / "ckpt_epoch_0.pth")) == 0
        assert f"val/mse {first:.5g}" in capsys.readouterr().out
    assert train(exported, sa1b, output, "--eval") == 0
    assert f"val/mse {last:.5g}" in capsys.readouterr().out


def test_pretrained_starts_from_the_weights_of_a_checkpoint(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    start_from = trained / "ckpt_epoch_1.pth"
    assert (
        train(exported, sa1b, tmp_path, "--pretrained", str(start_from), TRAIN__EPOCHS=1, TRAIN__WARMUP_EPOCHS=0) == 0
    )
    assert metrics(tmp_path, "train/loss_total")[0] < 0.97 * metrics(trained, "train/loss_total")[0]
    with pytest.raises(ValueError, match=r"ES-EV-S.*ES-EV-M|ES-EV-M.*ES-EV-S"):
        train(
            *(exported, sa1b, tmp_path / "other", "--pretrained", str(start_from)),
            MODEL__BACKBONE="efficientvit_b1",
        )


def test_tensorboard_gets_pictures(exported: Path, sa1b: Path, tmp_path: Path):
    assert train(exported, sa1b, tmp_path, TENSORBOARD=True, TRAIN__EPOCHS=1) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.glob("*/*/events.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert "train/loss_total" in board.Tags()["scalars"]
    assert any(tag.startswith("val/photo_teacher_student/") for tag in board.Tags()["images"])


def test_int8_store_and_augmented_store_train(teacher_file: Path, sa1b: Path, tmp_path: Path):
    opts = {"DISTILL__STORE_DTYPE": "int8", "DISTILL__NO_RAND": False}
    assert save_embedding_stage1.main(teacher_arguments(teacher_file, sa1b, tmp_path / "export", **opts)) == 0
    assert train(tmp_path / "export", sa1b, tmp_path / "run", DISTILL__NO_RAND=False, TRAIN__EPOCHS=1) == 0
    with pytest.raises(ValueError, match=r"augmentation.enabled: found True, wanted False"):
        train(tmp_path / "export", sa1b, tmp_path / "other")


@pytest.mark.parametrize(
    "opts",
    [
        {"TRAIN__USE_CHECKPOINT": True},
        {"TRAIN__CHANNELS_LAST": True},
        {"TRAIN__EVAL_BN_WHEN_TRAINING": True},
        {"TRAIN__ACCUMULATION_STEPS": 2},
        {"AMP_DTYPE": "bf16"},
        {"DISTILL__MSE_REDUCTION": "channel_sum"},
        {"TRAIN__OPTIMIZER__NAME": "sgd"},
        {"TRAIN__LR_SCHEDULER__NAME": "step"},
    ],
    ids=lambda opts: next(iter(opts)),
)
def test_options_act(opts: dict, trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    assert train(exported, sa1b, tmp_path, TRAIN__EPOCHS=2, **opts) == 0
    found, default = metrics(tmp_path, "train/loss_total"), metrics(trained, "train/loss_total")
    name = next(iter(opts))
    if name == "TRAIN__USE_CHECKPOINT":  # the same numbers, only computed twice
        assert found == pytest.approx(default, rel=1e-4)
    elif name == "TRAIN__ACCUMULATION_STEPS":
        assert len(found) == len(default) // 2
    elif name == "TRAIN__CHANNELS_LAST":
        assert found == pytest.approx(default, rel=1e-2)
    else:
        assert found != pytest.approx(default, rel=1e-6)


def test_a_store_of_the_public_code_is_enough(exported: Path, sa1b: Path, tmp_path: Path):
    store = tmp_path / "export/embeddings"
    shutil.copytree(exported / "embeddings", store)
    for path in (store / "meta.json", store / "rank0-crc32.bin", *store.glob("*.npy"), *store.glob(".*")):
        path.unlink(missing_ok=True)
    assert train(tmp_path / "export", sa1b, tmp_path / "run", TRAIN__EPOCHS=1) == 0


def test_data_that_does_not_fit_is_refused(exported: Path, teacher_file: Path, sa1b: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"preprocess.resize: found 'pad', wanted 'square'"):
        train(exported, sa1b, tmp_path, DATA__RESIZE="square")
    with pytest.raises(ValueError, match=r"shape.*\[64, 16, 16\].*\[32, 16, 16\]"):
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
    with pytest.raises(
        ValueError, match=r"no teacher embedding for 1 of 9 pictures in .*, such as 'sa_77'; write them"
    ):
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
    assert capsys.readouterr().out.count("left out (picture 1 that cannot be read): ") == 1


def test_a_shard_cut_in_the_middle_names_it(exported: Path, sa1b: Path, tmp_path: Path):
    store = tmp_path / "export/embeddings"
    shutil.copytree(exported / "embeddings", store)
    values = store / "rank0-values.bin"
    values.write_bytes(values.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"rank0-values.bin has 359492 bytes = 10.97 records of 32772, but rank0-keys.txt"
    ):
        train(tmp_path / "export", sa1b, tmp_path / "run")


def test_crc_is_checked_on_demand(exported: Path, sa1b: Path, tmp_path: Path):
    store = tmp_path / "export/embeddings"
    shutil.copytree(exported / "embeddings", store)
    values = bytearray((store / "rank0-values.bin").read_bytes())
    for record in range(8):
        values[record * 32772 + 100] ^= 1
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
        values[record * 32772 + 4 : record * 32772 + 6] = nan
    (store / "rank0-values.bin").write_bytes(values)
    with pytest.raises(ValueError, match=r"gradients were not finite in \d+ steps in a row"):
        train(tmp_path / "export", sa1b, tmp_path / "run", TRAIN__MAX_BAD_STEPS=3)


def test_no_host_sync_between_prints(exported: Path, sa1b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading a tensor on the host stalls an accelerator; it happens at print steps only."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _original=original, _name=name, **kwargs):
            if self.requires_grad or self.grad_fn is not None or self.dtype.is_floating_point:
                reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    counts = []
    for print_freq in (1, 4):
        reads.clear()
        opts = {"PRINT_FREQ": print_freq, "TRAIN__EPOCHS": 1, "DATA__NUM_VAL_SAMPLES": 0}
        assert train(exported, sa1b, tmp_path / str(print_freq), **opts) == 0
        counts.append(len(reads))
    # 4 steps: 4 reports against 1; whatever else is read once per run cancels out
    per_report = (counts[0] - counts[1]) / 3
    assert per_report >= 1
    assert counts[1] <= 2 * per_report + 6, counts


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


def test_sources_without_val_split_train_without_validation(teacher_file: Path, tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=4, num_val=0)
    assert save_embedding_stage1.main(teacher_arguments(teacher_file, tmp_path / "data", tmp_path / "export")) == 0
    assert train(tmp_path / "export", tmp_path / "data", tmp_path / "run", TRAIN__EPOCHS=1) == 0
    assert not metrics(tmp_path / "run", "val/mse")


def test_sync_bn_needs_cuda(exported: Path, sa1b: Path, tmp_path: Path):
    code, text = finish(start(TRAIN, student_arguments(exported, sa1b, tmp_path, "--use-sync-bn"), 2))
    assert code == 1 and "SYNC_BN" in text


def test_two_runs_do_not_share_a_folder(exported: Path, sa1b: Path, tmp_path: Path):
    with FileLock(tmp_path / ".train.lock", "holding the folder for this test"):
        code, text = finish(start(TRAIN, student_arguments(exported, sa1b, tmp_path)))
    assert code == 1 and "another process is training in" in text


def test_other_loss_weights_do_not_go_on(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match=r"DISTILL.COSINE is 1.0 there and 0.5 here"):
        train(exported, sa1b, tmp_path / "run", DISTILL__COSINE=0.5)


def test_a_start_from_scratch_begins_the_metrics_anew(exported: Path, sa1b: Path, tmp_path: Path):
    for _ in range(2):
        assert train(exported, sa1b, tmp_path, TRAIN__EPOCHS=1, TRAIN__AUTO_RESUME=False) == 0
    assert len(metrics(tmp_path, "train/loss_total")) == 4
