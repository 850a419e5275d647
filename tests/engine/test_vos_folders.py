"""Videos whose masks are pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sam3.engine.vos_folders import list_annotated_videos, read_labels

HEIGHT, WIDTH = 4, 6


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(pixels, np.uint8))
    if mode == "P":
        picture.putpalette([k % 256 for k in range(768)])
    elif mode is not None:
        picture = picture.convert(mode)
    picture.save(path)


def square(row, column, value=1):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[row : row + 2, column : column + 2] = value
    return pixels


def write_sav(root, name="sav_000002"):
    """10 frames; object 000 is in frames 0 and 4, gone in 8; 001 overlaps it and is annotated from frame 4 on."""
    base = root / "sav_val"
    for number in range(10):
        save(base / "JPEGImages_24fps" / name / f"{number:05d}.jpg", np.zeros((HEIGHT, WIDTH, 3)))
    masks = base / "Annotations_6fps" / name
    save(masks / "000/00000.png", square(0, 0, 255), mode="1")
    save(masks / "000/00004.png", square(0, 1, 255), mode="L")
    save(masks / "000/00008.png", square(0, 0, 0), mode="1")
    save(masks / "001/00004.png", square(0, 2), mode="P")
    save(masks / "001/00008.png", square(2, 2), mode="P")
    (base / "sav_val.txt").write_text(f"{name}\n\n")
    return base


def write_davis(root, name="dogs"):
    for number in range(3):
        save(root / "JPEGImages/480p" / name / f"{number:05d}.jpg", np.zeros((HEIGHT, WIDTH, 3)))
    first = square(0, 0, 1) + square(2, 3, 2)
    first[3, 0] = 255
    save(root / "Annotations/480p" / name / "00000.png", first, mode="P")
    save(root / "Annotations/480p" / name / "00001.png", square(1, 1, 2), mode="P")
    save(root / "Annotations/480p" / name / "00002.png", square(1, 1, 3), mode="P")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text(name)


def test_sav_layout(tmp_path):
    base = write_sav(tmp_path)
    for root in (tmp_path, base):
        (video,) = list_annotated_videos(root, "val")
        assert video.name == "sav_000002" and len(video.frames) == 10
        assert video.objects == ("000", "001") and video.num_objects == 2
        assert video.annotated == (0, 4, 8)
        assert video.numbers_of(0) == (0, 4, 8) and video.numbers_of(1) == (4, 8)
        assert video.size == (HEIGHT, WIDTH)
    assert (video.mask(0, 0) == (square(0, 0) > 0)).all() and video.mask(0, 0).dtype == bool
    assert (video.mask(4, 0) & video.mask(4, 1)).sum() == 2, "objects may overlap"
    assert not video.mask(8, 0).any()
    assert video.mask(0, 1) is None and video.mask(5, 0) is None
    assert [video.visible(number) for number in video.annotated] == [[0], [0, 1], [1]]


def test_davis_layout(tmp_path):
    write_davis(tmp_path)
    (video,) = list_annotated_videos(tmp_path, "val", "davis")
    assert video.objects == ("1", "2"), "255 is nobody, and an object that comes later does not count"
    assert video.annotated == (0, 1, 2) == video.numbers_of(1)
    assert (video.mask(0, 0) == (square(0, 0) > 0)).all()
    assert (video.mask(0, 1) == (square(2, 3) > 0)).all()
    assert (video.mask(1, 1) == (square(1, 1) > 0)).all() and not video.mask(1, 0).any()
    assert not video.mask(2, 0).any() and video.mask(3, 0) is None
    assert [video.visible(number) for number in video.annotated] == [[0, 1], [1], []]
    with pytest.raises(IndexError):
        video.numbers_of(2)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    write_davis(tmp_path)
    (tmp_path / "Annotations/480p/dogs/00002.png").write_bytes(b"")
    (video,) = list_annotated_videos(tmp_path, "val", "davis")
    assert video.mask(1, 1).any()
    with pytest.raises(ValueError, match=r"00002\.png is damaged"):
        video.mask(2, 1)


def test_faults_of_masks(tmp_path):
    base = write_sav(tmp_path)
    (video,) = list_annotated_videos(tmp_path, "val")
    save(base / "Annotations_6fps/sav_000002/000/00004.png", np.zeros((WIDTH, HEIGHT)))
    with pytest.raises(ValueError, match=r"00004\.png has \(6, 4\) rows and columns, the video's first one \(4, 6\)"):
        video.mask(4, 0)
    save(base / "Annotations_6fps/sav_000002/001/00004.png", np.zeros((HEIGHT, WIDTH, 3)))
    with pytest.raises(ValueError, match="is RGB, wanted one number per pixel"):
        video.mask(4, 1)
    path = base / "Annotations_6fps/sav_000002/001/00008.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"00008\.png is damaged"):
        read_labels(path, (HEIGHT, WIDTH))


def test_annotated_frames_must_be_there(tmp_path):
    base = write_sav(tmp_path)
    (base / "JPEGImages_24fps/sav_000002/00004.jpg").unlink()
    (video,) = list_annotated_videos(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=r"annotates 3 frames, but 1 \(4\) of them are not in"):
        _ = video.annotated


def test_a_video_of_one_frame(tmp_path):
    base = tmp_path / "sav_test"
    save(base / "JPEGImages_24fps/a/00000.jpg", np.zeros((HEIGHT, WIDTH, 3)))
    save(base / "Annotations_6fps/a/000/00000.png", square(0, 0))
    (base / "sav_test.txt").write_text("a\n")
    (video,) = list_annotated_videos(tmp_path, "test", "sav")
    assert video.annotated == (0,) and video.visible(0) == [0]


def test_faults_of_layouts(tmp_path):
    with pytest.raises(ValueError, match="layout 'mose' is unknown"):
        list_annotated_videos(tmp_path, "val", "mose")
    with pytest.raises(FileNotFoundError, match=r"no folder .*JPEGImages_24fps"):
        list_annotated_videos(tmp_path, "val")
    base = write_sav(tmp_path)
    (base / "sav_val.txt").write_text("sav_000002\nsav_000009\n")
    with pytest.raises(FileNotFoundError, match=r"of 2 videos in .*sav_val\.txt, 1 \(sav_000009\) are not in"):
        list_annotated_videos(tmp_path, "val")
    (base / "sav_val.txt").write_text("../sav_000002\n")
    with pytest.raises(ValueError, match="not the plain name of a video"):
        list_annotated_videos(tmp_path, "val")
    (base / "sav_val.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no videos"):
        list_annotated_videos(tmp_path, "val")
    (base / "sav_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no list of videos"):
        list_annotated_videos(tmp_path, "val")


def test_a_video_without_objects(tmp_path):
    base = write_sav(tmp_path)
    (base / "JPEGImages_24fps/empty").mkdir()
    (base / "Annotations_6fps/empty").mkdir()
    (base / "sav_val.txt").write_text("empty\n")
    with pytest.raises(FileNotFoundError, match="no folders of objects"):
        _ = list_annotated_videos(tmp_path, "val")[0].objects
