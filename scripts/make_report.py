"""One page about what the quickstart made: a table, curves, pictures. It needs no other file and no network.

    python scripts/make_report.py --input output/quickstart --output output/quickstart/report.html

Reads what the stages and evaluations wrote below the input folder, whatever there is of it; what is missing becomes a
line that says which command makes it. Exit code 1 if nothing was found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from sam3.engine import cli
from sam3.engine import report_page as html
from sam3.engine.files import human_bytes, write_text
from sam3.engine.report_charts import Series
from sam3.visualize import TITLE_HEIGHT

TITLE = "EfficientSAM3: what the quickstart made"
INTRODUCTION = (
    "A tiny SAM3, trained from scratch on generated scenes of named objects, is the teacher. Each stage of the "
    "project takes it, or what the stage before made of it, and makes something lighter. The figures of the table are "
    "measured on scenes and clips kept from every training, whose combinations of colour, texture and shape training "
    "never showed."
)
NOTE = (
    "mIoU is the mean overlap with the true masks: of every object that a phrase means (0 for one that is not found), "
    "of the object in an example box (by the mask whose box fits that box best, whatever its score), and of the object "
    "under one click. Any score: for phrases that the distilled student was taught, of as many of the best masks as "
    "there are objects, whatever their scores. Text precision: share of the masks found for a phrase that fit an "
    "object it means by half or more. Absent rejected: share of the phrases that are true of nothing and find nothing. "
    "J&F: overlap and contour of objects followed through clips. The rows with a compressed memory have the figures of "
    "pictures of the model they are built on, whose image model they hold unchanged. The teacher is itself so small "
    "that its students need not be smaller or faster; README.md has the speed-ups of the real sizes."
)
# Names that scripts/quickstart.sh gives the models.
TEACHER, STAGE1, TUNED, DISTILLED = "teacher", "Stage 1", "Stage 1 + geometry", "distilled"
MEMORY = "teacher, memory"
UNTRAINED = "{}, untrained"
# Models with a compressed memory -> those whose image model they have, bit for bit.
BUILT_ON = {UNTRAINED.format(MEMORY): TEACHER, MEMORY: TEACHER, "student, memory": TUNED}
ASKED = "asked, and the truth"
ASKED_FOR = {"text": "phrases", "absent": "absent phrases", "box": "boxes", "click": "clicks"}
# What training must raise: how the page calls the model, its name, figures.
LEARNT = (
    ("Stage 1", STAGE1, ("cosine", "text_iou", "box_iou", "click_iou")),
    ("Compressed memory", MEMORY, ("jf",)),
    ("Distilled", DISTILLED, ("text_taught_any_iou",)),
)
CLEARLY = 0.05  # what a student gains over its untrained state, in each figure
MEMORY_LOSS = 0.1  # of J&F, that the compressed memory may cost
PANEL_WIDTH, MAX_ROWS = 220, 6
FILM_WIDTH, FILM_FRAMES, FILM_MS = 1100, 24, 400
PROBLEMS = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError)  # what reading a damaged file raises

Row = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A chart of metrics.jsonl in `folder`. lines: name of a metric -> what the page calls it."""

    folder: str
    title: str
    lines: dict[str, str]


@dataclass(frozen=True)
class Stage:
    """A section. steps: how the titles of its steps in the quickstart begin. command: what makes its curves.

    models, kinds: columns and rows of the prompts' picture; film: whether clips are shown.
    """

    title: str
    text: str
    steps: str
    command: str
    curves: tuple[Curve, ...]
    models: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    film: bool = False


