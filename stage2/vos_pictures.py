"""Predicted masks as PNG files that lie as the true ones do, and a video of truth and models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from sam3.engine.files import atomic_path
from sam3.engine.vos_folders import DAVIS_VOID, AnnotatedVideo, read_labels
from sam3.transforms import read_image
from sam3.video_writer import write_video
from sam3.visualize import object_color, overlay_masks, picture_table
from stage2.vos_tracking import TrackedVideo

FPS = 24.0  # of the frames of SA-V and DAVIS
PANEL_WIDTH = 400  # pixels
TREES = {"sav": ("Annotations_6fps",), "davis": ("Annotations", "480p")}  # folders above the videos' own


def predictions_of(folder: Path, video: AnnotatedVideo, layout: str) -> Path:
    """Where the masks of a video lie below a model's folder."""
    return folder.joinpath(*TREES[layout], video.name)


def save_masks(folder: Path, video: AnnotatedVideo, tracked: TrackedVideo, layout: str) -> None:
    """Write one PNG for each true one, of the same name: `<object>/00000.png`, or labels in `00000.png` for davis."""
    if layout == "davis":
        for number in video.annotated:
            labels = np.zeros(video.size, dtype=np.uint8)
            for row, name in enumerate(video.objects):
                labels[tracked.mask(number, row)] = int(name)
            picture = Image.fromarray(labels)
            picture.putpalette(_palette())
            _save(picture, folder / f"{number:05d}.png")
        return
    for row, name in enumerate(video.objects):
        for number in video.numbers_of(row):
            _save(Image.fromarray(tracked.mask(number, row)), folder / name / f"{number:05d}.png")


def read_mask(folder: Path, video: AnnotatedVideo, number: int, row: int, layout: str) -> np.ndarray | None:
    """What `save_masks` wrote of an object, bool (H, W); None where there is no true mask."""
    if number not in video.numbers_of(row):
        return None
    if layout == "davis":
        return read_labels(folder / f"{number:05d}.png", video.size) == int(video.objects[row])
    return read_labels(folder / video.objects[row] / f"{number:05d}.png", video.size) > 0


def write_overlay(path: Path, video: AnnotatedVideo, models: Mapping[str, Path], layout: str) -> None:
    """A video (.mp4, .gif) of the annotated frames: the truth, then each model.

    models: name -> the folder that `save_masks` wrote this video to.
    """
    numbers = video.annotated
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    write_video(path, _rows(video, models, layout), FPS / step)


def _rows(video: AnnotatedVideo, models: Mapping[str, Path], layout: str) -> Iterator[np.ndarray]:
    """Each annotated frame as uint8 (h, w, 3), with a panel for the truth and for each model."""
    for number in video.annotated:
        pixels = np.ascontiguousarray(read_image(video.frames.path(number)).permute(1, 2, 0).numpy())
        found = [[video.mask(number, row) for row in range(video.num_objects)]]
        found += [
            [read_mask(folder, video, number, row, layout) for row in range(video.num_objects)]
            for folder in models.values()
        ]
        panels = []
        for masks in found:
            known = {row: mask for row, mask in enumerate(masks) if mask is not None}
            panels.append(Image.fromarray(overlay_masks(pixels, known)))
        yield np.asarray(picture_table([panels], ["truth", *models], PANEL_WIDTH))


def _palette() -> bytes:
    """The colours of the overlay for labels 1 to 254."""
    colors = np.zeros((DAVIS_VOID + 1, 3), dtype=np.uint8)
    colors[1:] = [object_color(number - 1) for number in range(1, DAVIS_VOID + 1)]
    return colors.tobytes()


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
