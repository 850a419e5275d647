"""Which objects of a picture become prompts, and what each is prompted with.

Everything random comes from one generator per picture, seeded by (seed, epoch, key): a batch, a worker or the order of
the pictures changes nothing. All numbers are drawn in a fixed order for all objects of the annotation file, so that
switching one step off leaves the others as they were.

Letters: `N` objects, `H W` rows and columns of the picture, `I` decode iterations, `K` refine points.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from yacs.config import CfgNode

from sam3.engine.sa1b import ImageAnnotations, clip_boxes, drop_outside, is_usable, pixel_of_runs
from sam3.transforms import Preprocess

LAYOUTS = ("per_object", "per_image")
POINT_SOURCES = ("annotation", "mask")
JITTER_SHARE = 0.1  # of the box's side: one standard deviation
JITTER_LIMIT_PX = 20.0


@dataclass(frozen=True)
class PromptSampling:
    """How prompts are drawn.

    max_prompts: objects of a picture. use_boxes, use_points: what an object is prompted with; both at once, or, with
    prompt_mix, one of them: a box with probability prob_box (0..1). layout: `per_object` draws that for each object,
    `per_image` once for all. point_source: `annotation`, or `mask` for any pixel of the object's mask.
    jitter: move box corners. filter_by_area: smallest and largest box in pixels of the resized picture, None = no
    limit. sort_by_area: largest box first, else in the file's order. mask_nms: drop objects of which more than this
    share lies under larger ones; None = keep all.
    decode_iters, refine_points: between iterations, so many points are added, or, if refine_points_max is above 0, a
    whole number drawn from refine_points_min to refine_points_max.
    """

    max_prompts: int = 16
    use_boxes: bool = True
    use_points: bool = True
    prompt_mix: bool = False
    prob_box: float = 0.5
    layout: str = "per_object"
    point_source: str = "annotation"
    jitter: bool = True
    filter_by_area: tuple[float | None, float | None] = (None, None)
    sort_by_area: bool = True
    mask_nms: float | None = None
    decode_iters: int = 1
    refine_points: int = 0
    refine_points_min: int = 1
    refine_points_max: int = 0

    def __post_init__(self) -> None:
        """ValueError for what cannot work, in terms of the config's keys."""
        for name, value, low in (
            ("MAX_PROMPTS", self.max_prompts, 1),
            ("DECODE_ITERS", self.decode_iters, 1),
            ("POINTS_PER_REFINE_ITER", self.refine_points, 0),
            ("POINTS_PER_REFINE_ITER_MAX", self.refine_points_max, 0),
        ):
            if value < low:
                raise ValueError(f"DISTILL.{name} must be at least {low}, got {value}")
        if self.refine_points_max and not 1 <= self.refine_points_min <= self.refine_points_max:
            raise ValueError(
                f"DISTILL.POINTS_PER_REFINE_ITER_MIN is {self.refine_points_min} and _MAX {self.refine_points_max}; "
                "wanted 1 <= MIN <= MAX"
            )
        for name, value in (("DISTILL.PROMPT_MIX_PROB_BOX", self.prob_box), ("DATA.MASK_NMS", self.mask_nms)):
            if value is not None and not 0 <= value <= 1:  # NaN neither
                raise ValueError(f"{name} is a share in 0..1, got {value}")
        self._check_kinds()
        _check_limits(self.filter_by_area)

    def _check_kinds(self) -> None:
        if not (self.use_boxes or self.use_points):
            raise ValueError("DISTILL.USE_BOX_PROMPTS and USE_POINT_PROMPTS are both False; prompts need one of them")
        if self.prompt_mix and not (self.use_boxes and self.use_points):
            raise ValueError("DISTILL.PROMPT_MIX draws between DISTILL.USE_BOX_PROMPTS and USE_POINT_PROMPTS: set both")
        for name, value, choices in (
            ("PROMPT_LAYOUT", self.layout, LAYOUTS),
            ("POINT_SOURCE", self.point_source, POINT_SOURCES),
        ):
            if value not in choices:
                raise ValueError(f"DISTILL.{name} {value!r} is unknown; choose one of {', '.join(choices)}")

    @property
    def refine_shape(self) -> tuple[int, int]:
        """(I - 1, K): how many times points are added, and the most that are added at a time."""
        points = self.refine_points_max or self.refine_points
        return (self.decode_iters - 1, points) if points else (0, 0)

    def for_validation(self) -> PromptSampling:
        """The same without jitter and refinement, each object on its own with box and point, to judge both."""
        return replace(
            self, layout="per_object", jitter=False, use_boxes=True, use_points=True, prompt_mix=False, decode_iters=1
        )


def _check_limits(area: Sequence[float | None]) -> None:
    if len(area) != 2 or any(not (v is None or (isinstance(v, (int, float)) and v >= 0)) for v in area):
        raise ValueError(f"DATA.FILTER_BY_AREA is [smallest, largest], numbers or None, got {list(area)}")
    if None not in area and area[0] > area[1]:
        raise ValueError(f"DATA.FILTER_BY_AREA is [smallest, largest], but {area[0]} is above {area[1]}")


