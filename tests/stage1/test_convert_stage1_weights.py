from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam3 import merged_model
from sam3.engine import files
from sam3.engine.files import sha256
from sam3.engine.merge import LANGUAGE, STUDENT_TRUNK, TRUNK, VISION
from sam3.engine.weights import load_weights, same_bytes, save_weights
from sam3.model.config import Sam3Config
from sam3.model.tracker_config import TrackerConfig
from sam3.model_builder import assemble_image_model, build_efficientsam3_image_model, build_student
from sam3.tracker_builder import assemble_tracker
from stage1 import convert_stage1_weights
from stage1.convert_stage1_weights import main
from tests.manifests import manifest_tensors

PREPROCESS = {"img_size": 1008, "resize": "pad", "mean": [127.5] * 3, "std": [127.5] * 3}


@pytest.fixture
def built(monkeypatch):
    """Stands in for the real model and students, which the shrunken tensors do not fit; lists the calls."""
    monkeypatch.setattr(merged_model, "recognise_student", lambda tensors, prefix: ("repvit_m1_1", 4))
    calls = []
    monkeypatch.setattr(merged_model, "build_efficientsam3_image_model", lambda **kw: calls.append(kw))
    return calls


@pytest.fixture
def inputs(tmp_path):
    """A SAM3 file and a Stage-1 checkpoint with all keys of the real ones."""
    torch.save({"model": manifest_tensors("sam3")}, tmp_path / "sam3.pt")
    write_student(tmp_path / "ckpt_epoch_29.pth", sha256(tmp_path / "sam3.pt"))
    return tmp_path


def write_student(path: Path, teacher_sha256: str | None, tensors=None, **meta) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in (tensors or manifest_tensors("es_rv_m")).items()}
    content = {"model": tensors, "epoch": 29, "optimizer": {"state": {}}}
    if teacher_sha256 is not None:
        teacher = {"name": "sam3.pt", "sha256": teacher_sha256}
        content["meta"] = {"backbone": "repvit_m1_1", "preprocess": PREPROCESS, "teacher": teacher} | meta
    torch.save(content, path)


def convert(folder: Path, *flags: str, output: str | None = "merged.pt") -> int:
    argv = ["--student-ckpt", str(folder / "ckpt_epoch_29.pth"), "--sam3-ckpt", str(folder / "sam3.pt")]
    if output:
        argv += ["--output", str(folder / output)]
    return main([*argv, *flags])


def test_commands_of_the_document(inputs, built, capsys, monkeypatch):
    """Relative paths and explicit prefixes, as written in the user's document."""
    monkeypatch.chdir(inputs)
    Path("sam3_checkpoints").mkdir()
    Path("sam3.pt").rename("sam3_checkpoints/sam3.pt")
    Path("output/stage1/repvit_m1").mkdir(parents=True)
    Path("ckpt_epoch_29.pth").rename("output/stage1/repvit_m1/ckpt_epoch_29.pth")
    command = """
      --student-ckpt output/stage1/repvit_m1/ckpt_epoch_29.pth
      --sam3-ckpt sam3_checkpoints/sam3.pt
      --output output/efficient_sam3_repvit_m1.pt
      --target-prefix detector.backbone.vision_backbone.trunk.model.
      --replace-prefix detector.backbone.vision_backbone.trunk."""
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = [
        f"Student parameters copied: 653 -> prefix '{STUDENT_TRUNK}.'",
        "Teacher params skipped=0, replaced=420, appended=1045",
        "Combined checkpoint saved to: output/efficient_sam3_repvit_m1.pt",
    ]
    start = lines.index(wanted[0])
    assert lines[start : start + 3] == wanted
    assert lines[start + 3].startswith("Proof: 1698 tensors read back, 0 missing, 0 unexpected; 653 bit-equal")
    found = load_weights("output/efficient_sam3_repvit_m1.pt")
    assert len(found.tensors) == 1698
    source = manifest_tensors("sam3") | {f"{STUDENT_TRUNK}.{k}": t for k, t in manifest_tensors("es_rv_m").items()}
    assert all(same_bytes(tensor, source[key]) for key, tensor in found.tensors.items())
    assert len(built) == 1

    # The defaults are the same command.
    short = "--student-ckpt output/stage1/repvit_m1/ckpt_epoch_29.pth"
    assert main(short.split()) == 0
    assert list(load_weights("output/stage1/repvit_m1/ckpt_epoch_29_sam3.pth").tensors) == list(found.tensors)


