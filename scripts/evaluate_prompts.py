"""How well models segment what a phrase, a box or a click asks for, against annotated masks; their size and speed.

    python scripts/evaluate_prompts.py --models sam3_checkpoints/sam3_tiny.safetensors output/efficient_sam3.pt \\
        --names teacher student --data-path data/scenes --output output/prompts

Takes `sam3.pt`, merged students, tiny ones, and exported files of train_distill.py's student, which is asked phrases
only. Any data set in the SA-1B layout will do; phrases come from annotation files with `phrases`, such as those of
data/make_sample_sa1b.py --scenes. All goes the way of scripts/predict.py, in float32; all models are asked the same:

text      of every object that a phrase means: IoU of the mask assigned to it among those with a score above one half,
          so that the sum is largest; 0 if there is none
precision share of these masks that were assigned with an IoU of at least one half: a mean over the phrases that are
          true of something and for which there is a mask
taught    as text, of the phrases that the exported students were taught, who know no others, and with the masks of the
          best queries whatever their scores: as many as objects are meant, so that a guess too many costs a right one
rejected  share of the absent phrases for which nothing scores above one half
box       IoU of the object in an exemplar box: the mask of the query whose box fits that box best, whatever its score;
          found: share of these scores that are above one half
click     IoU of the likeliest of three masks for one click into the middle of an object
cosine    of the trunk's map to the first model's, where both see the same pixels and maps have one shape
image ms  median time of a picture's encoding, which all its prompts share; speed-up: against the first model

Letters: `K` masks found, `N` objects of a picture, `n` objects that are meant, `H W` rows and columns of the picture.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distillation.export import is_student_file, load_student, read_student_meta
from distillation.models.efficient_sam3 import EfficientSAM3
from distillation.processor import StudentProcessor
from distillation.questions import Question, Task, make_task
from distillation.supervised.evaluation import box_ious, ious_of
from sam3.backbones.student import StudentTrunk, untrained_student
from sam3.engine import cli, log, sa1b
from sam3.engine.distributed import choose_device
from sam3.engine.files import atomic_path, write_json
from sam3.engine.losses import build_valid_mask, masked_cosine_per_image
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model
from sam3.transforms import read_image
from sam3.visualize import answer_panel, picture_table, table_rows

KINDS = ("text", "box", "click")  # rows of the picture take turns
# Figure -> its title in the table.
SHARES = {
    "cosine": "cosine",
    "text_iou": "text IoU",
    "text_precision": "precision",
    "text_taught_any_iou": "taught",
    "rejected": "rejected",
    "box_iou": "box IoU",
    "box_found": "found",
    "click_iou": "click IoU",
}
ASKED = "asked, and the truth"  # title of its first column
PANEL_WIDTH = 320  # pixels
RIGHT = 0.5  # least IoU of a mask that counts as right


@dataclass
class Model:
    """A model behind its public interface, and what became of it. clicker: the same model with the second neck and the
    tracker, which clicks go to; None for one that reads phrases only. values: figure -> its values."""

    name: str
    path: Path
    processor: Sam3Processor
    clicker: Sam3Processor | None
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    embedding: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.processor.model, Sam3Image):
            self.processor.model.backbone.vision_backbone.trunk.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: list[Tensor]) -> None:
        self.embedding = output[-1].float()

    @property
    def num_parameters(self) -> dict[str, int | None]:
        """Of all its parts, and of the trunk (None without one)."""
        parts = [self.processor.model, *([self.clicker.model] if self.clicker else [])]
        sizes = {name: p.numel() for part in parts for name, p in part.named_parameters()}
        prefix = "backbone.vision_backbone.trunk."
        trunk = [size for name, size in sizes.items() if name.startswith(prefix)]
        return {"parameters": sum(sizes.values()), "trunk_parameters": sum(trunk) if trunk else None}

    def summary(self) -> dict[str, Any]:
        """Plain values for table and JSON; None where there is nothing to average."""
        values = self.values
        return {
            "name": self.name,
            "checkpoint": str(self.path),
            "kind": "SAM3's layout" if self.clicker else "distilled student",
            **{name: float(np.mean(values[name])) if values[name] else None for name in SHARES},
            **self.num_parameters,
            **{name: float(np.median(values[name])) if values[name] else None for name in ("image_ms", "phrase_ms")},
            "file_bytes": self.path.stat().st_size,
        }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=Path, nargs="+", required=True, help="checkpoints; the others are compared with the first")
    add("--names", nargs="+", help="of the models in table and picture; left out, file names")
    add("--untrained", action="store_true", help="also a row for each kind of student, untrained")
    add("--data-path", type=Path, required=True, help="data set in the SA-1B layout")
    add("--split", default="val", help="part of the data set")
    add("--num-images", type=int, default=100, help="pictures, the first of the split")
    add("--num-phrases", type=int, default=2, help="phrases a picture, and as many absent ones")
    add("--num-objects", type=int, default=2, help="objects a picture for boxes and clicks")
    add("--num-pictures", type=int, default=6, help="rows of the picture")
    add("--seed", type=int, default=0, help="decides which phrases and objects are taken")
    add("--output", type=Path, required=True, help="folder for prompts.json and prompts.png")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if args.num_images < 1 or min(args.num_phrases, args.num_objects, args.num_pictures, args.seed) < 0:
        parser.error("--num-images must be at least 1; --num-phrases, --num-objects, --num-pictures, --seed at least 0")
    args.names = args.names or [path.stem for path in args.models]
    if len(args.names) != len(args.models):
        parser.error(f"{len(args.names)} --names for {len(args.models)} --models")
    if len(set(args.names)) < len(args.names):
        parser.error(f"two models of one name ({', '.join(args.names)}); tell them apart by --names")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    log.setup()
    listing = sa1b.list_sa1b(args.data_path, args.split).head(args.num_images)
    models = load_models(args.models, args.names, choose_device(args.device), args.untrained)
    taught = {p for path in args.models if is_student_file(path) for p in read_student_meta(path).get("prompts", ())}
    rows, kinds, counts = [], [], defaultdict(int)
    warm_up(models, read_image(listing.path(0)))
    for place in log.progress(range(len(listing)), desc="evaluate", unit="images"):
        annotations = sa1b.annotation_path(args.data_path, args.split, listing.key(place))
        rng = np.random.default_rng([args.seed, place])
        task = make_task(listing.path(place), annotations, args.num_phrases, args.num_objects, rng, taught)
        answers = evaluate(models, task)
        for question in task.questions:
            counts[question.kind if question.wanted else "absent"] += 1
        kind = KINDS[len(rows) % len(KINDS)]
        if len(rows) < args.num_pictures and (row := draw_row(task, answers, kind)):
            rows.append(row)
            kinds.append(kind)
    places = [{"kind": k, **place} for k, place in zip(kinds, table_rows(rows, PANEL_WIDTH), strict=True)]
    document = {
        "data": str(args.data_path),
        "split": args.split,
        "num_images": len(listing),
        "asked": dict(counts),
        "device": models[0].processor.device.type,
        "cpu_threads": torch.get_num_threads(),
        "models": [model.summary() for model in models],
        "picture": {"columns": [ASKED, *(model.name for model in models)], "rows": places},
    }
    write_json(args.output / "prompts.json", document)
    print(table(document))
    if rows:
        with atomic_path(args.output / "prompts.png") as temporary:
            picture_table(rows, document["picture"]["columns"], PANEL_WIDTH).save(temporary, format="PNG")
        print(f"picture: {args.output / 'prompts.png'}")
    return 0


# Models ---------------------------------------------------------------------------------------------------------------


def load_models(paths: Sequence[Path], names: Sequence[str], device: torch.device, untrained: bool) -> list[Model]:
    """In order; before the first of each kind of student, if asked for, the same untrained. Raises as the builders."""
    models: list[Model] = []
    seen = set()
    for name, path in zip(names, paths, strict=True):
        kind = student_kind(model := load_model(name, path, device))
        if untrained and kind is not None and kind not in seen:
            seen.add(kind)
            models.append(forget(load_model(f"{name}, untrained", path, device)))
        models.append(model)
    return models


def load_model(name: str, path: Path, device: torch.device) -> Model:
    if is_student_file(path):
        return Model(name, path, StudentProcessor(load_student(path, device)), None)
    finder = Sam3Processor(build_sam3_image_model(path, device))
    clicker = build_sam3_image_model(path, device, enable_text_encoder=False, enable_inst_interactivity=True)
    return Model(name, path, finder, Sam3Processor(clicker))


def student_kind(model: Model) -> str | None:
    """What an untrained row is worth having once for; None for a model without a student."""
    network = model.processor.model
    if isinstance(network, EfficientSAM3):
        return str(network.config)
    trunk = network.backbone.vision_backbone.trunk
    if not isinstance(trunk, StudentTrunk):
        return None
    return f"{trunk.model.backbone.model.name} / {trunk.model.output_stride}"


def forget(model: Model) -> Model:
    """The same model with its student's weights as training finds them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(model.processor.model, EfficientSAM3):
            fresh = EfficientSAM3(model.processor.model.config)
            return Model(model.name, model.path, StudentProcessor(fresh, model.processor.device), None)
        for processor in (model.processor, model.clicker):
            trunk = processor.model.backbone.vision_backbone.trunk
            trunk.model = untrained_student(trunk.model).to(processor.device).eval()
    return model


