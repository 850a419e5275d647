"""The small golden model from prompt to masks: the table of the public implementation, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image
from tests.model.golden import TEXTS, assert_row, golden_image, golden_model

TWO_PAIRS = FindStage(torch.tensor([0, 0]), torch.tensor([0, 1]))
BOXES = torch.tensor([[[0.4, 0.55, 0.3, 0.2], [0.5, 0.5, 0.6, 0.4]], [[0.7, 0.3, 0.2, 0.5], [0.0, 0.0, 0.0, 0.0]]])


def two_prompts() -> Prompt:
    """Two boxes and a point for the first pair; one box for the second, and padding."""
    return Prompt(
        box_embeddings=BOXES,
        box_mask=torch.tensor([[False, False], [False, True]]),
        box_labels=torch.tensor([[1, 1], [0, 0]]),
        point_embeddings=torch.tensor([[[0.25, 0.75], [0.0, 0.0]]]),
        point_mask=torch.tensor([[False], [True]]),
        point_labels=torch.tensor([[1, 0]]),
    )


@pytest.fixture
def model() -> Sam3Image:
    return golden_model()


@pytest.fixture
def backbone_out(model) -> dict:
    with torch.no_grad():
        return {**model.backbone.forward_image(golden_image()), **model.backbone.forward_text(TEXTS)}


@torch.no_grad()
def run(model: Sam3Image, *inputs, **options) -> dict:
    """Outputs, and beside them what the geometry encoder (`geometry`) and the decoder (`decoder`) returned."""
    seen = {}
    hooks = [
        model.geometry_encoder.register_forward_hook(lambda _m, _i, out: seen.update(geometry=out)),
        model.transformer.decoder.register_forward_hook(lambda _m, _i, out: seen.update(decoder=out)),
    ]
    out = model.forward_grounding(*inputs, **options)
    for hook in hooks:
        hook.remove()
    return {**out, **seen}


def without_noise(model: nn.Module) -> nn.Module:
    """All dropout set to zero, so that train mode can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def test_case_1_text_alone(model, backbone_out):
    out = run(model, backbone_out, FindStage.single())
    decoder = out["decoder"]
    assert_row(out["geometry"][0].transpose(0, 1), (1, 1, 32), -0.006645, 0.820569, 0.01989, -1.47476)
    assert_row(out["encoder_hidden_states"], (64, 1, 32), -0.473308, 1.738177, 2.50019, -0.89311)
    assert_row(decoder.hs.transpose(1, 2), (3, 10, 1, 32), 0.006892, 0.815585, -2.60207, 0.25133)
    assert_row(decoder.references.transpose(1, 2), (3, 10, 1, 4), 0.500588, 0.500588, 0.36276, 0.38122)
    assert_row(decoder.presence_logits.transpose(1, 2), (3, 1, 1), 0.357963, 0.447955, 0.81607, -0.13499)
    assert_row(out["presence_feats"], (1, 1, 32), 0.009707, 0.809466, -1.33951, 0.08069)
    assert_row(out["pred_logits"], (1, 10, 1), 0.047131, 0.049360, 0.02111, 0.05634)
    assert_row(out["pred_boxes"], (1, 10, 4), 0.464883, 0.464883, 0.52286, 0.24401)
    assert_row(out["pred_masks"], (1, 10, 32, 32), -0.212645, 0.673900, -0.29713, -0.13599)
    assert_row(out["semantic_seg"], (1, 1, 32, 32), -0.161520, 0.466030, -0.98141, -0.25350)


def test_case_2_boxes_points_and_padding(model, backbone_out):
    out = run(model, backbone_out, TWO_PAIRS, geometric_prompt=two_prompts())
    decoder, (geometry, mask) = out["decoder"], out["geometry"]
    assert mask.tolist() == [[False] * 4, [False, False, True, True]]
    assert_row(geometry.transpose(0, 1), (4, 2, 32), -0.003117, 0.791336, -0.74269, -0.62361)
    assert_row(out["encoder_hidden_states"], (64, 2, 32), -0.361016, 1.716980, 3.38391, -0.66083)
    assert_row(decoder.hs.transpose(1, 2), (3, 10, 2, 32), 0.009229, 0.809152, -2.33026, 0.07434)
    assert_row(decoder.references.transpose(1, 2), (3, 10, 2, 4), 0.497103, 0.497103, 0.36276, 0.28103)
    assert_row(decoder.presence_logits.transpose(1, 2), (3, 1, 2), 0.392006, 0.597372, 0.95347, -0.23349)
    assert_row(out["presence_logit_dec"], (2, 1), -0.308048, 0.308048, -0.38261, -0.23349)
    assert_row(out["pred_logits"], (2, 10, 1), -0.064805, 0.374410, -0.44648, 0.33346)
    assert_row(out["pred_boxes"], (2, 10, 4), 0.441393, 0.441393, 0.57514, 0.12919)
    assert_row(out["pred_masks"], (2, 10, 32, 32), -0.567652, 1.082172, -0.33639, -0.15183)
    assert_row(out["semantic_seg"], (2, 1, 32, 32), -0.093963, 0.468020, -0.92918, -0.12885)


def test_case_2_joint_scores(model, backbone_out):
    model.supervise_joint_box_scores = True
    logits = run(model, backbone_out, TWO_PAIRS, geometric_prompt=two_prompts())["pred_logits"].flatten()
    assert [logits.mean().item(), logits[0].item(), logits[-1].item()] == pytest.approx(
        [-1.3698, -1.6715, -1.0593], abs=1e-4
    )


