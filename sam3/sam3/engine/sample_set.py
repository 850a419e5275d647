"""What the makers of sample data sets share: real photos without any network, and a record of what a set is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sam3.engine.files import sha256, write_json
from sam3.engine.image_list import IMAGE_SUFFIXES

# Photos inside the wheels themselves; other members of skimage.data would be downloaded on first use.
BUNDLED = {
    "skimage": (
        "data",
        (
            *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
            *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "rocket.jpg"),
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
RECORD = "sample.json"  # what the set was made from; decides whether a second run finds it complete


def list_photos(folder: Path | None) -> list[Path]:
    """Sorted paths of the pictures below `folder`, or of the bundled photos. Raises ValueError if there are none."""
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"--images {folder} is not a folder")
        photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        wanted = f"files ending in {' '.join(IMAGE_SUFFIXES)} below {folder}"
    else:
        photos = [path for path in map(Path, bundled_paths()) if path.is_file()]
        wanted = (
            "the photos that ship with scikit-image and scikit-learn; install these with: "
            'pip install -e ".[dev]", or pass --images'
        )
    if not photos:
        raise ValueError(f"found no pictures; wanted {wanted}")
    return photos


def bundled_paths() -> list[str]:
    """Where the bundled photos lie, without importing the packages."""
    paths = []
    for package, (folder, names) in BUNDLED.items():
        if (spec := find_spec(package)) is not None and spec.origin is not None:
            paths += [str(Path(spec.origin).parent / folder / name) for name in names]
    return paths


def read_photo(path: Path) -> Image.Image:
    """An 8-bit RGB picture, upright. Raises ValueError naming a file that cannot be decoded."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits per pixel; PIL's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is not a readable picture ({error}); repair it or take it out of the folder"
        ) from error


def digests(photos: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of each photo, by its path as given."""
    return {str(photo): sha256(photo) for photo in sorted({*map(str, photos)})}


def claim_folder(root: Path, record: dict[str, Any]) -> None:
    """Write `record`, everything that decides the bytes of the set, into an empty `root`; or find it there.

    Raises ValueError if `root` holds a set with another record, or anything else.
    """
    record_file = root / RECORD
    if record_file.is_file():
        if json.loads(record_file.read_text()) != record:
            raise ValueError(
                f"{root} holds a sample made with other arguments or photos (see {record_file}); "
                "delete that folder or choose another --output"
            )
    elif root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty and was not made by this script; choose another --output")
    else:
        write_json(record_file, record)
