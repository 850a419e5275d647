from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data import extract_sav_frames
from data.extract_sav_frames import main
from sam3.engine.sav import list_videos, read_masklets
from tests.samples import sav_document

HEIGHT, WIDTH = 48, 64
ROOT = Path(__file__).parents[2]


def grey(number: int) -> int:
    """Frame `number` is of this grey, so that it is known again."""
    return 20 + 10 * number


def write_video(folder: Path, name: str, num_frames: int = 10, stated: int | None = None, kinds=("manual",)) -> None:
    """An mp4 of grey frames and its annotation files, which state `stated` frames."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(folder / f"{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 24, (WIDTH, HEIGHT))
    for number in range(num_frames):
        writer.write(np.full((HEIGHT, WIDTH, 3), grey(number), np.uint8))
    writer.release()
    stated = num_frames if stated is None else stated
    masks = np.zeros(((stated - 1) // 4 + 1, 2, HEIGHT, WIDTH), bool)
    masks[:, 0, 5:9, 5:9] = True
    for kind in kinds:
        (folder / f"{name}_{kind}.json").write_text(json.dumps(sav_document(name, masks, stated)))


def run(folder: Path, *extra: str) -> int:
    places = ["--source_dir", str(folder / "src"), "--output_dir", str(folder / "out")]
    return main([*places, "--workers", "1", *extra])


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.*g")) if path.is_file()
    }


def numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in sorted(folder.glob("*.jpg"))]


@pytest.mark.parametrize("every", [1, 4])
def test_frames_keep_their_numbers(tmp_path: Path, every: int) -> None:
    write_video(tmp_path / "src/sav_000", "sav_000001", kinds=("manual", "auto"))
    write_video(tmp_path / "src/sav_001", "sav_000002", num_frames=1)
    assert run(tmp_path, "--every", str(every)) == 0
    first, second = list_videos(tmp_path / "out")
    assert first.numbers == ((0, 4, 8) if every == 4 else tuple(range(10))) and second.numbers == (0,)
    for number in first.numbers:
        picture = np.asarray(Image.open(first.path(number)))
        assert picture.shape == (HEIGHT, WIDTH, 3)
        assert abs(picture.mean() - grey(number)) < 5, "another frame's grey is nearer"
    masklets = read_masklets(first)
    assert masklets.numbers == (0, 4, 8) and masklets.ids == ("manual/0", "manual/1", "auto/0", "auto/1")
    assert masklets.visible(8) == [0, 2]
    source = tmp_path / "src/sav_000/sav_000001_auto.json"
    assert (tmp_path / "out/sav_000001/sav_000001_auto.json").read_bytes() == source.read_bytes()
    assert not list((tmp_path / "out").rglob("*.mp4")) and not list((tmp_path / "out").glob(".*.tmp"))


def test_archives_are_read_in_place(tmp_path: Path) -> None:
    write_video(tmp_path / "src", "sav_000001")
    write_video(tmp_path / "src", "sav_000002", num_frames=5)
    assert run(tmp_path) == 0
    loose = tree(tmp_path / "out")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/sav_000.tar", "w") as tar:
        for path in sorted((tmp_path / "src").iterdir()):
            tar.add(path, f"./sav_train/sav_000/{path.name}")
    before = (tmp_path / "tars/sav_000.tar").read_bytes()
    assert (
        main(["--source_dir", str(tmp_path / "tars"), "--output_dir", str(tmp_path / "packed"), "--workers", "2"]) == 0
    )
    assert tree(tmp_path / "packed") == loose
    assert (tmp_path / "packed/sav_000002/sav_000002_manual.json").is_file()
    assert not list((tmp_path / "packed").rglob("*.mp4"))
    assert (tmp_path / "tars/sav_000.tar").read_bytes() == before


@pytest.mark.parametrize("name", ["../sav_000001.mp4", "/tmp/sav_000001.mp4"])
def test_unsafe_and_cut_archives_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / "src", "sav_000002")
    with tarfile.open(tmp_path / "src/a.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    (tmp_path / "src/b.tar").write_bytes((tmp_path / "src/a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"2 of 2 archives .* points outside .*run data/download_sa_v\.sh again"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_bad_videos_are_listed_and_the_others_extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "src"
    write_video(source, "good")
    write_video(source, "short", num_frames=7, stated=10)
    write_video(source, "cut")
    film = (source / "cut.mp4").read_bytes()
    (source / "cut.mp4").write_bytes(film[: len(film) // 2])
    write_video(source, "empty")
    (source / "empty.mp4").write_bytes(b"")
    write_video(source, "bare", kinds=())
    write_video(source, "broken")
    (source / "broken_manual.json").write_text('{"video_frame_count": 10.0}')
    write_video(source, "turned")
    document = json.loads((source / "turned_manual.json").read_text())
    document.update(video_height=float(WIDTH), video_width=float(HEIGHT))
    (source / "turned_manual.json").write_text(json.dumps(document))
    write_video(source, "at_odds", kinds=("manual", "auto"))
    document = json.loads((source / "at_odds_auto.json").read_text())
    (source / "at_odds_auto.json").write_text(json.dumps({**document, "video_frame_count": 9.0}))
    (source / "lost_manual.json").write_text("{}")
    assert run(tmp_path, "--workers", "2") == 1
    assert [video.name for video in list_videos(tmp_path / "out")] == ["good"]
    assert not list((tmp_path / "out").glob(".*.tmp"))
    text = capsys.readouterr().out
    listed = dict(
        line.strip().split(": ", 1) for line in text.split("left out, 8 videos:")[1].splitlines() if ": " in line
    )
    assert "only 7 of the 10 frames that its JSON states" in listed["short"]
    assert "no video that OpenCV can open" in listed["cut"] and "no video" in listed["empty"]
    assert "there is no bare_manual.json or bare_auto.json" in listed["bare"]
    assert "broken_manual.json is damaged" in listed["broken"]
    assert "has 48 x 64 pixels, its JSON states 64 x 48" in listed["turned"]
    assert "state different sizes" in listed["at_odds"]
    assert "lost_manual.json has no lost.mp4" in listed["lost"]
    assert text.endswith(f"1 videos are in {tmp_path / 'out'}\n")


def test_frames_beyond_those_stated_are_kept(tmp_path: Path) -> None:
    write_video(tmp_path / "src", "v", num_frames=10, stated=9)
    assert run(tmp_path) == 0
    assert numbers(tmp_path / "out/v") == list(range(10))


def test_a_second_run_changes_nothing_and_new_videos_are_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "src", "a")
    assert run(tmp_path) == 0
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(tmp_path) == 0
    assert "1 already" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    write_video(tmp_path / "src", "b")
    assert run(tmp_path) == 0
    assert "1 already in" in capsys.readouterr().out and numbers(tmp_path / "out/b") == list(range(10))


@pytest.mark.parametrize("stop_at", [0, 3, 9, 14])
def test_a_run_that_fails_midway_leaves_no_half_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    write_video(tmp_path / "src", "a")
    write_video(tmp_path / "src", "b")
    written, write = [], Path.write_bytes

    def failing(path: Path, data: bytes) -> int:
        if path.suffix == ".jpg":
            if len(written) == stop_at:
                raise OSError(28, "No space left on device")
            written.append(path)
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)
    done = [folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir()]
    assert done == (["a"] if stop_at >= 10 else [])
    assert run(tmp_path) == 0
    assert all(numbers(tmp_path / "out" / name) == list(range(10)) for name in "ab")


def test_a_killed_run_is_taken_up(tmp_path: Path) -> None:
    """SIGKILL, which nothing can tidy up after, while frames of the second video are written."""
    write_video(tmp_path / "src", "a")
    write_video(tmp_path / "src", "b", num_frames=16)
    code = (
        "import sys, time; from pathlib import Path; from data import extract_sav_frames as program\n"
        "write = Path.write_bytes\n"
        "def slow(path, data):\n"
        "    if path.parent.name == '.b.tmp' and path.name == '00005.jpg': time.sleep(60)\n"
        "    return write(path, data)\n"
        "Path.write_bytes = slow\n"
        "program.main(sys.argv[1:])"
    )
    places = ["--source_dir", str(tmp_path / "src"), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'sam3'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", code, *places], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/.b.tmp/00004.jpg").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [video.name for video in list_videos(tmp_path / "out")] == ["a"], "what is half done is no video"
    stamp = (tmp_path / "out/a/00000.jpg").stat().st_mtime_ns
    assert run(tmp_path) == 0
    assert numbers(tmp_path / "out/b") == list(range(16)) and not (tmp_path / "out/.b.tmp").exists()
    assert (tmp_path / "out/a/00000.jpg").stat().st_mtime_ns == stamp


def test_folders_made_otherwise_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "src", "a")
    assert run(tmp_path, "--every", "4") == 0
    with pytest.raises(ValueError, match=r"a was extracted with --every 4 --quality 95; give these"):
        run(tmp_path)
    (tmp_path / "out/a/extraction.json").unlink()
    with pytest.raises(ValueError, match="was not made by this program"):
        run(tmp_path)
    shutil.rmtree(tmp_path / "out/a")
    assert run(tmp_path) == 0


def test_dry_run_changes_nothing_and_the_estimate_is_near(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "src", "a", num_frames=12)
    write_video(tmp_path / "src", "b", num_frames=12)
    assert run(tmp_path, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert "dry run: nothing was changed" in capsys.readouterr().out
    pieces = extract_sav_frames.find_pieces(tmp_path / "src", (".mp4", ".json"), tmp_path / "out", "")
    videos, _ = extract_sav_frames.pair_up(pieces, tmp_path / "src")
    estimate = extract_sav_frames.estimate_bytes(videos, extract_sav_frames.Settings(1, 95))
    assert run(tmp_path) == 0
    real = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.j*") if p.name != "extraction.json")
    assert 0.9 * real < estimate < 1.1 * real


def test_a_full_disk_is_noticed_before_the_first_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "src", "a")
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 100)
    with pytest.raises(OSError, match=r"extracting frames needs .* but only 100 B are free"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_nothing_to_extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"src is not a folder; download SA-V with"):
        run(tmp_path)
    (tmp_path / "src").mkdir()
    with pytest.raises(ValueError, match="found no mp4 files"):
        run(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder data/sa-v/sav_train or data/sa-v"):
        main([])
    write_video(tmp_path / "data/sa-v/sav_train", "a")
    assert main(["--workers", "1"]) == 0
    assert numbers(tmp_path / "data/sa-v/extracted_frames/a") == list(range(10))


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "src/one", "a")
    write_video(tmp_path / "src/two", "a")
    with pytest.raises(ValueError, match=r"a\.mp4 is in .*one.* and in .*two"):
        run(tmp_path)


@pytest.mark.parametrize("flags", [["--workers", "0"], ["--every", "2"], ["--quality", "0"], ["--quality", "101"]])
def test_wrong_flags_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
