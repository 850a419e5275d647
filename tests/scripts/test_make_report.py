"""The page of scripts/make_report.py, from made-up results of the stages."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3.engine.cli import run_main
from sam3.video_writer import write_video
from sam3.visualize import picture_table, table_rows
from scripts.make_report import STAGES, main, merged_rows, statements

NAMES = (
    *("teacher", "Stage 1, untrained", "Stage 1", "Stage 1 + geometry", "teacher, memory, untrained"),
    *("teacher, memory", "student, memory", "distilled, untrained", "distilled"),
)
VOID = {"meta", "img", "line", "polyline", "br"}


def fill(folder: Path) -> Path:
    """What a quickstart leaves, with noise for pictures, which compress worst."""
    noise = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))

    (folder / "prompts").mkdir(parents=True)
    (folder / "vos/overlays").mkdir(parents=True)
    columns = ["asked, and the truth", *(name for name in NAMES if "memory" not in name)]
    panels = [[picture(316, 316) for _ in columns] for _ in range(6)]
    picture_table(panels, columns).save(folder / "prompts/prompts.png")
    rows = [{"kind": ("text", "box", "click")[i % 3], **place} for i, place in enumerate(table_rows(panels))]
    models = [model(name, i) for i, name in enumerate(NAMES) if "memory" not in name]
    document = {"num_images": 30, "asked": {"text": 40, "box": 60}, "device": "cpu", "cpu_threads": 2}
    write(
        folder / "prompts/prompts.json", {**document, "models": models, "picture": {"columns": columns, "rows": rows}}
    )
    followed = [
        {"name": name, "jf": jf, "fps": 9.5, "num_objects": 7, "num_videos": 2, "videos": {"sav_1": {}}}
        | {"parameters": {"trunk": 500_000, "memory_attention": attention, "perceiver": perceiver}}
        for name, jf, attention, perceiver in (
            *(("teacher", 0.81, 180_000, 0), ("Stage 1 + geometry", 0.55, 180_000, 0)),
            *((name, jf, 90_000, 50_000) for name, jf in zip(NAMES[4:7], (0.3, 0.72, 0.5), strict=True)),
        )
    ]
    write(folder / "vos/results.json", {"device": "cpu", "cpu_threads": 2, "models": followed})
    frames = [np.asarray(picture_table([[picture(390, 390)] * 4], ["t"] * 4, 400)) for _ in range(3)]
    write_video(folder / "vos/overlays/sav_1.gif", frames, 6)
    for stage in STAGES:
        for curve in stage.curves:
            place = folder / curve.folder
            place.mkdir(parents=True, exist_ok=True)
            lines = [{"step": i, "time": 1.0, **dict.fromkeys(curve.lines, 1 / (i + 1))} for i in range(50)]
            lines += [{"step": 60, **dict.fromkeys(curve.lines)}]  # a number that was not finite
            with (place / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    steps = [("4. Stage 1: export", 14), ("8. geometry: tune", 75), ("12. Stage 2: train", 70), ("15. distil all", 80)]
    (folder / "steps.tsv").write_text("".join(f"{title}\t{s}\tpython x.py --a '<b>'\n" for title, s in steps))
    return folder


def model(name: str, number: int) -> dict:
    """cosine 0.1 higher from row to row; the students of phrases have no boxes."""
    phrases_only = name.startswith("distilled")
    share = round(0.1 * number + 0.05, 3)
    figures = {"cosine": share, "text_iou": share, "text_precision": share - 0.01}
    figures["text_taught_any_iou"] = round(share + 0.02, 3)
    figures |= {"box_iou": share, "click_iou": share, "rejected": 0.97}
    if phrases_only:
        figures |= {"cosine": None, "box_iou": None, "click_iou": None}
    return {"name": name, **figures, "parameters": 2_910_000, "image_ms": 10.0 * (number + 1)}


def write(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "quickstart"))


class Checker(HTMLParser):
    """Gathers text and what the page refers to; fails where an element is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path: Path) -> tuple[Checker, str]:
    page = Checker()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.open
    return page, " ".join(" ".join(page.texts).split())


