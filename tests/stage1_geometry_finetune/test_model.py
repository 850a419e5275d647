"""The distiller: what its losses are, what gets gradients, that memory tricks and processes change nothing."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from sam3.backbones.student import build_student
from sam3.engine import distributed
from sam3.engine.losses import build_valid_mask
from sam3.model.config import Sam3Config
from sam3.model.necks import PassThroughTrunk
from sam3.model_builder import assemble_image_model
from sam3.transforms import Preprocess
from stage1_geometry_finetune.frozen_path import FrozenPath, PromptRows
from stage1_geometry_finetune.model import GeometryDistiller, parameter_table
from stage1_geometry_finetune.query_selection import best_box, best_mask, best_score
from tests.engine.processes import fork, join
from tests.stage1_geometry_finetune.tiny import (
    CHANNELS,
    GRID,
    MASK,
    QUERIES,
    GridStudent,
    distiller,
    frozen_path,
    make_batch,
    part,
)

MIXED = [["box", "point"], ["both"], ["point"]]


def step(batch, **options) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Losses and gradients of one step of a fresh distiller."""
    model = distiller(**options)
    losses = model(batch)
    losses["total"].backward()
    return {name: value.item() for name, value in losses.items()}, [p.grad for p in model.parameters()]


def to_unknown(batch, mode: FakeTensorMode):
    """The batch without the values of its tensors."""
    if isinstance(batch, torch.Tensor):
        return mode.from_tensor(batch)
    if not is_dataclass(batch):
        return batch
    return replace(batch, **{field.name: to_unknown(getattr(batch, field.name), mode) for field in fields(batch)})


def assert_same_step(first, second, rtol: float = 1e-3) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    for one, other in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-3 * other.abs().max().item())


@pytest.fixture
def passes(monkeypatch):
    """Rows of each pass through the frozen path; teacher and student count as two."""
    seen = []
    predict = FrozenPath.predict
    monkeypatch.setattr(FrozenPath, "predict", lambda self, f, rows: seen.append(rows) or predict(self, f, rows))
    return seen


# What is trained ------------------------------------------------------------------------------------------------------


def test_only_the_student_is_trained_and_saved():
    student = build_student("efficientvit_b0", CHANNELS, GRID)
    model = distiller(student)
    assert set(model.state_dict()) == {f"student_trunk.{name}" for name in student.state_dict()}
    model(make_batch([["both"]]))["total"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    frozen = list(model.frozen.heads.parameters())
    assert frozen and not any(p.requires_grad or p.grad is not None for p in frozen)
    model.train()
    assert student.training and not any(module.training for module in model.frozen.heads.modules())


def test_the_mask_losses_reach_the_student():
    _, with_masks = step(make_batch([["box"]]), embedding_weight=0.0)
    assert all(gradient.abs().max() > 0 for gradient in with_masks)
    losses, without = step(make_batch([["box"]]), embedding_weight=0.0, bce_weight=0.0, dice_weight=0.0)
    assert losses["total"] == 0 and losses["bce"] > 0
    assert not any(gradient.any() for gradient in without)


# What costs no accuracy -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    """Losses and gradients of a step on the mixed batch, with all rows at once and nothing computed again."""
    return step(make_batch(MIXED, iterations=2), chunk=16, use_checkpoint=False)


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 3}, {"chunk": 3, "use_checkpoint": False}])
def test_memory_tricks_change_no_gradient(plain, options):
    assert_same_step(step(make_batch(MIXED, iterations=2), **options), plain)


def test_bfloat16_comes_close(plain):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller()(make_batch(MIXED, iterations=2))
    assert {value.dtype for value in losses.values()} == {torch.float32}
    losses["total"].backward()
    assert losses["total"].item() == pytest.approx(plain[0]["total"], rel=0.05)


