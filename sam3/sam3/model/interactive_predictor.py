"""One thing in a picture, from clicks, a box or an earlier mask: what SAM3's tracker makes of a single frame.

From "Segment Anything" (Kirillov et al., 2023), whose interface this is.

Letters: I pictures of a state, n prompts about one of them, P points of a prompt, K masks proposed for a prompt (3 or
1), C channels, G side of the feature map, H W rows and columns of the picture. Mask logits "low" have the side 4 G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3.model.mask_cleaning import fill_holes, require_opencv
from sam3.model.tracker import FrameFeatures, Sam3Tracker
from sam3.model.video_prompts import BOX_LABELS, check_box, check_points, finite_numbers, input_coords
from sam3.transforms import Preprocess

MAX_HOLE_AREA = 256  # cells of a low mask
FILLED_LOGIT = 10.0  # of cells that become object when a hole is filled
LOW_LIMIT = 32.0  # low masks are handed out as logits within +- this
FEATURES = "tracker_features"  # where a state keeps them, beside the maps that they are made of

Numbers = Sequence | np.ndarray | Tensor
Masks = tuple[np.ndarray, np.ndarray, np.ndarray]


class InteractivePredictor(nn.Module):
    """Keeps the tracker, as `model`; what belongs to pictures lives in the state that `Sam3Processor` makes.

    Whether the tracker takes an object to be visible plays no part here: a click is a mask.
    """

    def __init__(self, model: Sam3Tracker, preprocess: Preprocess, max_hole_area: int = MAX_HOLE_AREA):
        """
        Args:
            preprocess: how the pictures of a state became input.
            max_hole_area: holes of at most so many cells of a low mask are filled; 0 fills none.
        """
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.max_hole_area = max_hole_area

    @torch.inference_mode()
    def predict(
        self,
        state: dict[str, Any],
        point_coords: Numbers | None = None,
        point_labels: Numbers | None = None,
        box: Numbers | None = None,
        mask_input: Numbers | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
        index: int | None = None,
    ) -> Masks:
        """Masks of one thing, or of n, in one picture.

        The tracker is put into eval mode, where it chooses among its masks.

        Args:
            state: from `Sam3Processor.set_image` or `set_image_batch` with a model that has the second neck.
            point_coords: (P, 2) x, y, or (n, P, 2); point_labels: (P,) or (n, P), 1 on the thing, 0 beside it.
            box: (4,) or (n, 4), left, top, right, bottom; several boxes are as many prompts.
            mask_input: (1, 4G, 4G) or (n, 1, 4G, 4G), low mask logits of an earlier call, to go on from.
            multimask_output: propose three masks, which a lone click needs, instead of the likeliest one.
            return_logits: masks as logits instead of bool.
            normalize_coords: points and boxes are in pixels of the picture; False: in 0..1 of it.
            index: picture of the state; left out, the one in use.

        Returns:
            masks (K, H, W) bool; ious (K,), what the model expects them to be worth, 0..1; low (K, 4G, 4G), mask logits
            over the model's square, within +-32. With n > 1 each has n rows in front.

        Raises ValueError: no prompt, prompts that do not belong together, lie outside the picture or have another size,
        or a state without what clicks need.
        """
        features = self._features(state)
        index = state["index"] if index is None else index
        size = (state["original_heights"][index], state["original_widths"][index])
        unit = torch.ones(2) if normalize_coords else torch.tensor([size[1], size[0]])
        points = self._read_points(point_coords, point_labels, box, size, unit)
        masks = None if mask_input is None else self._read_masks(mask_input)
        if points is None and masks is None:
            raise ValueError("nothing to segment: give points with labels, a box or a mask")
        if points is not None and masks is not None and len(masks) != len(points[1]):
            raise ValueError(f"mask_input holds {len(masks)} masks for {len(points[1])} prompts; give one for each")
        low, ious = self._decode(features.select(slice(index, index + 1)), points, masks, multimask_output)
        logits = self.preprocess.maps_to_image(self._fill_holes(low), size)  # (n, K, H, W)
        found = (logits if return_logits else logits > 0, ious, low.clamp(-LOW_LIMIT, LOW_LIMIT))
        masks, ious, low = ((part[0] if len(part) == 1 else part).cpu().numpy() for part in found)
        return masks, ious, low

    def predict_batch(
        self,
        state: dict[str, Any],
        point_coords_batch: Sequence[Numbers | None] | None = None,
        point_labels_batch: Sequence[Numbers | None] | None = None,
        box_batch: Sequence[Numbers | None] | None = None,
        mask_input_batch: Sequence[Numbers | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """`predict` for each of the I pictures of `state`, with one entry per picture in every list that is given.

        Returns lists of masks, ious and low masks.
        """
        count = len(self._features(state).top)
        batches = {
            "point_coords_batch": point_coords_batch,
            "point_labels_batch": point_labels_batch,
            "box_batch": box_batch,
            "mask_input_batch": mask_input_batch,
        }
        for name, entries in batches.items():
            if entries is not None and len(entries) != count:
                raise ValueError(f"{name} has {len(entries)} entries for {count} pictures; give one each, or None")
        prompts = zip(*([None] * count if entries is None else entries for entries in batches.values()), strict=True)
        options = (multimask_output, return_logits, normalize_coords)
        found = [self.predict(state, *prompt, *options, index) for index, prompt in enumerate(prompts)]
        masks, ious, low = (list(column) for column in zip(*found, strict=True))
        return masks, ious, low

    def _fill_holes(self, low: Tensor) -> Tensor:
        """(n, K, 4G, 4G) mask logits."""
        if not self.max_hole_area:
            return low
        require_opencv()
        return fill_holes(low.flatten(0, 1)[:, None], self.max_hole_area, FILLED_LOGIT).view_as(low)

    def _decode(
        self, features: FrameFeatures, points: tuple[Tensor, Tensor] | None, masks: Tensor | None, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Low masks (n, K, 4G, 4G) and ious (n, K), float32, of n prompts about one picture.

        Unlike `Sam3Tracker.predict_masks`, a mask alone is not accompanied by an empty point.
        """
        tracker = self.model.eval()
        sparse, dense = tracker.sam_prompt_encoder(points=points, boxes=None, masks=masks)
        decoded = tracker.sam_mask_decoder(
            tracker.condition(features.top, None),
            tracker.sam_prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            multimask,
            features.high_res,
        )
        return decoded.masks.float(), decoded.ious.float()

    @torch.inference_mode()
    def _features(self, state: dict[str, Any]) -> FrameFeatures:
        """Of the I pictures of `state`, made once and kept in it."""
        if "backbone_out" not in state:
            raise ValueError("there is no picture yet; call set_image before giving a prompt")
        maps = state["backbone_out"].get("sam2_backbone_out")
        if maps is None:
            raise ValueError(
                "this state lacks the maps of the second neck, which clicks need; make it with set_image of a "
                "Sam3Processor whose model was built with enable_inst_interactivity=True"
            )
        if FEATURES not in maps:
            dtype = self.model.no_mem_embed.dtype  # the maps have another one if they were made under autocast
            found = self.model.prepare_features([level.to(dtype) for level in maps["backbone_fpn"]])
            maps[FEATURES] = FrameFeatures(found.s0.to(dtype), found.s1.to(dtype), found.top)
        return maps[FEATURES]

    def _read_points(
        self,
        point_coords: Numbers | None,
        point_labels: Numbers | None,
        box: Numbers | None,
        size: tuple[int, int],
        unit: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """A box's corners, then the points: (n, P, 2) in pixels of the model's square, and labels (n, P).

        unit: (2,) pixels of the picture per unit of the numbers given.
        """
        if (point_coords is None) != (point_labels is None):
            missing = "point_labels" if point_labels is None else "point_coords"
            raise ValueError(f"points come with labels, but {missing} are missing; give both, or neither")
        parts = []
        if box is not None:
            parts.append(_read_boxes(box, size, unit))
        if point_coords is not None:
            parts.append(_read_clicks(point_coords, point_labels, size, unit))
        if not parts:
            return None
        counts = [len(labels) for _, labels in parts]
        if len(set(counts)) > 1:
            raise ValueError(f"{counts[0]} boxes with {counts[1]} sets of points; give one of each for every prompt")
        coords, labels = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
        device = self.model.no_mem_embed.device
        return input_coords(coords, self.preprocess, size).to(device), labels.to(device)

    def _read_masks(self, mask_input: Numbers) -> Tensor:
        """(n, 1, 4G, 4G) of the type and on the device of the weights."""
        given = finite_numbers(mask_input, "mask_input")
        masks = given[None] if given.ndim == 3 else given
        side = self.model.low_side
        if masks.ndim != 4 or not len(masks) or tuple(masks.shape[1:]) != (1, side, side):
            raise ValueError(
                f"mask_input has the shape {tuple(given.shape)}, wanted (1, {side}, {side}): one of the low masks that "
                "an earlier call returned, low[k][None]"
            )
        return masks.to(self.model.no_mem_embed)


def _read_boxes(box: Numbers, size: tuple[int, int], unit: Tensor) -> tuple[Tensor, Tensor]:
    """Corners (n, 2, 2) in pixels of the picture, and their labels (n, 2)."""
    numbers = finite_numbers(box, "a box")
    if numbers.shape[-1:] != (4,) or numbers.ndim > 2 or not numbers.numel():
        raise ValueError(f"a box is four numbers (left, top, right, bottom), several are (n, 4); got {box!r}")
    corners = torch.stack([check_box(row * unit.repeat(2), size) for row in numbers.reshape(-1, 4)])
    return corners, torch.tensor(BOX_LABELS).expand(len(corners), -1)


def _read_clicks(
    point_coords: Numbers, point_labels: Numbers, size: tuple[int, int], unit: Tensor
) -> tuple[Tensor, Tensor]:
    """Points (n, P, 2) in pixels of the picture, and their labels (n, P)."""
    coords, labels = finite_numbers(point_coords, "points"), finite_numbers(point_labels, "labels")
    found = f"{tuple(coords.shape)} with {tuple(labels.shape)}"
    if labels.ndim == 1:
        coords, labels = coords[None], labels[None]
    if labels.ndim != 2 or not labels.numel() or coords.shape != (*labels.shape, 2):
        raise ValueError(f"points are (P, 2) with labels (P,), or (n, P, 2) with labels (n, P); got {found}")
    pairs = [check_points(xy * unit, marks, size) for xy, marks in zip(coords, labels, strict=True)]
    return torch.stack([xy for xy, _ in pairs]), torch.stack([marks for _, marks in pairs])
