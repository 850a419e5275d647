"""How well checkpoints follow objects through video: J, F and J&F on SA-V and DAVIS 2017, and frames per second.

    python stage2/evaluate_vos.py --checkpoints sam3_checkpoints/sam3.pt output/efficient_sam3_memory.pt \\
        --data data/sa-v/sav_val --layout sav --split val --output output/vos
    torchrun --nproc_per_node=4 stage2/evaluate_vos.py ...

Takes `sam3.pt`, files with a student or a compressed memory merged into it, and tiny ones. Each object is prompted by
its truth where it is first seen in an annotated frame; all frames are tracked, and the annotated ones are scored but
for an object's first and last. Video i goes to process i mod the number of processes. The same command goes on after
any interruption: videos whose result was made by the same weights and options on the same device are passed over.
Where masks are kept, the table also tells how well each model's agree with those of the first checkpoint. With
--untrained, a row comes before the first checkpoint with a compressed memory: the same with that memory as Stage 2's
training finds it.

In the output folder: results.json; of each model <name>/results/<video>.json and, for the videos of the overlays or
with --save-masks for all, PNG masks in a tree like the truth's; overlays/ with truth and models side by side.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3.engine import amp, distributed, files, log
from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import World
from sam3.engine.vos_folders import AnnotatedVideo, list_annotated_videos
from sam3.engine.vos_metrics import RULES, evaluate_sequence
from sam3.engine.weights import digest, load_weights
from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.tracker import Sam3Tracker
from sam3.tracker_builder import COMPRESSED_MEMORY, build_memory, build_video_model
from stage2.frozen_parts import tracker_meta
from stage2.vos_pictures import predictions_of, save_masks, write_overlay
from stage2.vos_results import PARTS, Result, agreement, millions, read_result, summary, table, write_result
from stage2.vos_tracking import PROMPTS, check_video, track_video

TIMEOUT = timedelta(days=14)  # the processes meet again only at the end, where the fastest waits for the slowest
UNTRAINED = "{}, untrained"  # name of the row
RESERVED = ("overlays", "results.json")  # beside the models' folders
logger = logging.getLogger("sam3.stage2")


@dataclass
class Entry:
    """A checkpoint to evaluate. parameters: of PARTS.

    untrained: None, or its compressed memory is to be as training finds it; then `sha256` is of that memory's values,
    and `layers` the dense checkpoint whose layers are in it, None if they are random.
    """

    name: str
    checkpoint: Path
    sha256: str
    parameters: dict[str, int]
    untrained: dict[str, str | None] | None = None


@dataclass
class Evaluation:
    """One process's share. listing: all videos; videos: (place in the listing, video) of those that can be scored.

    failures: (what, reason). results: name of a model -> name of a video -> what its result file says.
    """

    args: argparse.Namespace
    world: World
    entries: list[Entry]
    listing: list[AnnotatedVideo]
    videos: list[tuple[int, AnnotatedVideo]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    results: dict[str, dict[str, Result]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return amp.resolve_amp_dtype(self.args.dtype != "fp32", self.args.dtype, self.world.device)

    @property
    def device_name(self) -> str:
        device = self.world.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def options(self, entry: Entry) -> dict[str, Any]:
        """What a result depends on."""
        return {
            "sha256": entry.sha256,
            **({"untrained": entry.untrained["sha256"]} if entry.untrained else {}),
            "data": str(self.args.data.resolve()),
            "layout": self.args.layout,
            "split": self.args.split,
            "prompt": self.args.prompt,
            "precision": precision(self.amp_dtype),
            "device": self.device_name,
        }

    def result_path(self, entry: Entry, video: AnnotatedVideo) -> Path:
        return self.args.output / entry.name / "results" / f"{video.name}.json"

    def wants_masks(self, place: int) -> bool:
        return self.args.save_masks or place < self.args.overlays


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoints", type=Path, nargs="+", required=True, help="sam3.pt, merged checkpoints, tiny ones")
    add("--names", nargs="+", help="of the checkpoints in table and output folder (default: their file names)")
    add("--untrained", action="store_true",
        help="also a row '<name>, untrained' of the first compressed memory: a random Perceiver, and layers of the "
        "first dense checkpoint with the same neck and tracker; without one, random layers")  # fmt: skip
    add("--data", type=Path, required=True, help="data set, the folder above JPEGImages*")
    add("--layout", choices=RULES, default="sav", help="folders and rule of the data set")
    add("--split", default="val", help="list of videos: sav_<split>.txt, or ImageSets/2017/<split>.txt")
    add("--output", type=Path, default=Path("output/vos"), help="where results and pictures go")
    add("--max-videos", type=int, help="do only the first so many")
    add("--prompt", choices=PROMPTS, default="mask", help="what is given of an object's first mask")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="precision of the matrix products; auto is bf16 or fp16 on a GPU, fp32 on the CPU")  # fmt: skip
    add("--save-masks", action="store_true", help="keep the predicted masks of all videos")
    add("--overlays", type=int, default=2, help="videos of which an overlay is made, the first of the split")
    add("--overlay-format", choices=("mp4", "gif"), default="mp4", help="of the overlays")
    args = parser.parse_args(argv)
    args.names = args.names or [path.stem for path in args.checkpoints]
    if len(args.names) != len(args.checkpoints):
        parser.error(f"{len(args.names)} --names for {len(args.checkpoints)} --checkpoints")
    if args.untrained and (taken := [name for name in args.names if UNTRAINED.format(name) in args.names]):
        parser.error(f"{UNTRAINED.format(taken[0])!r} is what --untrained calls a row; choose another of the --names")
    if len(set(args.names)) < len(args.names):
        parser.error(f"two checkpoints of one name ({', '.join(args.names)}); tell them apart by --names")
    if wrong := [name for name in args.names if Path(name).name != name or name.startswith(".") or name in RESERVED]:
        parser.error(f"{wrong[0]!r} cannot name a folder of results; give another one by --names")
    if args.overlays < 0 or (args.max_videos is not None and args.max_videos < 1):
        parser.error("--max-videos must be at least 1, --overlays at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all videos were scored with all checkpoints, else 1. Raises ValueError, OSError."""
    args = parse_args(argv)
    with distributed.start(args.device, timeout=TIMEOUT) as world:
        log.setup(args.output, world.rank)
        evaluation = prepare(args, world)
        for entry in evaluation.entries:
            evaluate_model(evaluation, entry)
        return finish(evaluation)