def build_sampling(config: CfgNode) -> PromptSampling:
    """How the config wants prompts drawn. ValueError names a key whose value cannot work."""
    data, distill = config.DATA, config.DISTILL
    return PromptSampling(
        max_prompts=distill.MAX_PROMPTS,
        use_boxes=distill.USE_BOX_PROMPTS,
        use_points=distill.USE_POINT_PROMPTS,
        prompt_mix=distill.PROMPT_MIX,
        prob_box=distill.PROMPT_MIX_PROB_BOX,
        layout=distill.PROMPT_LAYOUT,
        point_source=distill.POINT_SOURCE,
        jitter=data.BOX_JITTER,
        filter_by_area=tuple(data.FILTER_BY_AREA),
        sort_by_area=data.SORT_BY_AREA,
        mask_nms=data.MASK_NMS if data.LOAD_GT_MASK else None,
        decode_iters=distill.DECODE_ITERS,
        refine_points=distill.POINTS_PER_REFINE_ITER,
        refine_points_min=distill.POINTS_PER_REFINE_ITER_MIN,
        refine_points_max=distill.POINTS_PER_REFINE_ITER_MAX,
    )


@dataclass(frozen=True)
class Draws:
    """All random numbers of one picture, a row for each object of its file.

    corners: normal `(N, 4)`; order, kinds, pixels: in [0, 1), `(N,)`; image_kind: in [0, 1);
    refine_counts: in [0, 1), `(N, I-1)`; refine_uniforms: float32 in [0, 1), `(N, I-1, K)`.
    """

    corners: np.ndarray
    order: np.ndarray
    kinds: np.ndarray
    pixels: np.ndarray
    image_kind: float
    refine_counts: np.ndarray
    refine_uniforms: np.ndarray


@dataclass
class Prompts:
    """The prompts of one picture, in order.

    indices: objects of the annotation file, int `(N,)`. boxes, targets: float32 `(N, 4)` xyxy in 0..1 of the model's
    square, targets without jitter. points: float32 `(N, 2)` in the same units, zeros for an object without one.
    kinds: "box", "point" or "both". refine_uniforms: float32 `(N, I-1, K)` in [0, 1); refine_counts: int64 `(N, I-1)`;
    both None if nothing is refined.
    """

    indices: np.ndarray
    boxes: Tensor
    targets: Tensor
    points: Tensor
    kinds: list[str]
    refine_uniforms: Tensor | None
    refine_counts: Tensor | None


