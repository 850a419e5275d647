"""The page beside the tiny SAM3's weights: what was trained, on what, how long, and what it reaches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sam3.engine.files import human_bytes, write_text
from sam3.engine.log import duration

TARGET, REJECTED = 0.75, 0.9
# Figure of the validations -> what it is, and what is aimed at.
ROWS = {
    "image": {
        "val/text_iou": ("mask IoU per object that a phrase means, 0 for a missed one", TARGET),
        "val/text_found_iou": ("the same, of the objects that were found", None),
        "val/text_precision": ("share of the masks for a phrase that are right (IoU of one half or more)", None),
        "val/rejected": ("absent phrases without any mask", REJECTED),
        "val/box_iou": ("mask IoU of the object under one exemplar box", TARGET),
        "val/click_iou": ("mask IoU of the clicked object, one click", TARGET),
        "val/corner_iou": ("mask IoU of the object in a box given to the click head", None),
    },
    "tracker": {
        "val/jf_click": ("J&F of clips, one click on the first frame", TARGET),
        "val/jf_mask": ("J&F of clips, the mask given on the first frame", None),
    },
}


@dataclass(frozen=True)
class TrainingRecord:
    """What a run's folder says of it. seconds: in training steps, whatever lay between them."""

    steps: int
    seconds: float
    processes: int
    device: str
    torch: str


def training_record(folder: Path) -> TrainingRecord:
    """From metrics.jsonl and env.json of a run. ValueError if it has not logged a step."""
    steps, seconds = 0, 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "train/step_ms" in entry:
            seconds += (entry["step"] - steps) * entry["train/step_ms"] / 1000
            steps = entry["step"]
    if not steps:
        raise ValueError(f"{folder / 'metrics.jsonl'} tells of no training step; train the phase first")
    env = json.loads((folder / "env.json").read_text())
    device = ", ".join(env["devices"]) or f"{env['cpu_count']} CPU cores"
    return TrainingRecord(steps, seconds, env["world_size"], device, env["versions"]["torch"])


def write_card(
    weights: Path, figures: Mapping[str, Mapping[str, float]], records: Mapping[str, TrainingRecord]
) -> Path:
    """Write `<weights>.md` in Markdown; figures: of the phases' validations. Returns its path."""
    page = weights.with_suffix(".md")
    write_text(page, card(weights, figures, records))
    return page


def card(weights: Path, figures: Mapping[str, Mapping[str, float]], records: Mapping[str, TrainingRecord]) -> str:
    total = sum(record.seconds for record in records.values())
    phases = "\n".join(
        f"| {name} | {own.steps} | {duration(own.seconds)} | {own.processes} |" for name, own in records.items()
    )
    rows = "\n".join(
        f"| {text} | {figures[phase][name]:.3f} | {_aim(aim)} |"
        for phase, names in ROWS.items()
        for name, (text, aim) in names.items()
        if name in figures[phase]
    )
    record = list(records.values())[-1]
    return f"""# {weights.name}

A small SAM3 that segments and tracks drawn objects: twelve shapes in ten colours and four textures. It is trained from
scratch, on generated scenes only, so that every stage of this toolkit can be tried on a laptop. It knows nothing of the
world in photos.

- made by: `python scripts/train_tiny_sam3.py` (seed and settings: `configs/tiny_sam3_*.yaml`)
- data: scenes and clips made on the fly, 224 px (`sam3.engine.scenes`, `sam3.engine.scene_videos`)
- file: {human_bytes(weights.stat().st_size)}, float16, the layout of `sam3.pt` (`detector.*`, `tracker.*`)
- time: {duration(total)} of training steps, on {record.device}, torch {record.torch}

| phase | steps | time | processes |
|---|---|---|---|
{phases}

Measured on scenes and clips whose seeds and combinations of words were never trained on (224 px, score above one half;
`python scripts/train_tiny_sam3.py --phase image --eval --resume {weights}`, and the same with `--phase tracker`):

| what | measured | aim |
|---|---|---|
{rows}
"""


def _aim(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
