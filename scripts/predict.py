"""Finds objects in one picture, by text, boxes and points, and draws them.

    python scripts/predict.py --checkpoint sam3_checkpoints/sam3.pt --image photo.jpg --text "red car" --output out.png
    python scripts/predict.py --checkpoint merged.pt --image photo.jpg --box 40 60 210 300 --json masks.json
    python scripts/predict.py --checkpoint merged.pt --image photo.jpg --clicks --point 120 90 1 --output out.png
    python scripts/predict.py --checkpoint student_fp16.pt --image photo.jpg --text "all objects" --output out.png

Boxes and points are examples, of which everything alike is found; with --clicks they mark the very things to cut out.
Takes `sam3.pt`, merged student checkpoints, the files of train_distill.py's student (which reads phrases only) and the
tiny ones, and needs no GPU.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distillation.export import is_student_file, load_student, read_student_meta
from distillation.models.efficient_sam3 import EfficientSAM3
from distillation.processor import StudentProcessor
from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import atomic_path, write_json
from sam3.engine.weights import load_weights
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model
from sam3.transforms import read_image
from sam3.visualize import draw_objects

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16}

logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    box = {"nargs": "+", "type": float, "action": "extend", "default": [], "metavar": "X0 Y0 X1 Y1"}
    add("--checkpoint", required=True, type=Path,
        help="sam3.pt, a merged student checkpoint, a distilled student's exported file, or a tiny one")  # fmt: skip
    add("--image", required=True, type=Path, help="picture to look at")
    add("--text", help='phrase to look for, such as "red car"')
    add("--box", **box, help="pixels of something to find; several boxes one after another")
    add("--negative-box", **box, help="pixels of something not to find; likewise")
    add("--point", nargs=3, type=float, action="append", default=[], metavar=("X", "Y", "LABEL"),
        help="pixel on something to find (label 1) or not to find (0); may be given again")  # fmt: skip
    add("--clicks", action="store_true",
        help="cut out what all points (label 0: beside it) mark together, or what each box holds, and nothing else; "
        "points may go with one box. The score is then the mask's expected IoU")  # fmt: skip
    add("--threshold", type=float, help="keep objects with a higher score (0..1; 0.5 if left out); not with --clicks")
    add("--top-k", type=int, help="keep at most so many objects, the best; not with --clicks")
    add("--output", type=Path, help="picture with masks, boxes and scores drawn over it")
    add("--json", type=Path, help="masks (COCO RLE), boxes and scores as JSON")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=AUTOCAST_DTYPES, default="fp32", help="precision of the matrix products")
    add("--compile", action="store_true", help="compile the model first: slower start, faster afterwards")
    args = parser.parse_args(argv)
    if args.text is None and not (args.box or args.negative_box or args.point):
        parser.error("nothing to look for: give --text, --box, --negative-box or --point")
    if args.text is not None and not args.text.strip():
        parser.error("--text is empty; give a phrase, or leave it out and give a --box")
    if args.clicks:
        check_clicks(parser, args)
    elif args.threshold is None:
        args.threshold = 0.5
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold is a score in 0..1, got {args.threshold}")
    if args.top_k is not None and args.top_k < 1:
        parser.error(f"--top-k must be at least 1, got {args.top_k}")
    for flag, numbers in (("--box", args.box), ("--negative-box", args.negative_box)):
        if len(numbers) % 4:
            parser.error(f"{flag} takes four numbers a box (left, top, right, bottom), got {len(numbers)}")
    args.box, args.negative_box = (
        [numbers[i : i + 4] for i in range(0, len(numbers), 4)] for numbers in (args.box, args.negative_box)
    )
    if any(point[2] not in (0, 1) for point in args.point):
        parser.error("the label of a --point is 1 (find this) or 0 (not this)")
    if args.output and Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        parser.error(f"--output {args.output}: unknown picture format; use a name that ends in .png or .jpg")
    if args.json and find_spec("pycocotools") is None:
        parser.error("--json needs pycocotools, which is not installed: pip install pycocotools")
    return args


def check_clicks(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where an option makes no sense with --clicks."""
    others = {"--text": args.text, "--threshold": args.threshold, "--top-k": args.top_k}
    for flag, value in {**others, "--negative-box": args.negative_box or None}.items():
        if value is not None:
            parser.error(f"{flag} is for finding things, not for --clicks; leave one of them out")
    if args.point and len(args.box) > 4:
        parser.error("with --clicks, points go with one box at most; leave out the points or the other boxes")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, also where nothing scored above the threshold (which it says)."""
    args = parse_args(argv)
    image = read_image(args.image)
    boxes = [(normalised_box(box, image), True) for box in args.box]
    boxes += [(normalised_box(box, image), False) for box in args.negative_box]
    points = [(checked_point(point[:2], image), bool(point[2])) for point in args.point]
    processor = build_processor(args)
    start = time.perf_counter()
    state = processor.set_image(image)
    if args.clicks:
        cut_out(processor.model, state, args.box, args.point)
    else:
        processor.set_prompts(state, text=args.text, boxes=boxes, points=points)
    logger.info("model ran %.2f s on %s", time.perf_counter() - start, processor.device)
    if args.clicks or len(state["scores"]):
        report(state, "marked" if args.clicks else f"above {args.threshold:g}")
    else:
        print(f"no object above {args.threshold:g}; the best score is {processor.best_score(state):.4f}")
    if args.output:
        save_overlay(args.output, image, state)
    if args.json:
        write_json(args.json, to_coco(args, state))
    return 0


def build_processor(args: argparse.Namespace) -> Sam3Processor:
    """The checkpoint's model, of either kind, ready for pictures."""
    options = {
        "confidence_threshold": args.threshold or 0,
        "autocast_dtype": AUTOCAST_DTYPES[args.dtype],
        "top_k": args.top_k,
    }
    if is_student_file(args.checkpoint):
        return StudentProcessor(build_distilled_student(args), **options)
    if {"phase", "student"} <= load_weights(args.checkpoint).meta.keys():
        raise ValueError(
            f"{args.checkpoint} is a training checkpoint of a distilled student; make a file for inference of it with "
            f"python train_distill.py --export student.safetensors --init {args.checkpoint}"
        )
    model = build_sam3_image_model(
        checkpoint_path=args.checkpoint,
        device=args.device,
        compile=args.compile,
        enable_text_encoder=not args.clicks,
        enable_inst_interactivity=args.clicks,
    )
    return Sam3Processor(model, **options)


