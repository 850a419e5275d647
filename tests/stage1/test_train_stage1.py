"""Training: what it writes, that it learns, exact resume, several processes, what options do."""

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
from stage1 import save_embedding_stage1, train_stage1
from tests.samples import write_sa1b
from tests.stage1.runs import (
    TRAIN,
    assert_same_weights,
    finish,
    free_port,
    metrics,
    start,
    student_arguments,
    teacher_arguments,
    train,
)


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
    """Also if the output folder holds a newer one, which comes before weights to start from."""
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    first, last = metrics(trained, "val/mse")
    for flags, value in (
        (["--resume", str(output / "ckpt_epoch_0.pth")], first),
        (["--pretrained", str(output / "ckpt_epoch_0.pth")], last),
        ([], last),
    ):
        assert train(exported, sa1b, output, "--eval", *flags) == 0
        assert f"val/mse {value:.5g}" in capsys.readouterr().out


def test_it_goes_on_without_the_weights_it_started_from(trained: Path, exported: Path, sa1b: Path, tmp_path: Path):
    gone = tmp_path / "gone.pth"
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        train(exported, sa1b, tmp_path / "run", "--pretrained", str(gone))
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"log_rank0.txt", ".train.lock"}
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/ckpt_epoch_1.pth").unlink()
    assert train(exported, sa1b, tmp_path / "run", "--pretrained", str(gone)) == 0
    assert_same_weights(tmp_path / "run/ckpt_epoch_1.pth", trained / "ckpt_epoch_1.pth")


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


def test_sources_without_val_split_train_without_validation(teacher_file: Path, tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=4, num_val=0)
    assert save_embedding_stage1.main(teacher_arguments(teacher_file, tmp_path / "data", tmp_path / "export")) == 0
    assert train(tmp_path / "export", tmp_path / "data", tmp_path / "run", TRAIN__EPOCHS=1) == 0
    assert not metrics(tmp_path / "run", "val/mse")


def test_a_start_from_scratch_begins_the_metrics_anew(exported: Path, sa1b: Path, tmp_path: Path):
    for _ in range(2):
        assert train(exported, sa1b, tmp_path, TRAIN__EPOCHS=1, TRAIN__AUTO_RESUME=False) == 0
    assert len(metrics(tmp_path, "train/loss_total")) == 4