def prepare(args: argparse.Namespace, world: World) -> Evaluation:
    """Look at data and checkpoints; what cannot be scored is noted at once."""
    listing = list_annotated_videos(args.data, args.split, args.layout)[: args.max_videos]
    entries = None
    if world.is_main:
        entries = describe_all(args)
    evaluation = Evaluation(args, world, distributed.broadcast_object(entries), listing)
    for place, video in list(enumerate(listing))[world.rank :: world.size]:
        try:
            check_video(video)
            evaluation.videos.append((place, video))
        except (ValueError, OSError) as error:
            evaluation.failures.append((video.name, str(error)))
    logger.info(f"videos  {len(listing)} of {args.data} ({args.layout}, {args.split}), prompts: {args.prompt}")
    logger.info(f"device  {evaluation.device_name}, {precision(evaluation.amp_dtype)}, {world.size} process(es)")
    return evaluation


def describe_all(args: argparse.Namespace) -> list[Entry]:
    """In order; before the first with a compressed memory, if asked for, the same untrained."""
    entries = [describe(name, path) for name, path in zip(args.names, args.checkpoints, strict=True)]
    if not args.untrained:
        return entries
    weights = [load_weights(path) for path in args.checkpoints]
    place = next((i for i, file in enumerate(weights) if "memory" in file.meta), None)
    if place is None:
        raise ValueError("none of the checkpoints has a compressed memory; leave out --untrained")
    frozen = tracker_meta(weights[place])
    dense = (str(file.path) for file in weights if "memory" not in file.meta and tracker_meta(file) == frozen)
    entries.insert(place, untrained(entries[place], next(dense, None)))
    return entries