def test_one_page_holds_everything(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    target = tmp_path / "deep/report.html"
    assert main(["--input", str(filled), "--output", str(target)]) == 0
    page, text = read(target)
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in text and "url(" not in target.read_text()
    assert target.stat().st_size < 8_000_000
    assert all(stage.title in text for stage in STAGES)
    assert page.tags.count("svg") == 8
    # Rows of pictures x columns: Stage 1 has 6 x 4, geometry 2 x 4, distillation 2 x 4; and one clip.
    assert page.tags.count("img") == 24 + 8 + 8 + 1
    assert 'class="missing"' not in target.read_text()
    assert "Commands, 14 s" in text
    assert "--a '<b>'" in text, "commands are shown as they are"
    assert "teacher 0.050 0.050 0.070 0.040 0.050 0.050 97% 0.810 2.91M 10.0 1.00x 9.5" in text
    assert "teacher, memory, untrained 0.050 0.050 0.070 0.040 0.050 0.050 97% 0.300 2.87M 10.0 1.00x 9.5" in text
    assert "distilled – 0.850 0.870 0.840 – – 97% – 2.91M 90.0 0.11x –" in text
    out = capsys.readouterr().out
    assert re.search(
        r"^teacher +0.050 +0.050 +0.070 +0.040 +0.050 +0.050 +97% +0.810 +2.91M +10.0 +1.00x +9.5$", out, re.MULTILINE
    )
    assert "missing" not in out


def test_panels_are_those_of_their_columns(tmp_path: Path):
    """One row, in which each column has a grey of its own."""
    columns = ["asked, and the truth", "teacher", "Stage 1", "distilled"]
    panels = [[Image.new("RGB", (100, 60), (40 * i,) * 3) for i in range(4)]]
    (tmp_path / "prompts").mkdir()
    picture_table(panels, columns).save(tmp_path / "prompts/prompts.png")
    layout = {"columns": columns, "rows": [{"kind": "text", **table_rows(panels)[0]}]}
    write(tmp_path / "prompts/prompts.json", {"num_images": 1, "asked": {}, "device": "cpu", "cpu_threads": 1}
          | {"models": [model(name, 0) for name in columns[1:]], "picture": layout})  # fmt: skip
    assert main(["--input", str(tmp_path)]) == 0
    page, _ = read(tmp_path / "report.html")
    greys = []
    for link in page.links:
        image = Image.open(io.BytesIO(base64.b64decode(link.split(",")[1])))
        assert image.size == (316, round(316 * 0.6))
        greys.append(round(image.resize((1, 1)).getpixel((0, 0))[0] / 40))
    assert greys == [0, 1, 2, 0, 1, 3]  # Stage 1: asked, teacher, Stage 1; distillation: asked, teacher, distilled


@pytest.mark.parametrize(
    ("gone", "what", "command"),
    [
        ("prompts", "Figures of pictures", "python scripts/evaluate_prompts.py"),
        ("vos", "Figures of videos", "python stage2/evaluate_vos.py"),
        ("es_ev_s", "Curves", "bash stage1/scripts/train_stage1_student.sh OUTPUT="),
        ("geometry", "Curves", "bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh OUTPUT="),
        ("memory", "Curves", "bash stage2/scripts/train_memory.sh OUTPUT="),
        ("distillation", "Curves", "python train_distill.py --config configs/distillation_tiny.yaml"),
    ],
)
def test_a_missing_part_names_its_command(folder: Path, gone: str, what: str, command: str):
    shutil.rmtree(folder / gone)
    assert main(["--input", str(folder)]) == 0
    _, text = read(folder / "report.html")
    assert f"{what}: missing. It is made by: {command}" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts/prompts.json", "{"),
        ("prompts/prompts.json", "[]"),
        ("prompts/prompts.json", '{"models": [7]}'),
        ("prompts/prompts.png", "no picture"),
        ("vos/results.json", '{"models": [{"name": "teacher"}]}'),
        ("vos/overlays/sav_1.gif", "GIF89a"),
        ("memory/metrics.jsonl", '{"step": 1}\n{"st'),
        ("steps.tsv", "one two\n"),
    ],
)
def test_damaged_files_are_said_and_the_rest_is_shown(folder: Path, name: str, content: str):
    (folder / name).write_text(content)
    assert main(["--input", str(folder)]) == 0
    _, text = read(folder / "report.html")
    assert "not readable" in text
    assert all(stage.title in text for stage in STAGES)


