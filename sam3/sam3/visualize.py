"""Draws masks, boxes and scores over a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 4  # pixels between pictures of a table
TITLE_HEIGHT = 26
GOLDEN_RATIO = 0.618034  # steps of it around the colour wheel never come close to an earlier hue


def distinct_colors(count: int) -> np.ndarray:
    """`count` RGB colours, uint8 (count, 3), as different in hue as they can be."""
    return np.array([object_color(number) for number in range(count)], dtype=np.uint8).reshape(-1, 3)


def object_color(number: int) -> np.ndarray:
    """Row `number` of `distinct_colors`, uint8 (3,): an object has one colour in all frames, whoever is beside it."""
    color = colorsys.hsv_to_rgb((0.02 + GOLDEN_RATIO * number) % 1.0, 0.85, 1.0)
    return (np.array(color) * 255).round().astype(np.uint8)


def draw_objects(
    image: Tensor, masks: Tensor, boxes: Tensor, scores: Tensor, opacity: float = 0.5, show_scores: bool = True
) -> Image.Image:
    """The picture with one colour per object, the best on top.

    Args:
        image: uint8 (3, H, W) RGB.
        masks: bool (K, 1, H, W); boxes: (K, 4) left, top, right, bottom in pixels, or (0, 4); scores: (K,).
        opacity: of the masks, 0..1.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy().copy()
    order = scores.argsort().tolist()
    colors = distinct_colors(len(order))
    for k in order:
        _tint(pixels, masks[k, 0].cpu().numpy(), colors[k], opacity)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    unit = _line_width(picture.size)
    for k in order if len(boxes) else []:
        color = tuple(colors[k].tolist())
        left, top, right, bottom = _clip(boxes[k].tolist(), picture.size)
        draw.rectangle((left, top, right, bottom), outline=color, width=unit)
        if not show_scores:
            continue
        _draw_label(draw, (left + unit, top + unit), f"{scores[k].item():.2f}", color, unit)
    return picture


def overlay_masks(
    frame: np.ndarray, masks: Mapping[int, np.ndarray], opacity: float = 0.5, show_ids: bool = True
) -> np.ndarray:
    """A frame with one colour and contour per object, and its id at the top left of its mask.

    Args:
        frame: uint8 (H, W, 3) RGB; left as it is.
        masks: object id -> bool (H, W); later ones lie on top. An empty mask, an absent object, shows nothing.
        opacity: of the masks, 0..1; the contours are solid.

    Returns uint8 (H, W, 3). Raises ValueError if a mask has another size than the frame.
    """
    pixels = frame.copy()
    unit = _line_width(frame.shape[:2])
    visible = {}
    for number, mask in masks.items():
        if mask.shape != frame.shape[:2]:
            raise ValueError(f"the mask of object {number} has the shape {mask.shape}, its frame {frame.shape[:2]}")
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if not len(rows):
            continue
        visible[number] = (int(columns[0]), int(rows[0]))
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # nothing changes outside of it
        _tint(pixels[part], mask[part], object_color(number), opacity, unit)
    if not show_ids or not visible:
        return pixels
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for number, corner in visible.items():
        _draw_label(draw, corner, str(number), tuple(object_color(number).tolist()), unit)
    return np.array(picture)


def overlay_prompts(
    frame: np.ndarray,
    number: int,
    points: Sequence[tuple[float, float]] = (),
    labels: Sequence[int] = (),
    boxes: Sequence[tuple[float, float, float, float]] = (),
) -> np.ndarray:
    """A frame with the prompts of object `number`: boxes in its colour, points white on it (1), black beside it (0).

    Args:
        frame: uint8 (H, W, 3) RGB; left as it is.
        points: x, y in pixels, with one of `labels` each; boxes: left, top, right, bottom in pixels.

    Returns uint8 (H, W, 3).
    """
    picture = Image.fromarray(frame)
    color = tuple(object_color(number).tolist())
    for box in boxes:
        corners = _clip(list(box), picture.size)
        ImageDraw.Draw(picture).rectangle(corners, outline=color, width=_line_width(picture.size))
    for point, label in zip(points, labels, strict=True):
        _draw_point(picture, torch.as_tensor(point), positive=bool(label))
    return np.array(picture)


