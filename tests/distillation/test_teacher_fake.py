"""The fake teacher: SAM3's dictionary at small sizes, the same for the same seed, another for another picture."""

from __future__ import annotations

import pytest
import torch

from distillation.config import DistillationConfig
from distillation.teachers.build import build_teacher, describe_teacher
from distillation.teachers.fake import FakeTeacher

CONFIG = DistillationConfig(teacher_backend="fake", image_size=112)
PROMPTS = torch.tensor([0, 3])


def pictures(size: int = 112, seed: int = 0) -> torch.Tensor:
    """Two smooth pictures in -1..1."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


@pytest.fixture(scope="module")
def teacher() -> FakeTeacher:
    return FakeTeacher(CONFIG, "cpu")


def test_sizes_follow_the_picture(teacher: FakeTeacher):
    out = teacher(pictures(), PROMPTS, features=True)
    shapes = {name: tuple(value.shape) for name, value in out.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "pred_masks": (2, 20, 32, 32),
        "pred_boxes": (2, 20, 4),
        "pred_logits": (2, 20),
        "presence_logits": (2, 1),
        "semantic_seg": (2, 1, 32, 32),
        "encoder_output": (2, 64, 64),
    }
    assert [tuple(level.shape) for level in out["fpn_features"]] == [(2, 64, side, side) for side in (32, 16, 8)]
    assert out["encoder_hw"] == (8, 8)
    assert (teacher.image_size, teacher.dim, teacher.num_queries, teacher.trunk_shape) == (112, 64, 20, (32, 8, 8))
    large = FakeTeacher(DistillationConfig(teacher_backend="fake", image_size=224), "cpu")
    assert large(pictures(224), PROMPTS, features=False)["pred_masks"].shape == (2, 20, 64, 64)
    assert not {"fpn_features", "encoder_output"} & set(teacher(pictures(), PROMPTS, features=False))


def test_outputs_can_be_learnt(teacher: FakeTeacher):
    out = teacher(pictures(), torch.tensor([0, 0]), features=True)
    for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg", "encoder_output"):
        assert (out[name][0] - out[name][1]).abs().mean() > 0.01, f"{name} does not depend on the picture"
    scores = out["pred_logits"].sigmoid() * out["presence_logits"].sigmoid()
    assert ((scores > 0.5).sum(1) >= 2).all() and ((scores < 0.2).sum(1) >= 5).all()
    left, top, right, bottom = out["pred_boxes"].unbind(-1)
    assert (left < right).all() and (top < bottom).all() and out["pred_boxes"].min() > -0.11
    filled = (out["pred_masks"] > 0).float().mean((2, 3))
    assert (filled > 0.005).all() and (filled < 0.5).all()
    other = teacher(pictures(), torch.tensor([1, 1]), features=False)
    assert (other["pred_logits"] - out["pred_logits"]).abs().mean() > 0.01  # and on the prompt


def test_seed_decides_and_the_global_generator_is_left_alone(teacher: FakeTeacher):
    before = torch.random.get_rng_state()
    again, other = FakeTeacher(CONFIG, "cpu"), FakeTeacher(CONFIG, "cpu", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))
    assert again.meta == teacher.meta == describe_teacher(CONFIG) and other.meta["sha256"] != teacher.meta["sha256"]


def test_it_stays_frozen_and_goes_on_from_its_trunk(teacher: FakeTeacher):
    images = pictures().requires_grad_()
    out = teacher(images, PROMPTS, features=True)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters()) and not out["pred_masks"].requires_grad
    heads = build_teacher(CONFIG, "cpu", with_trunk=False)
    assert heads.meta == teacher.meta and not any("trunk" in name for name, _ in heads.named_parameters())
    maps = teacher.embed(images)
    for part in (teacher, heads):
        with torch.autocast("cpu", torch.bfloat16):
            found = part.forward_from_trunk(maps.double(), PROMPTS, features=True)
        assert all(torch.equal(found[name], out[name]) for name in out if isinstance(out[name], torch.Tensor))


def test_what_does_not_fit_is_refused(teacher: FakeTeacher):
    with pytest.raises(ValueError, match=r"image_size 120 is no multiple .* set image_size 112"):
        FakeTeacher(DistillationConfig(teacher_backend="fake", image_size=120), "cpu")
    with pytest.raises(ValueError, match=r"are \(B, 3, 112, 112\), got \(2, 3, 126, 126\)"):
        teacher(pictures(126), PROMPTS, features=False)
    with pytest.raises(ValueError, match=r"trunk gives .*32, 8, 8.*, got \(2, 32, 9, 9\)"):
        teacher.forward_from_trunk(torch.zeros(2, 32, 9, 9), PROMPTS, features=False)
