"""What scripts/evaluate_prompts.py asks, how it scores answers, and a whole run over models of all kinds."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import make_sample_sa1b
from distillation.export import export_student
from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from distillation.questions import Question, Task, make_task
from sam3.backbones.student import build_student
from sam3.engine.sa1b import annotation_path
from sam3.engine.weights import load_weights, save_weights
from sam3.model.config import TRUNK
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import STUDENT
from sam3.transforms import Preprocess
from scripts import evaluate_prompts
from scripts.evaluate_prompts import assign, best_masks, exemplar_mask, main, object_ious, score_phrase, table
from tests.samples import TINY_MAP, write_record

FILES = ["--models", "none.pt", "--data-path", "nowhere", "--output", "out"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    flags = ["--scenes", "--output", str(root), "--num-train", "1", "--num-val", "3", "--workers", "1"]
    assert make_sample_sa1b.main(flags) == 0
    return root


@pytest.fixture(scope="module")
def students(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student with random weights in the teacher's place, and one of the distillation that was taught "circle"."""
    folder = tmp_path_factory.mktemp("students")
    torch.manual_seed(1)
    file = load_weights(teacher_file)
    kept = {key: tensor for key, tensor in file.tensors.items() if not key.startswith(f"detector.{TRUNK}")}
    student = build_student("efficientvit_b0", *TINY_MAP[:2]).state_dict()
    meta = {"embed_size": TINY_MAP[1], "preprocess": Preprocess(img_size=224, resize="pad").to_meta()}
    save_weights(folder / "merged.pt", {**kept, **{f"detector.{STUDENT}{k}": v for k, v in student.items()}}, meta)
    distilled = EfficientSAM3(EfficientSAM3Config.preset("tiny"))
    export_student(distilled, folder / "distilled.safetensors", {"prompts": ["circle"]})
    return folder / "merged.pt", folder / "distilled.safetensors"


# Questions ------------------------------------------------------------------------------------------------------------


def test_a_task_asks_what_the_annotations_say(scenes: Path):
    path = next((scenes / "images/val").glob("*.jpg"))
    annotations = annotation_path(scenes, "val", path.stem)
    document = json.loads(annotations.read_text())
    ids = [entry["id"] for entry in document["annotations"]]
    meant = {phrase["text"]: [ids.index(i) for i in phrase["ids"]] for phrase in document["phrases"]}
    task = make_task(path, annotations, 2, 3, np.random.default_rng(7), taught={*meant})
    kinds = [question.kind for question in task.questions]
    count = min(3, len(ids))
    assert kinds == ["text"] * 4 + ["box"] * count + ["click"] * count
    for question in task.questions[:4]:
        assert question.wanted == meant[question.text] and question.taught
    assert [bool(question.wanted) for question in task.questions[:4]] == [True, True, False, False]
    for question in task.questions[4:]:
        (mask,) = task.truth(question).numpy()
        if question.kind == "box":
            x, y, width, height = document["annotations"][question.wanted[0]]["bbox"]
            assert question.box.tolist() == [x, y, x + width, y + height]
        else:
            assert mask[int(question.point[1]), int(question.point[0])]
    again = make_task(path, annotations, 2, 3, np.random.default_rng(7), taught=())
    assert [q.text for q in again.questions] == [q.text for q in task.questions]
    assert not any(question.taught for question in again.questions)


def test_pictures_without_phrases_are_asked_boxes_and_clicks(tmp_path: Path):
    write_record(tmp_path, "val", "sa_1", np.zeros((60, 80, 3), np.uint8))
    annotations = annotation_path(tmp_path, "val", "sa_1")
    task = make_task(tmp_path / "images/val/sa_1.jpg", annotations, 2, 1, np.random.default_rng(0))
    assert [question.kind for question in task.questions] == ["box", "click"]
    annotations.write_text(annotations.read_text().replace("{", '{"phrases": [{"text": "x", "ids": [99]}], ', 1))
    with pytest.raises(ValueError, match=r"sa_1\.json is damaged: it has no entry 99"):
        make_task(tmp_path / "images/val/sa_1.jpg", annotations, 2, 1, np.random.default_rng(0))


# Scores ---------------------------------------------------------------------------------------------------------------


