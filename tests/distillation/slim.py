"""A tiny student whose every weight counts, and something for it to look at."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from distillation.models.tokenizer import tokenize
from tests.parity.fill import fill_

SIDE = 112  # gives maps of 28, 14 and 7
PROMPTS = ("objects in the image", "a red car on the left of two dogs")
OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


def tiny_student(**changes: object) -> EfficientSAM3:
    """In eval mode, with weights of which none is zero: fresh ones begin with layers that do nothing."""
    student = EfficientSAM3(replace(EfficientSAM3Config.preset("tiny"), image_size=SIDE, **changes))
    fill_(student.state_dict())
    return student.eval()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """pixel_values, input_ids, padding."""
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ids, padding = tokenize([PROMPTS[i % 2] for i in range(batch)])
    return pixels, ids, padding


def scalar_of(outputs: dict) -> Tensor:
    """A sum of all that the losses read, in which no output cancels."""
    tensors = [*(outputs[name] for name in OUTPUTS), *outputs["fpn_features"], outputs["encoder_output"]]
    return sum(tensor.float().square().mean() for tensor in tensors)
