"""Pictures and prompts in, masks, boxes and scores out: the interface that SAM3's users know.

Letters: K objects found, H W rows and columns of the original picture, Q queries, S side of the model's square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam3.model.data_misc import FindStage
from sam3.model.sam3_image import Sam3Image
from sam3.transforms import to_rgb

VISUAL_PROMPT = "visual"  # the phrase SAM3 was trained with where only boxes or points say what to find
RESULTS = ("outputs", "masks", "masks_logits", "boxes", "scores")

Picture = Image.Image | np.ndarray | Tensor


class Sam3Processor:
    """Keeps a model; what belongs to a picture lives in the `state` dict that its methods take and return.

    After a prompt, `state` holds the K objects above the threshold, in query order:
      masks         bool (K, 1, H, W)
      masks_logits  float (K, 1, H, W), probabilities in 0..1 in spite of SAM3's name for them
      boxes         float (K, 4), left, top, right, bottom in pixels of the picture, not clipped to it
      scores        float (K,), in 0..1
    """

    def __init__(
        self,
        model: Sam3Image,
        resolution: int | None = None,
        device: torch.device | str | None = None,
        confidence_threshold: float = 0.5,
        autocast_dtype: torch.dtype | None = None,
        top_k: int | None = None,
    ):
        """
        Args:
            model: put into eval mode; its `preprocess` says how pictures are resized.
            resolution: side of the model's square, checked against the model; left out, the model's.
            device: where the model is moved; left out, where it is.
            confidence_threshold: objects with a higher score are kept.
            autocast_dtype: e.g. `torch.bfloat16`: run the model's matrix products in it; left out, an autocast that
                the caller has switched on stays in force.
            top_k: keep at most so many objects, those with the highest scores.
        """
        self.preprocess = model.preprocess
        if resolution not in (None, self.preprocess.img_size):
            raise ValueError(f"this model works at {self.preprocess.img_size} px, not at {resolution} px")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k (={top_k}) must be at least 1")
        self.model = model.eval() if device is None else model.eval().to(device)
        self.device = model.device
        self.autocast_dtype = autocast_dtype
        self.top_k = top_k
        self.set_confidence_threshold(confidence_threshold)

    def set_image(self, image: Picture, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Runs the image encoder on one picture; what `state` held about another picture is dropped.

        Args:
            image: Pillow picture, array (H, W, 3) or (H, W), or tensor (3, H, W); uint8, or float in 0..1.
        """
        return self.set_image_batch([image], state)

    def set_image_batch(self, images: Sequence[Picture], state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Runs the image encoder on several pictures at once; prompts choose among them by `index` (first: 0)."""
        if not isinstance(images, Sequence) or not images:
            raise ValueError("set_image_batch takes a list of at least one picture; for a single one use set_image")
        state = {} if state is None else state
        pictures = [to_uint8_chw(image) for image in images]
        fitted = [self.preprocess.fit(picture) for picture in pictures]
        inputs = torch.stack([square for square, _ in fitted]).to(self.device)
        sizes = torch.tensor([size for _, size in fitted])
        with self._inference():
            normalised = self.preprocess.normalise(inputs, sizes).to(self.model.dtype)
            state["backbone_out"] = self._encode_images(normalised)
        state["original_heights"] = [picture.shape[1] for picture in pictures]
        state["original_widths"] = [picture.shape[2] for picture in pictures]
        self._select(state, 0)
        self.reset_all_prompts(state)
        return state

    def set_text_prompt(self, prompt: str, state: dict[str, Any], index: int | None = None) -> dict[str, Any]:
        """Finds every instance of a phrase; earlier boxes and points stay in force.

        Args:
            index: picture of the batch; left out, the one in use. Another picture starts without boxes and points.
        """
        self._select(state, index)
        self._set_text(prompt, state)
        return self._run(state)

    def add_geometric_prompt(
        self, box: Sequence[float], label: bool, state: dict[str, Any], index: int | None = None
    ) -> dict[str, Any]:
        """Adds a box around something to find (`label` True) or not to find, beside what was given before.

        Args:
            box: centre x, centre y, width, height, in 0..1 of the picture.
        """
        self._select(state, index)
        self._add_box(box, label, state)
        return self._run(state)

    def add_point_prompt(
        self, point: Sequence[float], label: bool, state: dict[str, Any], index: int | None = None
    ) -> dict[str, Any]:
        """Adds a point [x, y], in pixels of the picture, on something to find (`label` True) or not to find."""
        self._select(state, index)
        self._add_point(point, label, state)
        return self._run(state)

    def set_prompts(
        self,
        state: dict[str, Any],
        text: str | None = None,
        boxes: Sequence[tuple[Sequence[float], bool]] = (),
        points: Sequence[tuple[Sequence[float], bool]] = (),
        index: int | None = None,
    ) -> dict[str, Any]:
        """Replaces all prompts, in one run of the model.

        Args:
            boxes: pairs of box and label, as in `add_geometric_prompt`; points: likewise, as in `add_point_prompt`.
        """
        if text is None and not boxes and not points:
            raise ValueError("nothing to look for: give a text, a box or a point")
        self._select(state, index)
        self.reset_all_prompts(state)
        if text is not None:
            self._set_text(text, state)
        for box, label in boxes:
            self._add_box(box, label, state)
        for point, label in points:
            self._add_point(point, label, state)
        return self._run(state)

    def reset_all_prompts(self, state: dict[str, Any]) -> None:
        """Forgets text, boxes, points and results; the picture stays."""
        features = state.get("backbone_out", {})
        for key in [key for key in features if key.startswith("language_")]:
            del features[key]
        for key in ("geometric_prompt", *RESULTS):
            state.pop(key, None)

    def set_confidence_threshold(self, threshold: float, state: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Sets the score above which objects are kept, and applies it to the results in `state`, if there are any."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"the confidence threshold is a score in 0..1, got {threshold}")
        self.confidence_threshold = threshold
        if state is not None and "outputs" in state:
            self._keep_objects(state)
        return state

    def best_score(self, state: dict[str, Any]) -> float:
        """The highest score of any query, kept or not."""
        return self._query_scores(state["outputs"]).max().item()

    def _select(self, state: dict[str, Any], index: int | None) -> None:
        """Makes picture `index` the one that prompts are about."""
        if "backbone_out" not in state:
            raise ValueError("there is no picture yet; call set_image before giving a prompt")
        count = len(state["original_heights"])
        if index is None or index == state.get("index"):
            index = state["index"]
        elif not 0 <= index < count:
            raise ValueError(f"picture {index} of a batch of {count} does not exist; the first is 0")
        else:
            for key in ("geometric_prompt", *RESULTS):
                state.pop(key, None)
        state["index"] = index
        state["original_height"], state["original_width"] = (
            state[f"original_{side}"][index] for side in ("heights", "widths")
        )

    def _set_text(self, prompt: str, state: dict[str, Any]) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"a text prompt is a phrase, got {prompt!r}")
        with self._inference():
            state["backbone_out"].update(self._encode_phrase(prompt))

    def _add_box(self, box: Sequence[float], label: bool, state: dict[str, Any]) -> None:
        cx, cy, width, height = _finite(box, 4, "box (centre x, centre y, width, height)")
        inside = abs(cx - 0.5) < (1 + width) / 2 and abs(cy - 0.5) < (1 + height) / 2
        if width <= 0 or height <= 0 or not inside:
            raise ValueError(f"box {list(box)} has no area inside the picture; it is cx, cy, w, h in 0..1")
        scale = torch.tensor([state["original_width"], state["original_height"]]).repeat(2)
        self._append("boxes", scale * torch.tensor([cx, cy, width, height]), label, state)

    def _add_point(self, point: Sequence[float], label: bool, state: dict[str, Any]) -> None:
        x, y = _finite(point, 2, "point (x, y)")
        width, height = state["original_width"], state["original_height"]
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"point {list(point)} lies outside the picture of {width} x {height} pixels")
        self._append("points", torch.tensor([x, y]), label, state)

    def _append(self, kind: str, pixels: Tensor, label: bool, state: dict[str, Any]) -> None:
        size = (state["original_height"], state["original_width"])
        coords = self.preprocess.coords_to_input(pixels.float(), size)[None, None].to(self.device)
        labels = torch.tensor([[int(label)]], device=self.device)
        prompt = state.setdefault("geometric_prompt", self.model._get_dummy_prompt())
        {"boxes": prompt.append_boxes, "points": prompt.append_points}[kind](coords, labels)

    def _run(self, state: dict[str, Any]) -> dict[str, Any]:
        if "language_features" not in state["backbone_out"]:
            self._set_text(VISUAL_PROMPT, state)
        with self._inference():
            state["outputs"] = self._predict_boxes(state)
        self._keep_objects(state)
        return state

    @torch.inference_mode()
    def _keep_objects(self, state: dict[str, Any]) -> None:
        """Turns raw outputs into results in pixels; only what is kept gets a mask."""
        outputs, size = state["outputs"], (state["original_height"], state["original_width"])
        scores = self._query_scores(outputs)
        kept = (scores > self.confidence_threshold).nonzero()[:, 0]
        if self.top_k is not None and len(kept) > self.top_k:
            kept = kept[scores[kept].topk(self.top_k).indices].sort().values
        state["scores"] = scores[kept]
        state["boxes"] = self.preprocess.coords_to_image(outputs["pred_boxes_xyxy"][0, kept].float(), size)
        state["masks_logits"] = self._mask_probabilities(outputs, kept, size)
        state["masks"] = state["masks_logits"] > 0.5

    def _query_scores(self, outputs: dict[str, Any]) -> Tensor:
        """(Q,): probability of the query times probability that the thing is in the picture at all."""
        presence = outputs["presence_logit_dec"].float().sigmoid()  # (1, 1)
        return outputs["pred_logits"].float().sigmoid()[0, :, 0] * presence[0]

    def _mask_probabilities(self, outputs: dict[str, Any], kept: Tensor, size: tuple[int, int]) -> Tensor:
        if not len(kept):
            return torch.zeros(0, 1, *size, device=self.device)
        with self._inference():
            logits = self._predict_masks(outputs, kept)
        return self.preprocess.maps_to_image(logits.float(), size).sigmoid_()

    @contextmanager
    def _inference(self):
        dtype = self.autocast_dtype
        with torch.inference_mode(), nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            yield

    # What the kind of model decides: a processor of another kind overrides these, and gives tensors of these names. ---

    def _encode_images(self, images: Tensor) -> dict[str, Any]:
        """Normalised pictures (B, 3, S, S) -> `backbone_out`."""
        return self.model.backbone.forward_image(images)

    def _encode_phrase(self, prompt: str) -> dict[str, Any]:
        """What `backbone_out` holds about a phrase, under names that begin with `language_`."""
        return self.model.backbone.forward_text([prompt], device=self.device)

    def _predict_boxes(self, state: dict[str, Any]) -> dict[str, Any]:
        """`pred_logits` (1, Q, 1), `presence_logit_dec` (1, 1), `pred_boxes_xyxy` (1, Q, 4) in 0..1 of the square for
        the picture in use, and what `_predict_masks` reads."""
        find_input = FindStage.single(self.device, image=state["index"])
        geometric_prompt = state.get("geometric_prompt") or self.model._get_dummy_prompt()
        return self.model.predict_boxes(state["backbone_out"], find_input, geometric_prompt)

    def _predict_masks(self, outputs: dict[str, Any], kept: Tensor) -> Tensor:
        """Logits (K, 1, h, w) of the queries `kept` (K,), over the square."""
        return self.model.predict_masks(outputs, kept[None])["pred_masks"][0, :, None]


def to_uint8_chw(image: Picture) -> Tensor:
    """Any picture -> uint8 RGB (3, H, W) on the CPU.

    Arrays are (H, W, 3), (H, W, 4) with transparency, which is dropped, (H, W, 1) or (H, W); tensors, and arrays that
    cannot be any of these, are (3, H, W) or (1, H, W). Floats must lie in 0..1.
    """
    if isinstance(image, Image.Image):
        image = to_rgb(image)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(f"a picture is a Pillow image, an array or a tensor, got {type(image).__name__}")
    found = f"a picture of shape {tuple(image.shape)} and type {image.dtype}"
    channels_last = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] in (1, 3, 4)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.require(image, requirements=("C", "W")))  # copies turned and read-only arrays
    pixels = image.cpu()
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif channels_last:
        pixels = pixels.permute(2, 0, 1)[:3]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel():
        raise ValueError(f"{found}: wanted an array (H, W, 3) or a tensor (3, H, W); for several use set_image_batch")
    if pixels.is_floating_point():
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"{found}: float pictures hold values in 0..1, this one goes beyond; pass uint8 for 0..255"
            )
        pixels = (pixels * 255.999).to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"{found}: wanted uint8 in 0..255 or float in 0..1")
    return pixels.expand(3, -1, -1)


def _finite(values: Sequence[float], count: int, what: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except TypeError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a {what} is {count} finite numbers, got {values!r}")
    return numbers
