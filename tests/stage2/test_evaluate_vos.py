"""The evaluation of checkpoints on videos: numbers, files, going on, processes, bad input."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import make_sample_sav
from sam3.engine.files import sha256
from sam3.engine.vos_folders import list_annotated_videos
from sam3.engine.weights import load_weights, save_weights
from stage2.evaluate_vos import main, parse_args
from tests.engine.processes import fork, join
from tests.parity.fill import image
from tests.stage2.vos import (
    LOWER,
    NOTHING,
    UPPER,
    Answer,
    nothing,
    rectangle,
    run,
    save,
    tell,
    write_davis,
    write_light,
    write_sav,
)

NUMBERS = range(0, 17, 4)  # of annotated frames; 4, 8 and 12 are scored
STAYS = dict.fromkeys(NUMBERS, UPPER)
LEAVES = {0: LOWER, 4: LOWER, 8: NOTHING, 12: NOTHING, 16: LOWER}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    return partial(tell, monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Video a with an object that stays, b with one that leaves and comes back beside one that stays."""
    return write_sav(tmp_path / "data", {"a": [STAYS], "b": [STAYS, LEAVES]})


def truth_of(root: Path, layout: str = "sav") -> Answer:
    """The true masks, and between annotated frames none."""
    videos = {video.name: video for video in list_annotated_videos(root, "val", layout)}

    def answer(name: str, number: int, row: int) -> np.ndarray:
        mask = videos[name].mask(number, row)
        return NOTHING if mask is None else mask

    return answer


# Numbers ------------------------------------------------------------------------------------------------------------


def test_truth_and_nothing(teacher_file: Path, data: Path, tmp_path: Path, told, capsys: pytest.CaptureFixture[str]):
    told(truth=truth_of(data), nothing=nothing)
    flags = ("--names", "truth", "nothing", "--save-masks")
    code, results = run([teacher_file, teacher_file], data, tmp_path / "out", *flags)
    assert code == 0 and results["failures"] == []
    best, worst = results["models"]
    assert (best["jf"], best["j"], best["f"]) == (1, 1, 1)
    assert (best["num_videos"], best["num_objects"], best["num_unscored"]) == (2, 3, 0)
    # Of `leaves`, two of three scored frames are rightly empty; a: 0, b: (0 + 2/3) / 2.
    assert worst["j"] == worst["f"] == worst["jf"] == pytest.approx(1 / 6)
    objects = worst["videos"]["b"]["objects"]
    assert objects["000"] == {"j": 0, "f": 0, "num_frames": 3, "first_seen": 0}
    assert objects["001"]["j"] == pytest.approx(2 / 3)
    assert best["sha256"] == sha256(teacher_file)
    assert best["videos"]["a"]["num_timed"] == 15 and best["videos"]["a"]["seconds"] > 0
    assert set(best["fps_by_num_objects"]) == {"1", "2"} and best["fps"] > 0
    assert (results["device"], results["precision"], results["prompt"]) == ("cpu", "fp32", "mask")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (line for line in lines if line[:1] == ["nothing"])
    assert row[4:8] == ["16.7", "16.7", "16.7", "16.7"] and row[9:] == ["2", "3"]
    # The predictions lie as the truth does.
    for path in sorted((data / "Annotations_6fps").rglob("*.png")):
        own = tmp_path / "out/truth" / path.relative_to(data)
        assert (np.asarray(Image.open(own)) == np.asarray(Image.open(path))).all()
    assert len(list((tmp_path / "out/truth").rglob("*.png"))) == 15


def test_a_shifted_mask(teacher_file: Path, tmp_path: Path, told):
    data = write_sav(tmp_path / "data", {"a": [STAYS]})
    told(m=lambda *_: rectangle(5, 15))  # half of the 20 columns overlap: 100 / 300 pixels
    _, results = run(teacher_file, data, tmp_path / "out", "--names", "m")
    (model,) = results["models"]
    assert model["j"] == pytest.approx(1 / 3)
    assert 0 < model["f"] < 1 and model["jf"] == pytest.approx((model["j"] + model["f"]) / 2)


