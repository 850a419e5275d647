"""Clips out of SA-1B's pictures, to mix with those of videos.

Letters: T frames, N objects, H W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sam3.engine.image_list import ImageList
from sam3.engine.sa1b import annotation_path, clip_boxes, is_usable, read_annotations
from sam3.engine.static_clips import annotated_masks, static_clip
from sam3.transforms import read_image
from stage2.data.batch import ABSENT, PRESENT
from stage2.data.clips import ClipSampling, Scene
from stage2.data.mask_grid import shrink_masks


@dataclass(frozen=True)
class Stills:
    """images: annotated pictures of `split` below `root`. ratio: share of the clips that are made of them, 0..1."""

    images: ImageList
    root: Path
    ratio: float
    split: str = "train"


def still_scene(
    stills: Stills, index: int, sampling: ClipSampling, longest: int, generator: np.random.Generator
) -> Scene | None:
    """Picture `index`, shrunk to sides of at most `longest`, moving for T frames; None if it has no usable object.

    Raises FileNotFoundError or ValueError naming a file that is missing, damaged or of another size.
    """
    path = annotation_path(stills.root, stills.split, stills.images.key(index))
    annotations = read_annotations(path)
    size = (annotations.height, annotations.width)
    usable = np.flatnonzero(is_usable(clip_boxes(annotations.boxes.double().numpy(), size)))
    objects = sorted(generator.permutation(usable)[: sampling.max_objects].tolist())
    picture = read_image(stills.images.path(index))
    if (found := tuple(picture.shape[1:])) != size:
        raise ValueError(
            f"picture {stills.images.path(index)} has {found} rows and columns, but {path} is about one of {size}; "
            "fetch both again"
        )
    masks = annotated_masks(annotations, objects)
    if (scale := longest / max(size)) < 1:
        size = tuple(max(1, round(side * scale)) for side in size)
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
        masks = shrink_masks(masks, size)
    masks = masks[masks.flatten(1).any(1)]
    if not len(masks):
        return None
    clip = static_clip(picture, masks, sampling.num_frames, generator)
    shapes = clip.masks.transpose(0, 1)  # (N, T, H, W)
    states = torch.where(shapes.flatten(2).any(2), PRESENT, ABSENT)
    key = stills.images.key(index)
    return Scene([(key, t) for t in range(sampling.num_frames)], list(clip.frames), shapes, states)
