"""Writes `golden_tiny.npz`: probes of the tiny preset's outputs, once the full-size comparison vouches for the code.

    python -m pytest tests/model/test_parity_full.py tests/model/test_parity_grounding.py && \
    python -m tests.model.make_golden_tiny

Weights, picture and probes come from `tests/parity/fill.py`, the prompts from `tests/parity/README.md`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam3.model.config import Sam3Config
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import assemble_image_model
from tests.parity.fill import fill_, image, probe

GOLDEN = Path(__file__).with_name("golden_tiny.npz")
OUTPUTS = ("pred_logits", "pred_boxes", "presence_logit_dec", "encoder_hidden_states", "queries")
BOX = [0.5, 0.5, 0.4, 0.3]


@torch.inference_mode()
def tiny_outputs() -> dict[str, Tensor]:
    """Every output that `detector.npz` has of the full model, and a run with a negative box and a point."""
    model = assemble_image_model(Sam3Config.preset("tiny"), with_sam2_neck=True)
    fill_(model.state_dict(), "detector.")
    processor = Sam3Processor(model, confidence_threshold=0.0)
    found = {}
    trunk = model.backbone.vision_backbone.trunk
    hook = trunk.register_forward_hook(lambda module, args, out: found.update(input=args[0], trunk=out[-1]))
    state = processor.set_image(Image.fromarray(image(600, 800, seed=0)))
    hook.remove()
    levels = state["backbone_out"]
    for i, level in enumerate(levels["backbone_fpn"]):
        found[f"fpn{i}"], found[f"pos{i}"] = level, levels["vision_pos_enc"][i]
        found[f"sam2_fpn{i}"] = levels["sam2_backbone_out"]["backbone_fpn"][i]

    def keep(tag: str) -> None:
        outputs = {**state["outputs"], **model.predict_masks(state["outputs"])}
        names = (*OUTPUTS, "pred_masks", "semantic_seg")
        found.update({f"{tag}.{name}": outputs[name] for name in names})
        found.update({f"{tag}.{name}": state[name] for name in ("scores", "boxes", "masks_logits")})

    processor.set_text_prompt("a red car", state)
    found |= {f"text.{key}": value for key, value in levels.items() if key.startswith("language_")}
    keep("text")
    processor.add_geometric_prompt(BOX, True, state)
    keep("text_box")
    processor.reset_all_prompts(state)
    processor.add_geometric_prompt(BOX, True, state)
    keep("box")
    processor.add_geometric_prompt([0.2, 0.3, 0.2, 0.2], False, state)
    processor.add_point_prompt([400, 300], True, state)
    keep("boxes_point")
    return found


def main() -> None:
    np.savez_compressed(GOLDEN, **{key: probe(value) for key, value in tiny_outputs().items()})


if __name__ == "__main__":
    main()
