"""Build a small data set in SA-1B's layout from a folder of pictures, without any network.

    python data/make_sample_sa1b.py                          # photos that ship with scikit-image and scikit-learn
    python data/make_sample_sa1b.py --images ~/photos --output data/my-set --num-train 900 --num-val 100 --crops 1
    python data/make_sample_sa1b.py --scenes --output data/scenes      # drawn objects with names, photos behind them

Every photo gives up to `--crops` pictures: itself and crops of it. No photo serves both splits.
Masks come from classical segmentation: a picture is cut into regions at four scales, and a region that returns almost
unchanged at the neighbouring scale is taken for an object or a part. The same arguments give the same files.

With --scenes the pictures are drawn, so that masks are exact and objects have names: "striped red square". Annotation
files then hold phrases as well, `{"text": ..., "ids": [...]}` with the ids of the annotations that a phrase means; an
empty list says that there is no such object. No pair of a property and a shape is in both splits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import atomic_path
from sam3.engine.sample_set import claim_folder, digests, list_photos, read_photo
from sam3.engine.scene_grounds import list_grounds, read_grounds, split_grounds
from sam3.engine.scenes import MIN_SIZE, make_scene, number_of_scene

JPEG_QUALITY = 92

SCALES = (60, 150, 400, 1000)  # felzenszwalb: larger merges more
WORK_SIDE = 320  # pixels; regions are found at this size and enlarged
MIN_AREA, MAX_AREA = 0.0015, 0.7  # share of the picture
MIN_MASKS, MAX_MASKS = 10, 60
MIN_STABILITY = 0.5  # asked of every mask after the first MIN_MASKS
SAME_REGION = 0.8  # IoU from which two regions count as one


@dataclass(frozen=True)
class Picture:
    """One picture of the set: which crop of which photo, and where it goes."""

    key: str
    split: str
    photo: str
    crop: int


@dataclass(frozen=True)
class ScenePicture:
    """One picture of a set of scenes. seed: the number of the scene; photos: what may lie behind its objects."""

    key: str
    split: str
    seed: int
    size: int
    photos: tuple[Path, ...]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    root = arguments.output
    if arguments.scenes:
        photos = list_grounds(arguments.images)
        pictures = plan_scenes(photos, arguments)
        make, record = partial(make_scene_picture, root), make_scene_record(arguments, pictures)
    else:
        if find_spec("skimage") is None:
            raise ValueError('scikit-image is needed to find masks; install it with: pip install -e ".[dev]"')
        photos = list_photos(arguments.images)
        pictures = plan(photos, arguments.num_train, arguments.num_val, arguments.crops, arguments.seed)
        make, record = partial(make_picture, root, arguments.max_side, arguments.seed), make_record(arguments, pictures)
    todo = missing_pictures(root, pictures, record)
    if not todo:
        print(f"{root} is already complete: {arguments.num_train} train and {arguments.num_val} val pictures")
        return 0
    print(f"{len(photos)} photos -> {len(pictures)} pictures in {root} ({len(todo)} to make)")
    with contextlib.ExitStack() as stack:
        several = min(arguments.workers, len(todo)) > 1
        run = stack.enter_context(ProcessPoolExecutor(arguments.workers)).map if several else map
        counts = list(tqdm(run(make, todo), total=len(todo), unit="picture", disable=None))
    print(f"made {len(counts)} pictures with {sum(counts)} masks ({min(counts)} to {max(counts)} each)")
    if bare := [picture.key for picture, count in zip(todo, counts, strict=True) if count == 0]:
        print(f"without any mask, because they are flat: {' '.join(bare)}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/sample-sa1b"), help="root of the new data set")
    parser.add_argument(
        "--images", type=Path, help="folder of pictures, searched with its sub-folders (default: the bundled photos)"
    )
    parser.add_argument("--num-train", type=int, default=48, help="pictures of the train split")
    parser.add_argument("--num-val", type=int, default=8, help="pictures of the val split")
    parser.add_argument("--crops", type=int, default=4, help="most pictures made of one photo; the first is all of it")
    parser.add_argument("--max-side", type=int, default=768, help="longest side of a picture in pixels")
    parser.add_argument("--scenes", action="store_true", help="draw named objects, over the pictures or over paint")
    parser.add_argument("--size", type=int, default=224, help="side of a scene in pixels")
    parser.add_argument("--seed", type=int, default=0, help="decides the split and the crops, and what is drawn")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)
    if arguments.num_train < 1 or arguments.num_val < 0 or arguments.crops < 1 or arguments.workers < 1:
        parser.error("--num-train, --crops and --workers must be at least 1, --num-val at least 0")
    if arguments.max_side < 32:
        parser.error(f"--max-side must be at least 32, got {arguments.max_side}")
    for name in ("crops", "max_side") if arguments.scenes else ("size",):
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} has no effect {'with' if arguments.scenes else 'without'} --scenes"
            )
    if arguments.scenes and (arguments.size < MIN_SIZE or arguments.seed < 0):
        parser.error(f"--size must be at least {MIN_SIZE} and --seed at least 0 with --scenes")
    return arguments


def plan(photos: list[Path], num_train: int, num_val: int, crops: int, seed: int) -> list[Picture]:
    """Deal photos to the splits, then take whole photos first, second crops next, and so on.

    Raises ValueError if the photos cannot give so many pictures.
    """
    need_train, need_val = math.ceil(num_train / crops), math.ceil(num_val / crops)
    if need_train + need_val > len(photos):
        raise ValueError(
            f"{num_train} train and {num_val} val pictures need {need_train} + {need_val} photos at --crops {crops}, "
            f"but there are {len(photos)}; raise --crops, lower --num-train or --num-val, or add photos"
        )
    shuffled = list(photos)
    random.Random(seed).shuffle(shuffled)
    share = math.ceil(len(photos) * num_val / (num_train + num_val))
    num_val_photos = max(need_val, min(share, len(photos) - need_train))
    pictures: list[Picture] = []
    for split, group, count in (
        ("train", shuffled[num_val_photos:], num_train),
        ("val", shuffled[:num_val_photos], num_val),
    ):
        for i in range(count):
            crop, which = divmod(i, len(group))
            pictures.append(Picture(f"sa_{len(pictures) + 1}", split, str(group[which]), crop))
    return pictures


def plan_scenes(photos: list[Path], arguments: argparse.Namespace) -> list[ScenePicture]:
    """The scenes of both splits, which share no photo. Raises ValueError if there are too few photos."""
    grounds = split_grounds(photos)
    pictures: list[ScenePicture] = []
    for split, count in (("train", arguments.num_train), ("val", arguments.num_val)):
        for _ in range(count):
            number = len(pictures) + 1
            seed = number_of_scene(arguments.seed, number)
            pictures.append(ScenePicture(f"sa_{number}", split, seed, arguments.size, grounds[split]))
    return pictures


def make_record(arguments: argparse.Namespace, pictures: list[Picture]) -> dict:
    """Everything that decides the bytes of the set; photos by name and content, so that the folder may move."""
    sums = digests(picture.photo for picture in pictures)
    entries = [{**asdict(picture), "photo": Path(picture.photo).name} for picture in pictures]
    for entry, picture in zip(entries, pictures, strict=True):
        entry["photo_sha256"] = sums[picture.photo]
    return {"format": 1, "seed": arguments.seed, "max_side": arguments.max_side, "pictures": entries}


def make_scene_record(arguments: argparse.Namespace, pictures: list[ScenePicture]) -> dict:
    """As `make_record`, for scenes."""
    grounds = {picture.split: picture.photos for picture in pictures}
    sums = digests(photo for photos in grounds.values() for photo in photos)
    return {
        "format": 1,
        "scenes": True,
        **{name: getattr(arguments, name) for name in ("seed", "size", "num_train", "num_val")},
        "photos": {split: [[photo.name, sums[str(photo)]] for photo in photos] for split, photos in grounds.items()},
    }


def missing_pictures(
    root: Path, pictures: Sequence[Picture | ScenePicture], record: dict
) -> list[Picture | ScenePicture]:
    """Pictures that are not on disk yet. Raises ValueError if `root` holds a set made with other arguments."""
    claim_folder(root, record)
    return [picture for picture in pictures if not all(path.is_file() for path in picture_files(root, picture))]


def picture_files(root: Path, picture: Picture | ScenePicture) -> tuple[Path, Path]:
    """Paths of a picture and of its annotations."""
    return (
        root / "images" / picture.split / f"{picture.key}.jpg",
        root / "annotations" / picture.split / f"{picture.key}.json",
    )


def make_picture(root: Path, max_side: int, seed: int, picture: Picture) -> int:
    """Write one picture and its annotations; returns the number of masks."""
    photo = crop_photo(read_photo(Path(picture.photo)), picture, seed)
    photo.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    save_image(root, picture, photo)
    masks = find_masks(np.asarray(photo))
    write_annotations(root, picture, describe(picture, photo, masks))
    return len(masks)


def make_scene_picture(root: Path, picture: ScenePicture) -> int:
    """Write one scene, its annotations and its phrases; returns the number of masks."""
    scene = make_scene(picture.seed, picture.size, picture.split, read_grounds(picture.photos, picture.size))
    image = Image.fromarray(scene.image)
    save_image(root, picture, image)
    document = describe(picture, image, [(mask, 1.0, 1.0) for mask in scene.masks])
    ids = [entry["id"] for entry in document["annotations"]]
    document["phrases"] = [
        {"text": phrase.text, "ids": [ids[place] for place in phrase.matches]} for phrase in scene.phrases
    ]
    write_annotations(root, picture, document)
    return len(ids)


def save_image(root: Path, picture: Picture | ScenePicture, image: Image.Image) -> None:
    with atomic_path(picture_files(root, picture)[0]) as temporary:
        image.save(temporary, "JPEG", quality=JPEG_QUALITY)


def write_annotations(root: Path, picture: Picture | ScenePicture, document: dict) -> None:
    with atomic_path(picture_files(root, picture)[1]) as temporary:
        temporary.write_text(json.dumps(document))


def describe(
    picture: Picture | ScenePicture, image: Image.Image, masks: Sequence[tuple[np.ndarray, float, float]]
) -> dict:
    """The document of SA-1B for a picture with `(mask (H, W) bool, predicted_iou, stability_score)`."""
    image_id = int(picture.key.removeprefix("sa_"))
    return {
        "image": {
            "image_id": image_id,
            "width": image.width,
            "height": image.height,
            "file_name": f"{picture.key}.jpg",
        },
        "annotations": [annotate(image_id * 1000 + i, *mask) for i, mask in enumerate(masks)],
    }


def crop_photo(photo: Image.Image, picture: Picture, seed: int) -> Image.Image:
    """Crop 0 is the photo itself; the others keep 55% to 85% of each side, drawn from seed, photo and number."""
    if picture.crop == 0:
        return photo
    generator = random.Random(f"{seed}/{Path(picture.photo).name}/{picture.crop}")
    width, height = (max(1, round(side * generator.uniform(0.55, 0.85))) for side in photo.size)
    left, top = generator.randint(0, photo.width - width), generator.randint(0, photo.height - height)
    return photo.crop((left, top, left + width, top + height))


def find_masks(image: np.ndarray) -> list[tuple[np.ndarray, float, float]]:
    """Masks of an RGB picture `(H, W, 3)`: `(mask (H, W) bool, predicted_iou, stability_score)`, large ones first.

    A region's stability is its best IoU with a region of the next finer or coarser scale; predicted_iou is the mean of
    the two. Both lie in 0..1.
    """
    label_maps = segment(image)
    regions = choose_regions(label_maps)
    height, width = image.shape[:2]
    masks = []
    for scale, label, predicted_iou, stability in regions:
        # Enlarged smoothly and cut at one half, so that edges are no stairs.
        small = Image.fromarray((label_maps[scale] == label).astype(np.uint8) * 255)
        mask = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)) > 127
        if mask.any():
            masks.append((mask, predicted_iou, stability))
    return sorted(masks, key=lambda entry: -int(entry[0].sum()))


def segment(image: np.ndarray) -> list[np.ndarray]:
    """One label map `(h, w)` with labels 0..n-1 for each of SCALES, at working size."""
    from skimage.segmentation import felzenszwalb

    small = Image.fromarray(image)
    small.thumbnail((WORK_SIDE, WORK_SIDE))
    min_size = max(4, int(MIN_AREA * small.width * small.height))
    return [felzenszwalb(np.asarray(small), scale=scale, sigma=0.8, min_size=min_size) for scale in SCALES]


def choose_regions(label_maps: list[np.ndarray]) -> list[tuple[int, int, float, float]]:
    """The most stable regions, no two the same: `(index of the scale, label, predicted_iou, stability)`."""
    iou = {(i, j): iou_table(a, b) for i, a in enumerate(label_maps) for j, b in enumerate(label_maps) if i != j}
    pixels, last = label_maps[0].size, len(label_maps) - 1
    candidates = []
    for i, labels in enumerate(label_maps):
        areas = np.bincount(labels.ravel())
        # The first and the last scale have one neighbour, which then counts twice.
        finer, coarser = (iou[i, j].max(1) for j in (i - 1 if i else 1, i + 1 if i < last else last - 1))
        for label in np.flatnonzero((areas >= MIN_AREA * pixels) & (areas <= MAX_AREA * pixels)):
            pair = float(finer[label]), float(coarser[label])
            candidates.append((i, int(label), sum(pair) / 2, max(pair)))
    kept: list[tuple[int, int, float, float]] = []
    for i, label, mean, stability in sorted(candidates, key=lambda candidate: -candidate[3]):
        if len(kept) == MAX_MASKS or (len(kept) >= MIN_MASKS and stability < MIN_STABILITY):
            break
        if all(i == j or iou[i, j][label, other] < SAME_REGION for j, other, _, _ in kept):
            kept.append((i, label, mean, stability))
    return kept


def iou_table(labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of every region of `labels` (h, w) with every region of `others` (h, w): `(n, m)`."""
    rows, columns = int(labels.max()) + 1, int(others.max()) + 1
    shared = np.bincount((labels * columns + others).ravel(), minlength=rows * columns).reshape(rows, columns)
    return shared / (shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared)


def annotate(number: int, mask: np.ndarray, predicted_iou: float, stability: float) -> dict:
    """One entry of `annotations`; the point is the one farthest from the mask's border."""
    from pycocotools import mask as coco_mask
    from scipy.ndimage import distance_transform_edt

    height, width = mask.shape
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    left, top, box_width, box_height = (int(side) for side in coco_mask.toBbox(rle))
    # Only the box, with a border of background, because the transform is the slow step.
    inside = distance_transform_edt(np.pad(mask[top : top + box_height, left : left + box_width], 1))
    row, column = np.unravel_index(inside.argmax(), inside.shape)
    return {
        "id": number,
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
        "bbox": [float(left), float(top), float(box_width), float(box_height)],
        "area": int(mask.sum()),
        "predicted_iou": round(predicted_iou, 4),
        "stability_score": round(stability, 4),
        "crop_box": [0.0, 0.0, float(width), float(height)],
        "point_coords": [[float(left + column - 1), float(top + row - 1)]],
    }


if __name__ == "__main__":
    run_main(main)
