"""Results of videos as files, what they come to together, and the table of several models."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sam3.engine.files import write_json
from sam3.engine.vos_folders import AnnotatedVideo
from sam3.engine.vos_metrics import ObjectScore, region_similarity, summarise
from stage2.vos_pictures import read_mask
from stage2.vos_tracking import TrackedVideo

PARTS = {"trunk": "trunk", "memory_attention": "memory attention", "perceiver": "Perceiver"}  # of a model, in the table
COLUMN = 8  # width of a number
logger = logging.getLogger("sam3.stage2")

Result = dict[str, Any]


def write_result(
    path: Path,
    video: AnnotatedVideo,
    tracked: TrackedVideo,
    scores: Mapping[int, ObjectScore],
    options: Mapping[str, Any],
    masks: bool,
) -> Result:
    """Write what became of a video, and return it.

    scores: by object, as `evaluate_sequence` gives them. options: what the result depends on. masks: whether its
    predictions were stored.
    """
    objects = {}
    for row, score in scores.items():
        j, f = (None if math.isnan(value) else value for value in (score.j, score.f))  # JSON has no NaN
        objects[video.objects[row]] = {
            "j": j, "f": f, "num_frames": score.num_frames, "first_seen": tracked.first_seen.get(row),
        }  # fmt: skip
    result = {
        "video": video.name,
        "options": dict(options),
        "masks": masks,
        "num_frames": len(video.frames),
        "num_tracked": len(tracked.first_seen),
        "num_timed": tracked.num_timed,
        "seconds": tracked.seconds,
        "objects": objects,
    }
    write_json(path, result)
    return result


def read_result(path: Path, options: Mapping[str, Any]) -> Result | None:
    """What `write_result` wrote; None if there is nothing, or it was made with other options, or is damaged."""
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["options"] == options:
            return result
        logger.info(f"{path} is of other weights, data, options or another device; it is made anew")
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(f"{path} is damaged ({error!r}); it is made anew")
    return None


def agreement(video: AnnotatedVideo, result: Result, folder: Path, first: Path, layout: str) -> float:
    """How well stored masks agree with the first model's, 0..1: J between them, averaged over frames, then objects.

    Only frames that are scored count. result: of either model, with a frame that is scored. folder, first: where
    `save_masks` wrote this video's masks of the two.

    Raises ValueError for a mask that is missing or damaged.
    """
    means = []
    for row, name in enumerate(video.objects):
        entry = result["objects"][name]
        if entry["num_frames"]:
            scored = [number for number in video.numbers_of(row) if number >= entry["first_seen"]][1:-1]
            pairs = ([read_mask(place, video, number, row, layout) for place in (folder, first)] for number in scored)
            means.append(np.mean([region_similarity(*pair) for pair in pairs]))
    return float(np.mean(means))


def summary(videos: Mapping[str, Result], rule: str) -> dict[str, Any]:
    """What the results of one model come to, None where there is nothing to average; and the results themselves.

    rule: how objects are averaged, see `summarise`. FPS are frames of all videos over their time. The agreement is
    the mean over the videos that have one.
    """
    scores = {
        name: {row: read_score(entry) for row, entry in enumerate(result["objects"].values())}
        for name, result in videos.items()
    }
    if any(score.num_frames for found in scores.values() for score in found.values()):
        numbers = asdict(summarise(scores, rule))
    else:
        unscored = sum(map(len, scores.values()))
        numbers = {"j": None, "f": None, "jf": None, "num_videos": 0, "num_objects": 0, "num_unscored": unscored}
    agreements = [result["agreement"] for result in videos.values() if "agreement" in result]
    counts = sorted({result["num_tracked"] for result in videos.values() if result["num_timed"]})
    return {
        **numbers,
        "agreement": float(np.mean(agreements)) if agreements else None,
        "num_agreement_videos": len(agreements),
        "fps": _fps(videos.values()),
        "fps_by_num_objects": {
            str(count): _fps([result for result in videos.values() if result["num_tracked"] == count])
            for count in counts
        },
        "videos": {
            name: {key: value for key, value in result.items() if key != "options"} for name, result in videos.items()
        },
    }


def _fps(results: Collection[Result]) -> float | None:
    frames, seconds = (sum(result[key] for result in results) for key in ("num_timed", "seconds"))
    return frames / seconds if frames else None


def read_score(entry: Mapping[str, Any]) -> ObjectScore:
    """An object's score as it stands in a result file."""
    j, f = (math.nan if entry[key] is None else entry[key] for key in ("j", "f"))
    return ObjectScore(j, f, entry["num_frames"])


def table(document: Mapping[str, Any]) -> str:
    """The figures of results.json as aligned lines; J, F and the agreement are in percent."""
    models = document["models"]
    first = next(row for row in models if not row["untrained"])
    agreed = {row["name"]: row["num_agreement_videos"] for row in models if row is not first}
    agreement_width = _width("agreement") if any(agreed.values()) else 0  # 0: there is nothing to compare
    width = max(5, *(len(row["name"]) for row in models))
    head = f"{'model':<{width}}" + "".join(f"{label:>{_width(label)}}" for label in PARTS.values())
    head += "".join(f"{title:>{COLUMN}}" for title in ("J&F", "J", "F"))
    head += f"{'agreement':>{agreement_width}}" if agreement_width else ""
    head += f"{'FPS':>{COLUMN}}{'videos':>8}{'objects':>9}"
    lines = [head, "-" * len(head)]
    for row in models:
        line = f"{row['name']:<{width}}"
        line += "".join(f"{millions(row['parameters'][part]):>{_width(label)}}" for part, label in PARTS.items())
        line += "".join(f"{percent(row[key]):>{COLUMN}}" for key in ("jf", "j", "f"))
        line += f"{percent(row['agreement']):>{agreement_width}}" if agreement_width else ""
        fps = "-" if row["fps"] is None else rate(row["fps"])
        lines.append(line + f"{fps:>{COLUMN}}{row['num_videos']:>8}{row['num_objects']:>9}")
    for row in models:
        rates = ", ".join(f"{count}: {rate(fps)}" for count, fps in row["fps_by_num_objects"].items())
        lines += [f"{row['name']}: FPS by the number of objects in the video: {rates}"] if rates else []
        lines += [f"{row['name']}: {row['num_unscored']} objects have no frame to score"] if row["num_unscored"] else []
    if agreement_width:
        counts = ", ".join(f"{name}: {count}" for name, count in agreed.items())
        lines.append(f"agreement is J against the masks of {first['name']}; videos with masks of both: {counts}")
    lines.append(
        f"J&F by the rule of {document['layout']}, prompts: {document['prompt']}; FPS of one process on "
        f"{document['device']} in {document['precision']}, image encoder included"
    )
    return "\n".join(lines)


def _width(label: str) -> int:
    return max(len(label), 8) + 2


def rate(fps: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{fps:.3g}" if fps < 100 else f"{fps:.0f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"
