"""The tracker's training step: what is trained, what the losses are, and that they fall."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sam3.engine.losses import mask_dice, mask_focal, mask_soft_iou
from sam3.tracker_builder import build_video_model
from stage2.data.batch import ABSENT, PRESENT, UNKNOWN
from stage2.rollout import Rollout
from stage2.supervised.model import TrackWeights, first_losses, wrong_cells
from tests.stage2.supervised.clips import CELLS, SIDE, clip, prompted, tracker

THREE = ["click", "box", "mask"]
NECK = "detector.backbone.vision_backbone.sam2_convs."


def fixed_length(model, length: int = 5):
    model._draw_length = lambda batch: length
    return model


def test_gradients_reach_all_that_is_trained_and_nothing_else(image_model: Path):
    model = tracker(image_model)
    torch.manual_seed(0)
    model(prompted(clip(3), THREE))["total"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if name.startswith("tracker.")} - trained == {"tracker.no_mem_pos_enc"}
    levels = tuple(f"{NECK}{level}." for level in range(3))
    assert {name for name in trained if not name.startswith("tracker.")} == {n for n in names if n.startswith(levels)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    without = [name for name, p in model.named_parameters() if name in trained and not p.grad.any()]
    # Of objects that are never found to be absent, and codes of frames further back than three.
    assert len(without) < 0.05 * len(trained), without
    parts = ("transformer", "maskmem_backbone", "maskmem_tpos_enc", "obj_ptr_proj", "obj_ptr_tpos_proj")
    for part in (*parts, "mask_downsample", "sam_prompt_encoder", "sam_mask_decoder"):
        assert any(name.startswith(f"tracker.{part}") for name in trained.difference(without)), part


def test_the_neck_can_stay_as_it_is(image_model: Path):
    model = tracker(image_model, "--opts", "MODEL.TRAIN_NECK=False")
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("detector."))
    model(clip(2))["total"].backward()
    assert model.tracker.no_mem_embed.grad.any()


def test_training_differs_in_the_decoder_alone(image_model: Path):
    model = tracker(image_model).train()
    modes = {name for name, module in model.named_modules() if module.training}
    decoder = "tracker.sam_mask_decoder"
    assert modes == {"", *(f"{decoder}.{n}".rstrip(".") for n, _ in model.tracker.sam_mask_decoder.named_modules())}
    assert not any(module.training for module in model.eval().modules())


def test_losses_are_those_of_the_best_proposal(image_model: Path):
    model, batch = fixed_length(tracker(image_model)), prompted(clip(2), ["box"] * 3)
    losses = model(batch)
    found, first = [], []
    begun = model.rollout.begin(model.encode(batch), batch, lambda kind, rows, heads: first.append(heads))
    model.rollout.follow(begun, lambda t, conditioned, heads: found.append(heads), length=5)
    rows = (batch.states[:, 1] == PRESENT).nonzero()[:, 0]
    sums = {"tracked": 0.0, "first": 0.0}
    for t, (name, heads) in enumerate((("first", first[0]), ("tracked", found[0]))):
        scored = rows if t else torch.arange(3)
        true = batch.masks[scored, t, None].float().expand(-1, heads.candidates.shape[1], -1, -1)
        valid = torch.ones(len(scored), 1, CELLS, CELLS)
        candidates = heads.candidates[scored]
        focal, dice, iou = (f(candidates, true, valid) for f in (mask_focal, mask_dice, mask_soft_iou))
        drawn = candidates > 0
        real = (drawn & true.bool()).sum((2, 3)) / (drawn | true.bool()).sum((2, 3))
        score = (heads.ious[scored] - real).abs().mean(1)
        best = (20 * focal + dice).argmin(1, keepdim=True)
        focal, dice, iou = (values.gather(1, best)[:, 0] for values in (focal, dice, iou))
        if t:
            for name_of, values in (("focal", focal), ("dice", dice), ("iou", iou), ("score", score)):
                assert losses[name_of].item() == pytest.approx(values.mean().item(), rel=1e-4)
        wanted = (batch.states[:, t] == PRESENT).float()
        known = batch.states[:, t] != UNKNOWN
        occlusion = F.binary_cross_entropy_with_logits(heads.object_logits[known, 0], wanted[known])
        sums[name] = (20 * focal + dice + iou + score).mean().item() + occlusion.item()
    assert losses["first"].item() == pytest.approx(sums["first"], rel=1e-4)
    assert losses["total"].item() == pytest.approx(sums["first"] + sums["tracked"], rel=1e-4)


def test_where_an_object_is_absent_only_its_logit_is_scored(image_model: Path):
    model, batch = fixed_length(tracker(image_model)), prompted(clip(2), ["mask"] * 3)
    states, masks = batch.states.clone(), batch.masks.clone()
    states[:, 1], masks[:, 1] = ABSENT, False
    found = []
    model.rollout.follow(
        model.rollout.begin(model.encode(batch), batch), lambda t, c, heads: found.append(heads), length=5
    )
    losses = model(replace(batch, states=states, masks=masks))
    assert [losses[name].item() for name in ("focal", "dice", "iou", "score")] == [0, 0, 0, 0]
    wanted = F.softplus(found[0].object_logits).mean()  # -log(1 - sigmoid)
    assert losses["occlusion"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert losses["total"].item() == pytest.approx(wanted.item(), rel=1e-5)  # given masks leave nothing to score
    assert losses["first"].item() == 0


def test_weights_of_the_first_frame_and_of_the_rest(image_model: Path):
    batch = prompted(clip(2), ["box"] * 3)
    model = fixed_length(tracker(image_model))
    model.weights = TrackWeights(first=0.0)
    alone = model(batch)
    terms = sum(weight * alone[name].item() for name, weight in (("focal", 20), ("dice", 1), ("iou", 1)))
    assert alone["total"].item() == pytest.approx(terms + alone["score"].item() + alone["occlusion"].item(), rel=1e-5)
    model.weights = TrackWeights(first=3.0)
    assert model(batch)["total"].item() == pytest.approx((alone["total"] + 3 * alone["first"]).item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"LOSS\.DICE must be at least 0, got -1"):
        TrackWeights(dice=-1)


def test_first_losses_are_means_per_clip():
    batch = replace(clip(2), keys=["a", "b"], clip_of_object=torch.tensor([0, 0, 1]))
    names = ("focal", "dice", "mask", "score", "object_logits")
    parts = [
        (torch.tensor([0, 2]), {name: torch.tensor([1.0, 8.0]) for name in names}),
        (torch.tensor([0]), {name: torch.tensor([3.0]) for name in names}),
    ]
    losses = first_losses(parts, batch)
    assert losses["dice"].item() == losses["iou"].item() == pytest.approx(((1 + 3) / 2 + 8) / 2)
    certain = [F.softplus(torch.tensor(-logit)).item() for logit in (1.0, 3.0, 8.0)]
    assert losses["occlusion"].item() == pytest.approx(((certain[0] + certain[1]) / 2 + certain[2]) / 2)


def test_a_correction_click_falls_where_mask_and_truth_differ():
    true = torch.zeros(3, 4, 4, dtype=torch.bool)
    true[:, :2] = True
    masks = torch.where(true, 1.0, -1.0)
    masks[0, 1, 2] = -1  # missed
    masks[1, 3, 0] = 1  # beside the object
    xy, labels = wrong_cells(masks, true, 224)  # cells of 56 pixels
    assert xy[:2].tolist() == [[2.5 * 56 - 0.5, 1.5 * 56 - 0.5], [0.5 * 56 - 0.5, 3.5 * 56 - 0.5]]
    assert labels[:2].tolist() == [1, 0]
    column, row = ((xy[2] + 0.5) / 56).long().tolist()
    assert labels[2].item() == true[2, row, column]


def test_objects_are_followed_as_the_built_model_does(image_model: Path):
    batch, model = prompted(clip(3), THREE), tracker(image_model).eval()
    rollout = Rollout(build_video_model(image_model, "cpu"))
    found = []
    begun = rollout.start(batch)
    rollout.follow(begun, lambda t, conditioned, heads: found.append(heads))
    with torch.no_grad():
        masks, present = model.follow(model.encode(batch), batch)
    assert masks.shape == (3, 3, SIDE, SIDE)
    for t, heads in enumerate([begun.first, *found]):
        wanted = rollout.tracker.upsample(heads.low)[:, 0] > 0
        assert (masks[:, t] == wanted).float().mean() > 0.999  # frames in one pass are rounded otherwise
        assert torch.equal(present[:, t], heads.object_logits[:, 0] > 0)


def test_the_loss_of_a_clip_falls(image_model: Path):
    batch, model = prompted(clip(2), ["box", "box", "mask"]), fixed_length(tracker(image_model))
    trunk = model.detector.backbone.vision_backbone.trunk
    frozen = trunk.pos_embed.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    totals = []
    for _ in range(5):
        losses = model(batch)
        totals.append(losses["total"].item())
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert totals[2] < totals[1] < totals[0]
    assert totals[4] < 0.5 * totals[0]
    assert torch.equal(trunk.pos_embed, frozen)
