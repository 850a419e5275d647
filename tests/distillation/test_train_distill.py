"""The program from end to end with a made-up teacher: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import gc
import json
import random
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch

import train_distill
from distillation.config import LOSSES, DistillationConfig, load_config
from distillation.export import load_student, read_student_meta
from distillation.teachers.build import build_teacher
from distillation.trainer import EXPORT
from tests.distillation.runs import PROGRAM, SMALL, arguments, run
from tests.samples import write_sa1b
from tests.stage1.runs import assert_same_weights, finish, metrics, model_of, start


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sa1b: Path) -> Path:
    """Output of both phases, an epoch each; to be left as it is."""
    output = tmp_path_factory.mktemp("distilled")
    assert run(sa1b, output, "--phase", "all", tensorboard="true") == 0
    return output


def test_both_phases_leave_their_files(trained: Path):
    for phase in ("phase1", "phase2"):
        names = {path.name for path in (trained / phase).iterdir()}
        wanted = {"ckpt_epoch_0.pth", "ckpt_epoch_0_step_3.pth", "ckpt_best.pth", "config.json", "env.json"}
        assert wanted | {"metrics.jsonl", "log_rank0.txt", "student_fp16.pt"} <= names
        assert list((trained / "logs" / phase).glob("events*"))


def test_numbers_have_the_names_of_the_method(trained: Path):
    lines = [json.loads(line) for line in (trained / "phase1/metrics.jsonl").read_text().splitlines()]
    step, validation = lines[0], lines[-1]
    names = {*(f"train/{name}" for name in LOSSES), *(f"train_raw/{name}" for name in LOSSES)}
    names |= {f"train/{name}" for name in ("total_loss", "lr", "grad_norm", "matched_pairs", "match_iou", "skipped")}
    assert names | {"sys/peak_mem_gb", "sys/sec_per_step"} <= step.keys()
    assert {"val/total_loss", "val/match_iou", *(f"val/{name}" for name in LOSSES)} <= validation.keys()
    total = sum(step[f"train/{name}"] for name in LOSSES)
    assert step["train/total_loss"] == pytest.approx(total, rel=1e-5)
    assert step["train_raw/mask_loss"] == pytest.approx(step["train/mask_loss"] / 5)
    assert (step["train/matched_pairs"], step["train/skipped"]) == (10, 0)
    assert 0 < step["train/match_iou"] < 1
    assert metrics(trained / "phase1", "train/lr")[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])


def test_the_second_phase_goes_on_without_features(trained: Path):
    log = (trained / "phase2/log_rank0.txt").read_text()
    assert f"start        {trained / 'phase1' / 'ckpt_epoch_0.pth'}" in log
    for name in ("fpn_feature_loss", "encoder_feature_loss"):
        assert set(metrics(trained / "phase2", f"train/{name}")) == {0}
        assert min(metrics(trained / "phase1", f"train/{name}")) > 0


def test_its_config_starts_the_same_run_again(trained: Path, sa1b: Path, tmp_path: Path):
    path = trained / "phase1/config.json"
    again = load_config(path)
    assert again.to_dict() == json.loads(path.read_text())
    train_distill.main(["--config", str(path), "--output", str(tmp_path), "--opts", f"log_dir={tmp_path}"])
    assert_same_weights(trained / "phase1/ckpt_epoch_0.pth", tmp_path / "phase1/ckpt_epoch_0.pth")


def test_what_gets_no_gradient_does_not_change(trained: Path):
    first, last = (model_of(trained / name) for name in ("phase1/ckpt_epoch_0_step_1.pth", "phase2/ckpt_epoch_0.pth"))
    same = {name.split(".")[0] for name, tensor in first.items() if torch.equal(tensor, last[name])}
    assert "perceiver_resampler" in same
    assert not any(torch.equal(first[name], last[name]) for name in first if name.startswith("decoder.query_embed"))


def test_the_exported_student_is_the_trained_one(trained: Path):
    path = trained / "phase2/student_fp16.pt"
    weights = model_of(trained / "phase2/ckpt_epoch_0.pth")
    for name, tensor in load_student(path, "cpu").state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-3)
    meta = read_student_meta(path)
    assert meta["phase"] == 2 and meta["prompts"] == list(DistillationConfig().prompts)
    assert meta["teacher"]["backend"] == "fake"


def test_a_checkpoint_can_be_exported_later(trained: Path, tmp_path: Path, capsys):
    target = tmp_path / "student.safetensors"
    assert train_distill.main(["--export", str(target), "--init", str(trained / "phase1/ckpt_best.pth")]) == 0
    assert str(target) in capsys.readouterr().out and load_student(target, "cpu")


def test_a_later_export_names_the_prompts_that_were_taught(sa1b: Path, tmp_path: Path):
    assert run(sa1b, tmp_path, "--max-steps", "1", prompts="[cats]") == 0
    checkpoint, target = tmp_path / "phase1/ckpt_epoch_0_step_1.pth", tmp_path / "student.pt"
    assert train_distill.main(["--export", str(target), "--init", str(checkpoint)]) == 0
    assert (
        read_student_meta(target)["prompts"] == read_student_meta(tmp_path / "phase1" / EXPORT)["prompts"] == ["cats"]
    )


def test_the_loss_falls_over_one_epoch(tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=16, num_val=3)
    assert run(tmp_path / "data", tmp_path / "out", grad_accum_steps=1, save_every_steps=0) == 0
    losses = metrics(tmp_path / "out/phase1", "train/total_loss")
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sa1b: Path) -> Path:
    """Phase 1 of two epochs, never interrupted; to be left as it is."""
    output = tmp_path_factory.mktemp("whole")
    assert run(sa1b, output, phase1_epochs=2) == 0
    return output / "phase1"


def test_stopped_inside_an_epoch_it_goes_on_as_if_nothing_had_been(whole: Path, sa1b: Path, tmp_path: Path):
    assert run(sa1b, tmp_path, "--max-steps", "3", phase1_epochs=2) == 0
    assert run(sa1b, tmp_path, "--resume", "auto", "--max-steps", "2", phase1_epochs=2) == 0  # 2 further ones
    assert (tmp_path / "phase1/ckpt_epoch_1_step_5.pth").is_file()
    assert run(sa1b, tmp_path, "--resume", "auto", phase1_epochs=2) == 0
    assert_same_weights(whole / "ckpt_epoch_1.pth", tmp_path / "phase1/ckpt_epoch_1.pth")
    assert metrics(tmp_path / "phase1", "train/total_loss") == metrics(whole, "train/total_loss")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(whole: Path, sa1b: Path, tmp_path: Path):
    moments, kills, flags = random.Random(2), 0, []
    for _ in range(20):
        process = start(PROGRAM, arguments(sa1b, tmp_path, *flags, phase1_epochs=2))
        before = len(list(tmp_path.glob("phase1/ckpt_epoch_*")))
        limit = time.monotonic() + 120
        while process.poll() is None and kills < 3:
            if len(list(tmp_path.glob("phase1/ckpt_epoch_*"))) > before:
                time.sleep(moments.uniform(0, 0.5))
                process.kill()
                break
            assert time.monotonic() < limit
            time.sleep(0.02)
        code, text = finish(process)
        kills += code == -signal.SIGKILL
        flags = ["--resume", "auto"]
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
    assert kills >= 2
    assert_same_weights(whole / "ckpt_epoch_1.pth", tmp_path / "phase1/ckpt_epoch_1.pth")


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_joined_batch(sa1b: Path, tmp_path: Path):
    """Without what is random or depends on the batch: drop-out and BatchNorm's statistics."""
    settings = {"student_dropout": 0, "bn_mode": "eval", "save_every_steps": 0}
    assert run(sa1b, tmp_path / "one", batch_size=2, **settings) == 0
    code, text = finish(start(PROGRAM, arguments(sa1b, tmp_path / "two", **settings), processes=2))
    assert code == 0, text
    one, two = (metrics(tmp_path / name / "phase1", "train/total_loss") for name in ("one", "two"))
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-4)
    first, second = (model_of(tmp_path / name / "phase1/ckpt_epoch_0.pth") for name in ("one", "two"))
    for key, tensor in first.items():
        assert torch.allclose(tensor.float(), second[key].float(), rtol=1e-3, atol=3e-4), key


