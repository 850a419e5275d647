"""The program that trains the tiny SAM3: the file it writes, its phases in order, what it says when one fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from distillation.supervised.card import TrainingRecord
from sam3.engine.weights import load_weights, save_weights
from sam3.model_builder import build_sam3_image_model
from sam3.tracker_builder import build_video_model
from scripts import train_tiny_sam3
from scripts.train_tiny_sam3 import MEASURED, PHASES, ROOT, command, full_parser, main, processes

# Of all phases, as little as can be trained and measured.
ONE = {"EFFECTIVE_BATCH": 2, "WARMUP_STEPS": 0}
SHORT = {
    "words": {"DATA": {"NUM_VAL_SCENES": 2, "BATCH_SIZE": 2}, "TRAIN": {"MAX_STEPS": 2, **ONE}},
    "closeup": {"DATA": {"NUM_VAL_SCENES": 2, "BATCH_SIZE": 2}, "TRAIN": {"MAX_STEPS": 1, **ONE}},
    "image": {"DATA": {"NUM_VAL_SCENES": 2, "BATCH_SIZE": 2}, "TRAIN": {"MAX_STEPS": 1, **ONE}},
    "tracker": {
        "DATA": {"NUM_VAL_CLIPS": 1, "NUM_VAL_FRAMES": 2, "BATCH_SIZE": 1, "NUM_FRAMES": [2]},
        "TRAIN": {"MAX_STEPS": 1, "EFFECTIVE_BATCH": 1, "WARMUP_STEPS": 0},
    },
}


def write_configs(folder: Path) -> Path:
    """The configs of all phases, shortened."""
    folder.mkdir()
    for phase, changes in SHORT.items():
        base = ROOT / "configs" / f"tiny_sam3_{phase}.yaml"
        (folder / base.name).write_text(yaml.safe_dump({"BASE": [str(base)], **changes}))
    return folder


def test_a_checkpoint_becomes_a_file_of_half_precision(teacher_file, tmp_path, capsys):
    target = tmp_path / "new" / "tiny.safetensors"
    assert main(["--export", str(teacher_file), "--to", str(target)]) == 0
    assert "657 entries" in capsys.readouterr().out
    assert target.stat().st_size <= 6_000_000
    full, half = load_weights(teacher_file).tensors, load_weights(target).tensors
    assert set(full) == set(half)
    for key, tensor in full.items():
        expected = tensor.half() if tensor.dtype == torch.float32 else tensor
        assert half[key].dtype == expected.dtype and torch.equal(half[key], expected)
    assert half["detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis"].dtype == torch.complex64


def test_a_file_says_what_its_checkpoint_says_of_itself(tmp_path):
    """And no more: weights from elsewhere are not said to be of the tiny preset."""
    tensors = {"detector.weight": torch.ones(2), "outlines.weight": torch.ones(2)}
    said = {}
    for name, meta in (("own", {"phase": "tracker", "preset": "tiny"}), ("foreign", {})):
        save_weights(tmp_path / f"{name}.pth", tensors, meta)
        assert main(["--export", str(tmp_path / f"{name}.pth"), "--to", str(tmp_path / f"{name}.safetensors")]) == 0
        found = load_weights(tmp_path / f"{name}.safetensors")
        assert set(found.tensors) == {"detector.weight"}
        said[name] = found.meta["trained"]
    assert said == {"own": {"on": "generated scenes", "preset": "tiny"}, "foreign": {"on": "generated scenes"}}


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_what_half_precision_cannot_hold_is_not_written(tmp_path, value):
    checkpoint, target = tmp_path / "ckpt.pth", tmp_path / "tiny.safetensors"
    save_weights(checkpoint, {"tracker.a": torch.ones(2), "tracker.b": torch.tensor([1.0, value])})
    with pytest.raises(ValueError, match=r"tracker\.b of .*ckpt\.pth .* float16"):
        main(["--export", str(checkpoint), "--to", str(target)])
    assert not target.exists()


def test_an_export_names_its_file(monkeypatch, teacher_file, tmp_path):
    """The committed one is not replaced by accident."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--export writes a file: name it with --to"):
        main(["--export", str(teacher_file)])
    assert not list(tmp_path.iterdir())
    assert full_parser().parse_args([]).to == Path("sam3_checkpoints/sam3_tiny.safetensors")


