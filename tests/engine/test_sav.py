"""Reading SA-V's training part."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from sam3.engine.sav import VideoFolder, list_videos, read_masklets
from tests.samples import sav_document, write_sav_video


def blocks(frames: int, objects: int, height: int = 6, width: int = 8) -> np.ndarray:
    """Object k of annotated frame i is the pixel in row k, column i."""
    masks = np.zeros((frames, objects, height, width), bool)
    for i in range(frames):
        for k in range(objects):
            masks[i, k, k, i] = True
    return masks


def edit(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))


def test_videos_are_listed_by_name_and_frames_by_number(tmp_path):
    for name in ("sav_000010", "sav_000002", ".sav_000003.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()
    folder = tmp_path / "sav_000002"
    for name in ("00004.jpg", "00000.jpg", "100000.jpg", "sav_000002_manual.json", "._00008.jpg", "thumbs.db"):
        (folder / name).touch()
    first, second = list_videos(tmp_path)
    assert [first.name, second.name] == ["sav_000002", "sav_000010"]
    assert first.numbers == (0, 4, 100000) and len(first) == 3
    assert first.path(4) == folder / "00004.jpg" and first.path(100000) == folder / "100000.jpg"
    assert pickle.loads(pickle.dumps(first)).numbers == first.numbers
    with pytest.raises(FileNotFoundError, match=r"no frame 3 of sav_000002 .* holds 3 from 0 to 100000"):
        first.path(3)
    with pytest.raises(FileNotFoundError, match=r"no frames .* in .*sav_000010"):
        _ = second.numbers
    assert [video.name for video in list_videos(tmp_path, ["sav_000010"])] == ["sav_000010"]


def test_names_without_leading_zeros_are_sorted_as_numbers(tmp_path):
    for name in ("0.jpeg", "10.jpeg", "9.jpeg"):
        (tmp_path / name).touch()
    video = VideoFolder("clip", tmp_path)
    assert video.numbers == (0, 9, 10)
    assert video.path(10).name == "10.jpeg"


@pytest.mark.parametrize(
    "names", [("00000.jpg", "00000.jpeg"), ("00000.jpg", "0.jpg"), ("frame_00001.jpg",), ("cover.jpg", "00000.jpg")]
)
def test_frames_that_could_not_be_found_by_number(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="wanted frames named alike by their numbers"):
        _ = VideoFolder("clip", tmp_path).numbers


def test_nothing_to_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"extract_sav_frames\.py"):
        list_videos(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no videos in"):
        list_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"of 2 videos asked for, 2 \(a, b\) are not in"):
        list_videos(tmp_path, ["a", "b"])


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/b", "a\\b", "", ".", "..", ".hidden"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not the plain name of a video"):
        list_videos(tmp_path, [name])


def test_rle_by_hand_runs_down_the_columns(tmp_path):
    # 2 rows, 3 columns, counted down the columns: 1 outside, 3 inside, 2 outside.
    folder = write_sav_video(tmp_path, "v", np.zeros((1, 1, 2, 3), bool), num_frames=1)
    edit(folder / "v_manual.json", masklet=[[{"size": [2, 3], "counts": [1, 3, 2]}]])
    masklets = read_masklets(list_videos(tmp_path)[0])
    assert masklets.mask(0, 0).tolist() == [[False, True, False], [True, True, False]]
    assert masklets.area(0, 0) == 3
    # The same in COCO's compressed form: 1, 3, 2 are the characters 1, 3, 2.
    edit(folder / "v_manual.json", masklet=[[{"size": [2, 3], "counts": "132"}]])
    assert read_masklets(list_videos(tmp_path)[0]).mask(0, 0).tolist() == [[False, True, False], [True, True, False]]


@pytest.mark.parametrize("every", [1, 4])
def test_masks_belong_to_original_frame_numbers(tmp_path, every):
    truth = blocks(frames=3, objects=2)
    write_sav_video(tmp_path, "v", truth, num_frames=10, every=every)
    (video,) = list_videos(tmp_path)
    assert video.numbers == ((0, 4, 8) if every == 4 else tuple(range(10)))
    masklets = read_masklets(video)
    assert (masklets.height, masklets.width, masklets.num_objects) == (6, 8, 2)
    assert masklets.numbers == (0, 4, 8) and masklets.ids == ("manual/0", "manual/1")
    for i, number in enumerate(masklets.numbers):
        for k in range(2):
            assert (masklets.mask(number, k) == truth[i, k]).all()
        assert masklets.visible(number) == [0, 1]
    assert masklets.mask(3, 0) is None, "nobody looked at frame 3"
    with pytest.raises(IndexError):
        masklets.mask(0, 2)


def test_unknown_absent_and_never_seen(tmp_path):
    truth = blocks(frames=3, objects=3)
    truth[1, 0] = False
    truth[:, 2] = False
    folder = write_sav_video(tmp_path, "v", truth, num_frames=12)
    document = json.loads((folder / "v_manual.json").read_text())
    document["masklet"][1][1] = None
    document["masklet"][2] = None
    (folder / "v_manual.json").write_text(json.dumps(document))
    masklets = read_masklets(list_videos(tmp_path)[0])
    absent, unknown = masklets.mask(4, 0), masklets.mask(4, 1)
    assert absent is not None and not absent.any() and masklets.area(4, 0) == 0
    assert unknown is None and masklets.area(4, 1) is None
    assert masklets.visible(0) == [0, 1] and masklets.visible(4) == [] == masklets.visible(8)
    assert masklets.mask(8, 0) is None
    assert not any(2 in masklets.visible(number) for number in masklets.numbers)
    assert masklets.area(0, 2) == 0


def test_both_kinds_are_joined_and_frames_without_entries_are_unknown(tmp_path):
    folder = write_sav_video(tmp_path, "v", blocks(3, 2), num_frames=9)
    auto = sav_document("v", blocks(2, 1), num_frames=9)
    (folder / "v_auto.json").write_text(json.dumps(auto))
    (video,) = list_videos(tmp_path)
    both = read_masklets(video)
    assert both.ids == ("manual/0", "manual/1", "auto/0") and both.numbers == (0, 4, 8)
    assert both.mask(4, 2)[0, 1] and both.mask(8, 2) is None
    assert read_masklets(video, ["auto"]).ids == ("auto/0",)
    assert read_masklets(video, ["manual"]).num_objects == 2
    (folder / "v_auto.json").unlink()
    assert read_masklets(video).num_objects == 2
    with pytest.raises(FileNotFoundError, match=r"no .*v_auto\.json"):
        read_masklets(video, ["auto"])
    (folder / "v_manual.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"v_manual\.json or .*v_auto\.json; copy it there"):
        read_masklets(video)
    with pytest.raises(ValueError, match=r"kinds \['hand'\] are unknown"):
        read_masklets(video, ["hand"])


def test_a_video_of_one_frame_and_one_without_objects(tmp_path):
    write_sav_video(tmp_path, "one", blocks(1, 1), num_frames=1)
    write_sav_video(tmp_path, "two", np.zeros((1, 0, 6, 8), bool), num_frames=2)
    one, two = list_videos(tmp_path)
    assert read_masklets(one).numbers == (0,) and read_masklets(one).visible(0) == [0]
    edit(two.folder / "two_manual.json", masklet=None, masklet_id=None, masklet_num=0)
    assert read_masklets(two).num_objects == 0 and read_masklets(two).visible(0) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ({"size": [8, 6], "counts": [48]}, r"its size \[8, 6\] is not the picture's \[6, 8\]"),
        ({"size": [6, 8], "counts": [47]}, "its runs cover 47 pixels, the picture has 48"),
        ({"size": [6, 8], "counts": "~~"}, "its counts are cut off"),
        ({"counts": [48]}, "'size'"),
        ("text", "string indices"),
    ],
)
def test_a_damaged_mask_is_named_and_only_when_read(tmp_path, code, reason):
    folder = write_sav_video(tmp_path, "v", blocks(2, 1), num_frames=5)
    document = json.loads((folder / "v_manual.json").read_text())
    document["masklet"][1][0] = code
    (folder / "v_manual.json").write_text(json.dumps(document))
    masklets = read_masklets(list_videos(tmp_path)[0])
    assert masklets.visible(0) == [0]
    with pytest.raises(ValueError, match=rf"object manual/0 in frame 4 of .*v cannot be decoded: {reason}"):
        masklets.mask(4, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"video_height": "gone"}, "it has no entry 'video_height'"),
        ({"video_width": 8.5}, "its video_width is 8.5"),
        ({"masklet_id": [0]}, "its masklet_num is 2, but it has 1 masklet_id"),
        ({"masklet_id": [0], "masklet_num": 1}, "entry 0 of its masklet has 2 masks, wanted one of each of 1 objects"),
        ({"video_id": "sav_000007"}, "it is of the video 'sav_000007', wanted 'v'"),
        ({"video_frame_count": 8.0}, "its masklet has 3 frames, but its video_frame_count allows 2"),
    ],
)
def test_damaged_documents_are_named(tmp_path, changes, reason):
    folder = write_sav_video(tmp_path, "v", blocks(3, 2), num_frames=9)
    edit(folder / "v_manual.json", **changes)
    with pytest.raises(ValueError, match=r"v_manual\.json is damaged: " + reason):
        read_masklets(list_videos(tmp_path)[0])


def test_documents_that_are_cut_off_or_disagree(tmp_path):
    folder = write_sav_video(tmp_path, "v", blocks(3, 2), num_frames=9)
    (folder / "v_auto.json").write_text(json.dumps(sav_document("v", blocks(3, 1, height=5), 9)))
    (video,) = list_videos(tmp_path)
    with pytest.raises(ValueError, match=r"states 6 x 8 pixels, .*v_auto\.json 5 x 8"):
        read_masklets(video)
    (folder / "v_manual.json").write_text('{"video_id": "v"')
    with pytest.raises(ValueError, match=r"v_manual\.json is damaged"):
        read_masklets(video)


def test_annotated_frames_must_be_there(tmp_path):
    folder = write_sav_video(tmp_path, "v", blocks(3, 1), num_frames=9)
    (folder / "00003.jpg").unlink()
    assert read_masklets(list_videos(tmp_path)[0]).numbers == (0, 4, 8), "frame 3 has no mask to lose"
    (folder / "00008.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotates 3 frames, but 1 \(8\) of them are not in"):
        read_masklets(list_videos(tmp_path)[0])
