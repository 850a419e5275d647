"""The export of video embeddings: whole, again, killed, shared between processes, and with bad input."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sam3.backbones.student import build_student
from sam3.engine.files import sha256
from sam3.engine.video_embedding_format import FrameFormat
from sam3.engine.video_embeddings import VideoEmbeddings
from sam3.engine.weights import load_weights, save_weights
from sam3.model_builder import build_teacher_trunk
from sam3.transforms import Preprocess, read_image
from stage2 import save_video_embeddings_stage2, trunk
from stage2.save_video_embeddings_stage2 import main
from tests.engine.processes import finish, fork, join, torchrun, wait_for
from tests.parity.fill import image
from tests.samples import TINY_MAP

PROGRAM = "stage2/save_video_embeddings_stage2.py"
NUMBERS = {"sav_000001": range(6), "sav_000002": range(0, 17, 4), "sav_000003": range(3), "sav_000004": [0, 1, 4]}
FRAME_BYTES = 2 * math.prod(TINY_MAP)
SQUARE = Preprocess(img_size=224, resize="square")


def write_video(root: Path, name: str, numbers: Any, rows: int = 60, columns: int = 90) -> None:
    (root / name).mkdir(parents=True)
    for number in numbers:
        picture = image(rows, columns, seed=number + sum(name.encode()))
        Image.fromarray(picture).save(root / name / f"{number:05d}.jpg", quality=90)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos; to be left as they are."""
    root = tmp_path_factory.mktemp("frames")
    for name, numbers in NUMBERS.items():
        write_video(root, name, numbers)
    (root / "sav_000001/sav_000001_manual.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, frames: Path) -> Path:
    """A finished export of `frames`; to be left as it is."""
    output = tmp_path_factory.mktemp("stored")
    assert save(teacher_file, frames, output) == 0
    return output


def arguments(teacher: Path, data: Path, output: Path, *flags: Any) -> list[str]:
    own = ["--data_dir", data, "--output_dir", output, "--checkpoint", teacher, "--batch_size", 4, "--device", "cpu"]
    return list(map(str, [*own, "--num_workers", 0, *flags]))


def save(teacher: Path, data: Path, output: Path, *flags: Any) -> int:
    return main(arguments(teacher, data, output, *flags))


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all frames, and the metadata of all videos."""
    paths = [*folder.glob("*/*.pt"), *folder.glob("*/metadata.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_output_tree_and_values(stored: Path, teacher_file: Path, frames: Path):
    wanted = {f"{video}/{number:05d}.pt" for video, numbers in NUMBERS.items() for number in numbers}
    wanted |= {f"{video}/metadata.json" for video in NUMBERS} | {"global_metadata.json", "log_rank0.txt"}
    assert {path.relative_to(stored).as_posix() for path in stored.rglob("*") if path.is_file()} == wanted
    embeddings = VideoEmbeddings(stored, TINY_MAP, {"teacher": {"sha256": sha256(teacher_file)}})
    assert embeddings.videos == tuple(NUMBERS)
    teacher = build_teacher_trunk(teacher_file, device="cpu")
    for video, numbers in NUMBERS.items():
        assert embeddings.numbers(video) == tuple(numbers)
        number = numbers[-1]  # by its number in the file's name, not its place in the folder
        square, size = SQUARE.fit(read_image(frames / video / f"{number:05d}.jpg"))
        with torch.no_grad():
            expected = teacher(SQUARE.normalise(square[None], torch.tensor([size])))[-1][0]
        values = embeddings.read(video, number)
        assert values.dtype == torch.float16
        torch.testing.assert_close(values.float(), expected, atol=2e-3, rtol=2e-3)


def test_metadata(stored: Path, teacher_file: Path, frames: Path):
    video = json.loads((stored / "sav_000002/metadata.json").read_text())
    assert video["video_name"] == "sav_000002" and video["num_frames"] == 5 and video["completed"] is True
    assert video["frames"] == ["00000", "00004", "00008", "00012", "00016"]
    assert (video["image_size"], video["backbone_stride"], video["feature_shape"]) == (224, 14, list(TINY_MAP))
    assert video["teacher"] == {"name": teacher_file.name, "sha256": sha256(teacher_file)}
    assert video["preprocess"] == SQUARE.to_meta() and (video["dtype"], video["save_format"]) == ("fp16", "pt")
    everything = json.loads((stored / "global_metadata.json").read_text())
    assert everything["num_videos"] == 4 and everything["num_gpus"] == 1 and everything["completed"] is True
    assert everything["data_dir"] == str(frames) and everything["frame_stride"] == 1


def test_each_file_holds_its_own_frame_only(stored: Path):
    for path in stored.glob("*/*.pt"):
        assert FRAME_BYTES < path.stat().st_size < FRAME_BYTES + 4096
        assert torch.load(path, weights_only=True).untyped_storage().nbytes() == FRAME_BYTES


def test_running_again_changes_nothing_and_new_videos_are_added(
    stored: Path, teacher_file: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, data = tmp_path / "stored", tmp_path / "frames"
    shutil.copytree(stored, output)
    shutil.copytree(frames, data)
    monkeypatch.setattr(trunk.FrozenTrunk, "forward", lambda *_: pytest.fail("a frame was embedded again"))
    assert save(teacher_file, data, output) == 0
    monkeypatch.undo()
    assert contents(output) == contents(stored)
    write_video(data, "sav_000009", range(2))
    assert save(teacher_file, data, output) == 0
    assert VideoEmbeddings(output).videos == (*NUMBERS, "sav_000009")
    assert json.loads((output / "global_metadata.json").read_text())["num_videos"] == 5


def test_the_batch_size_does_not_matter(stored: Path, teacher_file: Path, frames: Path, tmp_path: Path):
    assert save(teacher_file, frames, tmp_path, "--batch_size", 7, "--num_workers", 1) == 0
    one, other = VideoEmbeddings(stored), VideoEmbeddings(tmp_path)
    for video, numbers in NUMBERS.items():
        for number in numbers:
            # sums in batches of another size are rounded otherwise, so the last bit may differ
            torch.testing.assert_close(one.read(video, number), other.read(video, number), atol=2e-3, rtol=2e-3)


def test_two_processes_store_what_one_does(teacher_file: Path, frames: Path, tmp_path: Path):
    two, one = tmp_path / "two", tmp_path / "one"
    assert join(fork(main, arguments(teacher_file, frames, two, "--batch_size", 1), num_processes=2)) == [0, 0]
    assert save(teacher_file, frames, one, "--batch_size", 1) == 0
    assert contents(two) == contents(one)
    assert json.loads((two / "global_metadata.json").read_text())["num_gpus"] == 2
    # video i goes to process i mod 2: 6 + 3 frames, 5 + 3 frames
    assert "embed (process 0 of 2): 9/9 frames" in (two / "log_rank0.txt").read_text()
    assert "embed (process 1 of 2): 8/8 frames" in (two / "log_rank1.txt").read_text()


@pytest.mark.slow
def test_torchrun_as_documented(stored: Path, teacher_file: Path, frames: Path, tmp_path: Path):
    code, stdout, stderr = finish(torchrun(PROGRAM, arguments(teacher_file, frames, tmp_path, "--num_workers", 1)))
    assert code == 0, stdout + stderr
    assert contents(tmp_path).keys() == contents(stored).keys()


def test_a_bad_frame_of_one_process_fails_the_run(teacher_file: Path, frames: Path, tmp_path: Path):
    data = tmp_path / "frames"
    shutil.copytree(frames, data)
    (data / "sav_000002/00008.jpg").write_bytes(b"")
    assert join(fork(main, arguments(teacher_file, data, tmp_path / "out"), num_processes=2)) == [1, 1]
    assert (tmp_path / "out/failed_frames.txt").read_text().startswith("sav_000002/00008\t")
    assert VideoEmbeddings(tmp_path / "out").videos == ("sav_000001", "sav_000003", "sav_000004")


def test_killed_and_gone_on_with(teacher_file: Path, tmp_path: Path):
    data, output = tmp_path / "frames", tmp_path / "stored"
    names = [f"video_{i}" for i in range(5)]
    for name in names:
        write_video(data, name, range(20))
    options = arguments(teacher_file, data, output, "--batch_size", 1)
    (process,) = fork(main, options)
    wait_for(lambda: not process.is_alive() or (output / "video_1/00003.pt").exists(), "frames of two videos")
    process.kill()
    assert join([process]) == [-signal.SIGKILL], "the export was over before it was killed; make it longer"
    done = {path: path.stat().st_mtime_ns for path in output.glob("*/*.pt")}
    assert (output / "video_0/metadata.json").exists() and not (output / "video_4/metadata.json").exists()
    assert 0 < len(done) < 100
    assert json.loads((output / "global_metadata.json").read_text())["completed"] is False
    assert main(options) == 0
    assert VideoEmbeddings(output).videos == tuple(names)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "whole frames were made again"
    alone = tmp_path / "alone"
    assert save(teacher_file, data, alone, "--batch_size", 1) == 0
    assert contents(output) == contents(alone)


def test_sigterm_ends_after_the_batch(teacher_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    data, output = tmp_path / "frames", tmp_path / "stored"
    write_video(data, "long", range(150))
    (process,) = fork(main, arguments(teacher_file, data, output, "--batch_size", 2))
    wait_for(lambda: not process.is_alive() or (output / "long/00001.pt").exists(), "a first batch")
    process.terminate()
    assert join([process]) == [128 + signal.SIGTERM]
    assert "stopped; the same command goes on from there" in capfd.readouterr().err
    number = len(list((output / "long").glob("*.pt")))
    assert 0 < number < 150 and number % 2 == 0  # what was queued is written
    assert not list(output.rglob("*.tmp")) and not (output / "long/metadata.json").exists()


def test_bad_frames_are_listed_and_the_others_are_stored(
    stored: Path, teacher_file: Path, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    data, output = tmp_path / "frames", tmp_path / "stored"
    shutil.copytree(frames, data)
    half = data / "sav_000001/00002.jpg"
    half.write_bytes(half.read_bytes()[:400])
    (data / "sav_000003/00001.jpg").write_bytes(b"")
    (data / "sav_000005").mkdir()
    (data / "sav_000006").mkdir()
    (data / "sav_000006/first.jpg").write_bytes(half.read_bytes())
    assert save(teacher_file, data, output, "--batch_size", 3) == 1
    listed = [line.split("\t") for line in (output / "failed_frames.txt").read_text().splitlines()]
    assert [key for key, _ in listed] == ["sav_000001/00002", "sav_000003/00001", "sav_000005", "sav_000006"]
    reasons = dict(listed)
    assert "truncated" in reasons["sav_000001/00002"] and "empty" in reasons["sav_000003/00001"]
    assert "no frames" in reasons["sav_000005"] and "first.jpg" in reasons["sav_000006"]
    assert "4 frames or videos could not be stored, such as sav_000001/00002" in capsys.readouterr().out
    embeddings = VideoEmbeddings(output)
    assert embeddings.videos == ("sav_000002", "sav_000004") and embeddings.meta["completed"] is False
    assert len(list((output / "sav_000001").glob("*.pt"))) == 5
    # once they are repaired, only they are made
    shutil.copytree(frames, data, dirs_exist_ok=True)
    for name in ("sav_000005", "sav_000006"):
        shutil.rmtree(data / name)
    before = contents(output)
    assert save(teacher_file, data, output) == 0
    assert before.items() <= contents(output).items() and contents(output).keys() == contents(stored).keys()
    assert not (output / "failed_frames.txt").exists()


def test_frame_stride_takes_numbers_it_divides(teacher_file: Path, frames: Path, tmp_path: Path):
    assert save(teacher_file, frames, tmp_path, "--frame_stride", 4) == 0
    embeddings = VideoEmbeddings(tmp_path)
    numbers = {video: embeddings.numbers(video) for video in embeddings.videos}
    assert numbers == {
        "sav_000001": (0, 4), "sav_000002": (0, 4, 8, 12, 16), "sav_000003": (0,), "sav_000004": (0, 4)
    }  # fmt: skip
    assert json.loads((tmp_path / "sav_000001/metadata.json").read_text())["frame_stride"] == 4
    write_video(tmp_path / "odd", "v", [1, 3])
    assert save(teacher_file, tmp_path / "odd", tmp_path / "none", "--frame_stride", 2) == 1
    assert "--frame_stride 2 divides" in (tmp_path / "none/failed_frames.txt").read_text()


def test_videos_file_and_max_videos(teacher_file: Path, frames: Path, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("sav_000003\n\nsav_000001\nsav_000003\nsav_000004\n")
    assert save(teacher_file, frames, tmp_path / "out", "--videos_file", names, "--max_videos", 2) == 0
    assert VideoEmbeddings(tmp_path / "out").videos == ("sav_000001", "sav_000003")
    names.write_text("sav_000003\nsav_999999\n")
    with pytest.raises(FileNotFoundError, match="sav_999999"):
        save(teacher_file, frames, tmp_path / "out", "--videos_file", names)
    names.write_text("\n")
    with pytest.raises(ValueError, match=r"names.txt is empty"):
        save(teacher_file, frames, tmp_path / "out", "--videos_file", names)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.txt; --videos_file holds names"):
        save(teacher_file, frames, tmp_path / "out", "--videos_file", tmp_path / "gone.txt")


@pytest.mark.parametrize(("save_format", "dtype"), [("npy", "fp32"), ("pt", "bf16")])
def test_formats_and_types(
    teacher_file: Path, frames: Path, stored: Path, tmp_path: Path, save_format: str, dtype: str
):
    assert save(teacher_file, frames, tmp_path, "--save_format", save_format, "--dtype", dtype, "--max_videos", 1) == 0
    assert (tmp_path / f"sav_000001/00005.{save_format}").is_file()
    values = VideoEmbeddings(tmp_path).read("sav_000001", 5)
    assert values.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    half = VideoEmbeddings(stored).read("sav_000001", 5).float()
    torch.testing.assert_close(values.float(), half, atol=0.02, rtol=0.01)


def test_a_merged_student_gives_the_students_embedding(teacher_file: Path, frames: Path, tmp_path: Path):
    """Its pictures are padded as its meta says, where SAM3's are squashed."""
    place = "detector.backbone.vision_backbone.trunk."
    torch.manual_seed(0)
    student = build_student("efficientvit_b0", *TINY_MAP[:2]).eval()
    kept = {key: tensor for key, tensor in load_weights(teacher_file).tensors.items() if not key.startswith(place)}
    placed = {f"{place}model.{key}": tensor for key, tensor in student.state_dict().items()}
    pad = Preprocess(img_size=224, resize="pad")
    merged = tmp_path / "merged.pt"
    save_weights(merged, kept | placed, {"embed_size": 16, "preprocess": pad.to_meta()})
    assert save(merged, frames, tmp_path / "out", "--max_videos", 1) == 0
    embeddings = VideoEmbeddings(tmp_path / "out", TINY_MAP, {"preprocess": pad.to_meta()})
    square, size = pad.fit(read_image(frames / "sav_000001/00001.jpg"))
    with torch.no_grad():
        expected = student(pad.normalise(square[None], torch.tensor([size])))[0]
    torch.testing.assert_close(embeddings.read("sav_000001", 1).float(), expected, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match=r"teacher.sha256: found .* choose another --output_dir"):
        save(teacher_file, frames, tmp_path / "out")


def test_dry_run_prints_the_plan_and_writes_nothing(
    teacher_file: Path, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "out"
    assert save(teacher_file, frames, output, "--dry-run") == 0
    assert not output.exists()
    text = capsys.readouterr().out
    assert "videos       4 in" in text and "frames       17 (stride 1), 17 to do" in text
    assert "53.25 kB a frame, 905.22 kB to come" in text and "frames/s by 1 processes on cpu" in text
    write_video(tmp_path / "odd", "v", [1, 3])
    assert save(teacher_file, tmp_path / "odd", output, "--dry-run", "--frame_stride", 2) == 1
    assert "cannot be done: v: no frame of" in capsys.readouterr().out


def test_a_disk_too_small_is_refused_unless_told(
    teacher_file: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 1000)
    for flags in ((), ("--dry-run",)):
        with pytest.raises(OSError, match=r"needs 905.22 kB .* only 1.00 kB are free.*--ignore_free_space begins"):
            save(teacher_file, frames, tmp_path / "out", *flags)
    assert not list(tmp_path.rglob("*.pt"))
    assert save(teacher_file, frames, tmp_path / "out", "--ignore_free_space", "--max_videos", 1) == 0


def test_a_frame_the_stored_type_cannot_hold_is_listed(teacher_file: Path, frames: Path, tmp_path: Path):
    file = load_weights(teacher_file)
    key = "detector.backbone.vision_backbone.trunk.blocks.3.mlp.fc2.bias"
    large = tmp_path / "large.pt"
    save_weights(large, {**file.tensors, key: torch.full_like(file.tensors[key], 1e5)})
    assert save(large, frames, tmp_path / "fp16", "--max_videos", 1) == 1
    lines = (tmp_path / "fp16/failed_frames.txt").read_text().splitlines()
    assert len(lines) == 6 and "sav_000001/00000\tits embedding is NaN or too large for fp16" in lines[0]
    assert save(large, frames, tmp_path / "bf16", "--max_videos", 1, "--dtype", "bf16") == 0


def test_wrong_input_says_what_is_wrong(teacher_file: Path, frames: Path, stored: Path, tmp_path: Path, capsys):
    with pytest.raises(ValueError, match=r"takes pictures of 224 px, but --image_size is 1008; leave it out"):
        save(teacher_file, frames, tmp_path, "--image_size", 1008)
    assert save(teacher_file, frames, tmp_path / "ok", "--image_size", 224, "--max_videos", 1) == 0
    with pytest.raises(FileNotFoundError, match=r"gone.pt"):
        save(tmp_path / "gone.pt", frames, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone"):
        save(teacher_file, tmp_path / "gone", tmp_path)
    for flags, message in (
        (("--batch_size", 0), "--batch_size must be at least 1, got 0"),
        (("--frame_stride", 0), "--frame_stride must be at least 1"),
        (("--max_videos", 0), "--max_videos must be at least 1"),
        (("--save_format", "npy", "--dtype", "bf16"), "numpy has no bf16"),
    ):
        with pytest.raises(SystemExit) as stop:
            save(teacher_file, frames, tmp_path, *flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_released_checkpoint_is_fetched_if_it_is_not_there(
    teacher_file: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def download(folder: Path) -> None:
        folder.mkdir()
        shutil.copy(teacher_file, folder / "sam3.pt")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(save_video_embeddings_stage2, "download_sam3", download)
    options = ["--data_dir", str(frames), "--output_dir", "out", "--batch_size", "8", "--max_videos", "1"]
    options += ["--num_workers", "1"]
    with pytest.raises(FileNotFoundError, match=r"sam3_checkpoints/sam3.pt"):
        main([*options, "--dry-run"])
    assert main(options) == 0
    assert VideoEmbeddings("out").videos == ("sav_000001",)


def test_a_disk_that_fills_up_is_gone_on_with(
    stored: Path, teacher_file: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_frame, calls = FrameFormat.save, []

    def full_after_some(self: FrameFormat, path: Path, values: torch.Tensor) -> None:
        calls.append(path)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        save_frame(self, path, values)

    monkeypatch.setattr(FrameFormat, "save", full_after_some)
    with pytest.raises(OSError, match="No space left"):
        save(teacher_file, frames, tmp_path)
    monkeypatch.undo()
    assert 0 < len(list(tmp_path.glob("*/*.pt"))) <= 8
    assert save(teacher_file, frames, tmp_path) == 0
    assert contents(tmp_path).keys() == contents(stored).keys()