def test_rules_differ_in_how_they_average(teacher_file: Path, tmp_path: Path, told):
    """Video a is right, b with three objects all wrong: SA-V averages videos, DAVIS objects."""

    def answer(name: str, number: int, row: int) -> np.ndarray:
        return UPPER if name == "a" else NOTHING

    told(m=answer)
    three = [rectangle(0, 0, 5, 5), rectangle(10, 0, 5, 5), rectangle(20, 0, 5, 5)]
    sav = write_sav(tmp_path / "sav", {"a": [STAYS], "b": [dict.fromkeys(NUMBERS, mask) for mask in three]})
    davis = write_davis(tmp_path / "davis", {"a": [UPPER], "b": three})
    _, by_video = run(teacher_file, sav, tmp_path / "out1", "--names", "m")
    _, by_object = run(teacher_file, davis, tmp_path / "out2", "--names", "m", "--layout", "davis")
    assert by_video["models"][0]["jf"] == 0.5
    assert by_object["models"][0]["jf"] == 0.25


def test_davis_gives_a_pixel_to_one_object(teacher_file: Path, tmp_path: Path, told):
    data = write_davis(tmp_path / "data", {"a": [UPPER, LOWER]})
    told(m=lambda name, number, row: UPPER | LOWER if row else UPPER)  # on UPPER the first of two alike wins
    flags = ("--names", "m", "--layout", "davis", "--save-masks")
    code, results = run(teacher_file, data, tmp_path / "out", *flags)
    assert code == 0 and results["models"][0]["jf"] == 1
    for number in range(5):
        name = f"Annotations/480p/a/{number:05d}.png"
        found, true = Image.open(tmp_path / "out/m" / name), Image.open(data / name)
        assert found.mode == "P" and (np.asarray(found) == np.asarray(true)).all()


def test_before_its_prompt_an_object_is_not_scored(teacher_file: Path, tmp_path: Path, told):
    """Its first masks are empty; an empty prediction there must not count as right."""
    late = {0: NOTHING, 4: NOTHING, 8: LOWER, 12: LOWER, 16: LOWER}
    data = write_sav(tmp_path / "data", {"a": [late, dict.fromkeys(NUMBERS, NOTHING)]})
    told(m=nothing)
    code, results = run(teacher_file, data, tmp_path / "out", "--names", "m")
    (model,) = results["models"]
    assert code == 0 and model["jf"] == 0
    assert (model["num_objects"], model["num_unscored"]) == (1, 1), "one of the two never appears"
    objects = model["videos"]["a"]["objects"]
    assert objects["000"] == {"j": 0, "f": 0, "num_frames": 1, "first_seen": 8}
    assert objects["001"] == {"j": None, "f": None, "num_frames": 0, "first_seen": None}


# Going on -----------------------------------------------------------------------------------------------------------


def test_finished_videos_are_passed_over(teacher_file: Path, data: Path, tmp_path: Path, told):
    output, names = tmp_path / "out", ("--names", "m")
    told(m=truth_of(data))
    first = run(teacher_file, data, output, *names)

    made = told(m=nothing)
    assert run(teacher_file, data, output, *names) == first and made == []

    (output / "m/results/b.json").unlink()
    _, results = run(teacher_file, data, output, *names)
    assert [session.name for session in made[0].sessions] == ["b"]
    assert results["models"][0]["videos"]["a"]["objects"]["000"]["j"] == 1
    assert results["models"][0]["videos"]["b"]["objects"]["000"]["j"] == 0

    (output / "m/results/a.json").write_text('{"options": ')
    made = told(m=nothing)
    run(teacher_file, data, output, *names)
    assert [session.name for session in made[0].sessions] == ["a"]


def test_results_of_other_options_or_weights_are_made_anew(teacher_file: Path, data: Path, tmp_path: Path, told):
    output, names = tmp_path / "out", ("--names", "m")
    checkpoint = tmp_path / "own.pt"
    shutil.copyfile(teacher_file, checkpoint)
    told(m=nothing)
    run(checkpoint, data, output, *names)

    made = told(m=nothing)
    run(checkpoint, data, output, *names, "--prompt", "box")
    run(checkpoint, data, output, *names, "--prompt", "box", "--save-masks")
    assert [[session.name for session in predictor.sessions] for predictor in made] == [["a", "b"]] * 2
    run(checkpoint, data, output, *names, "--prompt", "box")
    assert len(made) == 2, "masks that are there already do no harm"

    file = load_weights(checkpoint)
    changed = {key: tensor + 1 if key == "tracker.no_obj_ptr" else tensor for key, tensor in file.tensors.items()}
    save_weights(checkpoint, {key: tensor.clone() for key, tensor in changed.items()}, file.meta)
    run(checkpoint, data, output, *names, "--prompt", "box")
    assert len(made) == 3