DISTILLATION_LOSSES = {"train/total_loss": "training", "val/total_loss": "held-out scenes"}
STAGES = (
    Stage(
        "Stage 1: a light image encoder",
        "The student, EfficientViT-B0 with a small head, learns to give the maps that the teacher's image encoder "
        "gives. Then it takes that encoder's place; all other parts stay the teacher's, bit for bit.",
        "Stage 1",
        "bash stage1/scripts/train_stage1_student.sh OUTPUT={}/es_ev_s",
        (
            Curve("es_ev_s", "Training loss", {"train/loss_total": "MSE and cosine, weighted"}),
            Curve("es_ev_s", "Cosine to the teacher's maps, held-out scenes", {"val/cosine": "mean"}),
        ),
        (TEACHER, UNTRAINED.format(STAGE1), STAGE1),
        ("text", "box", "click"),
    ),
    Stage(
        "Geometry fine-tuning: masks behind boxes and points",
        "The same student, now judged by the masks that come out of the teacher's frozen heads when a box or a point "
        "asks for an object.",
        "geometry",
        "bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh OUTPUT={}/geometry",
        (
            Curve("geometry", "Training loss", {"train/loss_total": "all terms"}),
            Curve(
                "geometry",
                "IoU with the annotated masks, held-out scenes",
                {
                    "val/box_iou_annotated": "student, box",
                    "val/box_iou_annotated_teacher": "teacher, box",
                    "val/point_iou_annotated": "student, point",
                },
            ),
        ),
        (TEACHER, STAGE1, TUNED),
        ("box",),
    ),
    Stage(
        "Stage 2: a compressed memory for video",
        "The tracker remembers each frame as a whole map. Here a Perceiver compresses that map to a few tokens, and "
        "two layers of attention read them. The memory is trained behind the teacher's frozen parts and fits both the "
        "teacher and the tuned student.",
        "Stage 2",
        "bash stage2/scripts/train_memory.sh OUTPUT={}/memory",
        (
            Curve("memory", "Training loss", {"train/loss_total": "all terms"}),
            Curve("memory", "J&F, clips left out of this training", {"val/jf": "student", "val/jf_teacher": "teacher"}),
        ),
        film=True,
    ),
    Stage(
        "Distillation of the whole model",
        "A slim student of its own build, for phrases only, learns the teacher's masks, boxes, scores and features: "
        "all of them in phase 1, the outputs alone in phase 2. It begins with random weights and is taught the names "
        "of shapes only; a minute or two show a beginning, not an end.",
        "distil",
        "python train_distill.py --config configs/distillation_tiny.yaml --phase all --output {}/distillation",
        (
            Curve("distillation/phase1", "Phase 1: loss", DISTILLATION_LOSSES),
            Curve("distillation/phase2", "Phase 2: loss", DISTILLATION_LOSSES),
        ),
        (TEACHER, UNTRAINED.format(DISTILLED), DISTILLED),
        ("text",),
    ),
)


@dataclass
class Report:
    """What is gathered from `folder`. parts: of the page; found: how many things there were, missing: those not."""

    folder: Path
    parts: list[str] = field(default_factory=list)
    found: int = 0
    missing: list[str] = field(default_factory=list)

    def add(self, make: Callable[[], str], what: str, command: str) -> None:
        """The part that `make` gives or, where its files are missing or damaged, a line that says what makes them."""
        try:
            self.parts.append(make())
            self.found += 1
        except PROBLEMS as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else f"not readable ({error})"
            self.missing.append(what)
            self.parts.append(html.element("p", f"{what}: {reason}. It is made by: {command}", "missing"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--input", type=Path, default=Path("output/quickstart"), help="folder of the quickstart")
    parser.add_argument("--output", type=Path, help="page to write; left out, report.html in the input folder")
    args = parser.parse_args(argv)
    output = args.output or args.input / "report.html"
    if not args.input.is_dir():
        raise FileNotFoundError(f"no folder {args.input}; make it with bash scripts/quickstart.sh")
    report = Report(args.input)
    rows = merged_rows(args.input)
    report.parts += [html.element("h1", TITLE), html.element("p", INTRODUCTION)]
    add_table(report, rows)
    for stage in STAGES:
        add_stage(report, stage)
    if not report.found:
        raise ValueError(f"nothing to report in {args.input}; fill it with bash scripts/quickstart.sh")
    write_text(output, html.page(TITLE, report.parts))
    if rows:
        print(text_table(rows))
    for what in report.missing:
        print(f"missing: {what}")
    print(f"page: {output} ({human_bytes(output.stat().st_size)})")
    return 0


# The table ------------------------------------------------------------------------------------------------------------


def merged_rows(folder: Path) -> list[Row]:
    """Figures of all models by the names that the evaluations share; [] without any of them."""
    rows: dict[str, Row] = {}
    for path in (folder / "prompts/prompts.json", folder / "vos/results.json"):
        try:
            for model in json.loads(path.read_text(encoding="utf-8"))["models"]:
                if isinstance(model.get("parameters"), dict):  # of videos: by part, the image model's heads not among
                    model["parts"] = model.pop("parameters")
                rows[model["name"]] = {**model, **rows.get(model["name"], {})}
        except PROBLEMS:
            continue  # `add_table` says so
    first = next(iter(rows.values()), {}).get("image_ms")
    for row in rows.values():
        row["speed_up"] = first / row["image_ms"] if first and row.get("image_ms") else None
    for name, base in BUILT_ON.items():
        if {name, base} <= rows.keys():
            rows[name] = built_on(rows[base], rows[name])
    return sorted(rows.values(), key=lambda row: row["name"].startswith(DISTILLED))  # the others may come from videos


def built_on(base: Row, row: Row) -> Row:
    """`row`, a model with another memory, with the figures of its base where it has none of its own."""
    filled = {**base, **{key: value for key, value in row.items() if value is not None}}
    own, old = (side.get("parts") for side in (row, base))
    if own and old and base.get("parameters") and "parameters" not in row:
        filled["parameters"] = base["parameters"] + sum(own.values()) - sum(old.values())
    return filled


# Title -> a row's figure -> text.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "embedding cosine": ("cosine", "{:.3f}".format),
    "text mIoU": ("text_iou", "{:.3f}".format),
    "text mIoU, any score": ("text_taught_any_iou", "{:.3f}".format),
    "text precision": ("text_precision", "{:.3f}".format),
    "box mIoU": ("box_iou", "{:.3f}".format),
    "click mIoU": ("click_iou", "{:.3f}".format),
    "absent rejected": ("rejected", "{:.0%}".format),
    "J&F": ("jf", "{:.3f}".format),
    "parameters": ("parameters", lambda count: f"{count / 1e6:.2f}M"),
    "image, ms": ("image_ms", "{:.1f}".format),
    "speed-up": ("speed_up", "{:.2f}x".format),
    "video, frames/s": ("fps", "{:.1f}".format),
}
TITLES = {key: title for title, (key, _) in COLUMNS.items()}


def cells(row: Row) -> list[str]:
    """The name, then a text for each of COLUMNS."""
    values = ((row.get(key), style) for key, style in COLUMNS.values())
    return [row["name"], *("–" if value is None else style(value) for value, style in values)]


def text_table(rows: list[Row]) -> str:
    """The same for a terminal."""
    lines = [["model", *COLUMNS], *map(cells, rows)]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others, strict=True))
        for line in lines
    )