def build_distilled_student(args: argparse.Namespace) -> EfficientSAM3:
    """ValueError where it is to look for anything but a phrase."""
    given = {"--box": args.box, "--negative-box": args.negative_box, "--point": args.point, "--clicks": args.clicks}
    if flags := [flag for flag, value in given.items() if value]:
        raise ValueError(
            f"{args.checkpoint} is a distilled student, which reads phrases only: give --text and leave out "
            f"{', '.join(flags)}, or take sam3.pt or a merged checkpoint"
        )
    taught = read_student_meta(args.checkpoint).get("prompts", [])
    if taught and args.text not in taught:
        logger.warning("%r is none of the phrases this student was taught: %s", args.text, ", ".join(map(repr, taught)))
    student = load_student(args.checkpoint, args.device)
    if args.compile:
        student.vision.compile()
        student.mask_decoder.pixel_decoder.compile()
    return student


def normalised_box(box: list[float], image: Tensor) -> tuple[float, float, float, float]:
    """Pixels (left, top, right, bottom) -> (cx, cy, w, h) in 0..1 of the picture (3, H, W).

    Raises ValueError where the box has no area or leaves the picture.
    """
    height, width = image.shape[1:]
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        raise ValueError(
            f"box {_numbers(box)} has no area; give left, top, right, bottom with left < right, top < bottom"
        )
    if left < 0 or top < 0 or right > width or bottom > height:
        raise ValueError(f"box {_numbers(box)} leaves the picture, which is {width} x {height} pixels")
    return (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height


def checked_point(point: list[float], image: Tensor) -> list[float]:
    """The pixel (x, y) itself; ValueError where it lies outside the picture (3, H, W)."""
    height, width = image.shape[1:]
    if not (0 <= point[0] <= width and 0 <= point[1] <= height):
        raise ValueError(f"point {_numbers(point)} lies outside the picture of {width} x {height} pixels")
    return point


def cut_out(model: Sam3Image, state: dict[str, Any], boxes: list[list[float]], points: list[list[float]]) -> None:
    """Puts what boxes and points mark into `state`, as the processor puts there what it finds.

    boxes: left, top, right, bottom in pixels, one object each; points: x, y, label of one object.
    """
    doubtful = not boxes and len(points) == 1  # a lone click may mean a thing or a part of it: the best mask is taken
    masks, ious, _ = model.predict_inst(
        state,
        point_coords=[point[:2] for point in points] or None,
        point_labels=[point[2] for point in points] or None,
        box=boxes or None,
        multimask_output=doubtful,
    )
    if doubtful:
        best = ious.argmax()
        masks, ious = masks[best], ious[best]
    state["masks"] = torch.from_numpy(masks).view(-1, 1, *masks.shape[-2:])
    state["scores"] = torch.from_numpy(ious.reshape(-1))
    state["boxes"] = torch.stack([surrounding_box(mask) for mask in state["masks"][:, 0]])


def surrounding_box(mask: Tensor) -> Tensor:
    """(4,) left, top, right, bottom of a bool mask (H, W), in pixels; zeros where it is empty."""
    rows, columns = (mask.any(dim).nonzero()[:, 0] for dim in (1, 0))
    if not len(rows):
        return torch.zeros(4)
    return torch.stack((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)).float()


def report(state: dict[str, Any], what: str) -> None:
    """Prints one line per object."""
    print(f"{len(state['scores'])} objects {what}")
    for score, box, mask in zip(state["scores"], state["boxes"], state["masks"], strict=True):
        print(f"  score {score:.4f}  box {_numbers(box.tolist())}  mask {int(mask.sum())} px")


def save_overlay(path: Path, image: Tensor, state: dict[str, Any]) -> None:
    """Draws the objects over `image` (3, H, W) into the file `path`, whose suffix says the format."""
    drawing = draw_objects(image, state["masks"], state["boxes"], state["scores"])
    with atomic_path(path) as temporary:
        drawing.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


def to_coco(args: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """Objects as COCO annotations: `bbox` is left, top, width, height in pixels, `segmentation` a compressed RLE."""
    from pycocotools import mask as coco_mask  # only this output needs it

    annotations = []
    for number, (score, box, mask) in enumerate(zip(state["scores"], state["boxes"], state["masks"], strict=True)):
        rle = coco_mask.encode(np.asfortranarray(mask[0].cpu().numpy().astype(np.uint8)))
        left, top, right, bottom = box.tolist()
        annotations.append(
            {
                "id": number,
                "score": score.item(),
                "bbox": [left, top, right - left, bottom - top],
                "area": int(coco_mask.area(rle)),
                "segmentation": {"size": list(mask.shape[1:]), "counts": rle["counts"].decode()},
            }
        )
    return {
        "image": {"file_name": args.image.name, "height": state["original_height"], "width": state["original_width"]},
        "prompt": {
            "text": args.text,
            "box": args.box,
            "negative_box": args.negative_box,
            "point": args.point,
            "clicks": args.clicks,
        },
        "threshold": args.threshold,
        "annotations": annotations,
    }


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.1f}".removesuffix(".0") for value in values) + ")"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_main(main)
