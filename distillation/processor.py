"""Pictures and phrases in, masks, boxes and scores out: SAM3's processor for a distilled student.

Letters: B pictures, K objects found, Q queries, S side of the model's square, L tokens of a phrase.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distillation.models.efficient_sam3 import EfficientSAM3
from distillation.models.tokenizer import tokenize
from sam3.model.sam3_image_processor import Sam3Processor


class StudentProcessor(Sam3Processor):
    """As `Sam3Processor`, for a model that reads phrases only: boxes and points are a ValueError.

    A picture is encoded once, however many phrases are looked for in it.
    """

    def __init__(
        self,
        model: EfficientSAM3,
        device: torch.device | str | None = None,
        confidence_threshold: float = 0.5,
        autocast_dtype: torch.dtype | None = None,
        top_k: int | None = None,
    ):
        """All arguments as those of `Sam3Processor`."""
        super().__init__(model, None, device, confidence_threshold, autocast_dtype, top_k)

    def _append(self, kind: str, pixels: Tensor, label: bool, state: dict[str, Any]) -> None:
        raise ValueError(f"this student reads phrases only, no {kind}; use a model with SAM3's own heads for those")

    def _encode_images(self, images: Tensor) -> dict[str, Any]:
        return {"levels": self.model.encode_image(images)}

    def _encode_phrase(self, prompt: str) -> dict[str, Any]:
        ids, padding = tokenize([prompt], self.model.config.context_length)
        features = self.model.encode_text(ids.to(self.device))
        return {"language_features": features, "language_mask": padding.to(self.device)}

    def _predict_boxes(self, state: dict[str, Any]) -> dict[str, Any]:
        features, index = state["backbone_out"], state["index"]
        levels = tuple(level[index : index + 1] for level in features["levels"])
        found = self.model.ground(levels, features["language_features"], features["language_mask"])
        return {
            "pred_logits": found["pred_logits"][..., None],
            "presence_logit_dec": found["presence_logits"],
            "pred_boxes_xyxy": found["pred_boxes"],
            "mask_inputs": (levels, found["encoder_output"], found["queries"]),
        }

    def _predict_masks(self, outputs: dict[str, Any], kept: Tensor) -> Tensor:
        levels, memory, queries = outputs["mask_inputs"]
        masks, _ = self.model.mask_decoder(levels, memory, queries[:, kept])
        return masks[0, :, None]