@pytest.mark.parametrize("options", [{"layout": "per_image"}, {"select_by": "mask_iou", "iter_on_box": False}])
def test_a_step_asks_the_device_for_no_value(options):
    """Tensors here have shapes but no values: whatever would wait for one raises."""
    batch = make_batch([["box"], ["point"]], iterations=2, masks=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        unknown = to_unknown(batch, mode)
        with pytest.raises(DataDependentOutputException):
            unknown.boxes.max().item()
        losses = distiller(**options, use_checkpoint=False)(unknown)
    assert losses["total"].requires_grad  # a backward pass would start threads here, after which tests cannot fork


def test_checkpointing_keeps_nothing_of_the_frozen_path():
    kept = []
    for use_checkpoint in (False, True):
        bytes_kept = 0

        def count(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            distiller(chunk=1, use_checkpoint=use_checkpoint)(make_batch([["box"] * 4]))
        kept.append(bytes_kept)
    assert kept[1] < kept[0] / 20


def test_layouts_coincide_for_one_object_an_image():
    batch = make_batch([["both"], ["box"]], iterations=2)
    assert_same_step(step(batch, layout="per_image"), step(batch, layout="per_object"))
    several = make_batch([["both", "both"]])
    assert step(several, layout="per_image")[0]["bce"] != pytest.approx(step(several)[0]["bce"], rel=1e-3)


def test_a_batch_is_the_mean_of_its_images():
    """Kinds mixed, different numbers of objects: padding, chunks and other images change nothing."""
    batch = make_batch(MIXED, iterations=2, num_points=2)
    whole = step(batch)
    alone = [step(part(batch, [i])) for i in range(3)]
    mean = {name: sum(losses[name] for losses, _ in alone) / 3 for name in whole[0]}
    gradients = [sum(each) / 3 for each in zip(*(gradients for _, gradients in alone), strict=True)]
    assert_same_step(whole, (mean, gradients))


def test_an_image_without_prompts_counts_in_the_embedding_loss_only():
    batch = make_batch([["box"], []])
    losses, _ = step(batch)
    (with_prompt, _), (without, gradients) = step(part(batch, [0])), step(part(batch, [1]))
    assert without["bce"] == without["dice"] == 0
    assert gradients[0].abs().max() > 0
    assert losses["mse"] == pytest.approx((with_prompt["mse"] + without["mse"]) / 2)
    assert losses["bce"] == pytest.approx(with_prompt["bce"] / 2, rel=1e-5)


@pytest.mark.parametrize("focal_weight", [0.0, 1.0])
def test_a_batch_of_skipped_pictures_gives_zeros_with_a_graph(focal_weight):
    model = distiller(focal_weight=focal_weight)
    losses = model(make_batch([]))
    assert set(losses) == {"total", "mse", "bce", "dice"} | ({"focal"} if focal_weight else set())
    assert all(value.item() == 0 for value in losses.values())
    losses["total"].backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def _train_step(argv: list[str]) -> int:
    """Run in two processes: each has half of the images, DDP averages."""
    with distributed.start("cpu") as world:
        batch = part(make_batch([*MIXED, ["box", "both"]], iterations=2), [2 * world.rank, 2 * world.rank + 1])
        model = DistributedDataParallel(distiller())
        model(batch)["total"].backward()
        torch.save([p.grad for p in model.module.parameters()], f"{argv[0]}/{world.rank}.pt")
        Path(argv[0], f"{world.rank}.json").write_text(json.dumps([name for name, _ in model.named_parameters()]))
    return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
def test_two_processes_give_the_gradients_of_one_on_the_joined_batch(tmp_path):
    frozen_path()  # built once, before the fork
    assert join(fork(_train_step, [str(tmp_path)], 2)) == [0, 0]
    _, wanted = step(make_batch([*MIXED, ["box", "both"]], iterations=2))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, other, joined in zip(first, second, wanted, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, joined, rtol=1e-3, atol=1e-3 * joined.abs().max().item())
    assert all(name.startswith("module.student_trunk.") for name in json.loads((tmp_path / "0.json").read_text()))


# What the losses are --------------------------------------------------------------------------------------------------


def test_where_student_and_teacher_agree_bce_is_entropy_and_no_points_are_added(passes):
    batch = make_batch([["box"], ["point"]], iterations=3)
    grid = batch.embeddings.values()
    losses = distiller(GridStudent(grid), mask_target="soft")(batch)
    assert len(passes) == 6  # three iterations, each for teacher and student
    assert all(rows.point_mask[0].all() for rows in passes[2:])  # nothing joined the box
    assert all(rows.point_mask[1].logical_not().sum() == 1 for rows in passes)
    assert losses["mse"].item() == 0
    with torch.no_grad():
        path = frozen_path()
        (rows,) = PromptRows.from_batch(batch, "per_object").chunks(2)
        out = path.predict(path.features(grid), rows)
        p = path.masks(out, out["pred_logits"].argmax(1))[:, 0].sigmoid().double()
    valid = build_valid_mask(batch.sizes, 224, MASK)[:, 0].double()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()) * valid
    wanted = entropy.sum((1, 2)) / valid.sum((1, 2))
    assert losses["bce"].item() == pytest.approx(wanted.mean().item(), rel=1e-4)
    shown = p * valid
    dice = 1 - (2 * (shown**2).sum((1, 2)) + 1) / (2 * shown.sum((1, 2)) + 1)
    assert losses["dice"].item() == pytest.approx(dice.mean().item(), rel=1e-4)
    single = make_batch([["box"], ["point"]])
    assert losses["bce"].item() == pytest.approx(distiller(GridStudent(grid))(single)["bce"].item(), rel=1e-5)


def test_total_is_the_weighted_sum():
    weights = {"embedding_weight": 0.5, "bce_weight": 2.0, "dice_weight": 3.0, "focal_weight": 4.0}
    losses, _ = step(make_batch([["both"]]), **weights)
    named = (losses["mse"], losses["bce"], losses["dice"], losses["focal"])
    assert losses["total"] == pytest.approx(sum(w * value for w, value in zip(weights.values(), named, strict=True)))


def test_targets_temperature_and_reduction_act():
    batch = make_batch([["both"]])
    plain, _ = step(batch)
    assert step(batch, mask_target="hard")[0]["bce"] != pytest.approx(plain["bce"], rel=1e-3)
    hot, _ = step(batch, temperature=1e4)  # all probabilities are one half
    assert hot["bce"] == pytest.approx(0.6931, rel=1e-3)
    assert step(batch, mse_reduction="channel_sum")[0]["mse"] == pytest.approx(plain["mse"] * CHANNELS, rel=1e-4)
    assert step(batch, text=False)[0]["bce"] != pytest.approx(plain["bce"], rel=1e-3)


def test_all_masks_are_averaged_if_none_is_selected():
    batch = make_batch([["box"]])
    found = distiller(select_best_mask=False, chunk=1)(batch)
    model = distiller()
    with torch.no_grad():
        student, teacher, _ = model._grids(batch)
        (rows,) = PromptRows.from_batch(batch, "per_object").chunks(1)
        masks = [model._masks(model.frozen.features(grid), rows, None) for grid in (student, teacher)]
        valid = build_valid_mask(batch.sizes, 224, MASK)
        each = [model._row_losses(*(m[:, q : q + 1] for m in masks), valid)["bce"].item() for q in range(QUERIES)]
    assert found["bce"].item() == pytest.approx(sum(each) / QUERIES, rel=1e-4)


# Refinement -----------------------------------------------------------------------------------------------------------


def test_points_accumulate_and_boxes_stay(passes):
    batch = make_batch([["box", "both", "point"]], iterations=3, num_points=2)
    distiller(use_checkpoint=False)(batch)
    assert len(passes) == 6
    first, second, third = passes[::2]
    assert (passes[1], passes[3], passes[5]) == (first, second, third)  # both sides get the same prompts
    counts = [(~rows.point_mask).sum(1).tolist() for rows in (first, second, third)]
    assert counts == [[0, 1, 1], [2, 3, 3], [4, 5, 5]]
    assert torch.equal(third.points[1, :1], first.points[1, :1])
    assert all(torch.equal(rows.boxes, first.boxes) for rows in (second, third))


def test_boxes_alone_get_one_pass_where_iter_on_box_is_off(passes):
    batch = make_batch([["box", "point"]], iterations=2)
    model = distiller(iter_on_box=False, use_checkpoint=False)
    losses = model(batch)
    assert [rows.kinds for rows in passes[::2]] == [["box", "point"], ["point"]]
    assert torch.equal(passes[2].image_index, torch.tensor([0])) and passes[2].points.shape[1] == 2
    del passes[:]
    model(make_batch([["box", "box"]], iterations=2))
    assert len(passes) == 2
    box, point = (make_batch([["box", "point"]], iterations=2) for _ in range(2))
    box.kinds, point.kinds = [["box"]], [["point"]]
    for batch, j in ((box, 0), (point, 1)):
        for name in ("boxes", "points", "point_labels", "refine_uniforms", "refine_counts"):
            setattr(batch, name, getattr(batch, name)[:, j : j + 1])
    alone = [model(each)["bce"].item() for each in (box, point)]
    assert losses["bce"].item() == pytest.approx(sum(alone) / 2, rel=1e-4)


# Selection ------------------------------------------------------------------------------------------------------------


def test_queries_are_selected_by_score_box_and_mask():
    assert best_score(torch.tensor([[[0.1], [2.0], [1.0]], [[3.0], [2.0], [1.0]]])).tolist() == [1, 0]
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.2, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.5, 0.5, 0.4, 0.4]])
    # The second overlaps the target by 0.09 of 0.16, the first by 0.16 of 1; the last is inside out.
    target = torch.tensor([[0.2, 0.2, 0.6, 0.6], [0.0, 0.0, 0.9, 1.0]])
    assert best_box(boxes.expand(2, 4, 4), target).tolist() == [1, 0]
    masks = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    masks[0, 0], masks[0, 1, :2], masks[0, 2, 0, 0] = True, True, True
    target = torch.zeros(1, 4, 4, dtype=torch.bool)
    target[0, :2, :3] = True  # IoU 6/16, 6/8, 1/6
    assert best_mask(masks, target).tolist() == [1]


