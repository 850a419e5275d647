"""Names of the backbone's outputs, and when a remembered phrase may be used."""

from __future__ import annotations

import pytest
import torch

from sam3.model import vl_combiner
from tests.model.golden import golden_model


@pytest.fixture
def backbone(monkeypatch):
    model = golden_model().backbone
    calls = []
    encode = model.language_backbone.forward
    monkeypatch.setattr(model.language_backbone, "forward", lambda texts: calls.append(texts) or encode(texts))
    model.calls = calls
    return model


def features(backbone, texts):
    with torch.inference_mode():
        return backbone.forward_text(texts)["language_features"]


def test_phrases_are_encoded_once(backbone):
    first = features(backbone, ["a dog", "a cat"])
    again = features(backbone, ["a cat", "a bird", "a dog", "a cat"])
    assert backbone.calls == [["a dog", "a cat"], ["a bird"]]
    assert torch.equal(again[:, [2, 0, 3]], first[:, [0, 1, 1]])
    with torch.no_grad():
        direct = backbone.language_backbone(["a cat", "a bird", "a dog"])[1]
    torch.testing.assert_close(again[:, :3], direct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["trained", "loaded", "replaced", "cast", "mode"])
def test_forgotten_when_the_encoder_changes(backbone, change: str):
    before = features(backbone, ["a dog"])
    text = backbone.language_backbone
    other = {key: value * 1.5 for key, value in text.state_dict().items()}
    if change == "trained":
        with torch.no_grad():
            text.resizer.weight.mul_(1.5)
    elif change in ("loaded", "replaced"):
        text.load_state_dict(other, assign=change == "replaced")
    elif change == "cast":
        backbone.double()
    else:
        backbone.train()
    after = features(backbone, ["a dog"])
    assert len(backbone.calls) == 2
    assert change == "mode" or not torch.equal(before, after)


@pytest.mark.parametrize("fused", [False, True])
def test_forgotten_when_an_optimizer_has_stepped(backbone, fused: bool):
    """A fused optimizer leaves the version of a weight as it was."""
    before = features(backbone.eval(), ["a dog"])
    optimizer = torch.optim.AdamW(backbone.language_backbone.parameters(), 0.1, fused=fused)
    backbone.train()
    backbone.forward_text(["a cat"])["language_features"].sum().backward()
    optimizer.step()
    after = features(backbone.eval(), ["a dog"])
    assert not torch.equal(before, after)
    assert torch.equal(after, backbone.language_backbone(["a dog"])[1])


def test_cache_is_bounded(backbone, monkeypatch):
    monkeypatch.setattr(vl_combiner, "MAX_CACHED_PHRASES", 2)
    features(backbone, ["a", "b", "c"])  # one call may need more than is kept
    features(backbone, ["b", "c"])
    assert len(backbone.calls) == 1
    features(backbone, ["a"])
    features(backbone, ["c"])
    features(backbone, ["b"])
    assert backbone.calls[1:] == [["a"], ["b"]]


def test_gradients_are_never_answered_from_memory(backbone):
    features(backbone, ["a dog"])
    backbone.forward_text(["a dog"])["language_features"].sum().backward()
    assert backbone.language_backbone.resizer.weight.grad is not None
    assert len(backbone.calls) == 2


def test_remembered_features_may_be_trained_on(backbone):
    remembered = features(backbone, ["a dog"])
    with torch.no_grad():
        remembered = backbone.forward_text(["a dog"])["language_features"]
    weight = torch.ones(32, requires_grad=True)
    (weight * remembered).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_additional_text_comes_back_apart(backbone):
    with torch.inference_mode():
        out = backbone.forward_text(["a dog"], additional_text=["a cat", "visual"])
    assert out["language_features"].shape == (32, 1, 32)
    assert out["additional_text_features"].shape == (32, 2, 32)
    assert out["additional_text_mask"].shape == (2, 32)
    assert torch.equal(out["additional_text_features"][:, :1], features(backbone, ["a cat"]))


def test_refusals(backbone):
    with pytest.raises(ValueError, match="non-empty list of phrases"):
        backbone.forward_text([])
    with pytest.raises(ValueError, match="non-empty list of phrases, got 'a dog'"):
        backbone.forward_text("a dog")
    with pytest.raises(ValueError, match="enable_text_encoder=True"):
        vl_combiner.SAM3VLBackbone(backbone.vision_backbone).forward_text(["a dog"])