def warm_up(models: list[Model], image: Tensor) -> None:
    """Everything once, untimed."""
    for model in models:
        model.processor.set_text_prompt("warm-up", model.processor.set_image(image))


# Answers --------------------------------------------------------------------------------------------------------------


def evaluate(models: list[Model], task: Task) -> list[list[Tensor | None]]:
    """Adds one picture to all figures. Returns the masks, bool (K, H, W), of each model for each question, None where
    it cannot be asked."""
    answers = []
    seen = [model.processor.preprocess.fit(task.image) for model in models]
    for model, (square, size) in zip(models, seen, strict=True):
        state = timed(model, "image_ms", lambda m=model: m.processor.set_image(task.image))
        clicks = model.clicker.set_image(task.image) if model.clicker else None
        first = models[0].embedding
        same = first is not None and model.embedding is not None and model.embedding.shape == first.shape
        if same and torch.equal(square, seen[0][0]):
            valid = build_valid_mask(torch.tensor([size], device=first.device), square.shape[-1], first.shape[-1])
            model.values["cosine"] += masked_cosine_per_image(model.embedding, first, valid).tolist()
        answers.append([answer(model, state, clicks, question, task) for question in task.questions])
    return answers


def answer(model: Model, state: dict, clicks: dict | None, question: Question, task: Task) -> Tensor | None:
    """What the model finds, which is added to its figures."""
    truth = task.truth(question)
    if question.kind == "text":
        timed(model, "phrase_ms", lambda: model.processor.set_prompts(state, text=question.text))
        masks = state["masks"][:, 0].cpu()
        score_phrase(model.values, masks, truth)
        if question.wanted and question.taught:
            best = best_masks(model.processor, state, len(truth))
            model.values["text_taught_any_iou"] += object_ious(assign(best, truth), len(truth))
        return masks
    if clicks is None:
        return None
    if question.kind == "box":
        mask, score = exemplar_mask(model.processor, state, question.box)
        model.values["box_found"].append(float(score > model.processor.confidence_threshold))
    else:
        masks, expected, _ = model.clicker.model.predict_inst(clicks, [question.point.tolist()], [1])
        mask = torch.from_numpy(masks[expected.argmax()])
    model.values[f"{question.kind}_iou"].append(ious_of(mask[None], truth).item())
    return mask[None]