def test_max_videos_and_overlays(teacher_file: Path, data: Path, tmp_path: Path, told):
    output = tmp_path / "out"
    told(m=truth_of(data))
    flags = ("--names", "m", "--max-videos", 1, "--overlays", 5, "--overlay-format", "gif")
    _, results = run(teacher_file, data, output, *flags)
    assert list(results["models"][0]["videos"]) == ["a"]
    assert [path.name for path in (output / "overlays").iterdir()] == ["a.gif"]
    with Image.open(output / "overlays/a.gif") as overlay:
        assert overlay.n_frames == len(NUMBERS) and overlay.width == 2 * 400
        assert overlay.info["duration"] == 170, "6 frames a second"
        overlay.seek(2)
        panels = np.asarray(overlay.convert("RGB"))[30:].astype(int)
    left, right = panels[:, :390], panels[:, 400:790]
    assert np.abs(left - right).mean() < 1 < left.std(), "the same masks on both"


# Processes ----------------------------------------------------------------------------------------------------------


def test_two_processes_give_what_one_does(teacher_file: Path, data: Path, tmp_path: Path, told):
    told(m=lambda name, number, row: UPPER)
    shutil.rmtree(data / "JPEGImages_24fps/b")
    (data / "JPEGImages_24fps/b").mkdir()
    (data / "sav_val.txt").write_text("a\nb\n")
    code, alone = run(teacher_file, data, tmp_path / "one", "--names", "m")
    own = ["--checkpoints", teacher_file, "--names", "m", "--data", data, "--overlays", 1, "--dtype", "fp32"]
    own += ["--output", tmp_path / "two", "--device", "cpu"]
    assert join(fork(main, list(map(str, own)), 2)) == [1, 1] and code == 1, "b fails, in whichever process"
    both = json.loads((tmp_path / "two/results.json").read_text())
    assert both["num_processes"] == 2 and both["failures"] == alone["failures"] != []
    for key in ("jf", "num_videos", "num_objects", "sha256", "parameters"):
        assert both["models"][0][key] == alone["models"][0][key]


# Bad input ----------------------------------------------------------------------------------------------------------


def spoil(data: Path, how: str) -> str:
    """Damages video a; returns what is said of it."""
    frames, masks = data / "JPEGImages_24fps/a", data / "Annotations_6fps/a/000"
    if how == "a frame is missing":
        (frames / "00005.jpg").unlink()
        return "lacks 1 frames between 0 and 16, such as 5"
    if how == "an annotated frame is missing":
        (frames / "00016.jpg").unlink()
        return "16"
    if how == "no annotations":
        shutil.rmtree(masks)
        return "no folders of objects"
    if how == "an object without masks":
        for path in masks.iterdir():
            path.unlink()
        return "no frames"
    if how == "a frame of another size":
        save(frames / "00009.jpg", np.zeros((20, 30, 3), dtype=np.uint8))
        return "frame 00009 .* is 30 x 20 pixels, the first frame is 60 x 40"
    if how == "masks of another size":
        for number in NUMBERS:
            save(masks / f"{number:05d}.png", np.ones((20, 30), dtype=bool))
        return r"the frames of a have \(40, 60\) rows and columns, its masks \(20, 30\)"
    (masks / "00008.png").write_bytes(b"no picture")
    return "mask .*00008.png is damaged"


@pytest.mark.parametrize(
    "how",
    [
        "a frame is missing",
        "an annotated frame is missing",
        "no annotations",
        "an object without masks",
        "a frame of another size",
        "masks of another size",
        "a damaged mask",
    ],
)
def test_a_bad_video_is_listed_and_the_others_are_done(teacher_file: Path, data: Path, tmp_path: Path, told, how: str):
    made = told(m=lambda name, number, row: UPPER)
    reason = spoil(data, how)
    code, results = run(teacher_file, data, tmp_path / "out", "--names", "m")
    assert code == 1
    (failure,) = results["failures"]
    assert failure["what"] in ("a", "a with m")
    assert re.search(reason, failure["reason"]), failure
    assert list(results["models"][0]["videos"]) == ["b"] and results["models"][0]["num_objects"] == 2
    assert not (tmp_path / "out/m/results/a.json").exists()
    assert made[0].sessions[-1].name == "b"


