"""How close merged students come to their teacher: embeddings, masks behind the same boxes and points, size and speed.

    python scripts/evaluate_student.py --teacher sam3_checkpoints/sam3.pt \
        --students output/efficient_sam3_repvit_m.pt --data-path data/sa-1b --split val --output output/evaluation

All models see the same pixels, pre-processed as the students' checkpoints say. Boxes and points come from the
annotations; each goes through the heads of teacher and student, and the mask of the teacher's best query is compared
with the student's mask of the same query, whose meaning the frozen heads fix. Without annotations only embeddings are
compared.

Letters: `P` prompts of a picture, `G` side of the embedding grid, `M` side of the mask grid.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sam3.backbones.student import StudentEncoder, StudentTrunk, untrained_student
from sam3.engine import cli, log, sa1b
from sam3.engine.distributed import choose_device
from sam3.engine.files import atomic_path, human_bytes, write_json
from sam3.engine.losses import build_valid_mask, masked_cosine_per_image
from sam3.engine.metrics import mask_iou
from sam3.model.box_ops import box_xyxy_to_cxcywh
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image_processor import VISUAL_PROMPT
from sam3.model_builder import build_sam3_image_model
from sam3.transforms import Preprocess, read_image
from sam3.visualize import picture_table, prompt_panels

KINDS = ("box", "point")


@dataclass
class Result:
    """One model's figures; `cosines` per picture, `ious` per prompt of each kind."""

    name: str
    path: Path
    trunk_parameters: int
    cosines: list[float] = field(default_factory=list)
    ious: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    trunk_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | str | int | None]:
        """Plain values for the table and the JSON file."""
        cosines, times = torch.tensor(self.cosines), torch.tensor(self.trunk_ms)
        return {
            "name": self.name,
            "cosine": cosines.mean().item(),
            "cosine_p5": cosines.quantile(0.05).item(),
            **{f"{kind}_iou": sum(ious) / len(ious) if ious else None for kind, ious in self.ious.items()},
            "trunk_parameters": self.trunk_parameters,
            "trunk_ms": times.median().item(),
            "file_bytes": self.path.stat().st_size,
        }


