"""Which frames and objects make a clip, by hand; reading them, and what is wrong with files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam3.engine.sav import list_videos, read_masklets
from sam3.transforms import read_image
from stage2.data.batch import ABSENT, PRESENT, UNKNOWN
from stage2.data.clips import Choice, ClipSampling, choose_clip, places, read_scene, spread
from tests.samples import write_sav_video

ROWS, COLUMNS = 48, 64


def shown(visible: list[list[int]], num_objects: int) -> np.ndarray:
    """Masks (len(visible), num_objects, H, W): object i is a square at (4 i, 6 i) in the frames that list it."""
    masks = np.zeros((len(visible), num_objects, ROWS, COLUMNS), dtype=bool)
    for t, objects in enumerate(visible):
        for i in objects:
            masks[t, i, 4 * i : 4 * i + 9, 6 * i + t : 6 * i + t + 7] = True
    return masks


def video_of(root: Path, visible: list[list[int]], num_objects: int = 1, num_frames: int | None = None):
    write_sav_video(root, "sav_000001", shown(visible, num_objects), num_frames or 4 * len(visible), every=4)
    (video,) = list_videos(root)
    return video, read_masklets(video)


def drawn(masklets, count: int = 60, **options) -> list[Choice | None]:
    sampling = ClipSampling(**{"num_frames": 3, "max_objects": 2, **options})
    return [choose_clip(masklets, sampling, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("count", "num_frames", "step", "expected"),
    [
        (10, 4, 1, (1, 7)),  # starts 0 to 6: the last one ends at place 9
        (10, 4, 3, (3, 1)),
        (10, 4, 5, (3, 1)),  # 3 x 5 + 1 places are too many, 3 x 3 + 1 are not
        (4, 4, 1, (1, 1)),
        (7, 4, 2, (2, 1)),
        (3, 4, 2, (1, 1)),  # too short: the last place is repeated
        (1, 4, 1, (1, 1)),
        (121, 8, 1, (1, 114)),
    ],
)
def test_step_and_number_of_starts(count: int, num_frames: int, step: int, expected: tuple[int, int]):
    assert spread(count, num_frames, step) == expected


def test_places_forwards_backwards_and_repeated():
    assert places(2, 2, 10, 4, reverse=False) == [2, 4, 6, 8]
    assert places(2, 2, 10, 4, reverse=True) == [8, 6, 4, 2]
    assert places(0, 1, 3, 5, reverse=False) == [0, 1, 2, 2, 2]
    assert places(0, 1, 3, 5, reverse=True) == [2, 1, 0, 0, 0]
    assert places(0, 1, 1, 3, reverse=True) == [0, 0, 0]


def test_every_start_is_drawn_and_every_frame_is_annotated(tmp_path: Path):
    _, masklets = video_of(tmp_path, [[0]] * 6)
    forwards = {choice.numbers for choice in drawn(masklets, reversal=0.0)}
    assert forwards == {(0, 4, 8), (4, 8, 12), (8, 12, 16), (12, 16, 20)}  # the last start is reached
    both = {choice.numbers for choice in drawn(masklets, 120, reversal=0.5)}
    assert both == forwards | {numbers[::-1] for numbers in forwards}
    assert {choice.numbers for choice in drawn(masklets, skip=8, reversal=0.0)} == {(0, 8, 16), (4, 12, 20)}
    # too long a skip becomes shorter, still by whole annotated frames
    assert {choice.numbers for choice in drawn(masklets, skip=40, reversal=1.0)} == {(16, 8, 0), (20, 12, 4)}
    # where only every 8th frame is stored, only those are taken
    assert {choice.numbers for choice in drawn(masklets, skip=8, grid=8, reversal=0.0)} == {(0, 8, 16)}


def test_the_first_frame_shows_all_objects_of_a_clip(tmp_path: Path):
    _, masklets = video_of(tmp_path, [[], [0], [0, 1], [], [1, 2], []], num_objects=4)
    choices = drawn(masklets, 200, reversal=0.5, max_objects=1)
    # forwards from 0 (nobody there) and 12 (the same) are never drawn; backwards 20 is not
    expected = {(4, 8, 12), (8, 12, 16), (8, 4, 0), (16, 12, 8)}
    assert {choice.numbers for choice in choices} == expected
    assert all(choice.objects[0] in masklets.visible(choice.numbers[0]) for choice in choices)
    assert {choice.objects for choice in choices if choice.numbers[0] == 8} == {(0,), (1,)}
    assert {choice.objects for choice in choices} == {(0,), (1,), (2,)}  # 3 never appears
    assert {choice.objects for choice in drawn(masklets) if choice.numbers[0] == 16} == {(1, 2)}
    assert {choice.objects for choice in drawn(masklets) if choice.numbers[0] == 4} == {(0,)}


def test_short_videos_and_videos_without_objects(tmp_path: Path):
    _, one = video_of(tmp_path / "one", [[0]], num_frames=1)
    assert {choice.numbers for choice in drawn(one)} == {(0, 0, 0)}
    _, two = video_of(tmp_path / "two", [[0], [0]], num_frames=6)
    assert {choice.numbers for choice in drawn(two)} == {(0, 4, 4), (4, 0, 0)}
    _, empty = video_of(tmp_path / "empty", [[], []])
    assert drawn(empty, 5) == [None] * 5
    _, nobody = video_of(tmp_path / "nobody", [[], []], num_objects=0)
    assert drawn(nobody, 5) == [None] * 5


def test_the_same_generator_gives_the_same_clip(tmp_path: Path):
    _, masklets = video_of(tmp_path, [[0, 1, 2]] * 9, num_objects=3)
    assert drawn(masklets) == drawn(masklets)
    assert len(set(drawn(masklets))) > 10


def test_scene_holds_what_the_files_say(tmp_path: Path):
    video, _ = video_of(tmp_path, [[0], [], [0], [0]])
    path = video.folder / "sav_000001_manual.json"
    document = json.loads(path.read_text())
    document["masklet"][2] = [None]
    path.write_text(json.dumps(document))
    masklets = read_masklets(video)
    scene = read_scene(video, masklets, Choice((12, 8, 4, 0), (0,)), with_pictures=True)
    assert scene.states.tolist() == [[PRESENT, UNKNOWN, ABSENT, PRESENT]]
    wanted = torch.zeros(4, ROWS, COLUMNS, dtype=torch.bool)
    wanted[0, :9, 3:10] = True
    wanted[3, :9, 0:7] = True
    assert torch.equal(scene.masks[0], wanted)
    assert scene.frames == [("sav_000001", number) for number in (12, 8, 4, 0)]
    for (_, number), picture in zip(scene.frames, scene.pictures, strict=True):
        assert torch.equal(picture, read_image(video.folder / f"{number:05d}.jpg"))
    assert read_scene(video, masklets, Choice((0, 4), (0,)), with_pictures=False).pictures is None


def test_files_that_are_wrong_are_named(tmp_path: Path):
    video, masklets = video_of(tmp_path, [[0]] * 3)
    choice = Choice((0, 4, 8), (0,))
    frame = video.folder / "00004.jpg"
    whole = frame.read_bytes()
    Image.new("RGB", (COLUMNS, ROWS - 2)).save(frame)
    with pytest.raises(ValueError, match=r"00004.jpg has \(46, 64\) rows .* of sav_000001 are about \(48, 64\)"):
        read_scene(video, masklets, choice, with_pictures=True)
    frame.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00004.jpg is truncated"):
        read_scene(video, masklets, choice, with_pictures=True)
    frame.unlink()
    with pytest.raises(FileNotFoundError, match=r"00004.jpg"):
        read_scene(video, masklets, choice, with_pictures=True)
    assert read_scene(video, masklets, choice, with_pictures=False).masks.any()
    path = video.folder / "sav_000001_manual.json"
    document = json.loads(path.read_text())
    document["masklet"][1][0]["size"] = [ROWS, COLUMNS + 1]
    path.write_text(json.dumps(document))
    frame.write_bytes(whole)
    with pytest.raises(ValueError, match=r"object manual/0 in frame 4 of .*sav_000001 cannot be decoded"):
        read_scene(list_videos(tmp_path)[0], read_masklets(video), choice, with_pictures=False)
    shutil.rmtree(video.folder)


def test_sampling_that_cannot_work():
    for options, message in (
        ({"num_frames": 1}, "NUM_FRAMES must be at least 2"),
        ({"max_objects": 0}, "MAX_OBJECTS at least 1"),
        ({"skip": 6}, "FRAME_SKIP must be a multiple of 4"),
        ({"skip": 4, "grid": 8}, "FRAME_SKIP must be a multiple of 8"),
        ({"skip": 6, "grid": 6}, "FRAME_SKIP must be a multiple of 6"),
        ({"skip": 0}, "FRAME_SKIP"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipSampling(**options)