def test_one_frame(teacher_file: Path, tmp_path: Path, told, capsys: pytest.CaptureFixture[str]):
    data = write_sav(tmp_path / "data", {"a": [{0: UPPER}]}, num_frames=1)
    told(m=truth_of(data))
    code, results = run(teacher_file, data, tmp_path / "out", "--names", "m", "--save-masks", "--overlays", 1)
    (model,) = results["models"]
    assert code == 1 and (model["jf"], model["fps"], model["num_unscored"]) == (None, None, 1)
    assert results["failures"] == [{"what": "m", "reason": "no object in 1 videos has a frame to score"}]
    assert (np.asarray(Image.open(tmp_path / "out/m/Annotations_6fps/a/000/00000.png")) == UPPER).all()
    assert (tmp_path / "out/overlays/a.mp4").is_file()
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("m "))
    assert row[4:] == ["-", "-", "-", "-", "0", "0"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layout", "youtube"], "invalid choice: 'youtube'"),
        (["--prompt", "text"], "invalid choice: 'text'"),
        (["--max-videos", "0"], "--max-videos must be at least 1"),
        (["--overlays", "-1"], "--overlays at least 0"),
        (["--names", "a"], "1 --names for 2 --checkpoints"),
        (["--names", "a", "a"], "two checkpoints of one name (a, a)"),
        (["--names", "a", "a, untrained", "--untrained"], "'a, untrained' is what --untrained calls a row"),
        (["--names", "a", "x/y"], "'x/y' cannot name a folder"),
        (["--names", "a", "overlays"], "'overlays' cannot name a folder"),
    ],
)
def test_wrong_arguments(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--checkpoints", "one.pt", "two.pt", "--data", "somewhere", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_wrong_folders_and_files(teacher_file: Path, data: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no list of videos .*sav_test\.txt"):
        run(teacher_file, data, tmp_path / "out", "--split", "test")
    with pytest.raises(FileNotFoundError, match="wanted the davis layout"):
        run(teacher_file, data, tmp_path / "out", "--layout", "davis")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        run([teacher_file, tmp_path / "none.pt"], data, tmp_path / "out")
    file = load_weights(teacher_file)
    save_weights(tmp_path / "image.pt", {k: v for k, v in file.tensors.items() if not k.startswith("tracker.")})
    with pytest.raises(ValueError, match="has no tracker"):
        run(tmp_path / "image.pt", data, tmp_path / "out")


# The whole way, with real models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The val part of a small sample set; to be left as it is."""
    photos, root = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("sample") / "set"
    for i in range(6):
        Image.fromarray(image(120, 150, seed=i)).save(photos / f"photo{i}.png")
    counts = ["--num-train", 1, "--num-val", 1, "--num-frames", 9, "--objects", 2, "--width", 96, "--height", 64]
    assert make_sample_sav.main(list(map(str, ["--images", photos, "--output", root, "--workers", 1, *counts]))) == 0
    return root / "sav_val"


@pytest.fixture(scope="module")
def light_file(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_light(tmp_path_factory.mktemp("light"), teacher_file)


def test_teacher_and_light_model(teacher_file: Path, light_file: Path, sample: Path, tmp_path: Path):
    code, results = run([teacher_file, light_file], sample, tmp_path / "out", "--overlays", 1)
    assert code == 0
    teacher, light = results["models"]
    assert (teacher["name"], light["name"]) == ("sam3_tiny", "light")
    assert teacher["parameters"]["trunk"] == light["parameters"]["trunk"] > 0
    assert teacher["parameters"]["perceiver"] == 0 < light["parameters"]["perceiver"]
    assert teacher["parameters"]["memory_attention"] != light["parameters"]["memory_attention"]
    for model in (teacher, light):
        assert 0 <= model["jf"] <= 1 and model["fps"] > 0 and model["num_objects"] == 2
        (video,) = model["videos"].values()
        assert (video["num_frames"], video["num_timed"], video["num_tracked"]) == (9, 7, 2)
        # What is stored for the prompted frame is the prompt.
        for path in sorted((sample / "Annotations_6fps").rglob("00000.png")):
            own = tmp_path / "out" / model["name"] / path.relative_to(sample)
            assert (np.asarray(Image.open(own)) == np.asarray(Image.open(path))).all()
    assert len(list((tmp_path / "out/overlays").glob("*.mp4"))) == 1


@pytest.mark.parametrize("prompt", ["box", "click"])
def test_boxes_and_clicks_with_a_real_model(teacher_file: Path, sample: Path, tmp_path: Path, prompt: str):
    code, results = run(teacher_file, sample, tmp_path / "out", "--prompt", prompt)
    assert code == 0 and results["prompt"] == prompt and results["models"][0]["num_objects"] == 2
