"""The tiny model against `Sam3Model` of transformers with the same weights: every output, for boxes of both labels."""

from __future__ import annotations

import pytest
import torch

from sam3.model.config import Sam3Config
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.tokenizer import SimpleTokenizer
from sam3.model_builder import assemble_image_model
from tests.parity.fill import fill_, image

pytest.importorskip("transformers")

PHRASES = ["a red car", "the small dog on the left"]
BOXES = torch.tensor([[[0.5, 0.5, 0.4, 0.3], [0.2, 0.7, 0.1, 0.3]], [[0.1, 0.4, 0.1, 0.2], [0.6, 0.3, 0.5, 0.5]]])
LABELS = torch.tensor([[1, 0], [0, 1]])


@pytest.fixture(scope="module")
def models() -> tuple:
    from benchmarks.bench_model import build_transformers_model

    config = Sam3Config.preset("tiny")
    ours = assemble_image_model(config).eval()
    fill_(ours.state_dict(), "detector.")
    return ours, build_transformers_model(config, ours.state_dict().items())


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.flatten() - theirs.flatten()).norm() / theirs.norm()).item()


@torch.no_grad()
def test_every_output_agrees(models):
    ours, theirs = models
    pixels = torch.stack([torch.from_numpy(image(224, 224, seed)).permute(2, 0, 1) / 127.5 - 1 for seed in (0, 1)])
    ids = SimpleTokenizer()(PHRASES)
    result = theirs(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        input_boxes=BOXES,
        input_boxes_labels=LABELS,
    )
    pairs = FindStage(torch.arange(2), torch.arange(2))
    out = ours(pixels, PHRASES, pairs, Prompt(BOXES.transpose(0, 1), box_labels=LABELS.T))
    names = {
        "pred_logits": "pred_logits",
        "pred_boxes_xyxy": "pred_boxes",
        "pred_masks": "pred_masks",
        "semantic_seg": "semantic_seg",
        "presence_logit_dec": "presence_logits",
    }
    distances = {name: distance(out[name], result[their_name]) for name, their_name in names.items()}
    assert max(distances.values()) < 1e-4, distances
