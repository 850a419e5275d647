"""Folders of frames, pictures and pictures in memory as videos; the cache; bad input."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam3 import video_frames
from sam3.transforms import read_image
from sam3.video_frames import Pictures, VideoFrames, open_video
from tests.parity.fill import image


def write_frames(folder: Path, names: list[str], height: int = 20, width: int = 30) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(image(height, width, seed=i)).save(folder / name)
    return folder


def test_a_folder_is_ordered_by_number_and_keeps_its_names(tmp_path, caplog):
    folder = write_frames(tmp_path / "video", ["8.jpg", "00012.JPG", "4.jpeg", "16.jpg"])
    (folder / "sav_000001_manual.json").write_text("{}")
    (folder / "._8.jpg").write_bytes(b"left by another system")
    frames = open_video(folder)
    assert frames.names == ("4", "8", "00012", "16")
    assert (len(frames), frames.height, frames.width, frames.fps) == (4, 20, 30, None)
    for i, name in enumerate(("4.jpeg", "8.jpg", "00012.JPG", "16.jpg")):
        assert torch.equal(frames[i], read_image(folder / name))
        assert frames[i].dtype == torch.uint8
    assert not caplog.text, "every fourth frame is as good as every one"


def test_an_uneven_step_is_noted(tmp_path, caplog):
    frames = open_video(str(write_frames(tmp_path / "v", ["00004.jpg", "00005.jpg", "00009.jpg", "00010.jpg"])))
    assert frames.names == ("00004", "00005", "00009", "00010")
    assert "leave gaps, the first between 5 and 9" in caplog.text


def test_one_picture_and_pictures_in_memory(tmp_path):
    folder = write_frames(tmp_path / "v", ["photo.png"])
    one = open_video(folder / "photo.png")
    assert (len(one), one.names) == (1, ("photo",))
    assert one[0].permute(1, 2, 0).numpy().tolist() == image(20, 30).tolist()
    pictures = [Image.fromarray(image(20, 30, seed=i)) for i in range(2)] + [Image.new("L", (30, 20), 7)]
    several = open_video(pictures)
    assert several.names == ("00000", "00001", "00002")
    assert np.array_equal(several[1].permute(1, 2, 0), image(20, 30, seed=1))
    assert several[2].eq(7).all()
    assert several[2].shape == (3, 20, 30)
    assert len(open_video(pictures[0])) == 1


def counted(count: int) -> tuple[Pictures, list[int]]:
    """Pictures that hold their number, and the list of those that were loaded."""
    loaded = []

    def load(index: int) -> torch.Tensor:
        loaded.append(index)
        return torch.full((3, 4, 5), index, dtype=torch.uint8)

    return Pictures([str(i) for i in range(count)], load), loaded


def test_the_cache_keeps_the_frames_used_last():
    source, loaded = counted(5)
    frames = VideoFrames(source, "video", cache_frames=2)
    assert [frames[i][0, 0, 0].item() for i in (0, 1, 0, 2, 0, 1)] == [0, 1, 0, 2, 0, 1]
    assert loaded == [0, 1, 2, 1], "2 pushed out 1, since 0 had been used after it"
    with pytest.raises(ValueError, match="at least 1"):
        VideoFrames(source, "video", cache_frames=0)


def test_memory_does_not_grow_with_the_video():
    source, _ = counted(100)
    frames = VideoFrames(source, "video", cache_frames=3)
    for _ in frames:
        assert len(frames._cache) <= 3


def test_read_ahead_reads_one_frame_ahead_in_a_thread():
    source, _ = counted(6)
    read_by, two_read = [], threading.Event()
    load = source._load

    def watched(index: int) -> torch.Tensor:
        read_by.append(threading.current_thread().name)
        if index == 4:
            two_read.set()
        return load(index)

    source._load = watched
    frames = VideoFrames(source, "video", cache_frames=2)
    ahead = frames.read_ahead([5, 4, 3])
    assert next(ahead)[0] == 5
    assert two_read.wait(5), "4 is read although only 5 was asked for"
    assert [(i, frame[0, 0, 0].item()) for i, frame in ahead] == [(4, 4), (3, 3)]
    assert read_by == ["MainThread", "prefetch", "prefetch", "prefetch"]
    with pytest.raises(IndexError):
        list(frames.read_ahead([7]))


def test_indices_outside_and_closed_videos():
    frames = VideoFrames(counted(3)[0], "video")
    assert len(list(frames)) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"frame {index} of video, which has frames 0 to 2"):
            frames[index]
    with frames:
        pass
    frames.close()
    with pytest.raises(ValueError, match="is closed"):
        frames[0]


def test_frames_of_other_sizes_and_truncated_frames_are_named(tmp_path):
    folder = write_frames(tmp_path / "v", [f"{i}.jpg" for i in range(4)])
    Image.fromarray(image(30, 20)).save(folder / "2.jpg")
    data = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(data[: len(data) // 2])
    frames = open_video(folder)
    frames[1]
    with pytest.raises(ValueError, match=r"frame 2 of .* is 20 x 30 pixels, the first frame is 30 x 20"):
        frames[2]
    with pytest.raises(ValueError, match=r"3\.jpg is truncated"):
        frames[3]


def test_a_frame_that_goes_away_is_named(tmp_path):
    folder = write_frames(tmp_path / "v", ["0.jpg", "1.jpg"])
    frames = open_video(folder)
    (folder / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.jpg"):
        frames[1]


def test_folders_that_are_no_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no video .*nowhere"):
        open_video(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no frames in .*wanted files named <number>\.jpg"):
        open_video(tmp_path)
    named = write_frames(tmp_path / "named", ["1.jpg", "frame_2.jpg"])
    with pytest.raises(ValueError, match=r"1 of 2 pictures in .* bear no number, such as frame_2\.jpg"):
        open_video(named)
    twice = write_frames(tmp_path / "twice", ["7.jpg", "00007.jpg"])
    with pytest.raises(ValueError, match=r"frame 7 twice: 00007\.jpg and 7\.jpg"):
        open_video(twice)


def test_lists_that_are_no_videos():
    with pytest.raises(ValueError, match="list of pictures is empty"):
        open_video([])
    with pytest.raises(ValueError, match="holds a str"):
        open_video(["a.jpg"])


def test_folders_work_without_opencv_and_video_files_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(video_frames, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "sam3.video_file", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert len(open_video(write_frames(tmp_path / "v", ["0.jpg"]))) == 1
    (tmp_path / "video.mp4").write_bytes(b"anything")
    with pytest.raises(OSError, match="pip install opencv-python"):
        open_video(tmp_path / "video.mp4")
