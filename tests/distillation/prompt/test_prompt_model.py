"""The module that is trained: how teachers and weights add up, and what being switched off means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distillation.prompt import everything
from distillation.prompt.batch import PromptBatch
from distillation.prompt.config import PromptDistillConfig
from distillation.prompt.dataset import open_dataset
from distillation.prompt.hooked import Decoded
from distillation.prompt.model import PromptDistiller, freeze_unused
from distillation.prompt.prompts import grid
from distillation.prompt.teachers import Teacher, build_teachers
from sam3.sam1_files import load_sam1
from tests.distillation.prompt.runs import LOSSES, SIDE, settings

TOTALS = [f"distill/{name}" for name in LOSSES]


@pytest.fixture(scope="module")
def made(models: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory):
    """Makes a distiller and a batch of settings, see `runs.settings`; student: whose weights it begins with."""
    output = tmp_path_factory.mktemp("run")

    def make(student: str = "mobile", **changed) -> tuple[PromptDistiller, PromptBatch]:
        config = PromptDistillConfig.from_dict(settings(models, photos, output, **changed))
        model = load_sam1(models / f"{student}.pt", image_size=SIDE)
        freeze_unused(model)
        teachers = build_teachers(config.teachers, config.distillation, "cpu") if config.distills else []
        distiller = PromptDistiller(model, config, teachers)
        torch.manual_seed(0)
        distiller.add_projections({})
        data = open_dataset(config.dataset.train_dataset, config.dataset, model.preprocess, training=True)
        rows = [0, 2] if config.dataset.mode == "single" else [0, 1]
        return distiller.eval(), data.load(rows, 0)

    return make


def losses_of(distiller: PromptDistiller, batch: PromptBatch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(value) for name, value in distiller(batch).items()}


@pytest.mark.parametrize("mode", ["single", "everything"])
def test_two_teachers_add_up_by_their_weights_and_lambda_scales_the_sum(made, mode: str):
    def run(**changed) -> dict[str, float]:
        return losses_of(*made(dataset__mode=mode, everything__match_iou_threshold=0.0, **changed))

    base = settings(Path(), Path(), Path())
    _, other = base["teachers"]
    both = run()
    alone = {}
    for name in ("SAM-H", "MobileSAM_orig"):
        found = made(dataset__mode=mode, everything__match_iou_threshold=0.0)[0].config.teachers
        (one,) = (t for t in found if t.name == name)
        alone[name] = run(teachers=[{"name": name, "weight": 1.0, "cfg": one.cfg}])
    for total in (*TOTALS, "dist_loss"):
        expected = 0.7 * alone["SAM-H"][total] + 0.3 * alone["MobileSAM_orig"][total]
        assert both[total] == pytest.approx(expected, rel=1e-5, abs=1e-7), total
    assert both["total"] == pytest.approx(both["task_loss"] + both["dist_loss"], rel=1e-6)
    assert other["weight"] == 0.3
    doubled = run(distillation__lambda_coef=2.0)
    assert doubled["total"] - doubled["task_loss"] == pytest.approx(2 * (both["total"] - both["task_loss"]), rel=1e-5)
    assert doubled["dist_loss"] == both["dist_loss"]


@pytest.mark.parametrize("mode", ["single", "everything"])
def test_a_student_that_equals_its_only_teacher_has_nothing_to_learn_from_it(made, mode: str):
    distiller, batch = made(dataset__mode=mode, everything__match_iou_threshold=0.0)
    (mobile,) = (t for t in distiller.config.teachers if t.name == "MobileSAM_orig")
    same, batch = made(
        dataset__mode=mode,
        everything__match_iou_threshold=0.0,
        teachers=[{"name": "M", "cfg": mobile.cfg}],
        distillation__dense_mask_logits={"enable": True, "w_focal": 0.0},
    )
    found = losses_of(same, batch)
    for total in TOTALS:
        assert abs(found[total]) < 1e-6, total


def test_each_teacher_and_part_is_in_the_log(made):
    found = losses_of(*made())
    for name in LOSSES:
        assert {f"distill/{name}", f"distill/{name}/SAM-H", f"distill/{name}/MobileSAM_orig"} <= found.keys()
    assert {"distill/encoder_patch/mse", "distill/prompt_embed/cos", "distill/dense_mask_logits/focal"} <= found.keys()
    assert {"task_loss", "task/bce", "task/focal", "task/dice", "task/iou", "dist_loss_scaled"} <= found.keys()
    sums = {"total", "task_loss", "dist_loss", "dist_loss_scaled", "lambda_coef"}
    known = {f"task/{name}" for name in ("bce", "focal", "dice", "iou")}
    known |= set(made()[0].objective.log_names(["SAM-H", "MobileSAM_orig"]))
    assert found.keys() - sums <= known


def test_switched_off_is_as_if_the_block_were_not_there(made):
    off, batch = made(distillation__enable=False)
    assert not off.teachers and not off.hooked.hooks and not list(off.objective.parameters())
    absent, _ = made(distillation={}, teachers=[])
    first, second = losses_of(off, batch), losses_of(absent, batch)
    assert first == second
    assert not [name for name in first if "dist" in name or name == "lambda_coef"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_off_has_no_hook_and_no_number(made, name: str):
    distiller, batch = made(**{f"distillation__{name}": {"enable": False}})
    for hooked in (distiller.hooked.hooks, *(teacher.hooks for teacher in distiller.teachers)):
        assert set(hooked) == set(LOSSES[:3]) - {name}
    found = losses_of(distiller, batch)
    assert not [key for key in found if name in key]
    every = losses_of(*made())
    left = sum(every[f"distill/{other}"] for other in LOSSES if other != name)
    assert found["dist_loss"] == pytest.approx(left, rel=1e-5)


def test_gradients_reach_student_and_projection_but_no_teacher(made):
    distiller, batch = made(train__loss_weights=dict.fromkeys(("bce", "focal", "dice", "iou"), 0.0))
    distiller(batch)["total"].backward()
    assert set(distiller.objective.distill_projections) == {"SAM-H"}
    trained = distiller.objective.distill_projections["SAM-H"].weight
    assert trained.grad.abs().sum() > 0
    for part in (distiller.student.image_encoder.patch_embed, distiller.student.mask_decoder.transformer):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert sum(float(p.grad.abs().sum()) for p in part.parameters()) > 0
    for teacher in distiller.teachers:
        assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    mine = {id(p) for p in distiller.parameters()}
    assert not mine & {id(p) for teacher in distiller.teachers for p in teacher.model.parameters()}


def test_chunks_of_a_grid_give_the_gradients_of_the_whole(made):
    gradients = []
    for chunk in (64, 2):
        distiller, batch = made(
            dataset__mode="everything", everything__points_per_batch=chunk, everything__match_iou_threshold=0.0
        )
        distiller(batch)["total"].backward()
        gradients.append({n: p.grad for n, p in distiller.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_without_any_pair_a_grid_still_has_a_finite_loss_and_gradients(made):
    distiller, batch = made(dataset__mode="everything", everything__match_iou_threshold=1.1, distillation__enable=False)
    losses = distiller(batch)
    assert losses["task_loss"].item() == 0.0
    losses["total"].backward()
    assert all(p.grad is None or not p.grad.any() for p in distiller.parameters())


def test_foreground_scores_are_learnt_from_all_candidates(made):
    weights = {"bce": 0.0, "focal": 0.0, "dice": 0.0, "iou": 0.0, "cls": 1.0}
    distiller, batch = made(dataset__mode="everything", distillation__enable=False, train__loss_weights=weights)
    losses = distiller(batch)
    assert losses["task/cls"].item() == losses["total"].item() > 0


def test_a_random_part_of_the_grid_is_the_same_in_every_process(made):
    distiller, batch = made(dataset__mode="everything", everything__max_points_train=4)
    assert len(distiller._grid(batch, 0)[0]) == 9  # all of it when validating
    distiller.train()
    first, second = (distiller._grid(batch, 0)[1] for _ in range(2))
    assert len(first) == 4 and torch.equal(first, second)


def test_nan_of_a_teacher_is_named(made):
    distiller, batch = made()
    with torch.no_grad():
        distiller.teachers[0].model.mask_decoder.mask_tokens.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"teacher SAM-H gives NaN or infinite decoder_mask_token.*fp32"):
        distiller(batch)
    distiller.teachers[0].model.mask_decoder.mask_tokens.weight.data.zero_()


@pytest.mark.parametrize(
    ("losses", "decoded"),
    [
        (["encoder_patch"], 0),
        (["prompt_embed"], 2),  # one prompt a picture shows it
        (["decoder_mask_token"], 18),
        (["dense_mask_logits"], None),  # the prompts of pairs
    ],
)
def test_teachers_decode_a_grid_only_as_far_as_losses_need_it(
    made, monkeypatch, losses: list[str], decoded: int | None
):
    changed = {f"distillation__{name}": {"enable": name in losses} for name in LOSSES}
    weights = {"cls": 1.0}  # of all prompts, but the student's only
    distiller, batch = made(
        dataset__mode="everything", everything__match_iou_threshold=0.0, train__loss_weights=weights, **changed
    )
    counts = []
    decode = Teacher.decode
    monkeypatch.setattr(Teacher, "decode", lambda self, e, p, m: counts.append(len(p)) or decode(self, e, p, m))
    losses_of(distiller, batch)
    pairs = sum(batch.counts)
    assert sum(counts) == len(distiller.teachers) * (pairs if decoded is None else decoded)


@pytest.mark.parametrize("mode", ["single", "everything"])
def test_half_precision_changes_little(made, mode: str):
    """Autocast as on a GPU: pixels are counted in full, and gradients reach the same parameters."""
    found = []
    for half in (False, True):
        distiller, batch = made(dataset__mode=mode, everything__match_iou_threshold=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = distiller(batch)
        losses["total"].backward()
        names = {name for name, p in distiller.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
        found.append((float(losses["total"].detach()), names))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.02)
    assert found[0][1] == found[1][1]


def test_overlaps_are_exact_under_autocast():
    masks = torch.zeros(2, 1, 256, 256)
    masks[0, :, :200, :201], masks[1, :, :200, :199] = 1, 1
    prompts = grid(1, (1024, 1024))

    def decode(embedding, prompts, multimask) -> Decoded:
        return Decoded(2 * masks[:1] - 1, torch.ones(1, 1))

    with torch.autocast("cpu", torch.bfloat16):
        found = everything.match(decode, torch.zeros(1), prompts, masks, False, 64)
    torch.testing.assert_close(found[0, 0], torch.tensor([1.0, 199 / 201]))


def test_an_embedding_that_depends_on_the_prompt_is_refused_in_a_grid(made):
    hook = {"prompt_embed": "mask_decoder.transformer.layers[0]@out.1"}
    distiller, batch = made(dataset__mode="everything", distillation__hooks={"student": hook})
    with pytest.raises(ValueError, match="a map for each prompt of the grid"):
        distiller(batch)


def test_statistics_of_a_frozen_encoder_stay(made):
    distiller, batch = made(freeze={"freeze_image_encoder": True, "unfreeze_epoch": 1}, train__freeze_bn=False)
    distiller.train()
    before = {name: value.clone() for name, value in distiller.student.image_encoder.named_buffers()}
    distiller(batch)
    assert all(torch.equal(before[name], value) for name, value in distiller.student.image_encoder.named_buffers())
    batch.epoch = 1
    distiller.train()
    distiller(batch)
    assert not all(torch.equal(before[n], value) for n, value in distiller.student.image_encoder.named_buffers())
    assert not any(p.requires_grad for p in distiller.student.image_encoder.head.parameters())