class Model:
    """A model, the output of its trunk, and the time that took; `untrained` gives a student random weights."""

    def __init__(self, name: str, path: Path, device: torch.device, untrained: bool = False) -> None:
        self.model = build_sam3_image_model(checkpoint_path=path, device=device)
        trunk = self.model.backbone.vision_backbone.trunk
        if untrained:
            trunk.model = untrained_student(_student(trunk, path)).to(device).eval()
        self.result = Result(name, path, sum(p.numel() for p in trunk.parameters()))
        trunk.register_forward_pre_hook(self._start)
        trunk.register_forward_hook(self._stop)

    @property
    def kind(self) -> tuple[str, int]:
        """Name and output stride of the student; ValueError if the file holds none."""
        student = _student(self.model.backbone.vision_backbone.trunk, self.result.path)
        return student.backbone.model.name, student.output_stride

    def _start(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.started = time.perf_counter()

    def _stop(self, module: nn.Module, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
        self.embedding = output[-1].float()
        self.embedding.sum().item()  # waits for an accelerator
        self.result.trunk_ms.append(1000 * (time.perf_counter() - self.started))

    def encode(self, images: Tensor) -> dict:
        """Image features; `embedding` then holds the trunk's grid."""
        return self.model.backbone.forward_image(images)

    def predict(self, features: dict, prompt: Prompt, count: int) -> dict:
        """Outputs for a `prompt` of `count` rows, without masks."""
        zeros = torch.zeros(count, dtype=torch.long, device=self.model.device)
        features.update(self.model.backbone.forward_text([VISUAL_PROMPT], device=self.model.device))
        return self.model.predict_boxes(features, FindStage(zeros, zeros), prompt)

    def masks(self, outputs: dict, queries: Tensor) -> Tensor:
        """Mask logits `(P, M, M)` of one query for each prompt."""
        return self.model.predict_masks(outputs, queries[:, None])["pred_masks"][:, 0]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint in the sam3.pt layout")
    parser.add_argument("--students", type=Path, nargs="+", required=True, help="merged checkpoints")
    parser.add_argument("--names", nargs="+", help="names of the students in table and picture; left out, file names")
    parser.add_argument("--untrained", action="store_true", help="also a row for each kind of student, untrained")
    parser.add_argument("--data-path", type=Path, required=True, help="data set in the SA-1B layout")
    parser.add_argument("--split", default="val", help="part of the data set")
    parser.add_argument("--num-images", type=int, default=100, help="pictures, the first of the split")
    parser.add_argument("--num-boxes", type=int, default=8, help="objects a picture, those of the largest masks")
    parser.add_argument("--num-pictures", type=int, default=4, help="rows of the picture")
    parser.add_argument("--output", type=Path, required=True, help="folder for evaluation.json and evaluation.png")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if args.num_images < 1 or args.num_boxes < 0 or args.num_pictures < 0:
        parser.error("--num-images must be at least 1, --num-boxes and --num-pictures at least 0")
    if args.names and len(args.names) != len(args.students):
        parser.error(f"{len(args.names)} --names for {len(args.students)} --students")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    names = args.names or [path.stem for path in args.students]
    log.setup()
    listing = sa1b.list_sa1b(args.data_path, args.split).head(args.num_images)
    pictures = [
        (listing.path(index), sa1b.annotation_path(args.data_path, args.split, listing.key(index)))
        for index in range(len(listing))
    ]
    device = choose_device(args.device)
    teacher = Model("teacher", args.teacher, device)
    students = []
    fresh = set()
    for name, path in zip(names, args.students, strict=True):
        student = Model(name, path, device)
        if args.untrained and student.kind not in fresh:
            fresh.add(student.kind)
            students.append(Model(f"{name}, untrained", path, device, untrained=True))
        students.append(student)
    preprocess = _shared_preprocess(students)
    rows = []
    with torch.inference_mode():
        for path, annotations in log.progress(pictures, desc="evaluate", unit="images"):
            row = compare(path, annotations, teacher, students, preprocess, args.num_boxes, device)
            if row is not None and len(rows) < args.num_pictures:
                rows.append(row)
    summaries = [model.result.summary() for model in (teacher, *students)]
    write_json(args.output / "evaluation.json", {"num_images": len(pictures), "models": summaries})
    print(table(summaries, {kind: len(ious) for kind, ious in teacher.result.ious.items()}))
    if rows:
        titles = ["photo and prompt", "teacher", *(student.result.name for student in students)]
        picture = args.output / "evaluation.png"
        with atomic_path(picture) as temporary:
            picture_table(rows, titles).save(temporary, format="PNG")
        print(f"picture: {picture}")
    return 0


def _student(trunk: nn.Module, path: Path) -> StudentEncoder:
    if not isinstance(trunk, StudentTrunk):
        raise ValueError(f"{path} holds no student; merge one into it with stage1/convert_stage1_weights.py")
    return trunk.model


def _shared_preprocess(students: list[Model]) -> Preprocess:
    """The students' pre-processing; ValueError if they differ."""
    first = students[0].model.preprocess
    for student in students[1:]:
        if student.model.preprocess != first:
            raise ValueError(
                f"{student.result.name} was trained on {student.model.preprocess}, {students[0].result.name} on "
                f"{first}; evaluate them one at a time"
            )
    return first


def compare(
    path: Path,
    annotations: Path,
    teacher: Model,
    students: list[Model],
    preprocess: Preprocess,
    num_boxes: int,
    device: torch.device,
) -> list[Image.Image] | None:
    """Adds one picture to all results; returns its panels, or None if it has no boxes."""
    image = read_image(path)
    square, size = preprocess.fit(image)
    sizes = torch.tensor([size], device=device)
    images = preprocess.normalise(square[None].to(device), sizes)
    reference = teacher.encode(images)
    valid = build_valid_mask(sizes, preprocess.img_size, teacher.embedding.shape[-1])
    teacher.result.cosines.append(1.0)
    features = [student.encode(images) for student in students]
    for student in students:
        student.result.cosines += masked_cosine_per_image(student.embedding, teacher.embedding, valid).tolist()
    image_size = tuple(image.shape[1:])
    panels = None
    for kind, coords in _prompts(annotations, image_size, preprocess, num_boxes).items():
        if not len(coords):
            continue
        prompt = _prompt(kind, coords.to(device))
        outputs = teacher.predict(reference, prompt, len(coords))
        queries = outputs["pred_logits"][..., 0].argmax(1)  # (P,)
        masks = [preprocess.crop_valid(teacher.masks(outputs, queries), image_size) > 0]
        teacher.result.ious[kind] += [1.0] * len(coords)
        for student, seen in zip(students, features, strict=True):
            found = student.masks(student.predict(seen, prompt, len(coords)), queries)
            masks.append(preprocess.crop_valid(found, image_size) > 0)
            student.result.ious[kind] += mask_iou(masks[-1], masks[0]).tolist()
        if kind == "box":
            picture = square[:, : size[0], : size[1]]
            panels = prompt_panels(picture, [mask[0] for mask in masks], box=coords[0] * preprocess.img_size)
    return panels


def _prompts(annotations: Path, image_size: tuple[int, int], preprocess: Preprocess, count: int) -> dict[str, Tensor]:
    """Boxes `(P, 4)` xyxy of the largest masks, cut at the picture's edges, and the points `(P, 2)` of those that have
    one in the picture, in 0..1 of the model's square; none without annotations.

    An object whose box does not span a pixel of the picture counts for neither. ValueError names a damaged file.
    """
    if not annotations.exists():
        return {}
    found = sa1b.read_annotations(annotations)
    boxes = sa1b.clip_boxes(found.boxes.double().numpy(), image_size)
    rows = np.flatnonzero(sa1b.is_usable(boxes))
    largest = rows[np.argsort(-found.areas.numpy()[rows], kind="stable")][:count]
    points = sa1b.drop_outside(found.points.double().numpy()[largest], image_size)
    pixels = {"box": boxes[largest], "point": points[~np.isnan(points[:, 0])]}
    return {
        kind: preprocess.coords_to_input(torch.from_numpy(coords), image_size).float()
        for kind, coords in pixels.items()
    }


def _prompt(kind: str, coords: Tensor) -> Prompt:
    """Each box or point as a prompt of its own."""
    if kind == "point":
        return Prompt(point_embeddings=coords[None])
    return Prompt(box_embeddings=box_xyxy_to_cxcywh(coords)[None])


def table(summaries: list[dict], counts: dict[str, int]) -> str:
    """The figures as aligned lines; counts: prompts of each kind."""
    width = max(24, *(len(s["name"]) for s in summaries))
    titles = "".join(f"{kind + ' IoU':>11}" for kind in KINDS)
    head = f"{'model':<{width}}{'cosine':>9}{'5th pct':>9}{titles}{'trunk':>11}{'trunk ms':>10}{'file':>11}"
    lines = [head, "-" * len(head)]
    for s in summaries:
        values = [s[f"{kind}_iou"] for kind in KINDS]
        ious = "".join(f"{'-' if value is None else f'{value:.3f}':>11}" for value in values)
        lines.append(
            f"{s['name']:<{width}}{s['cosine']:>9.4f}{s['cosine_p5']:>9.4f}{ious}{s['trunk_parameters'] / 1e6:>10.2f}M"
            f"{s['trunk_ms']:>10.1f}{human_bytes(s['file_bytes']):>11}"
        )
    asked = " and ".join(f"{count} prompts by {kind}" for kind, count in counts.items())
    lines.append(f"cosine of embeddings and IoU of masks are against the teacher; {asked}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_main(main)