def test_text_from_files_is_escaped(folder: Path):
    document = json.loads((folder / "prompts/prompts.json").read_text())
    document["models"][0]["name"] = '<script>alert("1")</script>'
    write(folder / "prompts/prompts.json", document)
    assert main(["--input", str(folder)]) == 0
    page, text = read(folder / "report.html")
    assert '<script>alert("1")</script>' in text
    assert "script" not in page.tags


def test_nothing_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    for folder, message in ((tmp_path / "nowhere", "no folder"), (tmp_path, "nothing to report in")):
        with pytest.raises(SystemExit) as stop:
            run_main(main, ["--input", str(folder)])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert message in error and "bash scripts/quickstart.sh" in error
    assert not (tmp_path / "report.html").exists()


def test_statements_are_about_what_the_stages_are_for():
    before, after = {"text_iou": 0.1, "box_iou": 0.2}, {"text_iou": 0.6, "box_iou": 0.24}
    rows = {"Stage 1, untrained": before, "Stage 1": after}
    assert statements(rows) == [
        (False, "Stage 1 against itself before training: text mIoU 0.100 → 0.600, box mIoU 0.200 → 0.240")
    ]  # 0.04 is not clearly more
    rows = {"Stage 1": {"box_iou": 0.5}, "Stage 1 + geometry": {"box_iou": 0.501}}
    text = "Geometry fine-tuning against Stage 1: box mIoU 0.500 → 0.501"
    assert statements(rows) == [(True, text)]
    for row, share in zip(rows.values(), (0.25, 0.7), strict=True):
        row["box_found"] = share
    assert statements(rows) == [(True, f"{text}; of these objects, scored above one half 25% → 70%")]
    for small, holds in ((0.71, True), (0.69, False), (0.9, True)):
        rows = {"teacher": {"jf": 0.8}, "teacher, memory": {"jf": small}}
        assert [found for found, _ in statements(rows)] == [holds]
    key, begin = "text_taught_any_iou", "Distilled against itself before training: "
    rows = {"distilled, untrained": {key: 0.0}, "distilled": {key: 0.25, "box_iou": None}}
    text = f"{begin}text mIoU, any score 0.000 → 0.250"
    assert statements(rows) == [(True, text)]
    for before, holds in ((0.5, True), (0.56, False)):
        rows = {"teacher, memory, untrained": {"jf": before}, "teacher, memory": {"jf": 0.6}}
        text = f"Compressed memory against itself before training: J&F {before:.3f} → 0.600"
        assert statements(rows) == [(holds, text)]
    assert statements({}) == []


def test_rows_join_pictures_and_videos_by_name(filled: Path):
    rows = merged_rows(filled)
    assert [row["name"] for row in rows] == list(NAMES)
    assert [row.get("jf") for row in rows] == [0.81, None, None, 0.55, 0.3, 0.72, 0.5, None, None]
    by_name = {row["name"]: row for row in rows}
    assert by_name["Stage 1 + geometry"]["speed_up"] == pytest.approx(10 / 40)
    # A model with a compressed memory has the image model of its base, and 40,000 parameters fewer in its tracker.
    for name, base in zip(NAMES[4:7], ("teacher", "teacher", "Stage 1 + geometry"), strict=True):
        for key in ("cosine", "text_iou", "text_precision", "box_iou", "click_iou", "image_ms", "speed_up"):
            assert by_name[name][key] == by_name[base][key]
        assert by_name[name]["parameters"] == 2_910_000 - 40_000
