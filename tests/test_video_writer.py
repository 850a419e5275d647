"""Written videos hold the frames they were given, whole or not at all."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image, ImageSequence

from sam3 import video_writer
from sam3.video_writer import check_video_path, write_video
from tests.video_files import decode_in_order, moving_square


@pytest.mark.parametrize("fps", [24, 12.5, 30000 / 1001])
def test_mp4_comes_back(tmp_path, fps):
    frames = moving_square(20)
    path = tmp_path / "new" / "clip.mp4"
    assert write_video(path, iter(frames), fps) == 20
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) == pytest.approx(fps, abs=0.01)
    back = decode_in_order(path)
    assert len(back) == 20
    for frame, read in zip(frames, back, strict=True):
        assert np.abs(read.permute(1, 2, 0).numpy().astype(int) - frame).mean() < 6
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_mp4_with_odd_sides_repeats_the_last_row_and_column(tmp_path):
    frames = moving_square(3, height=41, width=63)
    for frame in frames:
        frame[-9:] = 200
    write_video(tmp_path / "odd.mp4", frames, 24)
    (read, *_) = decode_in_order(tmp_path / "odd.mp4")
    assert read.shape == (3, 42, 64)
    assert (read[:, -1].int() - 200).abs().max() < 25


def test_gif_comes_back(tmp_path):
    frames = moving_square(5)
    assert write_video(tmp_path / "clip.GIF", iter(frames), 24) == 5
    with Image.open(tmp_path / "clip.GIF") as picture:
        assert picture.n_frames == 5
        assert picture.info["loop"] == 0, "for ever"
        for frame, read in zip(frames, ImageSequence.Iterator(picture), strict=True):
            assert read.info["duration"] == 40
            assert np.abs(np.asarray(read.convert("RGB")).astype(int) - frame).max() < 4
    write_video(tmp_path / "fast.gif", frames, 100)
    with Image.open(tmp_path / "fast.gif") as picture:
        assert picture.info["duration"] == 20


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_frames_are_drawn_one_at_a_time_and_failures_leave_the_older_file(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"older")

    def frames():
        yield from moving_square(3)
        assert len(list(tmp_path.iterdir())) == 2, "the writer had begun"
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_video(path, frames(), 24)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_bad_frames_are_named(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    first = moving_square(1)
    cases = {
        "no frames": [],
        "frame 1 has the shape": first + moving_square(1, height=20),
        "frame 1 is float64": [*first, first[0] / 255],
        r"frame 0 is uint8 \(48, 64\)": [first[0][:, :, 0]],
    }
    for message, frames in cases.items():
        with pytest.raises(ValueError, match=message):
            write_video(path, frames, 24)
    assert not list(tmp_path.iterdir())


def test_bad_names_rates_and_codecs(tmp_path, monkeypatch):
    frames = moving_square(1)
    for name in ("clip.mov", "clip"):
        with pytest.raises(ValueError, match=r"ends in \.mp4 or \.gif"):
            write_video(tmp_path / name, frames, 24)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a positive number"):
            write_video(tmp_path / "clip.mp4", frames, fps)
    with pytest.raises(ValueError, match="four letters"):
        write_video(tmp_path / "clip.mp4", frames, 24, codec="h264x")
    with pytest.raises(OSError, match="with codec 'zzzz'"):
        write_video(tmp_path / "clip.mp4", frames, 24, codec="zzzz")
    monkeypatch.setattr(video_writer, "find_spec", lambda name: None)
    assert check_video_path("clip.gif") == ".gif"
    with pytest.raises(OSError, match="needs OpenCV"):
        check_video_path("clip.mp4")


def test_a_file_that_could_not_be_written_whole_is_an_error(tmp_path, monkeypatch):
    class ShortWriter:
        """Loses every other frame without a word, as a full disk would."""

        def __init__(self, *args: object) -> None:
            self.writer, self.count = real(*args), 0

        def write(self, frame: np.ndarray) -> None:
            self.count += 1
            if self.count % 2:
                self.writer.write(frame)

        def isOpened(self) -> bool:
            return True

        def release(self) -> None:
            self.writer.release()

    real = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", ShortWriter)
    with pytest.raises(OSError, match="did not write all 6 frames"):
        write_video(tmp_path / "clip.mp4", moving_square(6), 24)
    assert not list(tmp_path.iterdir())