def strips(*ends: tuple[int, int]) -> torch.Tensor:
    """bool (n, 1, 10): True from a start to an end."""
    masks = torch.zeros(len(ends), 1, 10, dtype=torch.bool)
    for row, (start, end) in enumerate(ends):
        masks[row, :, start:end] = True
    return masks


def test_masks_are_assigned_so_that_the_sum_is_largest():
    # IoUs: first mask 4/6 with the first object and 2/4 with the second; second mask 2/4 with the first, 0 else.
    # Greedily the first mask would take the first object, 4/6 + 0; the best is 2/4 + 2/4.
    truth = strips((0, 4), (4, 6))
    found = strips((2, 6), (0, 2))
    assert assign(found, truth) == [(0, 1, 0.5), (1, 0, 0.5)]
    assert assign(found[:0], truth) == []


def test_scores_of_phrases():
    assert object_ious(assign(strips((0, 4), (7, 8)), strips((5, 6), (0, 5))), 2) == pytest.approx([0, 0.8])
    values = defaultdict(list)
    score_phrase(values, strips((0, 4), (7, 8)), strips((0, 5), (5, 6)))  # the second object is missed
    assert values["text_iou"] == pytest.approx([0.8, 0])
    score_phrase(values, strips(), strips((0, 5)))
    assert values["text_iou"] == pytest.approx([0.8, 0, 0])
    score_phrase(values, strips((0, 1)), strips())
    score_phrase(values, strips(), strips())
    assert values["rejected"] == [0, 1]
    # One of two masks is right, the phrases without any do not count; then two of three, one of them just so, and none.
    assert values["text_precision"] == [0.5]
    score_phrase(values, strips((0, 4), (6, 7), (8, 9)), strips((0, 4), (6, 8)))
    score_phrase(values, strips((0, 2)), strips((0, 5)))
    assert values["text_precision"] == pytest.approx([0.5, 2 / 3, 0])