def test_meta_of_the_student_goes_into_the_merged_file(inputs, built):
    convert(inputs)
    meta = load_weights(inputs / "merged.pt").meta
    assert meta["backbone"] == "repvit_m1_1"
    assert meta["embed_dim"] == 4
    assert meta["preprocess"] == PREPROCESS
    assert meta["teacher"] == {"name": "sam3.pt", "sha256": sha256(inputs / "sam3.pt")}
    assert meta["student"] == {"file": "ckpt_epoch_29.pth", "epoch": 29}


def test_safetensors_in_and_out(inputs, built):
    student = load_weights(inputs / "ckpt_epoch_29.pth")
    save_weights(inputs / "s.safetensors", student.tensors, student.meta)
    save_weights(inputs / "sam3.safetensors", load_weights(inputs / "sam3.pt").tensors)
    convert(inputs)
    command = ["--student-ckpt", str(inputs / "s.safetensors"), "--sam3-ckpt", str(inputs / "sam3.safetensors")]
    main([*command, "--output", str(inputs / "m.safetensors"), "--allow-other-teacher"])
    a, b = load_weights(inputs / "merged.pt"), load_weights(inputs / "m.safetensors")
    assert a.tensors.keys() == b.tensors.keys()
    assert all(same_bytes(tensor, b.tensors[key]) for key, tensor in a.tensors.items())
    assert b.meta["preprocess"] == PREPROCESS


def test_another_teacher_is_refused_unless_allowed(inputs, built, capsys):
    write_student(inputs / "ckpt_epoch_29.pth", "0" * 64)
    with pytest.raises(ValueError, match=r"trained from the SAM3 file with SHA-256 0{64}, .*--allow-other-teacher"):
        convert(inputs)
    assert not (inputs / "merged.pt").exists()
    assert convert(inputs, "--allow-other-teacher") == 0
    assert "Warning: " in capsys.readouterr().out


def test_student_without_meta_is_accepted_with_a_note(inputs, built, capsys):
    write_student(inputs / "ckpt_epoch_29.pth", None)
    assert convert(inputs) == 0
    assert "does not say which SAM3 file" in capsys.readouterr().out


def test_student_of_another_backbone_is_refused(inputs):
    write_student(inputs / "ckpt_epoch_29.pth", "0" * 64, manifest_tensors("es_ev_s", full=True))
    with pytest.raises(ValueError, match=r"says that it is a 'repvit_m1_1', but its weights .* ES-EV-S"):
        convert(inputs)


def test_student_of_another_width_is_refused(inputs):
    """A real EfficientViT-B0 student with 1024 channels; the shrunken SAM3's neck reads 4."""
    write_student(inputs / "ckpt_epoch_29.pth", None, manifest_tensors("es_ev_s", full=True))
    with pytest.raises(ValueError, match=r"the student gives 1024 channels, but .* reads 4"):
        convert(inputs)


def test_sam3_given_as_student_is_refused(inputs):
    command = ["--student-ckpt", str(inputs / "sam3.pt"), "--sam3-ckpt", str(inputs / "sam3.pt")]
    with pytest.raises(ValueError, match="no student under the prefix"):
        main(command)