def test_case_2_train_mode(model, backbone_out):
    inputs = (backbone_out, TWO_PAIRS)
    evaluated = run(model, *inputs, geometric_prompt=two_prompts())
    trained = run(without_noise(model).train(), *inputs, geometric_prompt=two_prompts())
    for name in ("pred_logits", "pred_boxes", "pred_boxes_xyxy", "pred_masks", "presence_logit_dec", "queries"):
        torch.testing.assert_close(trained[name], evaluated[name], rtol=0, atol=2e-5)
        assert f"{name}_o2m" in trained or name == "presence_logit_dec"
    for name, mean, first in (("pred_logits_o2m", -0.15472, -0.46754), ("pred_boxes_o2m", 0.48040, 0.71474)):
        assert trained[name].mean().item() == pytest.approx(mean, abs=1e-4)
        assert trained[name].flatten()[0].item() == pytest.approx(first, abs=1e-4)
    assert trained["pred_masks_o2m"].shape == (2, 10, 32, 32)
    assert len(trained["aux_outputs"]) == 2
    assert trained["aux_outputs"][0]["pred_boxes_o2m"].shape == (2, 10, 4)
    assert not torch.equal(trained["aux_outputs"][1]["pred_logits"], trained["pred_logits"])


def test_swapping_two_boxes_changes_no_prediction(model, backbone_out):
    labels = torch.tensor([[1], [0]])
    results = [
        run(model, backbone_out, FindStage.single(), geometric_prompt=Prompt(boxes, box_labels=box_labels))
        for boxes, box_labels in ((BOXES[:, :1], labels), (BOXES[:, :1].flip(0), labels.flip(0)))
    ]
    assert_same_predictions(*results)


def test_padding_changes_no_prediction(model, backbone_out):
    both = run(model, backbone_out, TWO_PAIRS, geometric_prompt=two_prompts())
    alone = Prompt(BOXES[:1, 1:], box_labels=torch.tensor([[1]]))
    single = run(model, backbone_out, FindStage.single(text=1), geometric_prompt=alone)
    assert_same_predictions({k: v[1:] for k, v in both.items() if isinstance(v, Tensor)}, single)


def test_masks_of_chosen_queries_are_those_of_all(model, backbone_out):
    every = run(model, backbone_out, TWO_PAIRS, geometric_prompt=two_prompts())
    chosen = torch.tensor([[7, 0], [3, 3]])
    some = run(model, backbone_out, TWO_PAIRS, geometric_prompt=two_prompts(), mask_queries=chosen)
    wanted = torch.stack([every["pred_masks"][b, q] for b, q in enumerate(chosen)])
    torch.testing.assert_close(some["pred_masks"], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(some["pred_logits"], every["pred_logits"])


def test_pairs_choose_image_and_phrase(model):
    images = torch.cat((golden_image(), golden_image().flip(3)))
    crossed = FindStage(torch.tensor([1, 0]), torch.tensor([0, 1]))
    with torch.no_grad():
        together = model(images, TEXTS, find_input=crossed)
        for pair, (image, text) in enumerate(((1, 0), (0, 1))):
            alone = model(images[image : image + 1], TEXTS[text : text + 1])
            assert_same_predictions(
                {k: v[pair : pair + 1] for k, v in together.items() if isinstance(v, Tensor)}, alone
            )
    with pytest.raises(ValueError, match="2 phrases for 1 images"):
        model(images[:1], TEXTS)


def test_a_model_of_boxes_only_gives_no_masks(model, backbone_out):
    model.segmentation_head = None
    out = run(model, backbone_out, FindStage.single())
    assert "pred_masks" not in out
    with pytest.raises(ValueError, match="enable_segmentation=True"):
        model.predict_masks(out)


@torch.no_grad()
def test_low_precision_keeps_boxes_in_float32(model, backbone_out):
    exact = run(model, backbone_out, TWO_PAIRS, geometric_prompt=two_prompts())
    image, text = golden_image(), TEXTS
    with torch.autocast("cpu", torch.bfloat16):
        features = {**model.backbone.forward_image(image), **model.backbone.forward_text(text)}
        autocast = run(model, features, TWO_PAIRS, geometric_prompt=two_prompts())
    cast = model.to(torch.bfloat16)
    features = {**cast.backbone.forward_image(image.bfloat16()), **cast.backbone.forward_text(text)}
    weights = run(cast, features, TWO_PAIRS, geometric_prompt=two_prompts())
    for low in (autocast, weights):
        assert low["pred_boxes"].dtype == torch.float32
        assert (low["pred_boxes"] - exact["pred_boxes"]).abs().mean() < 0.05
        assert low["pred_masks"].dtype == torch.bfloat16


def test_every_weight_that_acts_gets_a_gradient(model, backbone_out):
    model.train()
    out = model.forward_grounding(backbone_out, TWO_PAIRS, geometric_prompt=two_prompts())
    losses = [out[name].float().square().mean() for name in out if name.startswith("pred_")] + [
        out["semantic_seg"].mean()
    ]
    (sum(losses) + out["presence_logit_dec"].sum()).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None and not name.startswith("backbone.")}
    assert idle == {f"segmentation_head.pixel_decoder.{part}.2.{kind}" for part in ("conv_layers", "norms")
                    for kind in ("weight", "bias")}  # fmt: skip


def assert_same_predictions(first: dict, second: dict) -> None:
    for name in ("pred_logits", "pred_boxes", "presence_logit_dec", "pred_masks", "semantic_seg"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