def test_a_box_gets_the_mask_of_the_query_that_fits_it(teacher_file: Path):
    """As the processor has it when it keeps everything."""
    model = evaluate_prompts.load_model("x", teacher_file, torch.device("cpu"))
    image = torch.randint(0, 256, (3, 60, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    box = np.array([10, 20, 50, 55], np.float32)
    mask, score = exemplar_mask(model.processor, model.processor.set_image(image), box)
    every = Sam3Processor(model.processor.model, confidence_threshold=0)
    state = every.set_image(image)
    every.set_prompts(state, boxes=[([30 / 90, 37.5 / 60, 40 / 90, 35 / 60], True)])
    best = evaluate_prompts.box_ious(state["boxes"], torch.from_numpy(box)).argmax()
    assert torch.equal(mask, state["masks"][best, 0])
    assert score == pytest.approx(state["scores"][best].item())


def test_the_best_masks_whatever_their_scores(teacher_file: Path):
    processor = evaluate_prompts.load_model("x", teacher_file, torch.device("cpu")).processor
    state = processor.set_image(torch.zeros(3, 40, 50, dtype=torch.uint8))
    processor.set_text_prompt("circle", state)
    scores = processor._query_scores(state["outputs"])
    assert best_masks(processor, state, 3).shape == (3, 40, 50)
    assert torch.equal(state["scores"].sort().values, scores.sort().values[-3:])
    assert (processor.confidence_threshold, processor.top_k) == (0.5, None)


def test_a_query_that_is_right_counts_only_if_it_is_among_the_best(teacher_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a model that ignores the phrase would be right by whichever of its many masks fits."""
    model = evaluate_prompts.load_model("x", teacher_file, torch.device("cpu"))
    objects = torch.zeros(3, 30, 30, dtype=torch.bool)
    for row, mask in enumerate(objects):
        mask[10 * row : 10 * row + 10] = True
    scores = torch.tensor([0.9, 0.2, 0.1] + 17 * [0.0])  # whatever is asked; the mask of query i is object i
    monkeypatch.setattr(model.processor, "_query_scores", lambda outputs: scores)
    monkeypatch.setattr(model.processor, "_mask_probabilities", lambda outputs, kept, size: 1.0 * objects[kept, None])
    phrases = [Question("text", [1], "circle", True), Question("text", [2, 0], "drop", True)]
    phrases += [Question("text", [0], "red drop", False), Question("text", [], "star", True)]
    task = Task(torch.zeros(3, 30, 30, dtype=torch.uint8), phrases, dict(enumerate(objects)))
    evaluate_prompts.evaluate([model], task)
    assert model.values["text_taught_any_iou"] == [0, 0, 1]  # of the circle, and of both drops: queries 0; 0 and 1
    assert model.values["text_iou"] == [0, 0, 1, 1] and model.values["text_precision"] == [0, 1, 1]


# The program ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        *(["--num-images", "0"], ["--num-phrases", "-1"], ["--num-objects", "-1"], ["--num-pictures", "-1"]),
        *(["--seed", "-1"], ["--names", "a", "b"], ["--models", "a.pt", "b/a.pt"]),
    ],
)
def test_wrong_flags_exit_with_2(flags: list[str]):
    with pytest.raises(SystemExit) as stop:
        main([*FILES, *flags])
    assert stop.value.code == 2


def test_missing_data_and_models_are_named(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(FILES)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        main([*FILES, "--data-path", str(scenes)])


def test_all_kinds_of_models_in_one_run(
    teacher_file: Path, students: tuple[Path, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = ["--models", str(teacher_file), str(teacher_file), *map(str, students), "--untrained"]
    flags += ["--names", "teacher", "twin", "merged", "distilled", "--data-path", str(scenes)]
    flags += ["--num-phrases", "1", "--num-objects", "1", "--output", str(tmp_path), "--device", "cpu"]
    assert main(flags) == 0
    document = json.loads((tmp_path / "prompts.json").read_text())
    rows = {row["name"]: row for row in document["models"]}
    assert list(rows) == ["teacher", "twin", "merged, untrained", "merged", "distilled, untrained", "distilled"]
    assert document["asked"] == {"text": 3, "absent": 3, "box": 3, "click": 3}
    same = ("text_iou", "text_precision", "rejected", "box_iou", "box_found", "click_iou")
    assert [rows["twin"][key] for key in same] == [rows["teacher"][key] for key in same]
    assert rows["teacher"]["cosine"] == pytest.approx(1) == rows["twin"]["cosine"]
    assert abs(rows["merged"]["cosine"]) < 0.5
    assert rows["merged"]["cosine"] != rows["merged, untrained"]["cosine"]
    for name in ("distilled", "distilled, untrained"):
        assert all(rows[name][key] is None for key in ("cosine", "box_iou", "click_iou", "trunk_parameters"))
        assert rows[name]["rejected"] is not None
    # All tensors but the rotary tables and buffers, each once.
    tensors = load_weights(teacher_file).tensors
    parameters = sum(t.numel() for k, t in tensors.items() if "freqs_cis" not in k and "gaussian_matrix" not in k)
    assert rows["teacher"]["parameters"] == parameters
    trunk = sum(t.numel() for k, t in tensors.items() if k.startswith(f"detector.{TRUNK}") and "freqs_cis" not in k)
    assert rows["teacher"]["trunk_parameters"] == trunk
    assert all(row["image_ms"] > 0 and row["phrase_ms"] > 0 for row in rows.values())
    places = document["picture"]["rows"]
    assert [place["kind"] for place in places] == ["text", "box", "click"]
    sheet = Image.open(tmp_path / "prompts.png")
    assert sheet.size == (320 * 7, places[-1]["top"] + places[-1]["height"] + 4)
    out = capsys.readouterr().out
    assert "3 phrases and 3 absent ones, 3 boxes, 3 clicks" in out


def test_columns_stay_aligned_whatever_the_names():
    figures = dict.fromkeys(evaluate_prompts.SHARES, 0.5) | {"text_taught_any_iou": None, "click_iou": None}
    figures |= {"parameters": 2_910_000, "image_ms": 20.0}
    models = [
        {"name": "teacher", **figures, "trunk_parameters": 510_000},
        {"name": "a student of some length", **figures, "image_ms": 10.0, "trunk_parameters": None},
    ]
    document = {"models": models, "asked": {"text": 2}, "num_images": 4, "device": "cpu", "cpu_threads": 1}
    head, rule, first, second, last = table(document).splitlines()
    assert len(head) == len(rule) == len(first) == len(second)
    assert "taught" not in head and "click IoU" not in head  # nobody has these figures
    assert second.split()[-4:] == ["2.91M", "-", "10.0", "2.00x"]
    assert "4 pictures: 2 phrases and 0 absent ones, 0 boxes" in last
