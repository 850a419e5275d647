"""scripts/predict.py on the exported file of a distilled student: what it finds, what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from distillation.export import export_student, load_student
from distillation.processor import StudentProcessor
from scripts.predict import main
from tests.distillation.slim import PROMPTS, tiny_student
from tests.parity.fill import image

HEIGHT, WIDTH = 60, 100


@pytest.fixture(scope="module", params=[".pt", ".safetensors"])
def checkpoint(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("predict") / f"student{request.param}"
    export_student(tiny_student(), path, {"prompts": list(PROMPTS)})
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(image(HEIGHT, WIDTH)).save(path)
    return path


def run(checkpoint: Path, photo: Path, *options: object) -> int:
    return main(["--checkpoint", str(checkpoint), "--image", str(photo), "--device", "cpu", *map(str, options)])


def test_picture_and_json_hold_what_the_processor_finds(checkpoint, photo, tmp_path, capsys):
    picture, report = tmp_path / "out.png", tmp_path / "out.json"
    options = ("--text", PROMPTS[0], "--threshold", 0, "--output", picture, "--json", report)
    assert run(checkpoint, photo, *options) == 0
    processor = StudentProcessor(load_student(checkpoint, "cpu"), confidence_threshold=0)
    state = processor.set_text_prompt(PROMPTS[0], processor.set_image(Image.open(photo)))

    document = json.loads(report.read_text())
    assert document["prompt"]["text"] == PROMPTS[0]
    assert len(document["annotations"]) == len(state["scores"]) == 10
    for annotation, score, box, mask in zip(
        document["annotations"], state["scores"], state["boxes"], state["masks"], strict=True
    ):
        assert annotation["score"] == pytest.approx(score.item(), abs=1e-5)
        left, top, right, bottom = box.tolist()
        assert annotation["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
        assert (coco_mask.decode(annotation["segmentation"]) != mask[0].numpy()).mean() < 1e-3
    drawn = np.asarray(Image.open(picture))
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    assert (drawn != np.asarray(Image.open(photo))).any()
    assert "10 objects above 0" in capsys.readouterr().out


def test_top_k_and_bfloat16(checkpoint, photo, capsys):
    options = ("--text", PROMPTS[0], "--threshold", 0, "--top-k", 2, "--dtype", "bf16")
    assert run(checkpoint, photo, *options) == 0
    assert "2 objects above 0" in capsys.readouterr().out


def test_nothing_above_the_threshold_says_the_best_score(checkpoint, photo, capsys):
    assert run(checkpoint, photo, "--text", PROMPTS[0], "--threshold", 1) == 0
    assert "no object above 1; the best score is 0." in capsys.readouterr().out


def test_phrases_it_was_not_taught_are_remarked_on(checkpoint, photo, caplog):
    with caplog.at_level(logging.WARNING, "scripts.predict"):
        run(checkpoint, photo, "--text", PROMPTS[0])
        assert not caplog.messages
        run(checkpoint, photo, "--text", "a zebra")
    assert caplog.messages == [f"'a zebra' is none of the phrases this student was taught: {str(PROMPTS)[1:-1]}"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--box", 10, 20, 60, 50], "--box"),
        (["--text", "car", "--negative-box", 0, 0, 20, 15, "--point", 30, 30, 1], "--negative-box, --point"),
        (["--clicks", "--point", 30, 30, 1], "--point, --clicks"),
    ],
)
def test_all_but_phrases_is_refused_and_nothing_written(checkpoint, photo, tmp_path, options, named):
    message = rf"{checkpoint.name} is a distilled student, which reads phrases only: .* leave out {named}, or take"
    with pytest.raises(ValueError, match=message):
        run(checkpoint, photo, *options, "--output", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_damaged_files_are_refused(checkpoint, photo, tmp_path):
    cut = tmp_path / f"cut{checkpoint.suffix}"
    cut.write_bytes(checkpoint.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"cut\."):
        run(cut, photo, "--text", "car")


def test_a_training_checkpoint_is_to_be_exported_first(photo, tmp_path):
    student = tiny_student()
    payload = {"model": student.state_dict(), "meta": {"phase": 1, "student": student.config.to_meta()}}
    torch.save(payload, tmp_path / "ckpt_best.pth")
    with pytest.raises(ValueError, match=r"a training checkpoint .* train_distill\.py --export .* --init .*best\.pth"):
        run(tmp_path / "ckpt_best.pth", photo, "--text", "car")


@pytest.mark.slow
def test_compiled_finds_the_same(photo, tmp_path):
    checkpoint, scores = tmp_path / "student.pt", []
    export_student(tiny_student(), checkpoint, {}, fuse=True)
    for number, options in enumerate(([], ["--compile"])):
        report = tmp_path / f"{number}.json"
        assert run(checkpoint, photo, "--text", "car", "--threshold", 0, "--json", report, *options) == 0
        scores.append([annotation["score"] for annotation in json.loads(report.read_text())["annotations"]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
