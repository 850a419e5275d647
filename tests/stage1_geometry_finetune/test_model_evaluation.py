"""What validation measures: the right masks of the right objects, against each other and against the annotations."""

from __future__ import annotations

import pytest
import torch

from sam3.engine.losses import build_valid_mask
from stage1_geometry_finetune.frozen_path import PromptRows
from tests.stage1_geometry_finetune.tiny import CHANNELS, MASK, GridStudent, distiller, make_batch


def test_evaluation_of_a_perfect_student():
    batch = make_batch([["both", "box"], ["both"]], masks=True)
    result = distiller(GridStudent(batch.embeddings.values()), chunk=2).evaluate(batch)
    assert result.mse.tolist() == [0, 0]
    torch.testing.assert_close(result.cosine, torch.ones(2))
    assert (result.box.images, result.box.objects) == ([0, 0, 1], [0, 1, 0])
    assert (result.point.images, result.point.objects) == ([0, 1], [0, 0])  # the second object has no point
    for each in (result.box, result.point):
        assert each.agreement.tolist() == [1] * len(each.images)
        assert torch.equal(each.teacher_iou, each.student_iou)
        assert torch.equal(each.student_masks, each.teacher_masks)
        assert each.scores.min() > 0 and each.scores.max() < 1
        assert each.teacher_masks.shape == (len(each.images), MASK, MASK)


def test_evaluation_compares_the_right_masks():
    batch = make_batch([["both"], ["box", "both"]], masks=True)
    model = distiller(chunk=2)
    result = model.evaluate(batch)
    student, teacher, valid = model._grids(batch)
    assert result.mse[1].item() == pytest.approx(
        ((student - teacher)[1].square() * valid[1]).sum().item() / valid[1].sum().item() / CHANNELS, rel=1e-5
    )
    rows = PromptRows.of_objects(batch, [(1, 1, "point")])
    (rows,) = rows.chunks(1)
    with torch.no_grad():
        out = model.frozen.predict(model.frozen.features(teacher), rows)
        scores = out["pred_logits"][0, :, 0].sigmoid() * out["presence_logit_dec"][0].sigmoid()
        query = out["pred_logits"].argmax(1)
        shown = build_valid_mask(batch.sizes, 224, MASK)[1, 0].bool()
        wanted = (model.frozen.masks(out, query)[0, 0] > 0) & shown
        found = (model._masks(model.frozen.features(student), rows, query)[0, 0] > 0) & shown
    assert torch.equal(result.point.teacher_masks[1], wanted)
    assert torch.equal(result.point.student_masks[1], found)
    assert result.point.scores[1].item() == pytest.approx(scores.max().item(), rel=1e-5)
    assert result.point.agreement[1].item() == pytest.approx(((wanted & found).sum() / (wanted | found).sum()).item())
    truth = batch.gt_masks[1, 1]
    assert result.point.student_iou[1].item() == pytest.approx(((truth & found).sum() / (truth | found).sum()).item())


def test_evaluation_without_annotated_masks_and_without_points():
    result = distiller().evaluate(make_batch([["box"]]))
    assert result.point is None
    assert result.box.teacher_iou is None and result.box.student_iou is None
    result = distiller().evaluate(make_batch([[]]))
    assert result.box is None and len(result.mse) == 1
