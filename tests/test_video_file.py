"""Frames of video files: the same in every order of access, and damaged files are named."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import pytest
import torch

from sam3.video_file import VideoFile
from sam3.video_frames import VideoFrames, open_video
from tests.video_files import decode_in_order, write_sample

COUNT = 230


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("video") / "square.mp4", COUNT)


@pytest.fixture(scope="module")
def expected(video: Path) -> list[torch.Tensor]:
    frames = decode_in_order(video)
    assert len(frames) == COUNT
    assert len({frame.numpy().tobytes() for frame in frames}) == COUNT, "a wrong frame would go unseen"
    return frames


def assert_same_in_every_order(frames: VideoFrames, expected: list[torch.Tensor]) -> None:
    generator = random.Random(0)
    orders = {
        "forward": range(COUNT),
        "backward": range(COUNT - 1, -1, -1),
        "every fourth, backward": range(COUNT - 1, -1, -4),
        "far steps": (0, 225, 3, 110, 229, 109, 0),
        "random": [generator.randrange(COUNT) for _ in range(40)],
    }
    for name, order in orders.items():
        wrong = [i for i in order if not torch.equal(frames[i], expected[i])]
        assert not wrong, name


@pytest.mark.parametrize("cache_frames", [1, 16])
def test_frames_do_not_depend_on_the_order_of_access(video, expected, cache_frames):
    with open_video(video, cache_frames) as frames:
        assert (len(frames), frames.height, frames.width, frames.fps) == (COUNT, 48, 64, 24)
        assert frames.names[:2] == ("00000", "00001")
        assert_same_in_every_order(frames, expected)


class LateCapture:
    """A decoder whose seeks land too late, as they do with variable frame rates, and which may lack time stamps."""

    def __init__(self, path: str, late: int, has_times: bool) -> None:
        self.capture, self.late, self.has_times = CAPTURE(path), late, has_times

    def set(self, key: int, value: float) -> bool:
        done = self.capture.set(key, value)
        for _ in range(self.late):
            self.capture.grab()
        return done

    def get(self, key: int) -> float:
        return self.capture.get(key) if self.has_times or key != cv2.CAP_PROP_POS_MSEC else 0.0

    def __getattr__(self, name: str):
        return getattr(self.capture, name)


CAPTURE = cv2.VideoCapture


@pytest.mark.parametrize(("late", "has_times"), [(5, True), (40, True), (1000, True), (3, False)])
def test_frames_are_right_where_seeks_are_not(video, expected, monkeypatch, late, has_times):
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: LateCapture(path, late, has_times))
    assert_same_in_every_order(open_video(video), expected)


def test_reading_in_order_never_seeks_and_walking_back_seldom(video, monkeypatch):
    frames, seeks = open_video(video), []
    seek = VideoFile._seek
    monkeypatch.setattr(VideoFile, "_seek", lambda self, index: (seeks.append(index), seek(self, index)))
    for i in range(COUNT):
        assert frames[i] is frames[i]
    for i in range(0, 90, 4):
        frames[i]
    assert seeks == [0], "only to come back to the start"
    seeks.clear()
    for i in range(COUNT - 1, -1, -1):
        frames[i]
    assert len(seeks) <= COUNT // 16 + 2, "one per 16 frames, and one to the end"


def test_a_video_of_one_frame(tmp_path):
    frames = open_video(write_sample(tmp_path / "one.mp4", 1))
    assert len(frames) == 1
    assert frames[0].shape == (3, 48, 64)
    assert frames[0][0, 24, 8] > 180, "red comes first"
    assert frames[0][2, 24, 8] < 80


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(range(256)) * 40])
def test_files_that_are_no_video(tmp_path, capfd, content):
    path = tmp_path / "page.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot open video .*page\.mp4 \({len(content)} bytes\)"):
        open_video(path)
    assert capfd.readouterr().err == "", "one message is enough"


def test_cut_off_and_overwritten_files(tmp_path, video):
    data = video.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot open video .*cut\.mp4"):
        open_video(cut)
    holey = tmp_path / "holey.mp4"
    holey.write_bytes(data[: len(data) // 4] + bytes(len(data) // 2) + data[len(data) // 4 + len(data) // 2 :])
    with pytest.raises(ValueError, match=rf"holey\.mp4 is damaged: \d+ of its {COUNT} frames"):
        open_video(holey)


def test_a_header_that_promises_a_frame_too_many_is_only_noted(video, monkeypatch, caplog):
    real = LateCapture.get
    monkeypatch.setattr(LateCapture, "get", lambda self, key: real(self, key) + (key == cv2.CAP_PROP_FRAME_COUNT))
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: LateCapture(path, 0, True))
    assert len(open_video(video)) == COUNT
    assert f"promises {COUNT + 1} frames, it has {COUNT}" in caplog.text


def test_a_file_that_changes_while_it_is_read(tmp_path, video):
    path = tmp_path / "changing.mp4"
    path.write_bytes(video.read_bytes())
    frames = open_video(path)
    for i in range(40):
        frames[i]
    path.write_bytes(b"gone")
    frames[39]  # is in the cache
    with pytest.raises(ValueError, match=r"cannot open video .*changing\.mp4"):
        frames[0]


def test_a_frame_that_could_be_decoded_before_is_named(video, monkeypatch):
    class Failing:
        def grab(self) -> bool:
            return False

    frames = open_video(video)
    monkeypatch.setattr(frames._source, "_capture", Failing())
    with pytest.raises(ValueError, match=r"frame 7 of .*square\.mp4 can no longer be decoded"):
        frames[7]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no video .*none\.mp4"):
        VideoFile(tmp_path / "none.mp4")
