"""Published weights in the student's towers, with a hub that is made up or out of reach."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch

from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from distillation.models.pretrained import load_pretrained
from sam3.engine.weights import digest
from tests.distillation.slim import tiny_student
from tests.parity.fill import fill_

create_timm, create_clip = timm.create_model, open_clip.create_model


@pytest.fixture(scope="module")
def student() -> EfficientSAM3:
    return EfficientSAM3(EfficientSAM3Config.preset("full"))


class Hub:
    """Models as published ones would come, with weights of its own; what is asked for is written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[tuple] = []
        self.error: Exception | None = None
        self.models: dict[str, torch.nn.Module] = {}
        monkeypatch.setattr(timm, "create_model", self._answer(create_timm))
        monkeypatch.setattr(open_clip, "create_model", self._answer(create_clip))

    def _answer(self, create):
        def answer(name: str, pretrained: object = None, **sizes: object):
            if not pretrained:  # a part of a model, or a student
                return create(name, pretrained=None, **sizes)
            self.asked.append((name, pretrained))
            if self.error is not None:
                raise self.error
            model = self.models.get(name) or create(name, pretrained=None)
            fill_(
                {key: t for key, t in model.state_dict().items() if t.ndim}, gain=0.3
            )  # at 1, RepViT's 50 blocks would blow up
            self.models[name] = model
            return model

        return answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_both_towers_are_copied_whole(student: EfficientSAM3, hub: Hub):
    rest = {name: t for name, t in student.state_dict().items() if not name.startswith(TOWERS)}
    before = digest(rest)
    load_pretrained(student)
    assert hub.asked == [("repvit_m2_3.dist_300e_in1k", True), ("MobileCLIP-S1", "datacompdr")]
    images = torch.randn(1, 3, 64, 64)
    published = hub.models["repvit_m2_3.dist_300e_in1k"].eval()
    with torch.no_grad():
        theirs = published.forward_features(images)
        ours = images
        for stage in student.vision.backbone.eval().values():
            ours = stage(ours)
    torch.testing.assert_close(ours, theirs)
    assert 1e-3 < theirs.std() < 1e3
    tower = hub.models["MobileCLIP-S1"].text.state_dict()
    tower.pop("text_projection")
    assert digest(student.text.tower.state_dict()) == digest(tower)
    assert digest(rest) == before  # adapters, projection and heads are left alone


TOWERS = ("vision.backbone.", "text.tower.")


def test_one_tower_at_a_time(student: EfficientSAM3, hub: Hub):
    before = student.text.tower.positional_embedding.clone()
    load_pretrained(student, text=False)
    assert [name for name, _ in hub.asked] == ["repvit_m2_3.dist_300e_in1k"]
    assert torch.equal(student.text.tower.positional_embedding, before)


@pytest.mark.parametrize("error", [OSError("no route to host\nTraceback"), RuntimeError(""), ValueError("404")])
def test_without_a_connection_one_message_says_what_to_do(student: EfficientSAM3, hub: Hub, error: Exception):
    hub.error = error
    before = student.vision.backbone["stem"].conv1.c.weight.clone()
    for towers in ({"text": False}, {"backbone": False}):
        with pytest.raises(ConnectionError, match=r"could not fetch .*student_pretrained=False") as caught:
            load_pretrained(student, **towers)
        assert "\n" not in str(caught.value)
    assert torch.equal(student.vision.backbone["stem"].conv1.c.weight, before)


def test_a_half_download_changes_nothing(student: EfficientSAM3, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    before = digest(student.vision.state_dict())
    with pytest.raises(ConnectionError, match=r"MobileCLIP-S1 datacompdr.*no route to host"):
        load_pretrained(student)
    assert len(hub.asked) == 1  # RepViT came
    assert digest(student.vision.state_dict()) == before


def test_weights_that_do_not_fit_are_refused(student: EfficientSAM3, hub: Hub):
    hub.models["repvit_m2_3.dist_300e_in1k"] = create_timm("repvit_m1_1")
    with pytest.raises(ValueError, match=r"repvit_m2_3.dist_300e_in1k does not fit FeatureListNet"):
        load_pretrained(student, text=False)


def test_students_of_other_sizes_are_refused(hub: Hub):
    with pytest.raises(ValueError, match=r"backbone_dims .* text_width 32.*student_pretrained=False"):
        load_pretrained(tiny_student())
    with torch.device("meta"):
        fused = EfficientSAM3(EfficientSAM3Config.preset("full"))
        fused.vision.fuse()
    with pytest.raises(ValueError, match="fused"):
        load_pretrained(fused)
    assert hub.asked == []
