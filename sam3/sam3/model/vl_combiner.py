"""Image and text encoders side by side, with the outputs named as the rest of the model reads them.

Letters: B images, T phrases, L tokens of a phrase, C channels of the detector, W channels of the text encoder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

MAX_CACHED_PHRASES = 256  # 160 KB each in the released model


class SAM3VLBackbone(nn.Module):
    """`vision_backbone` (neck over trunk) and `language_backbone`, which is None in a model without text."""

    def __init__(self, vision_backbone: nn.Module, language_backbone: nn.Module | None = None):
        super().__init__()
        self.vision_backbone = vision_backbone
        self.language_backbone = language_backbone
        self._phrases: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
        self._phrases_state: Hashable = None

    def forward_image(self, images: Tensor) -> dict[str, Any]:
        """Normalised images (B, 3, S, S) ->

        backbone_fpn: list of (B, C, kG, kG), k = 4, 2, 1; vision_pos_enc: their positions; vision_features: the last
        level; sam2_backbone_out: the same three of the second neck, or None.
        """
        levels, positions, sam2_levels, sam2_positions = self.vision_backbone(images)
        sam2 = None if sam2_levels is None else _named(sam2_levels, sam2_positions)
        return {**_named(levels, positions), "sam2_backbone_out": sam2}

    def forward_text(
        self,
        captions: list[str],
        additional_text: list[str] | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """T phrases ->

        language_features (L, T, C); language_mask (T, L) bool, True = padding; language_embeds (L, T, W), token
        embeddings before positions. `additional_text` is encoded along and comes back as `additional_text_features` and
        `additional_text_mask`. In eval mode and without gradients, a phrase is encoded once and then remembered.

        Args:
            device: where the results go; left out, they stay where the weights are.

        Raises:
            ValueError: no phrases, or a model without its text encoder.
        """
        if self.language_backbone is None:
            raise ValueError("this model has no text encoder; build it with enable_text_encoder=True to prompt by text")
        if isinstance(captions, str) or not captions:
            raise ValueError(f"wanted a non-empty list of phrases, got {captions!r}")
        texts = [*captions, *(additional_text or [])]
        if torch.is_grad_enabled() or self.language_backbone.training:
            self._phrases.clear()  # an optimizer may follow, and fused ones leave no trace in a weight's version
            mask, features, embeds = self.language_backbone(texts)
        else:
            mask, features, embeds = self._remembered(texts)
        if device is not None:
            mask, features, embeds = mask.to(device), features.to(device), embeds.to(device)
        count = len(captions)
        out = {
            "language_features": features[:, :count],
            "language_mask": mask[:count],
            "language_embeds": embeds[:, :count],
        }
        if additional_text:
            out["additional_text_features"] = features[:, count:]
            out["additional_text_mask"] = mask[count:]
        return out

    def _remembered(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """`language_backbone(texts)`, of which only phrases not seen before are computed."""
        state = self._text_state()
        if state != self._phrases_state:
            self._phrases.clear()
            self._phrases_state = state
        new = [text for text in dict.fromkeys(texts) if text not in self._phrases]
        fresh: dict[str, tuple[Tensor, ...]] = {}
        if new:
            # Not inference tensors: those could take no part in a training step later.
            with torch.inference_mode(False), torch.no_grad():
                mask, features, embeds = self.language_backbone(new)
            # Clones, so that a phrase kept does not keep its whole batch.
            rows = zip(mask, features.unbind(1), embeds.unbind(1), strict=True)
            fresh = {text: tuple(part.clone() for part in row) for text, row in zip(new, rows, strict=True)}
        found = [fresh[text] if text in fresh else self._phrases[text] for text in texts]
        for text, row in zip(texts, found, strict=True):
            self._phrases[text] = row
            self._phrases.move_to_end(text)
        while len(self._phrases) > MAX_CACHED_PHRASES:
            self._phrases.popitem(last=False)
        mask, features, embeds = zip(*found, strict=True)
        return torch.stack(mask), torch.stack(features, dim=1), torch.stack(embeds, dim=1)

    def _text_state(self) -> Hashable:
        """Changes whenever remembered phrases stop being what the encoder would compute: new, moved or trained
        weights, another autocast mode."""
        parameters = list(self.language_backbone.parameters())
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
        device = parameters[0].device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return weights, device, autocast


def _named(levels: list[Tensor], positions: list[Tensor]) -> dict[str, Any]:
    return {"vision_features": levels[-1], "backbone_fpn": levels, "vision_pos_enc": positions}