def untrained(entry: Entry, layers: str | None) -> Entry:
    """The row of a checkpoint before its memory was trained; see `Entry`."""
    tracker = build_video_model(entry.checkpoint, device="cpu", with_trunk=False).tracker
    forget_memory(tracker, layers)
    values = {key: value for key, value in tracker.state_dict().items() if key.startswith(COMPRESSED_MEMORY)}
    name = UNTRAINED.format(entry.name)
    logger.info(
        f"model   {name}: {f'layers of {layers}' if layers else 'random layers'}, a random Perceiver if it has one"
    )
    return replace(entry, name=name, untrained={"sha256": digest(values), "layers": layers})


def forget_memory(tracker: Sam3Tracker, layers: str | None) -> None:
    """Gives the tracker a new compressed memory, on the CPU: values of one fixed seed, layers of a dense checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        memory = build_memory(tracker.config, tracker.config.memory)
    if layers is not None:
        teacher = build_video_model(layers, device="cpu", with_trunk=False).tracker
        memory.attention.init_from_teacher(teacher.transformer.encoder)
    tracker.memory, tracker.memory_attention = memory, memory.attention
    if memory.perceiver is not None:
        tracker.spatial_perceiver = memory.perceiver


def describe(name: str, path: Path) -> Entry:
    """What is said of a checkpoint; its values are not read, only hashed. Raises as `build_video_model`."""
    model = build_video_model(path, device="cpu")
    tracker = model.tracker
    attention = tracker.memory_attention if hasattr(tracker, "memory_attention") else tracker.transformer
    parts = (model.neck.trunk, attention, getattr(tracker, "spatial_perceiver", None))
    counts = dict(zip(PARTS, map(num_parameters, parts), strict=True))
    text = ", ".join(f"{label} {millions(counts[part])}" for part, label in PARTS.items())
    logger.info(f"model   {name}: {path}, {text}")
    return Entry(name, path, files.sha256(path), counts)


def num_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def load_predictor(entry: Entry, device: torch.device, amp_dtype: torch.dtype | None) -> Sam3VideoPredictor:
    """Nobody clicks on tracked frames here, so that they need not be kept."""
    model = build_video_model(entry.checkpoint, device)
    if entry.untrained:
        forget_memory(model.tracker, entry.untrained["layers"])
        model.to(device).eval()
    return Sam3VideoPredictor(model, autocast_dtype=amp_dtype, keep_logits=False)


# One model ----------------------------------------------------------------------------------------------------------


def evaluate_model(evaluation: Evaluation, entry: Entry) -> None:
    """Score what has no result yet of this process's videos; the model is loaded only if there is any."""
    world, results = evaluation.world, evaluation.results[entry.name]
    todo = []
    for place, video in evaluation.videos:
        result = read_result(evaluation.result_path(entry, video), evaluation.options(entry))
        if result is None or (evaluation.wants_masks(place) and not result["masks"]):
            todo.append((place, video))
        else:
            results[video.name] = result
    logger.info(
        f"{entry.name}: {len(todo)} videos to do, {len(results)} done before" + " (process 0)" * (world.size > 1)
    )
    if not todo:
        return
    predictor = load_predictor(entry, world.device, evaluation.amp_dtype)
    frames = evaluate_videos(evaluation, entry, predictor, todo)
    total = sum(len(video.frames) for _, video in todo)
    for _ in log.progress(frames, desc=entry.name, unit="frames", total=total, count=int, main=world.is_main):
        pass


def evaluate_videos(
    evaluation: Evaluation, entry: Entry, predictor: Sam3VideoPredictor, todo: list[tuple[int, AnnotatedVideo]]
) -> Iterator[int]:
    """Yields the number of frames done each time."""
    for place, video in todo:
        done = 0
        steps = evaluate_video(evaluation, entry, predictor, place, video)
        try:
            for _ in steps:
                done += 1
                yield 1
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            evaluation.failures.append((f"{video.name} with {entry.name}", str(error)))
            logger.error(f"{video.name} with {entry.name}: {error}")
        yield len(video.frames) - done