def score_phrase(values: dict[str, list[float]], masks: Tensor, truth: Tensor) -> None:
    """masks: bool `(K, H, W)` of what was found, truth: bool `(n, H, W)` of what was meant."""
    if not len(truth):
        values["rejected"].append(float(not len(masks)))
        return
    pairs = assign(masks, truth)
    values["text_iou"] += object_ious(pairs, len(truth))
    if len(masks):
        values["text_precision"].append(sum(iou >= RIGHT for *_, iou in pairs) / len(masks))


def best_masks(processor: Sam3Processor, state: dict, count: int) -> Tensor:
    """bool `(count, H, W)` of the best queries for the prompt in `state`, whose results they replace."""
    threshold, top_k = processor.confidence_threshold, processor.top_k
    processor.top_k = count
    processor.set_confidence_threshold(0, state)
    processor.top_k = top_k
    processor.set_confidence_threshold(threshold)
    return state["masks"][:, 0].cpu()


def object_ious(pairs: list[tuple[int, int, float]], count: int) -> list[float]:
    """Of each of `count` objects: IoU of the mask that `assign` gave it, 0 without one."""
    own = [0.0] * count
    for _, wanted, iou in pairs:
        own[wanted] = iou
    return own


def assign(masks: Tensor, truth: Tensor) -> list[tuple[int, int, float]]:
    """(mask, object, IoU), each in one at most, so that the sum of IoUs is largest."""
    ious = ious_of(masks, truth).numpy()
    pairs = zip(*linear_sum_assignment(ious, maximize=True), strict=True)
    return [(int(k), int(i), float(ious[k, i])) for k, i in pairs]


