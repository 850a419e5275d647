"""Build a small data set for prompt distillation out of pictures in SA-1B's layout: a PNG for the mask of each object.

    python data/make_sample_sa1b.py && python data/make_sample_prompts.py    # 48 train and 8 val pictures
    python data/make_sample_prompts.py --sa1b data/sa-1b --output data/mine --num-train 900 --num-val 100

`<output>/<split>/image/<key>.jpg` is the picture as it was, `<output>/<split>/mask/<key>/obj_00.png` its largest mask
(255 on the object, 0 elsewhere), `obj_01.png` the next one, and so on. Pictures are taken in the order of their names.
The same arguments give the same files; a second run makes what is missing.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import atomic_path, sha256
from sam3.engine.image_list import SPLITS
from sam3.engine.sa1b import ImageAnnotations, annotation_path, decode_runs, list_sa1b, read_annotations
from sam3.engine.sample_set import claim_folder


@dataclass(frozen=True)
class Picture:
    """One picture of the set, and where it and its annotations lie now."""

    key: str
    split: str
    image: Path
    annotations: Path


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    wanted = {"train": arguments.num_train, "val": arguments.num_val}
    pictures = [picture for split in SPLITS for picture in choose(arguments.sa1b, split, wanted[split])]
    root = arguments.output
    claim_folder(root, make_record(pictures, arguments.max_masks))
    todo = [picture for picture in pictures if not image_file(root, picture).is_file()]
    if todo:
        print(f"{arguments.sa1b} -> {len(pictures)} pictures in {root} ({len(todo)} to make)")
        counts = [
            make_picture(root, picture, arguments.max_masks) for picture in tqdm(todo, unit="picture", disable=None)
        ]
        print(f"made {len(counts)} pictures with {sum(counts)} masks ({min(counts)} to {max(counts)} each)")
    num_val = sum(picture.split == "val" for picture in pictures)
    print(f"{root} is complete: {len(pictures) - num_val} train and {num_val} val pictures")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--sa1b", type=Path, default=Path("data/sample-sa1b"), help="root of the set in SA-1B's layout")
    parser.add_argument("--output", type=Path, default=Path("data/sample-prompts"), help="root of the new data set")
    parser.add_argument("--num-train", type=int, help="pictures of the train split (default: all there are)")
    parser.add_argument("--num-val", type=int, help="pictures of the val split (default: all there are)")
    parser.add_argument("--max-masks", type=int, default=12, help="most masks of a picture, the largest ones")
    arguments = parser.parse_args(argv)
    for name, least in (("num_train", 1), ("num_val", 0), ("max_masks", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return arguments


def choose(root: Path, split: str, count: int | None) -> list[Picture]:
    """The first `count` annotated pictures of a split, None for all.

    Raises FileNotFoundError if there are none, ValueError if there are fewer.
    """
    if count == 0 or (split == "val" and count is None and not (root / "images" / split).is_dir()):
        return []
    for folder in (root / "images" / split, root / "annotations" / split):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}; make a sample with python data/make_sample_sa1b.py, or name a set in SA-1B's "
                "layout with --sa1b"
            )
    images = list_sa1b(root, split)
    if count is not None and count > len(images):
        raise ValueError(
            f"{root} holds {len(images)} annotated pictures of {split}, wanted {count}; lower --num-{split} or name "
            "another set with --sa1b"
        )
    keys = images.keys()[:count]
    return [Picture(key, split, images.path(i), annotation_path(root, split, key)) for i, key in enumerate(keys)]


def make_record(pictures: list[Picture], max_masks: int) -> dict:
    """Everything that decides the bytes of the set; files by name and content, so that the folder may move."""
    entries = [
        {
            **asdict(picture),
            "image": picture.image.name,
            "annotations": picture.annotations.name,
            "image_sha256": sha256(picture.image),
            "annotations_sha256": sha256(picture.annotations),
        }
        for picture in pictures
    ]
    return {"format": 1, "max_masks": max_masks, "pictures": entries}


def image_file(root: Path, picture: Picture) -> Path:
    return root / picture.split / "image" / picture.image.name


def make_picture(root: Path, picture: Picture, max_masks: int) -> int:
    """Write the masks of a picture, then the picture, which says that it is complete; returns the number of masks."""
    annotations = read_annotations(picture.annotations)
    chosen = largest(annotations, max_masks)
    digits = len(str(max_masks - 1))
    for place, index in enumerate(chosen):
        mask = decode_runs(annotations.runs(index), annotations.height, annotations.width)
        file = root / picture.split / "mask" / picture.key / f"obj_{place:0{max(2, digits)}d}.png"
        with atomic_path(file) as temporary:
            Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, "PNG")
    with atomic_path(image_file(root, picture)) as temporary:
        shutil.copyfile(picture.image, temporary)
    return len(chosen)


def largest(annotations: ImageAnnotations, count: int) -> list[int]:
    """Which `count` masks have the most pixels, the largest first; of equal ones the first, of empty ones none."""
    areas = [int(annotations.runs(index)[1::2].sum()) for index in range(len(annotations))]
    order = sorted(range(len(areas)), key=lambda index: -areas[index])
    return [index for index in order if areas[index]][:count]


if __name__ == "__main__":
    run_main(main)