def add_table(report: Report, rows: list[Row]) -> None:
    folder = report.folder

    def read(name: str) -> str:
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        asked = document.get("asked")
        if asked is None:
            counts = [model["num_objects"] for model in document["models"]]
            text = f"Video: {max(counts)} objects in {document['models'][0]['num_videos']} clips"
        else:
            counts = ", ".join(f"{count} {ASKED_FOR.get(kind, kind)}" for kind, count in asked.items())
            text = f"Pictures: {document['num_images']} scenes, asked {counts}"
        return html.element("p", f"{text}; {document['device']}, {document['cpu_threads']} threads.", "note")

    if rows:
        report.parts.append(html.table(["model", *COLUMNS], [cells(row) for row in rows]))
    report.add(lambda: read("prompts/prompts.json"), "Figures of pictures", "python scripts/evaluate_prompts.py")
    report.add(lambda: read("vos/results.json"), "Figures of videos", "python stage2/evaluate_vos.py")
    if rows:
        report.parts += [html.element("p", NOTE, "note"), html.claims(statements({row["name"]: row for row in rows}))]


def statements(rows: dict[str, Row]) -> list[tuple[bool, str]]:
    """What the stages are there for, each with whether it was reached; those without figures are left out."""
    found = []
    for called, name, keys in LEARNT:
        pairs = [(key, figure(rows, UNTRAINED.format(name), key), figure(rows, name, key)) for key in keys]
        pairs = [(key, before, after) for key, before, after in pairs if None not in (before, after)]
        listed = ", ".join(f"{TITLES[key]} {before:.3f} → {after:.3f}" for key, before, after in pairs)
        if pairs:
            holds = all(after >= before + CLEARLY for _, before, after in pairs)
            found.append((holds, f"{called} against itself before training: {listed}"))
    before, after = figure(rows, STAGE1, "box_iou"), figure(rows, TUNED, "box_iou")
    if None not in (before, after):
        text = f"Geometry fine-tuning against Stage 1: box mIoU {before:.3f} → {after:.3f}"
        if None not in (scored := [figure(rows, name, "box_found") for name in (STAGE1, TUNED)]):
            text += "; of these objects, scored above one half {:.0%} → {:.0%}".format(*scored)
        found.append((after > before, text))
    dense, small = figure(rows, TEACHER, "jf"), figure(rows, MEMORY, "jf")
    if None not in (dense, small):
        text = f"Compressed memory against the dense one: J&F {dense:.3f} → {small:.3f}; it may lose {MEMORY_LOSS}"
        found.append((small >= dense - MEMORY_LOSS, text))
    return found