@torch.inference_mode()
def exemplar_mask(processor: Sam3Processor, state: dict, box: np.ndarray) -> tuple[Tensor, float]:
    """Mask bool (H, W) and score of the query whose box fits best.

    `state` has the objects above the threshold only, and those alike too, so the query is sought in the raw outputs.
    """
    size = (state["original_height"], state["original_width"])
    pixels = torch.from_numpy(box)
    centre, sides = (pixels[:2] + pixels[2:]) / 2, pixels[2:] - pixels[:2]
    unit = torch.tensor([size[1], size[0]])
    processor.set_prompts(state, boxes=[(torch.cat([centre / unit, sides / unit]).tolist(), True)])
    outputs = state["outputs"]
    boxes = processor.preprocess.coords_to_image(outputs["pred_boxes_xyxy"][0].float().cpu(), size)
    query = box_ious(boxes, pixels).argmax()
    logits = processor.model.predict_masks(outputs, query.view(1, 1).to(processor.device))["pred_masks"]
    mask = processor.preprocess.maps_to_image(logits.float(), size)[0, 0] > 0
    score = outputs["pred_logits"][0, query, 0].sigmoid() * outputs["presence_logit_dec"][0, 0].sigmoid()
    return mask.cpu(), score.item()


def timed(model: Model, figure: str, call: Any) -> Any:
    """What `call` returns; the milliseconds it takes go to a figure."""
    start = time.perf_counter()
    result = call()
    device = model.processor.device
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()
    model.values[figure].append(1000 * (time.perf_counter() - start))
    return result


# What people see ------------------------------------------------------------------------------------------------------


def draw_row(task: Task, answers: list[list[Tensor | None]], kind: str) -> list[Image.Image] | None:
    """Panels for the first question of a kind: the truth, then each model; None if the picture has none."""
    place = next((i for i, q in enumerate(task.questions) if q.kind == kind and q.wanted), None)
    if place is None:
        return None
    question = task.questions[place]
    truth = task.truth(question)
    pixels = task.image.permute(1, 2, 0).numpy()
    prompt = {"text": question.text, "box": question.box, "point": question.point, "width": PANEL_WIDTH}
    panels = [answer_panel(pixels, dict(enumerate(truth.numpy())), **prompt)]
    for given in answers:
        masks = given[place]
        if masks is None:
            panels.append(answer_panel(pixels, {}, note="not asked", width=PANEL_WIDTH))
            continue
        pairs = assign(masks, truth)
        numbers = {k: i for k, i, _ in pairs}  # a mask has the colour of its object, the others have more colours
        shown = {numbers.get(k, len(truth) + k): mask for k, mask in enumerate(masks.numpy())}
        iou = sum(value for *_, value in pairs) / len(truth)
        panels.append(answer_panel(pixels, shown, note=f"IoU {iou:.2f}", **prompt))
    return panels


def table(document: dict[str, Any]) -> str:
    """The figures as aligned lines."""
    models, asked = document["models"], document["asked"]
    width = max(16, *(len(row["name"]) for row in models))
    shown = [name for name in SHARES if any(row[name] is not None for row in models)]
    titles = (*(SHARES[name] for name in shown), "all", "trunk", "image ms", "speed-up")
    head = f"{'model':<{width}}" + "".join(f"{title:>11}" for title in titles)
    lines = [head, "-" * len(head)]
    for row in models:
        cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in shown]
        sizes = (row["parameters"], row["trunk_parameters"])
        cells += ["-" if size is None else f"{size / 1e6:.2f}M" for size in sizes]
        cells += [f"{row['image_ms']:.1f}", f"{models[0]['image_ms'] / row['image_ms']:.2f}x"]
        lines.append(f"{row['name']:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    lines.append(
        f"against the annotated masks of {document['num_images']} pictures: {asked.get('text', 0)} phrases and "
        f"{asked.get('absent', 0)} absent ones, {asked.get('box', 0)} boxes, {asked.get('click', 0)} clicks; cosine of "
        f"the trunk's maps to {models[0]['name']}; {document['device']}, {document['cpu_threads']} threads, fp32"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_main(main)
