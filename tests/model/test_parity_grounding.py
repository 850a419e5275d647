"""Full-size prompts, scores, boxes and masks against the public implementation; see tests/parity/README.md."""

from __future__ import annotations

import pytest
import torch

from tests.parity.compare import distance

pytestmark = pytest.mark.slow

OUTPUTS = (
    "pred_logits", "pred_boxes", "pred_boxes_xyxy", "pred_masks", "presence_logit_dec", "semantic_seg",
    "encoder_hidden_states", "queries",
)  # fmt: skip
BOX = [0.5, 0.5, 0.4, 0.3]


@pytest.fixture(scope="module")
def distances(full_image_pass, expected) -> dict[str, float]:
    """Entry -> distance; all prompts in one pass, and no map kept longer than needed."""
    processor, state = full_image_pass.processor, full_image_pass.state
    found = {}

    def compare(tag: str) -> None:
        with torch.inference_mode():
            outputs = {**state["outputs"], **processor.model.predict_masks(state["outputs"])}
        found.update({f"{tag}.{name}": distance(outputs[name], expected[f"{tag}.{name}"]) for name in OUTPUTS})

    processor.set_text_prompt("a red car", state)
    compare("text")
    for name in ("scores", "boxes", "masks_logits"):
        found[f"text.{name}"] = distance(state[name], expected[f"text.{name}"])
    processor.add_geometric_prompt(BOX, True, state)
    compare("text_box")
    processor.reset_all_prompts(state)
    processor.add_geometric_prompt(BOX, True, state)
    compare("box")
    return found


@pytest.mark.parametrize(
    "entry",
    [f"{tag}.{name}" for tag in ("text", "text_box", "box") for name in OUTPUTS]
    + ["text.scores", "text.boxes", "text.masks_logits"],
)
def test_grounding(distances, entry: str):
    assert distances[entry] <= (1e-3 if entry.endswith(("pred_logits", "scores")) else 1e-4)