def test_dry_run_checks_and_writes_nothing(inputs, built, capsys):
    before = sorted(p.name for p in inputs.iterdir())
    assert convert(inputs, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "1698 tensors" in out
    assert "nothing written" in out
    assert sorted(p.name for p in inputs.iterdir()) == before
    with pytest.raises(ValueError, match="nothing would be replaced"):
        convert(inputs, "--dry-run", "--replace-prefix", "image_encoder")


def test_skipped_modules_are_left_out_of_file_and_model(inputs, built, capsys):
    assert convert(inputs, "--skip-teacher-prefix", "tracker", "--skip-teacher-prefix", f"{LANGUAGE}.") == 0
    assert "Teacher params skipped=604, replaced=420, appended=441" in capsys.readouterr().out
    assert not any(key.startswith(("tracker.", LANGUAGE)) for key in load_weights(inputs / "merged.pt").tensors)
    assert built[0]["enable_text_encoder"] is False
    assert built[0]["enable_segmentation"] is True


def test_inputs_are_never_overwritten(inputs, built):
    (inputs / "link.pt").symlink_to(inputs / "sam3.pt")
    before = sha256(inputs / "sam3.pt")
    for output in ("sam3.pt", "ckpt_epoch_29.pth", "link.pt"):
        with pytest.raises(ValueError, match="is one of the inputs"):
            convert(inputs, output=output)
    assert sha256(inputs / "sam3.pt") == before


def test_an_older_output_stays_until_the_new_one_is_proven(inputs, built, monkeypatch):
    (inputs / "merged.pt").write_bytes(b"older")

    def refuse(**kw):
        raise ValueError("1 missing: detector.x")

    monkeypatch.setattr(merged_model, "build_efficientsam3_image_model", refuse)
    with pytest.raises(ValueError, match="1 missing"):
        convert(inputs)
    assert (inputs / "merged.pt").read_bytes() == b"older"
    monkeypatch.setattr(merged_model, "build_efficientsam3_image_model", lambda **kw: None)
    convert(inputs)
    assert len(load_weights(inputs / "merged.pt").tensors) == 1698
    assert sorted(p.name for p in inputs.iterdir()) == ["ckpt_epoch_29.pth", "merged.pt", "sam3.pt"]


def test_ddp_files_and_image_only_files(inputs, built, capsys):
    wrapped = {f"module.{key}": tensor for key, tensor in manifest_tensors("es_rv_m").items()}
    write_student(inputs / "ckpt_epoch_29.pth", None, wrapped)
    detector = {key: t for key, t in manifest_tensors("sam3").items() if key.startswith("detector.")}
    torch.save({key.removeprefix("detector."): tensor for key, tensor in detector.items()}, inputs / "sam3.pt")
    assert convert(inputs) == 0
    assert "replaced=420, appended=736" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replace-prefix", "image_encoder"], "nothing would be replaced"),
        (["--target-prefix", "image_encoder"], "the target prefix must lie below"),
        (["--replace-prefix", f"{TRUNK}.blocks"], "4 of the teacher's tensors"),
    ],
)
def test_wrong_prefixes(inputs, built, flags, message):
    with pytest.raises(ValueError, match=message):
        convert(inputs, *flags)
    assert not (inputs / "merged.pt").exists()


def test_full_disk(inputs, built, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"writing merged.pt needs .* only 1.00 kB are free"):
        convert(inputs)
    assert not (inputs / "merged.pt").exists()