def evaluate_video(
    evaluation: Evaluation, entry: Entry, predictor: Sam3VideoPredictor, place: int, video: AnnotatedVideo
) -> Generator[int, None, None]:
    """Track and score one video; yields after each frame. The result file comes last, so it stands for all of it."""
    args, wants_masks = evaluation.args, evaluation.wants_masks(place)
    tracked = yield from track_video(predictor, video, args.prompt, exclusive=args.layout == "davis")

    def truth(number: int, row: int):
        """An object is scored after its prompt, which lies in the first frame that the rule then leaves out."""
        known = row in tracked.first_seen and number >= tracked.first_seen[row]
        return video.mask(number, row) if known else None

    rows = range(video.num_objects)
    scores = evaluate_sequence(video.annotated, rows, tracked.mask, truth)
    path = evaluation.result_path(entry, video)
    if wants_masks:
        path.unlink(missing_ok=True)  # a result of other options would vouch for these masks
        save_masks(predictions_of(args.output / entry.name, video, args.layout), video, tracked, args.layout)
    result = write_result(path, video, tracked, scores, evaluation.options(entry), wants_masks)
    evaluation.results[entry.name][video.name] = result


# All of them --------------------------------------------------------------------------------------------------------


def finish(evaluation: Evaluation) -> int:
    """Gather what all processes found; process 0 writes results, table and overlays. Returns the exit code."""
    compare_masks(evaluation)
    shares = distributed.gather_objects((dict(evaluation.results), evaluation.failures))
    failures = sorted({failure for _, failed in shares for failure in failed})
    if not evaluation.world.is_main:
        return 1 if failures else 0
    args, rows = evaluation.args, []
    for entry in evaluation.entries:
        merged = {name: result for results, _ in shares for name, result in results.get(entry.name, {}).items()}
        videos = {video.name: merged[video.name] for video in evaluation.listing if video.name in merged}
        rows.append({**asdict(entry), "checkpoint": str(entry.checkpoint), **summary(videos, args.layout)})
        if not rows[-1]["num_objects"]:
            failures.append((entry.name, f"no object in {len(videos)} videos has a frame to score"))
    document = {
        "data": str(args.data),
        **{key: getattr(args, key) for key in ("layout", "split", "prompt")},
        "precision": precision(evaluation.amp_dtype),
        "device": evaluation.device_name,
        "num_processes": evaluation.world.size,
        "cpu_threads": torch.get_num_threads(),
        "models": rows,
        "failures": [{"what": what, "reason": reason} for what, reason in failures],
    }
    files.write_json(args.output / "results.json", document)
    draw_overlays(evaluation, rows)
    print(table(document), flush=True)
    for what, reason in failures:
        logger.error(f"failed: {what}: {reason}")
    return 1 if failures else 0


def compare_masks(evaluation: Evaluation) -> None:
    """Note in each result of this process how well the masks agree with the first model's, if both kept theirs."""
    args, first = evaluation.args, next(entry for entry in evaluation.entries if not entry.untrained)
    for entry in evaluation.entries:
        for _, video in evaluation.videos:
            names = (entry.name, first.name)
            results = [evaluation.results[name].get(video.name) for name in names]
            folders = [predictions_of(args.output / name, video, args.layout) for name in names]
            kept = all(result and result["masks"] for result in results) and all(map(Path.is_dir, folders))
            if not kept or not any(scores["num_frames"] for scores in results[0]["objects"].values()):
                continue
            try:
                same = entry is first
                results[0]["agreement"] = 1.0 if same else agreement(video, results[0], *folders, args.layout)
            except ValueError as error:
                evaluation.failures.append((f"masks of {video.name} with {entry.name}", str(error)))


def draw_overlays(evaluation: Evaluation, rows: list[dict[str, Any]]) -> None:
    """Truth and models side by side, for the first videos."""
    args = evaluation.args
    for video in evaluation.listing[: args.overlays]:
        done = [row["name"] for row in rows if video.name in row["videos"]]
        if done:
            path = args.output / "overlays" / f"{video.name}.{args.overlay_format}"
            folders = {name: predictions_of(args.output / name, video, args.layout) for name in done}
            write_overlay(path, video, folders, args.layout)
            logger.info(f"overlay {path}")


def precision(dtype: torch.dtype | None) -> str:
    return "fp32" if dtype is None else {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


if __name__ == "__main__":
    run_main(main)
