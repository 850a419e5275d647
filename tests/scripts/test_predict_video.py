"""scripts/predict_video.py in process, on the tiny model: what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3.tracker_builder import build_sam3_video_predictor
from sam3.video_frames import open_video
from sam3.visualize import object_color
from scripts.predict_video import label_map, main, parse_args
from tests.model.videos import BOX, HEIGHT, WIDTH, pictures, rectangle

FRAMES = 4


@pytest.fixture(scope="module")
def frames_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for i, picture in enumerate(pictures(FRAMES)):
        picture.save(folder / f"{4 * i:05d}.jpg", quality=95)
    return folder


@pytest.fixture
def mask_file(tmp_path) -> Path:
    Image.fromarray(rectangle().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def run(checkpoint: Path, video: Path, *options: object) -> int:
    return main(["--checkpoint", str(checkpoint), "--video", str(video), "--device", "cpu", *map(str, options)])


def test_pngs_and_video_show_what_the_predictor_finds(teacher_file, frames_folder, mask_file, tmp_path, capsys):
    masks_dir, output = tmp_path / "masks", tmp_path / "out.mp4"
    prompts = ("--box", *BOX, "--object", 7, "--frame", 1, "--mask", mask_file)
    assert run(teacher_file, frames_folder, *prompts, "--masks-dir", masks_dir, "--output", output) == 0
    assert capsys.readouterr().out == f"wrote {output}\nwrote {masks_dir}\n"

    predictor = build_sam3_video_predictor(teacher_file, device="cpu")
    with predictor.start_session(frames_folder) as session:
        predictor.add_new_points_or_box(session, 0, 1, box=BOX, rel_coordinates=False)
        predictor.add_new_mask(session, 1, 7, rectangle())
        wanted = {m.frame_idx: label_map(m) for m in predictor.propagate_in_video(session, direction="both")}
    names = [f"{4 * i:05d}.png" for i in range(FRAMES)]
    assert sorted(path.name for path in masks_dir.iterdir()) == names
    for i, name in enumerate(names):
        picture = Image.open(masks_dir / name)
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), wanted[i])
    assert picture.getpalette()[21:24] == object_color(7).tolist()
    assert set(np.unique(wanted[1])) == {0, 1, 7}
    with open_video(output) as video:
        assert len(video) == FRAMES and (video.height, video.width) == (HEIGHT, WIDTH)
        shown = video[1].permute(1, 2, 0).numpy().astype(int)
    plain = np.asarray(pictures(2)[1]).astype(int)
    distance = np.abs(shown - plain).mean(axis=2)
    assert distance[wanted[1] > 0].mean() > 3 * distance[wanted[1] == 0].mean()


def test_frames_that_were_not_tracked_are_drawn_as_they_are(teacher_file, frames_folder, tmp_path):
    masks_dir, output = tmp_path / "masks", tmp_path / "out.gif"
    options = ("--frame", 2, "--point", 50, 40, 1, "--point", 150, 80, 0, "--direction", "forward", "--dtype", "bf16")
    assert run(teacher_file, frames_folder, *options, "--masks-dir", masks_dir, "--output", output) == 0
    assert sorted(path.stem for path in masks_dir.iterdir()) == ["00008", "00012"]
    assert Image.open(output).n_frames == FRAMES


def test_prompts_belong_to_the_object_and_frame_before_them():
    options = "--point 1 2 1 --object 2 --point 3 4 0 --point 5 6 1 --frame 9 --box 1 2 3 4 --object 1 --point 7 8 1"
    args = parse_args(["--checkpoint", "a", "--video", "b", "--output", "c.mp4", *options.split()])
    assert list(args.prompts) == [(0, 1), (0, 2), (9, 2), (9, 1)]
    assert args.prompts[0, 2].points == [[3, 4], [5, 6]] and args.prompts[0, 2].labels == [0, 1]
    assert args.prompts[9, 2].box == [1, 2, 3, 4] and not args.prompts[9, 2].points
    assert args.prompts[9, 1].points == [[7, 8]]


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "out.mp4"],
        ["--box", "1", "2", "30", "40"],
        ["--box", "1", "2", "30", "40", "--output", "out.avi"],
        ["--box", "1", "2", "30", "40", "--box", "1", "2", "30", "40", "--output", "out.mp4"],
        ["--box", "1", "2", "30", "40", "--mask", "m.png", "--output", "out.mp4"],
        ["--mask", "m.png", "--point", "1", "2", "1", "--output", "out.mp4"],
        ["--point", "1", "2", "3", "--output", "out.mp4"],
        ["--object", "256", "--point", "1", "2", "1", "--output", "out.mp4"],
        ["--object", "0", "--point", "1", "2", "1", "--output", "out.mp4"],
        ["--point", "1", "2", "1", "--output", "out.mp4", "--fps", "0"],
        ["--point", "1", "2", "1", "--output", "out.mp4", "--fill-hole-area", "-1"],
        ["--point", "1", "2", "1", "--output", "out.mp4", "--direction", "up"],
    ],
)
def test_wrong_arguments_end_with_2(options):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--checkpoint", "a", "--video", "b", *options])
    assert stop.value.code == 2


def test_what_does_not_fit_the_video_is_refused_before_the_model_is_loaded(frames_folder, mask_file, tmp_path):
    Image.new("L", (WIDTH, HEIGHT + 1)).save(tmp_path / "high.png")
    for options, message in (
        (["--point", 170, 2, 1], "outside the picture of 160 x 90"),
        (["--box", 5, 5, 5, 9], "has no area"),
        (["--frame", 4, "--point", 1, 2, 1], "frame 4 does not exist"),
        (["--point", 1, 2, 1, "--start-frame", 9], "frame 9 does not exist"),
        (["--mask", tmp_path / "high.png"], "160 x 91 pixels, the video 160 x 90"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "no.pt", frames_folder, *options, "--output", tmp_path / "out.mp4")
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "no.pt", frames_folder, "--mask", tmp_path / "no.png", "--output", tmp_path / "out.mp4")
    with pytest.raises(FileNotFoundError, match=r"no\.pt"):
        run(tmp_path / "no.pt", frames_folder, "--mask", mask_file, "--output", tmp_path / "out.mp4")
    with pytest.raises(FileNotFoundError, match="no video"):
        run(tmp_path / "no.pt", tmp_path / "none.mp4", "--mask", mask_file, "--output", tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
