"""Draws masks, boxes and scores over a picture."""

from __future__ import annotations

import colorsys

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
    hues = (0.02 + GOLDEN_RATIO * np.arange(count)) % 1.0
    colors = [colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in hues]
    return (np.array(colors).reshape(-1, 3) * 255).round().astype(np.uint8)


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
        mask = masks[k, 0].cpu().numpy()
        pixels[mask] = ((1 - opacity) * pixels[mask] + opacity * colors[k]).astype(np.uint8)
        pixels[_outline(mask)] = colors[k]
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    unit = max(1, round(min(picture.size) / 400))  # line width, pixels
    font = ImageFont.load_default(10 * unit + 2)
    for k in order if len(boxes) else []:
        color = tuple(colors[k].tolist())
        left, top, right, bottom = _clip(boxes[k].tolist(), picture.size)
        draw.rectangle((left, top, right, bottom), outline=color, width=unit)
        if not show_scores:
            continue
        label = f"{scores[k].item():.2f}"
        draw.rectangle(draw.textbbox((left + unit, top + unit), label, font=font), fill="black")
        draw.text((left + unit, top + unit), label, fill=color, font=font)
    return picture


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


def _draw_point(picture: Image.Image, point: Tensor) -> None:
    radius = max(2, round(min(picture.size) / 60))  # pixels
    x, y = point.tolist()
    circle = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(picture).ellipse(circle, fill="white", outline="black", width=max(1, radius // 3))


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


def _fit_width(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, max(1, round(picture.height * width / picture.width))))