@pytest.mark.slow
def test_two_processes_go_through_both_phases(sa1b: Path, tmp_path: Path):
    """With one checkpoint to hand over, a term without any gradient, and a validation for one process only."""
    settings = {"save_every_steps": 0, "presence_loss_weight": 0, "num_val": 1}
    code, text = finish(start(PROGRAM, arguments(sa1b, tmp_path, "--phase", "all", **settings), processes=2))
    assert code == 0, text
    for phase in ("phase1", "phase2"):
        assert (tmp_path / phase / "ckpt_epoch_0.pth").is_file() and (tmp_path / phase / EXPORT).is_file()


def test_the_teacher_of_a_finished_phase_is_gone(sa1b: Path, tmp_path: Path, monkeypatch):
    built, alive = [], []

    def build(*arguments, **settings):
        alive.append(sum(reference() is not None for reference in built))
        teacher = build_teacher(*arguments, **settings)
        built.append(weakref.ref(teacher))
        return teacher

    monkeypatch.setattr("distillation.trainer.build_teacher", build)
    gc.disable()
    try:
        assert run(sa1b, tmp_path, "--phase", "all", save_every_steps=0) == 0
    finally:
        gc.enable()
    assert alive == [0, 0]


# Other things to do ---------------------------------------------------------------------------------------------------