def test_half_precision_is_read_as_float32(teacher_file, tmp_path):
    target = tmp_path / "tiny.safetensors"
    main(["--export", str(teacher_file), "--to", str(target)])
    for model in (build_sam3_image_model(target, device="cpu"), build_video_model(target, device="cpu")):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = build_sam3_image_model(target, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_cpu_runs_two_processes():
    args = full_parser().parse_args(["--device", "cpu"])
    assert processes(args) == 2
    assert processes(full_parser().parse_args(["--processes", "1"])) == 1
    assert command(["--phase", "words"], 1)[:2] == [sys.executable, str(ROOT / "scripts" / "train_tiny_sam3.py")]
    two = command(["--phase", "words"], 2)
    assert two[1:3] == ["-m", "torch.distributed.run"] and two[two.index("--nproc_per_node") + 1] == "2"
    assert two[-2:] == ["--phase", "words"]


def test_a_phase_that_fails_ends_the_program(monkeypatch, tmp_path, capsys):
    """What comes after would start from nothing."""
    ran = []

    def fail(words, check):
        ran.append(words)
        return type("Ended", (), {"returncode": 3})

    monkeypatch.setattr(train_tiny_sam3.subprocess, "run", fail)
    assert main(["--output", str(tmp_path), "--processes", "1"]) == 3
    assert len(ran) == 1 and "phase words ended with exit code 3" in capsys.readouterr().out


def test_phases_follow_each_other(monkeypatch, tmp_path):
    """Each starts from the last step of the one before, with the same seed."""
    ran = []

    class Stop(Exception):
        pass

    def note(words, check):
        ran.append(words[2:])
        if "tracker" in words:
            raise Stop
        return type("Ended", (), {"returncode": 0})

    monkeypatch.setattr(train_tiny_sam3.subprocess, "run", note)
    with pytest.raises(Stop):
        main(["--output", str(tmp_path), "--processes", "1", "--seed", "7"])
    phases = [words[words.index("--phase") + 1] for words in ran]
    assert tuple(phases) == PHASES
    starts = [words[words.index("--pretrained") + 1] if "--pretrained" in words else None for words in ran]
    assert starts == [None, *(str(tmp_path / phase / "ckpt_latest.pth") for phase in PHASES[:-1])]
    assert all(words[words.index("--seed") + 1] == "7" for words in ran)


@pytest.fixture
def finished(monkeypatch, teacher_file, tmp_path):
    """Flags of a program whose phases are done."""
    (tmp_path / "tracker").mkdir()
    (tmp_path / "tracker/ckpt_latest.pth").write_bytes(teacher_file.read_bytes())
    ended = type("Ended", (), {"returncode": 0})
    monkeypatch.setattr(train_tiny_sam3.subprocess, "run", lambda words, check: ended)
    record = TrainingRecord(1, 1.0, 1, "2 CPU cores", "2.9", 1)
    monkeypatch.setattr(train_tiny_sam3, "training_record", lambda folder: record)
    return ["--output", str(tmp_path), "--processes", "1", "--to", str(tmp_path / "made/tiny.safetensors")]


def test_a_file_that_cannot_be_measured_replaces_nothing(monkeypatch, finished, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/tiny.safetensors").write_text("older")

    def fail(phase, path, args):
        assert load_weights(path).tensors
        raise RuntimeError("no measure")

    monkeypatch.setattr(train_tiny_sam3, "measure", fail)
    with pytest.raises(RuntimeError, match="no measure"):
        main(finished)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tiny.safetensors"]
    assert (tmp_path / "made/tiny.safetensors").read_text() == "older"


def test_a_measured_file_lies_beside_its_page(monkeypatch, finished, tmp_path):
    monkeypatch.setattr(train_tiny_sam3, "measure", lambda phase, path, args: {"val/jf_click": 0.5})
    assert main(finished) == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["tiny.md", "tiny.safetensors"]
    assert load_weights(tmp_path / "made/tiny.safetensors").tensors
    assert "| 0.500 | 0.75 |" in (tmp_path / "made/tiny.md").read_text()


@pytest.mark.slow
def test_all_phases(tmp_path, capsys):
    configs, target = write_configs(tmp_path / "configs"), tmp_path / "tiny.safetensors"
    flags = ["--configs", str(configs), "--output", str(tmp_path / "out"), "--to", str(target), "--device", "cpu"]
    assert main([*flags, "--processes", "1"]) == 0
    page = target.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    for phase, steps in (("words", 2), ("closeup", 1), ("image", 1), ("tracker", 1)):
        assert f"| {phase} | {steps} | 0:00:0" in page
    for name in ("J&F of clips, one click", "mask IoU of the clicked object", "absent phrases"):
        assert name in page
    whole = load_weights(tmp_path / "out" / "tracker" / "ckpt_latest.pth").tensors
    file = load_weights(target).tensors
    assert set(whole) == set(file) and set(MEASURED) < set(PHASES)
    assert build_video_model(target, device="cpu").tracker.config.img_size == 224


@pytest.mark.parametrize("content", ["PHASE: words\nLOSS: {WORD_WEIGHT: 1.0}\n", "SEED: 3\n"])
def test_the_phase_asked_for_is_trained(monkeypatch, tmp_path, content):
    """Whatever a file of one's own says, or does not say."""
    (tmp_path / "own.yaml").write_text(content)
    monkeypatch.setattr(
        train_tiny_sam3, "run_stage", lambda argv, parser, load, build: load(parser.parse_args(argv)).PHASE
    )
    assert main(["--phase", "closeup", "--cfg", str(tmp_path / "own.yaml")]) == "closeup"


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tiny_sam3_words.yaml"):
        main(["--phase", "words", "--configs", str(tmp_path)])