def test_output_folder_is_made_or_named(inputs, built):
    assert convert(inputs, output="a/b/merged.pt") == 0
    assert (inputs / "a" / "b" / "merged.pt").exists()
    (inputs / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        convert(inputs, output="file/merged.pt")


def test_bad_files_give_one_line_and_exit_code_1(inputs):
    (inputs / "ckpt_epoch_29.pth").write_bytes((inputs / "ckpt_epoch_29.pth").read_bytes()[:5000])
    script = Path(convert_stage1_weights.__file__)
    command = [sys.executable, str(script), "--student-ckpt", str(inputs / "ckpt_epoch_29.pth")]
    done = subprocess.run([*command, "--sam3-ckpt", str(inputs / "sam3.pt")], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "ckpt_epoch_29.pth is cut off after 5.00 kB" in done.stderr


def test_missing_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny SAM3 file, and a real EfficientViT-B0 student with the tiny trunk's width and grid."""
    folder = tmp_path_factory.mktemp("tiny")
    config = Sam3Config.preset("tiny")
    detector = {f"detector.{k}": t for k, t in assemble_image_model(config, with_sam2_neck=True).state_dict().items()}
    tracker = {f"tracker.{k}": t for k, t in assemble_tracker(TrackerConfig.preset("tiny")).state_dict().items()}
    save_weights(folder / "sam3.pt", detector | tracker)
    student = build_student("efficientvit_b0", config.vit_dim, config.grid).eval()
    preprocess = PREPROCESS | {"img_size": config.img_size}
    meta = {"backbone": "efficientvit_b0", "embed_size": config.grid, "preprocess": preprocess}
    write_student(folder / "ckpt_epoch_29.pth", sha256(folder / "sam3.pt"), student.state_dict(), **meta)
    return folder, config, student


def test_merged_model_gives_the_students_embedding(tiny, capsys):
    folder, config, student = tiny
    assert convert(folder) == 0
    assert "the model loads it strictly" in capsys.readouterr().out
    model = build_efficientsam3_image_model(folder / "merged.pt", device="cpu")
    images = torch.rand(1, 3, config.img_size, config.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.backbone.vision_backbone.trunk(images)[-1], student(images))


@pytest.mark.parametrize(
    "skip",
    [["tracker"], [LANGUAGE], ["detector.segmentation_head"], [f"{VISION}.sam2_convs", "tracker"]],
)
def test_merged_model_without_optional_parts_loads(tiny, skip):
    assert convert(tiny[0], *(f"--skip-teacher-prefix={prefix}" for prefix in skip)) == 0


@pytest.mark.parametrize("part", ["detector.dot_prod_scoring", "tracker.maskmem_backbone"])
def test_merged_model_without_a_needed_part_is_refused(tiny, part):
    folder = tiny[0]
    (folder / "merged.pt").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="missing"):
        convert(folder, "--skip-teacher-prefix", part)
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt_epoch_29.pth", "sam3.pt"]


# Runs the converter and prints its peak of anonymous memory (heap, not mapped files) above that of its imports.
MEASURE = """
import json, re, sys, threading, time
from stage1.convert_stage1_weights import main

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

start = peak = anonymous_bytes()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
try:
    code = main(sys.argv[1:])
finally:
    done.set()
    thread.join()
print(json.dumps({"code": code, "peak_bytes": peak - start}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_size_merge_needs_little_memory(tmp_path):
    """3.44 GB in, 1.73 GB out, loaded strictly by the real model."""
    if files.free_bytes(tmp_path) < 12e9:
        pytest.skip("needs 12 GB of disk")
    try:
        save_weights(tmp_path / "sam3.safetensors", manifest_tensors("sam3", full=True))
        save_weights(tmp_path / "sam3.pt", load_weights(tmp_path / "sam3.safetensors").tensors)
        (tmp_path / "sam3.safetensors").unlink()
        assert (tmp_path / "sam3.pt").stat().st_size > 3.4e9
        write_student(tmp_path / "student.pth", None, manifest_tensors("es_rv_m", full=True))
        flags = ["--student-ckpt", tmp_path / "student.pth", "--sam3-ckpt", tmp_path / "sam3.pt"]
        for name in ("merged.pt", "merged.safetensors"):
            command = [sys.executable, "-c", MEASURE, *flags, "--output", tmp_path / name]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "replaced=420, appended=1045" in done.stdout
            found = json.loads(done.stdout.splitlines()[-1])
            assert found["code"] == 0
            assert found["peak_bytes"] < 0.4e9  # the largest tensor has 0.2 GB
            assert 1.70e9 < (tmp_path / name).stat().st_size < 1.75e9
            (tmp_path / name).unlink()
    finally:
        for path in tmp_path.iterdir():
            path.unlink()