def test_validation_prints_a_table(trained: Path, sa1b: Path, capsys):
    assert run(sa1b, trained, "--validate", "--phase", "2") == 0
    out = capsys.readouterr().out
    value = metrics(trained / "phase2", "val/total_loss")[-1]
    assert f"val/total_loss             {value:.5g}" in out and "ckpt_epoch_0.pth" in out


def test_the_second_phase_is_validated_without_the_first(trained: Path, sa1b: Path, tmp_path: Path, capsys):
    shutil.copytree(trained / "phase2", tmp_path / "phase2")
    assert run(sa1b, tmp_path, "--validate", "--phase", "2") == 0
    assert "val/total_loss" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(sa1b: Path, tmp_path: Path, capsys):
    assert run(sa1b, tmp_path / "out", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "4 an epoch" in out and "GB before activations" in out and "time" in out
    assert not (tmp_path / "out").exists()


def test_debug_keeps_no_checkpoints(tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=24, num_val=3)
    assert run(tmp_path / "data", tmp_path / "out", "--debug") == 0
    assert len(metrics(tmp_path / "out/phase1", "train/total_loss")) == 10
    assert not list((tmp_path / "out").rglob("*.pt*"))


def test_debug_leaves_a_run_alone(trained: Path, sa1b: Path):
    before = (trained / "phase1/metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"holds a run; .* choose another folder with --output"):
        run(sa1b, trained, "--debug")
    assert (trained / "phase1/metrics.jsonl").read_text() == before


def test_debug_gives_way_to_flags():
    accumulation = [
        train_distill.load_config(train_distill.parse_args(["--debug", *flags])).grad_accum_steps
        for flags in ([], ["--grad-accum", "3"])
    ]
    assert accumulation == [2, 3]


def test_memory_over_budget_fails_if_that_is_asked_for(sa1b: Path, tmp_path: Path, capsys):
    assert run(sa1b, tmp_path / "a", memory_budget_gb=0.01) == 0
    assert "above memory_budget_gb 0.01" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"above memory_budget_gb 0\.01"):
        run(sa1b, tmp_path / "b", "--strict-memory", memory_budget_gb=0.01)
    assert list((tmp_path / "b/phase1").glob("ckpt_epoch_0*.pth"))  # what was trained is not lost


@pytest.mark.parametrize("mode", ["trunk_cache", "output_cache"])
def test_a_cached_teacher_says_what_the_teacher_says(sa1b: Path, tmp_path: Path, mode: str):
    kind = mode.removesuffix("_cache").replace("output", "outputs")
    cache = {"cache_dir": tmp_path / "cache", "cache_queries": 20, "cache_mask_size": 32, "prompts": "[everything]"}
    assert run(sa1b, tmp_path, "--write-cache", kind, **cache) == 0
    flags = ("--phase", "1") if mode == "trunk_cache" else ("--phase", "2", "--init", str(tmp_path / "start.pth"))
    settings = {"student_dropout": 0, "save_every_steps": 0, **cache}
    if mode == "output_cache":
        assert run(sa1b, tmp_path / "first", "--max-steps", "1", **settings) == 0
        (tmp_path / "first/phase1/ckpt_epoch_0_step_1.pth").rename(tmp_path / "start.pth")
    losses = []
    for name, teacher_mode in (("online", "online"), ("cached", mode)):
        assert run(sa1b, tmp_path / name, *flags, teacher_mode=teacher_mode, **settings) == 0
        losses.append(metrics(tmp_path / name / flags[1].join(("phase", "")), "train/total_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]  # halves of a float16


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_left_alone(trained: Path, sa1b: Path):
    with pytest.raises(ValueError, match="holds a run; go on with it by --resume auto"):
        run(sa1b, trained)


def test_a_checkpoint_of_the_other_phase_is_not_resumed(trained: Path, sa1b: Path, tmp_path: Path):
    path = trained / "phase1/ckpt_epoch_0.pth"
    with pytest.raises(ValueError, match=r"of phase 1, which phase 2 cannot go on from; start .* --init"):
        run(sa1b, tmp_path, "--phase", "2", "--resume", str(path))


def test_other_files_are_not_taken_for_checkpoints(trained: Path, sa1b: Path, tmp_path: Path):
    exported = trained / "phase1/student_fp16.pt"
    with pytest.raises(ValueError, match=r"is an exported student, not a checkpoint; training starts .* --init"):
        run(sa1b, tmp_path, "--resume", str(exported))
    with pytest.raises(ValueError, match="is an exported student"):
        train_distill.main(["--export", str(tmp_path / "x.pt"), "--init", str(exported)])
    payload = torch.load(trained / "phase1/ckpt_epoch_0.pth", weights_only=True)
    torch.save({**payload, "meta": {"backbone": "repvit_m1_1"}}, tmp_path / "stage1.pth")
    with pytest.raises(ValueError, match=r"stage1\.pth is a checkpoint of another training \(its meta has backbone\)"):
        train_distill.main(["--export", str(tmp_path / "x.pt"), "--init", str(tmp_path / "stage1.pth")])


def test_an_exported_student_may_be_trained_on(trained: Path, sa1b: Path, tmp_path: Path):
    start = str(trained / "phase1/student_fp16.pt")
    assert run(sa1b, tmp_path, "--phase", "2", "--init", start, "--max-steps", "1") == 0
    assert f"start        {start}" in (tmp_path / "phase2/log_rank0.txt").read_text()


def test_an_older_checkpoint_is_not_resumed_among_newer_ones(trained: Path, sa1b: Path, tmp_path: Path):
    """What it goes on to write would be pruned, and `--resume auto` would take the newer ones."""
    shutil.copytree(trained / "phase1", tmp_path / "phase1")
    path = tmp_path / "phase1/ckpt_epoch_0_step_2.pth"
    with pytest.raises(ValueError, match=r"holds ckpt_epoch_0\.pth, of step 4, .*step_2\.pth .* step 2; .*--output"):
        run(sa1b, tmp_path, "--resume", str(path))
    assert run(sa1b, tmp_path / "other", "--resume", str(path)) == 0
    assert_same_weights(trained / "phase1/ckpt_epoch_0.pth", tmp_path / "other/phase1/ckpt_epoch_0.pth")


def test_a_checkpoint_of_other_settings_is_not_resumed(trained: Path, sa1b: Path):
    with pytest.raises(ValueError, match=r"belongs to another run: .*prompts is .*leave --resume out"):
        run(sa1b, trained, "--resume", "auto", prompts="[other]")


def test_the_second_phase_needs_the_first(sa1b: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"phase 2 starts from phase 1.*--phase 1 first"):
        run(sa1b, tmp_path, "--phase", "2")


def test_too_few_pictures_for_validation(sa1b: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="lower num_val"):
        run(sa1b, tmp_path, "--num-val", "11")


def test_a_cache_of_outputs_does_not_serve_the_first_phase(sa1b: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="phase 1 aligns features"):
        run(sa1b, tmp_path, "--teacher-mode", "output_cache", "--cache-dir", str(tmp_path))


def test_a_missing_start_is_named(sa1b: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        run(sa1b, tmp_path, "--init", str(tmp_path / "absent.pth"))


def test_a_student_of_another_width_than_the_teacher(sa1b: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"has 64 channels, the full student 256"):
        run(sa1b, tmp_path, student="full", student_pretrained="false")


@pytest.mark.parametrize(
    "flags",
    [
        ["--phase", "3"],
        ["--phase", "all", "--epochs", "2"],
        ["--phase", "all", "--warmup", "0"],
        ["--phase", "all", "--max-steps", "2"],
        ["--phase", "all", "--debug"],
        ["--phase", "all", "--resume", "x.pth"],
        ["--debug", "--resume", "auto"],
        ["--debug", "--max-steps", "3"],
        ["--resume", "auto", "--init", "x.pth"],
        ["--export", "x.pt"],
        ["--max-steps", "-1"],
        ["--validate", "--debug"],
        ["--teacher-backend", "onnx"],
    ],
)
def test_flags_that_do_not_go_together_end_with_2(flags: list[str]):
    with pytest.raises(SystemExit) as stop:
        train_distill.main(flags)
    assert stop.value.code == 2


def test_settings_may_be_given_in_several_places():
    config = train_distill.load_config(train_distill.parse_args(["--opts", "seed=3", "--opts", "num_val=5"]))
    assert (config.seed, config.num_val) == (3, 5)


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train_distill.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for flag in ("--phase", "--sa1b-dir", "--teacher-mode", "--student-ckpt", "--no-grad-ckpt", "--write-cache"):
        assert flag in text
    for default in ("data/sa1b", "native", "online", "amp_fp16", "1000", "1008", "checkpoints/distillation"):
        assert f"(default: {default})" in text


def test_settings_of_tests_are_settings():
    assert load_config(None, [f"{key}={value}" for key, value in SMALL.items()]).image_size == 112
