from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data import extract_sav_frames, make_sample_sav
from data.make_sample_sav import describe, kinds_of, main, plan
from sam3.engine.sample_set import bundled_paths
from sam3.engine.sample_video import TRAIN_WAYS, VAL_WAYS, Shape, draw_video
from sam3.engine.sav import list_videos, read_masklets
from sam3.engine.scene_grounds import read_grounds, split_grounds
from sam3.engine.scene_videos import make_clip
from sam3.engine.vos_folders import list_annotated_videos
from tests.parity.fill import image

SHAPE = Shape(width=96, height=64, num_frames=24)
FIELDS = (
    "video_id video_duration video_frame_count video_height video_width video_resolution video_environment video_split "
    "masklet masklet_id masklet_size_rel masklet_size_abs masklet_size_bucket masklet_visibility_changes "
    "masklet_first_appeared_frame masklet_frame_count masklet_edited_frame_count masklet_type masklet_stability_score "
    "masklet_num"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(8):
        Image.fromarray(image(120, 150, seed=i)).save(folder / f"photo{i}.png")
    return folder


def make(photos: Path, output: Path, *extra: str) -> int:
    sizes = ["--width", str(SHAPE.width), "--height", str(SHAPE.height), "--num-frames", str(SHAPE.num_frames)]
    counts = ["--num-train", "2", "--num-val", "1", "--workers", "1"]
    return main(["--images", str(photos), "--output", str(output), *sizes, *counts, *extra])


@pytest.fixture(scope="module")
def sample(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set; to be left as it is."""
    root = tmp_path_factory.mktemp("sample") / "set"
    assert make(photos, root) == 0
    return root


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def draw(photos: Path, ways=TRAIN_WAYS, seed: int = 0, shape: Shape = SHAPE) -> tuple[list[np.ndarray], np.ndarray]:
    return draw_video(sorted(photos.iterdir())[:5], shape, ways, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(4))
def test_what_the_objects_do(photos: Path, seed: int) -> None:
    _, masks = draw(photos, seed=seed)
    assert masks.shape == (24, 4, 64, 96) and (masks.sum(1) <= 1).all(), "masks show what no other object covers"
    seen = masks.any((2, 3))
    steady, crossing, late, leaving = seen.T
    assert crossing.all() and steady[[0, -1]].all()
    areas = masks[:, 0].sum((1, 2))
    assert areas.min() < 0.7 * min(areas[0], areas[-1]), "the crossing object covers a part of the steady one"
    assert not late[:8].any() and late[-6:].all()
    assert leaving[:8].all() and not leaving[-6:].any()


def test_in_val_every_object_is_in_the_first_frame_and_one_returns(photos: Path) -> None:
    for seed in range(4):
        seen = draw(photos, VAL_WAYS, seed)[1].any((2, 3))
        assert seen[0].all()
        returning = seen[:, 3].astype(int)
        assert np.diff(returning).tolist().count(-1) == 1 == np.diff(returning).tolist().count(1)


def test_masks_are_where_the_picture_differs(photos: Path) -> None:
    """Bright objects on a dark ground: the mask is the bright half of each edge, to the pixel."""
    folder = photos.parent / "plain"
    folder.mkdir(exist_ok=True)
    for i, value in enumerate((0, 255, 255)):
        Image.fromarray(np.full((120, 150, 3), value, np.uint8)).save(folder / f"{i}.png")
    frames, masks = draw_video(sorted(folder.iterdir()), SHAPE, TRAIN_WAYS, np.random.default_rng(1))
    for frame, shown in zip(frames, masks, strict=True):
        bright, union = frame[..., 0] >= 128, shown.any(0)
        # Where one object's soft edge lies on another object, both add to the brightness of the ground.
        assert (union & ~bright).sum() == 0
        assert (bright & ~union).sum() <= 4
    assert (masks.any(1).mean((1, 2)) > 0.03).all()


def test_the_train_split(sample: Path, tmp_path: Path) -> None:
    folder = sample / "sav_train"
    kinds = {"sav_000001": ["manual"], "sav_000002": ["auto", "manual"]}
    for name, wanted in kinds.items():
        assert sorted(path.stem for path in folder.glob(f"{name}_*.json")) == [f"{name}_{kind}" for kind in wanted]
    document = json.loads((folder / "sav_000002_manual.json").read_text())
    assert list(document) == FIELDS.split()
    assert document["video_frame_count"] == 24.0 and document["video_duration"] == 1.0
    assert (document["video_height"], document["video_width"]) == (64.0, 96.0)
    assert len(document["masklet"]) == 6 and {len(row) for row in document["masklet"]} == {3}
    assert document["masklet_stability_score"] is None
    auto = json.loads((folder / "sav_000002_auto.json").read_text())
    assert auto["masklet_num"] == 1 and auto["masklet_stability_score"] == [[1.0]] * 6
    capture = cv2.VideoCapture(str(folder / "sav_000001.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 24
    capture.release()


def test_the_train_split_through_the_extractor_and_the_reader(sample: Path, photos: Path, tmp_path: Path) -> None:
    argv = ["--source_dir", str(sample / "sav_train"), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    assert extract_sav_frames.main(argv) == 0
    chosen = plan(sorted(photos.iterdir()), 2, 1, 4, 0)
    for i, video in enumerate(list_videos(tmp_path / "out"), 1):
        assert video.numbers == tuple(range(24))
        masklets = read_masklets(video)
        assert masklets.num_objects == 4 and masklets.numbers == (0, 4, 8, 12, 16, 20)
        paths = [Path(photo) for photo in chosen[i - 1].photos]
        frames, masks = draw_video(paths, SHAPE, TRAIN_WAYS, np.random.default_rng([0, i]))
        for number in masklets.numbers:
            for k in range(4):
                assert (masklets.mask(number, k) == masks[number, k]).all()
            picture = np.asarray(Image.open(video.path(number))).astype(int)
            differences = [np.abs(picture - frame).mean() for frame in frames]
            assert np.argmin(differences) == number, "compressed, but the frame of this number"


def test_the_val_split(sample: Path, photos: Path) -> None:
    (video,) = list_annotated_videos(sample, "val")
    assert video.name == "sav_000003" and video.frames.numbers == tuple(range(24))
    assert video.annotated == (0, 4, 8, 12, 16, 20) and video.objects == ("000", "001", "002", "003")
    assert video.visible(0) == [0, 1, 2, 3] and video.size == (64, 96)
    paths = [Path(photo) for photo in plan(sorted(photos.iterdir()), 2, 1, 4, 0)[2].photos]
    _, masks = draw_video(paths, SHAPE, VAL_WAYS, np.random.default_rng([0, 3]))
    assert all((video.mask(n, k) == masks[n, k]).all() for n in video.annotated for k in range(4))
    assert Image.open(video.frames.path(0)).size == (96, 64)


def test_scenes_through_the_extractor_and_the_readers(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    argv = ["--scenes", "--size", "64", "--num-frames", "9", "--num-train", "2", "--num-val", "1", "--workers", "1"]
    argv += ["--images", str(photos)]
    assert main([*argv, "--output", str(root)]) == 0
    grounds = {s: read_grounds(p, 83) for s, p in split_grounds(sorted(photos.iterdir())).items()}
    extract = ["--source_dir", str(root / "sav_train"), "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    assert extract_sav_frames.main(extract) == 0
    for i, video in enumerate(list_videos(tmp_path / "out"), 1):
        masklets = read_masklets(video)
        clip = make_clip(i, 64, 9, "train", grounds["train"])
        assert masklets.numbers == (0, 4, 8) and masklets.num_objects == len(clip.objects)
        for number in masklets.numbers:
            for k in range(len(clip.objects)):
                assert (masklets.mask(number, k) == clip.masks[number, k]).all()
    (video,) = list_annotated_videos(root, "val")
    clip = make_clip(3, 64, 9, "val", grounds["val"])
    assert video.name == "sav_000003" and len(video.objects) == len(clip.objects)
    assert all((video.mask(n, k) == clip.masks[n, k]).all() for n in (0, 4, 8) for k in range(len(clip.objects)))
    frames = np.stack([np.asarray(Image.open(video.frames.path(n))) for n in range(9)]).astype(int)
    assert np.abs(frames - clip.frames).mean() < 8
    main([*argv, "--output", str(tmp_path / "again"), "--workers", "2"])
    assert files(root) == files(tmp_path / "again")


@pytest.mark.parametrize("flags", [["--scenes", "--objects", "2"], ["--scenes", "--width", "64"], ["--size", "64"]])
def test_flags_without_effect_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2


def test_describe_by_hand() -> None:
    masks = np.zeros((9, 3, 64, 96), bool)  # annotated: 0, 4, 8
    masks[4, 0, :10, :10] = True
    masks[8, 0, :10, :30] = True
    masks[0, 1] = masks[8, 1] = True
    document = describe(make_sample_sav.Video("sav_000001", "train", ()), "manual", masks)
    assert document["masklet_first_appeared_frame"] == [1.0, 0.0, None]
    assert document["masklet_frame_count"] == [2, 2, 0]
    assert document["masklet_visibility_changes"] == [1, 2, 0]
    assert document["masklet_size_abs"] == [200.0, 64 * 96, 0.0]
    assert document["masklet_size_rel"] == [200 / 6144, 1.0, 0.0]
    assert document["masklet_size_bucket"] == ["small", "medium", "small"]


def test_the_same_arguments_give_the_same_bytes(sample: Path, photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "b", "--workers", "2")
    make(photos, tmp_path / "c", "--seed", "1")
    assert files(sample) == files(tmp_path / "b")
    assert files(sample).keys() == files(tmp_path / "c").keys() and files(sample) != files(tmp_path / "c")


def test_a_second_run_finds_it_complete_and_repairs_what_is_missing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    make(photos, root)
    before = files(root)
    capsys.readouterr()
    assert make(photos, root) == 0
    assert capsys.readouterr().out == f"{root} is complete: 2 train and 1 val videos\n"
    (root / "sav_train/sav_000002_auto.json").unlink()
    masks = root / "sav_val/Annotations_6fps/sav_000003"
    masks.rename(masks.with_name(".sav_000003.tmp"))
    assert make(photos, root) == 0
    assert "(2 to make)" in capsys.readouterr().out
    assert files(root) == before
    with pytest.raises(ValueError, match="made with other arguments"):
        make(photos, root, "--objects", "2")


def test_no_photo_serves_both_splits_and_no_background_its_own_objects() -> None:
    photos = [Path(f"{i}.jpg") for i in range(14)]
    videos = plan(photos, 6, 3, 4, seed=0)
    used = {split: {photo for v in videos if v.split == split for photo in v.photos} for split in ("train", "val")}
    assert not used["train"] & used["val"]
    assert all(len(video.photos) == 5 and video.photos[0] not in video.photos[1:] for video in videos)
    assert len({video.photos[0] for video in videos if video.split == "train"}) == 6
    assert [video.name for video in videos] == [f"sav_{i:06d}" for i in range(1, 10)]
    assert len(plan(photos[:4], 6, 3, 4, seed=0)) == 9 and len(plan(photos[:2], 6, 0, 4, seed=0)) == 6
    with pytest.raises(ValueError, match="3 photos are too few"):
        plan(photos[:3], 6, 3, 4, seed=0)


def test_one_frame_and_one_object(photos: Path, tmp_path: Path) -> None:
    assert make(photos, tmp_path / "set", "--num-frames", "1", "--objects", "1") == 0
    (video,) = list_annotated_videos(tmp_path / "set", "val")
    assert video.annotated == (0,) and video.visible(0) == [0]
    assert kinds_of(make_sample_sav.Video("sav_000002", "train", ("a", "b"))) == {"manual": range(1)}


@pytest.mark.parametrize("flags", [["--num-train", "0"], ["--width", "33"], ["--height", "16"], ["--objects", "0"]])
def test_wrong_flags_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2


def test_the_bundled_photos_suffice_for_the_defaults() -> None:
    assert len(plan([Path(path) for path in bundled_paths()], 6, 3, 4, seed=0)) == 9