def sample_generator(seed: int, epoch: int | None, key: str) -> np.random.Generator:
    """The generator of the picture `key` in `epoch`; with None, the same for all epochs."""
    digest = hashlib.sha256(f"{seed} {epoch} {key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def draw(count: int, sampling: PromptSampling, generator: np.random.Generator) -> Draws:
    """Random numbers for the `count` objects of a file."""
    return Draws(
        corners=generator.standard_normal((count, 4)),
        order=generator.random(count),
        kinds=generator.random(count),
        pixels=generator.random(count),
        image_kind=generator.random(),
        refine_counts=generator.random((count, sampling.refine_shape[0])),
        refine_uniforms=generator.random((count, *sampling.refine_shape), dtype=np.float32),
    )


def choose_prompts(
    annotations: ImageAnnotations, sampling: PromptSampling, preprocess: Preprocess, generator: np.random.Generator
) -> Prompts:
    """The prompts of a picture; none if no object is usable. ValueError names a damaged mask that was needed."""
    image_size = (annotations.height, annotations.width)
    draws = draw(len(annotations), sampling, generator)
    boxes = clip_boxes(annotations.boxes.double().numpy(), image_size)
    rows = np.flatnonzero(is_usable(boxes))
    if sampling.mask_nms is not None:
        rows = rows[mask_nms([annotations.rle(row) for row in rows], sampling.mask_nms)]
    if not sampling.use_boxes:
        rows = rows[~np.isnan(object_points(annotations, rows, sampling.point_source, draws.pixels)[:, 0])]
    areas = areas_px(boxes, preprocess, image_size)
    rows = filter_by_area(rows, areas, sampling.filter_by_area)
    rows = pick(rows, draws.order, sampling.max_prompts)
    if sampling.sort_by_area:
        rows = rows[np.argsort(-areas[rows], kind="stable")]
    points = object_points(annotations, rows, sampling.point_source, draws.pixels)
    moved = jitter_boxes(boxes[rows], draws.corners[rows], image_size) if sampling.jitter else boxes[rows]
    return Prompts(
        indices=rows,
        boxes=_to_input(moved, preprocess, image_size),
        targets=_to_input(boxes[rows], preprocess, image_size),
        points=_to_input(np.nan_to_num(points, nan=0.0), preprocess, image_size),
        kinds=choose_kinds(~np.isnan(points[:, 0]), draws.kinds[rows], draws.image_kind, sampling),
        **_refinement(rows, draws, sampling),
    )


def mask_nms(masks: Sequence[Mapping[str, Any]], threshold: float) -> list[int]:
    """Which masks to keep, in their order.

    The largest first, a mask is dropped if more than `threshold` of its pixels lie under those kept before. Empty ones
    are dropped too. masks: compressed RLEs (`ImageAnnotations.rle`) of one size; nothing is decoded.
    """
    areas = [int(coco_mask.area(mask)) for mask in masks]
    kept: list[int] = []
    union = None
    for i in sorted(range(len(masks)), key=lambda i: -areas[i]):
        covered = 0 if union is None else int(coco_mask.area(coco_mask.merge([union, masks[i]], intersect=True)))
        if areas[i] == 0 or covered > threshold * areas[i]:
            continue
        kept.append(i)
        union = masks[i] if union is None else coco_mask.merge([union, masks[i]])
    return sorted(kept)


def object_points(annotations: ImageAnnotations, rows: np.ndarray, source: str, pixels: np.ndarray) -> np.ndarray:
    """The points of objects `rows`, `(len(rows), 2)` xy in pixels, NaN for those that have none.

    source: `annotation` takes the stated point if it is in the picture; `mask` takes the centre of the mask's pixel
    that `pixels` (in [0, 1), one for each object of the file) points at.
    """
    if source == "annotation":
        return drop_outside(annotations.points.double().numpy()[rows], (annotations.height, annotations.width))
    points = np.full((len(rows), 2), np.nan)
    for point, row in zip(points, rows, strict=True):
        pixel = pixel_of_runs(annotations.runs(row), annotations.height, pixels[row])
        if pixel is not None:
            point[:] = pixel[1] + 0.5, pixel[0] + 0.5
    return points


def areas_px(boxes: np.ndarray, preprocess: Preprocess, image_size: tuple[int, int]) -> np.ndarray:
    """Areas `(N,)` of boxes `(N, 4)` given in pixels of the picture, in square pixels of the resized one."""
    height, width = image_size
    h, w = preprocess.fitted_size(height, width)
    sides = boxes[:, 2:] - boxes[:, :2]
    return sides.prod(1) * (h * w) / (height * width)


def filter_by_area(rows: np.ndarray, areas: np.ndarray, limits: tuple[float | None, float | None]) -> np.ndarray:
    """Those of `rows` whose area is within `limits` (both included); all of them if that would leave none."""
    low, high = limits
    within = (areas[rows] >= (0 if low is None else low)) & (areas[rows] <= (np.inf if high is None else high))
    return rows[within] if within.any() else rows


def pick(rows: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `rows`, each equally likely, in their order: those with the lowest `order`."""
    return np.sort(rows[np.argsort(order[rows], kind="stable")[:count]])


def jitter_boxes(boxes: np.ndarray, normals: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Move each coordinate by a tenth of its side times `normals` `(N, 4)`, at most 20 pixels; stay in the picture.

    boxes: `(N, 4)` xyxy in pixels. Corners that pass each other change places; a box that is left with a side below one
    pixel stays as it was.
    """
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    moves = np.clip(JITTER_SHARE * sides * normals, -JITTER_LIMIT_PX, JITTER_LIMIT_PX)
    moved = clip_boxes(boxes + moves, image_size)
    low, high = np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])
    moved = np.concatenate([low, high], 1)
    return np.where(is_usable(moved)[:, None], moved, boxes)


def choose_kinds(has_point: np.ndarray, shares: np.ndarray, image_share: float, sampling: PromptSampling) -> list[str]:
    """ "box", "point" or "both" for each object; `shares` `(N,)` and `image_share`, in [0, 1), decide in a mix.

    What lacks a point is prompted by its box. A picture that has one kind for all objects is prompted by boxes if one
    of them lacks a point.
    """
    alike = sampling.layout == "per_image"
    if sampling.prompt_mix:
        shares = np.full_like(shares, image_share) if alike else shares
        kinds = ["box" if share < sampling.prob_box else "point" for share in shares]
    else:
        both = sampling.use_boxes and sampling.use_points
        kinds = ["both" if both else "box" if sampling.use_boxes else "point"] * len(has_point)
    if alike:
        has_point = np.full_like(has_point, has_point.all())
    return [kind if pointed else "box" for kind, pointed in zip(kinds, has_point, strict=True)]


def _to_input(coords: np.ndarray, preprocess: Preprocess, image_size: tuple[int, int]) -> Tensor:
    return preprocess.coords_to_input(torch.from_numpy(coords), image_size).float()


def _refinement(rows: np.ndarray, draws: Draws, sampling: PromptSampling) -> dict[str, Tensor | None]:
    if not all(sampling.refine_shape):
        return {"refine_uniforms": None, "refine_counts": None}
    low = sampling.refine_points_min if sampling.refine_points_max else sampling.refine_points
    choices = sampling.refine_shape[1] - low + 1
    counts = low + np.floor(draws.refine_counts[rows] * choices).astype(np.int64)
    return {
        "refine_uniforms": torch.from_numpy(draws.refine_uniforms[rows]),
        "refine_counts": torch.from_numpy(counts),
    }