def figure(rows: dict[str, Row], name: str, key: str) -> float | None:
    return rows.get(name, {}).get(key)


# Stages ---------------------------------------------------------------------------------------------------------------


def add_stage(report: Report, stage: Stage) -> None:
    folder, command = report.folder, stage.command.format(report.folder)
    report.parts += [html.element("h2", stage.title), html.element("p", stage.text)]
    report.add(lambda: commands(folder, stage.steps), "Commands as they ran", "bash scripts/quickstart.sh")
    report.add(lambda: html.charts([draw_curve(folder, curve) for curve in stage.curves]), "Curves", command)
    if stage.models:
        make = "python scripts/evaluate_prompts.py --output " + str(folder / "prompts")
        report.add(lambda: prompt_panels(folder / "prompts", stage), "Pictures", make)
    if stage.film:
        make = "python stage2/evaluate_vos.py --overlay-format gif --output " + str(folder / "vos")
        report.add(lambda: film(folder / "vos"), "A clip", make)


def commands(folder: Path, begins: str) -> str:
    """The stage's steps with their commands and times."""
    lines = [line.split("\t") for line in (folder / "steps.tsv").read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if line[0].split(". ", 1)[1].startswith(begins)]
    if not own:
        raise ValueError("steps.tsv has none of them")
    items = []
    for title, seconds, command in own:
        items += [html.element("p", f"{title}: {int(seconds)} s", "seconds"), html.element("pre", command.strip())]
    total = sum(int(line[1]) for line in own)
    return f"<details>{html.element('summary', f'Commands, {total} s')}{''.join(items)}</details>"


def draw_curve(folder: Path, curve: Curve) -> str:
    """ValueError if none of its metrics was recorded."""
    text = (folder / curve.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    series = [Series(name, points) for key, name in curve.lines.items() if (points := read_points(lines, key))]
    if not series:
        raise ValueError(f"{curve.folder}/metrics.jsonl holds none of {', '.join(curve.lines)}")
    return html.chart(curve.title, series, "step")


def read_points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    values = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [(float(x), float(y)) for x, y in values if math.isfinite(y)]


def prompt_panels(folder: Path, stage: Stage) -> str:
    """The stage's columns and rows of the picture of evaluate_prompts.py."""
    layout = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["picture"]
    columns = [name for name in (ASKED, *stage.models) if name in layout["columns"]]
    wanted = [row for row in layout["rows"] if row["kind"] in stage.kinds][:MAX_ROWS]
    if len(columns) < 2 or not wanted:
        raise ValueError(f"it has no pictures of {', '.join(stage.models)}")
    rows = []
    with Image.open(folder / "prompts.png") as sheet:
        for row in wanted:
            lefts = [layout["columns"].index(name) * row["step"] for name in columns]
            bottom = row["top"] + row["height"]
            rows.append([sheet.crop((left, row["top"], left + row["width"], bottom)) for left in lefts])
    return html.panels(columns, rows, PANEL_WIDTH)


def film(folder: Path) -> str:
    """The first clip with the truth and all models, as a moving picture below their names."""
    path = next(iter(sorted((folder / "overlays").glob("*.gif"))), None)
    if path is None:
        raise FileNotFoundError(folder / "overlays")
    models = json.loads((folder / "results.json").read_text(encoding="utf-8"))["models"]
    titles = ["truth", *(model["name"] for model in models if path.stem in model["videos"])]
    with Image.open(path) as clip:
        size = (FILM_WIDTH, round((clip.height - TITLE_HEIGHT) * FILM_WIDTH / clip.width))
        box = (0, TITLE_HEIGHT, clip.width, clip.height)  # the page has titles of its own
        frames = [
            frame.convert("RGB").resize(size, Image.Resampling.LANCZOS, box)
            for frame in islice(ImageSequence.Iterator(clip), FILM_FRAMES)
        ]
    caption = f"Clip {path.stem}, every fourth frame. The models are told of objects by their masks in the first one."
    return html.film(titles, frames, FILM_MS, caption)


if __name__ == "__main__":
    cli.run_main(main)