@pytest.mark.parametrize("rule", ["score", "box_iou", "mask_iou"])
def test_the_rule_decides_which_masks_are_compared(rule):
    batch = make_batch([["both", "point"]], masks=True)
    model = distiller(select_by=rule)
    with torch.no_grad():
        teacher = model.frozen.features(batch.embeddings.values())
        (rows,) = PromptRows.from_batch(batch, "per_object").chunks(2)
        out, queries, masks = model._teacher_masks(batch, rows, teacher)
        every = model.frozen.masks(out)
    if rule == "score":
        wanted = out["pred_logits"][..., 0].argmax(1)
    elif rule == "box_iou":
        wanted = best_box(out["pred_boxes_xyxy"], batch.targets[0])
    else:
        wanted = best_mask((every > 0) & build_valid_mask(batch.sizes, 224, MASK).bool(), batch.gt_masks[0])
    assert queries.tolist() == wanted.tolist()
    torch.testing.assert_close(masks[:, 0], every[[0, 1], wanted], rtol=1e-4, atol=1e-4)
    assert model(batch)["total"].isfinite()


def test_selection_by_masks_needs_masks():
    with pytest.raises(ValueError, match=r"set DATA\.LOAD_GT_MASK True"):
        distiller(select_by="mask_iou")(make_batch([["box"]]))


