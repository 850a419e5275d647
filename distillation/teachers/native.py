"""SAM3 as this project builds it, from sam3.pt or a tiny file in its layout.

Letters: `B` pictures, `P` prompts, `L` tokens of a prompt, `Q` queries, `C` channels, `E G` channels and side of the
trunk's grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillation.config import DistillationConfig
from distillation.teachers.teacher import PRESENCE_LIMIT, Teacher, place
from sam3.engine.stage_config import teacher_meta
from sam3.engine.weights import load_weights
from sam3.model.config import Sam3Config
from sam3.model.data_misc import FindStage
from sam3.model_builder import build_sam3_heads, build_teacher_trunk, encode_phrases
from sam3.model_loading import detector_tensors, has_student


class NativeTeacher(Teacher):
    """The grounding pass of `Sam3Image` for a text prompt, its outputs under the common names.

    Prompts are encoded once, by a text encoder that is then dropped. Raises what `read_sizes` raises, and ValueError
    for a file without heads or text encoder.
    """

    def __init__(self, config: DistillationConfig, device: str | torch.device = "auto", with_trunk: bool = True):
        """with_trunk: False neither builds nor reads the trunk, for `forward_from_trunk` alone."""
        path = Path(config.teacher)
        meta = describe_native(config)
        sizes = read_sizes(path, config.image_size)
        super().__init__(config.image_size, sizes.dim, sizes.num_queries, meta)
        device, dtype = place(config.teacher_dtype, device)
        self.trunk = build_teacher_trunk(path, device, dtype) if with_trunk else None
        self.heads = build_sam3_heads(path, "cpu").to(device, dtype)
        text = encode_phrases(path, config.prompts)
        self.register_buffer("text", text["language_features"].to(device, dtype))  # (L, P, C)
        self.register_buffer("text_mask", text["language_mask"].to(device))  # (P, L), True = padding
        self.freeze()

    def run_trunk(self, images: Tensor) -> Tensor:
        assert self.trunk is not None, "this teacher was built without its trunk"
        return self.trunk(images)[-1]

    def run_heads(self, maps: Tensor, prompt_index: Tensor, features: bool) -> dict[str, Any]:
        seen = self.heads.backbone.forward_image(maps)
        seen |= {"language_features": self.text, "language_mask": self.text_mask}
        pairs = FindStage(torch.arange(len(maps), device=maps.device), prompt_index)
        found = self.heads.predict_boxes(seen, pairs)
        masks = self.heads.predict_masks(found)
        outputs = {
            "pred_masks": masks["pred_masks"],
            "pred_boxes": found["pred_boxes_xyxy"],
            "pred_logits": found["pred_logits"].squeeze(-1),
            "presence_logits": found["presence_logit_dec"].clamp(-PRESENCE_LIMIT, PRESENCE_LIMIT),
            "semantic_seg": masks["semantic_seg"],
        }
        if features:
            outputs |= {
                "fpn_features": tuple(seen["backbone_fpn"]),
                "encoder_output": found["encoder_hidden_states"].transpose(0, 1),  # (GG, B, C) -> (B, GG, C)
                "encoder_hw": tuple(maps.shape[-2:]),
            }
        return outputs


def describe_native(config: DistillationConfig) -> dict[str, Any]:
    """The meta of the teacher that `config` names; all processes of a run must call it. Raises what it raises."""
    path = Path(config.teacher)
    digest = teacher_meta(path, "--teacher (with --teacher-backend hf, a name at the hub)")
    sizes = read_sizes(path, config.image_size)
    return {"backend": "native", **digest, "trunk_shape": [sizes.vit_dim, sizes.grid, sizes.grid]}


def read_sizes(path: Path, image_size: int) -> Sam3Config:
    """Raises FileNotFoundError; ValueError for a student's file, or one made for another size of pictures."""
    tensors = detector_tensors(load_weights(path).tensors, path)
    if has_student(tensors):
        raise ValueError(
            f"{path} has a student in the place of SAM3's trunk, which cannot teach another; wanted sam3.pt, or a file "
            "of scripts/make_tiny_sam3.py (--teacher)"
        )
    try:
        sizes = Sam3Config.from_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; wanted the full sam3.pt (--teacher)") from error
    if sizes.img_size != image_size:
        raise ValueError(
            f"the teacher {path} was made for pictures of {sizes.img_size} px, but image_size is {image_size}; "
            f"set image_size {sizes.img_size} (--image-size)"
        )
    return sizes
