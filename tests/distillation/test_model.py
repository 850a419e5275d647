"""The module that the loop trains: who gets gradients, and what happens to outputs that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillation.batch import DistillBatch
from distillation.config import LOSSES, DistillationConfig
from distillation.memory import check_budget, fixed_gb, over_budget
from distillation.model import MAX_BAD_OUTPUTS, Distiller
from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from distillation.teachers.build import build_teacher
from distillation.trainer import build_distiller
from distillation.validation import SHOWN_SIDE, draw_outputs

CONFIG = DistillationConfig(teacher_backend="fake", image_size=112, student="tiny", device="cpu")
CPU = torch.device("cpu")


def build(phase: int = 1, config: DistillationConfig = CONFIG) -> Distiller:
    torch.manual_seed(0)
    student = EfficientSAM3(replace(EfficientSAM3Config.preset("tiny"), image_size=112, dropout=0))
    student.freeze_unused()
    return build_distiller(config, config.phase(phase), student, build_teacher(config, "cpu")).train()


def batch(count: int = 1, outputs: dict | None = None) -> DistillBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8, generator=generator)
    sizes = torch.full((count, 2), 112)
    prompts = torch.arange(count) % len(CONFIG.prompts)
    return DistillBatch(images, prompts, sizes, [f"sa_{i}" for i in range(count)], outputs=outputs)


class Broken(torch.nn.Module):
    """A teacher of which every picture's presence is NaN."""

    def __init__(self, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.teacher, self.dim = teacher, teacher.dim

    def forward(self, *inputs):
        outputs = self.teacher(*inputs)
        return {**outputs, "presence_logits": outputs["presence_logits"] * math.nan}


def test_the_total_is_the_sum_of_the_terms_and_moves_the_student_only():
    distiller = build()
    losses = distiller(batch(2))
    assert losses["total"].item() == pytest.approx(sum(losses[name].item() for name in LOSSES), rel=1e-6)
    assert (losses["matched_pairs"].item(), losses["skipped"].item()) == (10, 0)
    losses["total"].backward()
    for name, parameter in distiller.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad <= name.startswith("student."), name
    assert not distiller.teacher.training and distiller.student.training


def test_each_picture_is_asked_its_own_prompt():
    distiller = build().eval()
    _, both = distiller.run(batch(2))
    pictures = batch(2)
    pictures.prompt_index = torch.zeros(2, dtype=torch.long)
    _, same = distiller.run(pictures)
    torch.testing.assert_close(both["pred_logits"][0], same["pred_logits"][0])
    assert not torch.allclose(both["pred_logits"][1], same["pred_logits"][1])


def test_the_second_phase_asks_for_no_features():
    teacher, student = build(phase=2).run(batch())
    assert "fpn_features" not in teacher and "fpn_features" not in student


def test_outputs_that_come_with_the_batch_need_no_teacher():
    distiller = build(phase=2)
    said = distiller.teach(batch())
    stored = {
        name: tensor.half() if "mask" in name else tensor for name, tensor in said.items() if torch.is_tensor(tensor)
    }
    online = distiller(batch())
    distiller.teacher = None
    cached = distiller(batch(outputs=stored))
    assert cached["total"].item() == pytest.approx(online["total"].item(), rel=1e-2)


def test_a_teacher_without_numbers_is_skipped_and_counted(caplog):
    distiller = build()
    distiller.teacher = Broken(distiller.teacher)
    losses = distiller(batch())
    assert (losses["total"].item(), losses["skipped"].item()) == (0, 1)
    assert all(losses[name] == 0 for name in LOSSES)
    losses["total"].backward()
    gradients = [p.grad for p in distiller.student.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert "skipped sa_0" in caplog.text


def test_too_many_in_a_row_end_the_run():
    distiller = build(phase=2)
    good = distiller.teacher
    distiller.teacher = Broken(good)
    for _ in range(MAX_BAD_OUTPUTS):
        distiller(batch())
    distiller.teacher = good
    assert distiller(batch())["skipped"] == 0  # the count begins anew
    distiller.teacher = Broken(good)
    for _ in range(MAX_BAD_OUTPUTS):
        distiller(batch())
    with pytest.raises(ValueError, match=r"51 times in a row, last for sa_0; try teacher_dtype fp32"):
        distiller(batch())


def test_a_student_without_numbers_is_skipped_too():
    distiller = build()
    with torch.no_grad():
        distiller.student.decoder.query_embed.weight.fill_(math.nan)
    assert distiller(batch())["skipped"] == 1


def test_pictures_show_photo_teacher_and_student():
    distiller = build(phase=2).eval()
    pictures = batch()
    teacher, student = distiller.run(pictures)
    shown = draw_outputs(pictures, teacher, student, distiller.matcher(student, teacher))
    assert shown.shape == (3, SHOWN_SIDE, 3 * SHOWN_SIDE) and shown.dtype == torch.uint8
    photo, masks, _ = shown.split(SHOWN_SIDE, dim=2)
    assert not torch.equal(photo, masks)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_fixed_memory_is_counted_in_bytes():
    linear = torch.nn.Linear(999, 1000)  # 1,000,000 parameters, 4 MB
    frozen = torch.nn.Linear(999, 1000).half().requires_grad_(False)
    assert fixed_gb(frozen, linear) == {"teacher": 0.002, "student": 0.004, "gradients": 0.004, "AdamW": 0.008}
    assert fixed_gb(None, frozen) == {"teacher": 0, "student": 0.002, "gradients": 0, "AdamW": 0}


def test_what_is_over_budget_is_said(monkeypatch, caplog):
    generous = DistillationConfig(memory_budget_gb=1e6)
    assert over_budget(generous, CPU) == ""
    monkeypatch.setattr("distillation.memory.pressure_level", lambda: 2)
    assert over_budget(generous, CPU) == "the system is short of memory (pressure level 2, normal is 1)"
    check_budget(generous, CPU)
    assert "short of memory" in caplog.text
    with pytest.raises(ValueError, match=r"above memory_budget_gb 0\.001; .* short of memory"):
        check_budget(DistillationConfig(memory_budget_gb=0.001, strict_memory=True), CPU)


def test_pressure_is_read_where_there_is_any(monkeypatch, tmp_path: Path):
    from distillation import memory

    assert memory.pressure_level() is None or memory.sys.platform == "darwin"
    sysctl = tmp_path / "sysctl"
    sysctl.write_text("#!/bin/sh\necho 4\n")
    sysctl.chmod(0o755)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.shutil, "which", lambda name: str(sysctl))
    assert memory.pressure_level() == 4