# Messages and the log ------------------------------------------------------------------------------------------------


def test_bad_batches_are_refused():
    batch = make_batch([["box"]])
    with pytest.raises(ValueError, match=r"the student gives \(96, 8, 8\), the teacher \(96, 16, 16\)"):
        distiller(GridStudent(torch.zeros(1, CHANNELS, 8, 8)))(batch)
    batch.embeddings = None
    with pytest.raises(ValueError, match="no teacher embeddings"):
        distiller()(batch)


def test_parameter_table_counts_the_full_model():
    config = Sam3Config.preset("full")
    with torch.device("meta"):
        heads = assemble_image_model(config, PassThroughTrunk(1024), enable_text_encoder=False)
        student = build_student("repvit_m1_1")
    counts = parameter_table(GeometryDistiller(student, FrozenPath(heads), Preprocess()))
    assert {name: round(count / 1e6, 2) for name, count in counts.items()} == {
        "student backbone": 7.77,
        "student head": 9.96,
        "neck": 7.80,
        "geometry encoder": 8.22,
        "fusion encoder": 9.47,
        "decoder": 11.58,
        "scoring": 1.18,
        "segmentation head": 2.30,
        "trained": 17.74,
        "frozen": 40.55,
    }


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"select_by": "nonsense"}, "select_by 'nonsense' is unknown; choose one of score, box_iou, mask_iou"),
        ({"mask_target": "sofft"}, "mask_target 'sofft' is unknown; choose one of soft, hard"),
        ({"layout": "per_picture"}, "layout 'per_picture' is unknown; choose one of per_object, per_image"),
        ({"layout": "per_image", "select_by": "box_iou"}, "select_by 'box_iou' needs one object a prompt"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], found: str):
    with pytest.raises(ValueError, match=re.escape(found)):
        distiller(**options)
