"""The page beside the tiny SAM3's weights: what was trained, on what, how long, and what it reaches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillation.supervised.evaluation import REJECTED, TARGET
from sam3.engine.files import human_bytes, write_text
from sam3.engine.log import duration
from sam3.engine.settings import read_mapping

# Figure of the validations -> what it is, and what is aimed at.
ROWS = {
    "image": {
        "val/text_iou": ("mask IoU per object that a phrase means, 0 for a missed one", TARGET),
        "val/text_found_iou": ("the same, of the objects that were found", None),
        "val/text_precision": ("share of the masks for a phrase that are right (IoU of one half or more)", None),
        "val/rejected": ("absent phrases without any mask", REJECTED),
        "val/box_iou": ("mask IoU of the object under one exemplar box", TARGET),
        "val/box_found": ("share of these objects with a score above one half", None),
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
    seed: int


def training_record(folder: Path) -> TrainingRecord:
    """From metrics.jsonl, env.json and config.yaml of a run. ValueError if it has not logged a step."""
    steps, seconds = 0, 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "train/step_ms" in entry:
            seconds += (entry["step"] - steps) * entry["train/step_ms"] / 1000
            steps = entry["step"]
    if not steps:
        raise ValueError(f"{folder / 'metrics.jsonl'} tells of no training step; train the phase first")
    env, config = json.loads((folder / "env.json").read_text()), read_mapping(folder / "config.yaml")
    device = used_device(config["DEVICE"], env)
    return TrainingRecord(steps, seconds, env["world_size"], device, env["versions"]["torch"], config["SEED"])


def used_device(wanted: str, env: Mapping[str, Any]) -> str:
    """What a run on DEVICE `wanted` has used of its machine, by the rules of `distributed.choose_device`."""
    gpus, processes = env["devices"], env["world_size"]
    if wanted == "auto":
        apple = env["platform"].startswith("macOS") and processes == 1
        wanted = "cuda" if gpus else "mps" if apple else "cpu"
    kind, _, index = wanted.partition(":")
    if kind == "cuda":
        return ", ".join([gpus[int(index)]] if index else gpus[:processes])
    return f"{env['cpu_count']} CPU cores" if kind == "cpu" else kind.upper()


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
    devices = ", ".join(dict.fromkeys(own.device for own in records.values()))
    record = list(records.values())[-1]
    return f"""# {weights.name}

A small SAM3 that segments and tracks drawn objects: twelve shapes in ten colours and four textures. It is trained from
scratch, on generated scenes only, so that every stage of this toolkit can be tried on a laptop. It knows nothing of the
world in photos.

- made by: `python scripts/train_tiny_sam3.py --seed {record.seed}` (settings: `configs/tiny_sam3_*.yaml`)
- data: scenes and clips made on the fly, of up to 224 px (`sam3.engine.scenes`, `sam3.engine.scene_videos`)
- file: {human_bytes(weights.stat().st_size)}, float16, the layout of `sam3.pt` (`detector.*`, `tracker.*`)
- time: {duration(total)} of training steps, on {devices}, torch {record.torch}; validation and start-up come on top

| phase | steps | time | processes |
|---|---|---|---|
{phases}

Pairs of words that training never shows are known to the losses, which leave answers for them unpunished
(`set_loss.Targets.doubtful`, `outlines.rivals`): the model is not taught that there are no such things.

Measured on scenes and clips whose seeds and combinations of words were never trained on, at 224 px. Masks for a phrase
are those with a score above one half; under an exemplar box it is the mask whose own box fits the object best, whatever
its score, and after a click the one that the model takes for the best
(`python scripts/train_tiny_sam3.py --phase image --eval --resume {weights}`, and the same with `--phase tracker`):

| what | measured | aim |
|---|---|---|
{rows}
"""


def _aim(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
