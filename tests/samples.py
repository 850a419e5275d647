"""Small data sets in the real formats, for tests."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sam3.model.config import Sam3Config
from tests.parity.fill import image

_TINY = Sam3Config.preset("tiny")
TINY_MAP = (_TINY.vit_dim, _TINY.grid, _TINY.grid)  # what the tiny teacher's trunk makes of a picture
TINY_RECORD = 4 + 2 * math.prod(TINY_MAP)  # bytes of it in a store: a seed, numbers in float16


def write_sa1b(root: Path, num_train: int = 4, num_val: int = 2, height: int = 90, width: int = 130) -> list[str]:
    """An SA-1B-layout set below `root` (images/{train,val}, annotations/{train,val}); returns all keys, train first.

    Picture i has `height` + 2 i rows and `width` columns; every other one is turned, so that both layouts occur.
    """
    keys = []
    for i in range(num_train + num_val):
        split = "train" if i < num_train else "val"
        rows, columns = (height + 2 * i, width) if i % 2 == 0 else (width, height + 2 * i)
        key = f"sa_{i + 1}"
        write_record(root, split, key, image(rows, columns, seed=i))
        keys.append(key)
    return keys


def write_record(root: Path, split: str, key: str, picture: np.ndarray, quality: int = 90) -> None:
    """One SA-1B picture (H, W, 3 uint8) and its annotation file with two rectangular masks."""
    rows, columns = picture.shape[:2]
    images, annotations = root / "images" / split, root / "annotations" / split
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(images / f"{key}.jpg", quality=quality)
    boxes = [
        (columns // 8, rows // 8, columns // 3, rows // 3),
        (columns // 2, rows // 2, columns // 3, rows // 4),
    ]
    document = {
        "image": {"image_id": int(key.split("_")[-1]), "width": columns, "height": rows, "file_name": f"{key}.jpg"},
        "annotations": [_annotation(i, box, rows, columns) for i, box in enumerate(boxes)],
    }
    (annotations / f"{key}.json").write_text(json.dumps(document))


def _annotation(number: int, box: tuple[int, int, int, int], rows: int, columns: int) -> dict:
    x, y, w, h = box
    mask = np.zeros((rows, columns), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(mask)
    return {
        "id": number,
        "segmentation": {"size": [rows, columns], "counts": rle["counts"].decode()},
        "bbox": [float(v) for v in box],
        "area": w * h,
        "predicted_iou": 0.9,
        "stability_score": 0.95,
        "crop_box": [0.0, 0.0, float(columns), float(rows)],
        "point_coords": [[x + w / 2, y + h / 2]],
    }


def sav_document(name: str, masks: np.ndarray, num_frames: int) -> dict:
    """What a JSON file of SA-V says of `masks`, bool (annotated frames, objects, H, W), in a video of `num_frames`."""
    height, width = masks.shape[2:]
    rows = []
    for shown in masks:
        codes = coco_mask.encode(np.asfortranarray(shown.transpose(1, 2, 0), dtype=np.uint8)) if len(shown) else []
        rows.append([{"size": [height, width], "counts": code["counts"].decode()} for code in codes])
    return {
        "video_id": name,
        "video_frame_count": float(num_frames),
        "video_height": float(height),
        "video_width": float(width),
        "masklet": rows,
        "masklet_id": list(range(masks.shape[1])),
        "masklet_num": masks.shape[1],
    }


def write_sav_video(root: Path, name: str, masks: np.ndarray, num_frames: int, every: int = 1) -> Path:
    """A video of SA-V as extracted with `--every`, below `root`, with manual annotations `masks` as above."""
    folder = root / name
    folder.mkdir(parents=True)
    height, width = masks.shape[2:]
    for number in range(0, num_frames, every):
        Image.fromarray(image(height, width, seed=number)).save(folder / f"{number:05d}.jpg")
    (folder / f"{name}_manual.json").write_text(json.dumps(sav_document(name, masks, num_frames)))
    return folder