def answer_panel(
    frame: np.ndarray,
    masks: Mapping[int, np.ndarray],
    *,
    width: int,
    text: str = "",
    box: np.ndarray | None = None,
    point: np.ndarray | None = None,
    note: str = "",
) -> Image.Image:
    """A frame with what was asked and what was found, for a column of `picture_table` of that width.

    Args:
        frame: uint8 (H, W, 3) RGB.
        masks: as in `overlay_masks`.
        text: a phrase, written at the top; box: (4,) left, top, right, bottom; point: (2,) x, y, in pixels.
        note: written at the bottom.
    """
    pixels = overlay_masks(frame, masks, show_ids=False)
    points = [] if point is None else [tuple(point.tolist())]
    pixels = overlay_prompts(pixels, 0, points, [1] * len(points), [] if box is None else [tuple(box.tolist())])
    panel = _fit_width(Image.fromarray(pixels), width - MARGIN)
    draw = ImageDraw.Draw(panel)
    for line, top in ((text, MARGIN), (note, panel.height - TITLE_HEIGHT)):
        if line:
            _draw_label(draw, (MARGIN, top), line, (255, 255, 255), 1.5)
    return panel


def _line_width(size: tuple[int, int]) -> int:
    """Pixels that look the same in pictures of every size (either order of the sides)."""
    return max(1, round(min(size) / 400))


def _tint(pixels: np.ndarray, mask: np.ndarray, color: np.ndarray, opacity: float, contour: int = 1) -> None:
    """Colour `pixels` (H, W, 3) in place under a bool (H, W) mask, with a solid contour of so many pixels inside it."""
    pixels[mask] = ((1 - opacity) * pixels[mask] + opacity * color).astype(np.uint8)
    inner = mask
    for _ in range(contour):
        inner = inner & ~_outline(inner)
    pixels[mask & ~inner] = color


def _draw_label(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, color: tuple, unit: float) -> None:
    font = ImageFont.load_default(10 * unit + 2)
    draw.rectangle(draw.textbbox(corner, text, font=font), fill="black")
    draw.text(corner, text, fill=color, font=font)


def prompt_panels(
    image: Tensor, masks: list[Tensor], box: Tensor | None = None, point: Tensor | None = None
) -> list[Image.Image]:
    """The picture with its prompt alone, then with the prompt and each of the masks.

    Args:
        image: uint8 (3, H, W) RGB.
        masks: bool, (h, w) each, over the same picture at any resolution.
        box: (4,) left, top, right, bottom in pixels; point: (2,) x, y in pixels.
    """
    size = tuple(image.shape[1:])
    full = [F.interpolate(mask[None, None].float().cpu(), size)[0] > 0.5 for mask in masks]
    boxes = torch.zeros(0, 4) if box is None else box[None]
    panels = []
    for mask in (torch.zeros(1, *size, dtype=torch.bool), *full):
        panel = draw_objects(image, mask[None], boxes, torch.ones(1), show_scores=False)
        if point is not None:
            _draw_point(panel, point)
        panels.append(panel)
    return panels


def _draw_point(picture: Image.Image, point: Tensor, positive: bool = True) -> None:
    fill, outline = ("white", "black") if positive else ("black", "white")
    radius = max(2, round(min(picture.size) / 60))  # pixels
    x, y = point.tolist()
    circle = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(picture).ellipse(circle, fill=fill, outline=outline, width=max(1, radius // 3))


def _outline(mask: np.ndarray) -> np.ndarray:
    """The cells of a bool (H, W) mask that touch its outside, or the edge of the picture."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _clip(box: list[float], size: tuple[int, int]) -> list[float]:
    """Brings a box onto the picture, still left <= right and top <= bottom."""
    limits = (size[0] - 1, size[1] - 1) * 2
    return [min(max(value, 0), limit) for value, limit in zip(box, limits, strict=True)]


def picture_table(rows: list[list[Image.Image]], titles: list[str], width: int = 320) -> Image.Image:
    """Pictures in rows and columns of `width` pixels, with a title above each column."""
    panels = [[_fit_width(picture, width - MARGIN) for picture in row] for row in rows]
    heights = [max(picture.height for picture in row) + MARGIN for row in panels]
    sheet = Image.new("RGB", (width * len(titles), TITLE_HEIGHT + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((width * column + MARGIN, MARGIN), title, fill="black", font=ImageFont.load_default(14))
    top = TITLE_HEIGHT
    for row, height in zip(panels, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (width * column, top))
        top += height
    return sheet


def table_rows(rows: list[list[Image.Image]], width: int = 320) -> list[dict[str, int]]:
    """Where `picture_table` puts the pictures of each row, in pixels: `top`, `height`, `width`, and `step` from one
    column to the next."""
    heights = [max(_fit_width(picture, width - MARGIN).height for picture in row) for row in rows]
    tops = [TITLE_HEIGHT + sum(heights[:i]) + MARGIN * i for i in range(len(rows))]
    return [
        {"top": top, "height": height, "width": width - MARGIN, "step": width}
        for top, height in zip(tops, heights, strict=True)
    ]


def _fit_width(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, max(1, round(picture.height * width / picture.width))))
