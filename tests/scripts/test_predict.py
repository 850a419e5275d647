"""scripts/predict.py in process, on tiny checkpoints: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from sam3.backbones.student import StudentTrunk, build_student
from sam3.engine.weights import save_weights
from sam3.model.config import Sam3Config
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import assemble_image_model, build_sam3_image_model
from sam3.transforms import Preprocess
from scripts.predict import main, surrounding_box
from tests.parity.fill import fill_, image
from tests.samples import TINY_MAP

HEIGHT, WIDTH = 60, 100


def save_model(path: Path, trunk=None, meta: dict | None = None) -> Path:
    model = assemble_image_model(Sam3Config.preset("tiny"), trunk)
    fill_(model.state_dict(), "detector.")
    save_weights(path, {f"detector.{key}": tensor for key, tensor in model.state_dict().items()}, meta)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("predict") / "tiny.pt")


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(image(HEIGHT, WIDTH)).save(path)
    return path


def run(checkpoint: Path, photo: Path, *options: object) -> int:
    return main(["--checkpoint", str(checkpoint), "--image", str(photo), "--device", "cpu", *map(str, options)])


def test_picture_and_json_hold_what_the_processor_finds(checkpoint, photo, tmp_path, capsys):
    picture, report = tmp_path / "out.png", tmp_path / "out.json"
    options = ("--text", "a red car", "--box", 10, 20, 60, 50, "--negative-box", 0, 0, 20, 15, "--point", 30, 30, 1)
    assert run(checkpoint, photo, *options, "--threshold", 0, "--output", picture, "--json", report) == 0
    processor = Sam3Processor(build_sam3_image_model(checkpoint, device="cpu"), confidence_threshold=0)
    state = processor.set_image(Image.open(photo))
    processor.set_text_prompt("a red car", state)
    processor.add_geometric_prompt([0.35, 35 / 60, 0.5, 0.5], True, state)
    processor.add_geometric_prompt([0.1, 0.125, 0.2, 0.25], False, state)
    processor.add_point_prompt([30, 30], True, state)

    document = json.loads(report.read_text())
    assert document["image"] == {"file_name": "photo.png", "height": HEIGHT, "width": WIDTH}
    assert document["prompt"]["text"] == "a red car"
    assert len(document["annotations"]) == len(state["scores"]) == 20
    for annotation, score, box, mask in zip(
        document["annotations"], state["scores"], state["boxes"], state["masks"], strict=True
    ):
        assert annotation["score"] == pytest.approx(score.item(), abs=1e-5)
        left, top, right, bottom = box.tolist()
        assert annotation["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
        decoded = coco_mask.decode(annotation["segmentation"])
        assert decoded.shape == (HEIGHT, WIDTH)
        assert (decoded != mask[0].numpy()).mean() < 1e-3
        assert annotation["area"] == decoded.sum()
    drawn = np.asarray(Image.open(picture))
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    assert (drawn != np.asarray(Image.open(photo))).any()
    assert "20 objects above 0" in capsys.readouterr().out


def test_nothing_above_the_threshold_says_the_best_score(checkpoint, photo, tmp_path, capsys):
    picture, report = tmp_path / "out.jpg", tmp_path / "out.json"
    assert run(checkpoint, photo, "--text", "car", "--threshold", 1, "--output", picture, "--json", report) == 0
    assert "no object above 1; the best score is 0." in capsys.readouterr().out
    assert json.loads(report.read_text())["annotations"] == []
    assert Image.open(picture).size == (WIDTH, HEIGHT)


def test_top_k_and_bfloat16(checkpoint, photo, capsys):
    assert run(checkpoint, photo, "--text", "car", "--threshold", 0, "--top-k", 2, "--dtype", "bf16") == 0
    out = capsys.readouterr().out
    assert "2 objects" in out
    assert out.count("score") == 2


def test_merged_student_checkpoints_work(photo, tmp_path, capsys):
    torch.manual_seed(0)
    trunk = StudentTrunk(build_student("repvit_m0_9", *TINY_MAP[:2]))
    meta = {"embed_size": 16, "preprocess": Preprocess(img_size=224, resize="pad").to_meta()}
    merged = save_model(tmp_path / "merged.pt", trunk, meta)
    assert run(merged, photo, "--box", 10, 20, 60, 50, "--threshold", 0, "--json", tmp_path / "out.json") == 0
    assert "20 objects" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "prompt", "choice"),
    [
        (["--point", 30, 30, 1], {"point_coords": [[30, 30]], "point_labels": [1]}, True),
        (
            ["--point", 30, 30, 1, "--point", 80, 50, 0, "--box", 10, 20, 60, 50],
            {"point_coords": [[30, 30], [80, 50]], "point_labels": [1, 0], "box": [10, 20, 60, 50]},
            False,
        ),
        (["--box", 10, 20, 60, 50, 0, 0, 99, 59], {"box": [[10, 20, 60, 50], [0, 0, 99, 59]]}, False),
    ],
)
def test_clicks_cut_out_the_very_thing(teacher_file, photo, tmp_path, capsys, options, prompt, choice):
    picture, report = tmp_path / "out.png", tmp_path / "out.json"
    assert run(teacher_file, photo, "--clicks", *options, "--output", picture, "--json", report) == 0
    model = build_sam3_image_model(teacher_file, device="cpu", enable_inst_interactivity=True)
    state = Sam3Processor(model).set_image(Image.open(photo))
    masks, ious, _ = model.predict_inst(state, **prompt, multimask_output=choice)
    if choice:
        masks, ious = masks[ious.argmax()], ious.max()
    masks, ious = masks.reshape(-1, HEIGHT, WIDTH), ious.reshape(-1)

    document = json.loads(report.read_text())
    assert (document["prompt"]["clicks"], document["threshold"]) == (True, None)
    for annotation, mask, iou in zip(document["annotations"], masks, ious, strict=True):
        assert annotation["score"] == pytest.approx(float(iou), abs=1e-5)
        assert np.array_equal(coco_mask.decode(annotation["segmentation"]), mask)
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
    assert (np.asarray(Image.open(picture)) != np.asarray(Image.open(photo))).any()
    assert f"{len(masks)} objects marked" in capsys.readouterr().out


def test_an_empty_mask_has_an_empty_box():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    assert surrounding_box(mask).tolist() == [0, 0, 0, 0]
    mask[1:3, 2:5] = True
    assert surrounding_box(mask).tolist() == [2, 1, 5, 3]


def test_clicks_need_the_tracker(checkpoint, photo):
    with pytest.raises(ValueError, match="lacks the second neck"):
        run(checkpoint, photo, "--clicks", "--point", 3, 4, 1)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--clicks"],
        ["--clicks", "--text", "car"],
        ["--clicks", "--point", "3", "4", "1", "--threshold", "0.2"],
        ["--clicks", "--point", "3", "4", "1", "--top-k", "1"],
        ["--clicks", "--point", "3", "4", "1", "--negative-box", "1", "1", "9", "9"],
        ["--clicks", "--point", "3", "4", "1", "--box", "1", "1", "9", "9", "--box", "2", "2", "8", "8"],
        ["--text", "car", "--threshold", "2"],
        ["--text", "car", "--top-k", "0"],
        ["--text", "  "],
        ["--point", "3", "4", "2"],
        ["--box", "1", "2", "3"],
        ["--text", "car", "--output", "out.xyz"],
        ["--text", "car", "--output", "out.psd"],  # which Pillow reads, but does not write
        ["--text", "car", "--dtype", "fp8"],
        ["--text", "car", "--thresh", "0.3"],
    ],
)
def test_wrong_arguments_end_with_2(checkpoint, photo, options):
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, photo, *options)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--box", 10, 20, 10, 50], r"box \(10, 20, 10, 50\) has no area"),
        (["--box", 50, 20, 10, 50], "no area"),
        (["--box", 10, 20, 101, 50], "leaves the picture, which is 100 x 60 pixels"),
        (["--negative-box", -1, 20, 10, 50], "leaves the picture"),
        (["--box", "nan", 20, 10, 50], "no area"),
        (["--point", 200, 5, 1], "outside the picture of 100 x 60"),
        (["--text", "car", "--device", "gpu7"], "device 'gpu7' is unknown"),
    ],
)
def test_wrong_prompts_are_refused(checkpoint, photo, options, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, photo, *options)


def test_wrong_pictures_are_refused(checkpoint, photo, tmp_path):
    with pytest.raises(FileNotFoundError):
        run(checkpoint, tmp_path / "absent.jpg", "--text", "car")
    cut = tmp_path / "cut.jpg"
    Image.fromarray(image(HEIGHT, WIDTH)).save(cut)
    cut.write_bytes(cut.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        run(checkpoint, cut, "--text", "car")


def test_wrong_checkpoints_are_refused(checkpoint, photo, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        run(tmp_path / "absent.pt", photo, "--text", "car")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoint.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        run(cut, photo, "--text", "car")
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match=r"foreign\.pt"):
        run(foreign, photo, "--text", "car")


def test_nothing_is_written_where_the_run_fails(checkpoint, photo, tmp_path):
    picture = tmp_path / "out.png"
    with pytest.raises(ValueError, match="no area"):
        run(checkpoint, photo, "--box", 5, 5, 5, 5, "--output", picture)
    assert not picture.exists()
