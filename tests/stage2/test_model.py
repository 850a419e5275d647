"""The training step: what is trained, what the losses are, that memory tricks and processes change nothing."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from sam3.engine import distributed
from sam3.engine.losses import mask_dice, mask_focal, mask_soft_iou
from sam3.model.memory_bank import MemoryBank
from sam3.model.tracker_config import MemoryConfig, TrackerConfig
from sam3.tracker_builder import build_memory
from stage2.data.batch import ABSENT, UNKNOWN, mean_per_clip
from stage2.model import MemoryDistiller
from tests.engine.processes import fork, join
from tests.stage2.clips import CONFIG, SIDE, distiller, make_batch, part, video_model

MIXED = [["mask", "box"], ["click"]]


def gradients(model: MemoryDistiller, batch) -> tuple[float, list[torch.Tensor]]:
    loss = model(batch)["total"]
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def test_only_perceiver_and_memory_attention_are_trained():
    model = distiller()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"memory_attention", "spatial_perceiver"}
    before = {name: tensor.clone() for name, tensor in video_model().state_dict().items()}
    _, grads = gradients(model, make_batch(MIXED))
    assert all(grad is not None and torch.isfinite(grad).all() and grad.any() for grad in grads)
    frozen = video_model()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


def test_counts_at_full_size():
    with torch.device("meta"):
        memory = build_memory(TrackerConfig(), MemoryConfig())
    counts = [sum(p.numel() for p in part.parameters()) for part in (memory.perceiver, memory.attention)]
    assert counts == [3_282_432 + 16_640 + 16_448, 2_961_408]


def test_recomputing_activations_changes_nothing():
    batch = make_batch(MIXED)
    (loss, kept), (again, recomputed) = (gradients(distiller(recompute=r), batch) for r in (False, True))
    assert loss == again
    assert all(torch.equal(one, other) for one, other in zip(kept, recomputed, strict=True))


def test_losses_come_from_the_best_proposal_of_each_frame():
    batch = make_batch([["box"]], num_frames=2)
    model = distiller()
    losses = model(batch)
    found = []
    clip = model.rollout.start(batch)
    model.rollout.follow(clip, lambda t, conditioned, heads: found.append(heads), model.memory)
    candidates, target = found[0].candidates, batch.masks[:, 1:2].float()
    valid = torch.ones(1, 1, SIDE, SIDE)
    focal, dice = (f(candidates, target.expand_as(candidates), valid) for f in (mask_focal, mask_dice))
    best = (20 * focal + dice)[0].argmin()
    assert losses["focal"].item() == pytest.approx(focal[0, best].item(), rel=1e-5)
    assert losses["dice"].item() == pytest.approx(dice[0, best].item(), rel=1e-5)
    iou = mask_soft_iou(candidates[:, best : best + 1], target, valid)
    assert losses["iou"].item() == pytest.approx(iou.item(), rel=1e-5)
    total = 20 * losses["focal"] + losses["dice"] + losses["iou"] + losses["mse"]
    assert losses["total"].item() == pytest.approx(total.item(), rel=1e-6)


def test_the_score_reading_of_the_iou_loss_compares_all_proposals():
    batch = make_batch([["box"]], num_frames=2)
    model = distiller(iou_type="score")
    found = []
    model.rollout.follow(model.rollout.start(batch), lambda t, c, heads: found.append(heads), model.memory)
    drawn, truth = found[0].candidates[0] > 0, batch.masks[0, 1]
    ious = torch.stack([(mask & truth).sum() / (mask | truth).sum() for mask in drawn])
    assert model(batch)["iou"].item() == pytest.approx((found[0].ious[0] - ious).abs().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="iou_type 'box' is unknown; choose one of mask, score"):
        distiller(iou_type="box")


def test_mse_is_between_the_maps_of_both_followers():
    batch = make_batch([["mask"]], num_frames=3)
    model = distiller()
    maps = {}
    for name, memory in (("teacher", None), ("student", model.memory)):
        maps[name] = []
        clip = model.rollout.start(batch)
        model.rollout.follow(clip, lambda t, conditioned, heads, n=name: maps[n].append(conditioned), memory)
    wanted = torch.stack([(s - t).square().mean() for s, t in zip(maps["student"], maps["teacher"], strict=True)])
    assert model(batch)["mse"].item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    shared = distiller(share_memory=True)(batch)["mse"].item()
    assert shared != pytest.approx(wanted.mean().item(), rel=1e-6)
    assert "mse" not in distiller(mse_weight=0.0)(batch)


def test_a_teacher_that_shares_the_masks_sees_what_the_student_drew():
    batch, model = make_batch([["mask"]], num_frames=3), distiller()
    own, shared, drawn = {}, {}, {}
    clip = model.rollout.start(batch)
    model.rollout.follow(clip, lambda t, conditioned, heads: own.update({t: conditioned}))
    model.rollout.follow_both(clip, lambda t, c, heads: drawn.update({t: heads}), shared.__setitem__, model.memory)
    torch.testing.assert_close(shared[1], own[1])  # both look at frame 0 alone
    tracker, bank = video_model().tracker, MemoryBank()
    bank.add(0, tracker.remember(clip.first_map, clip.first), cond=True)
    remembered = tracker.encode_memory(clip.frames[1].top, drawn[1].low, drawn[1].object_logits, from_prompt=False)
    bank.add(1, tracker.remember(remembered, drawn[1]), cond=False)
    wanted = tracker.condition(clip.frames[2].top, tracker.gather(bank.plan(2, 3), bank.records))
    torch.testing.assert_close(shared[2], wanted)
    assert not torch.allclose(shared[2], own[2])
    assert not any(target.requires_grad for target in shared.values())


@pytest.mark.parametrize("state", [UNKNOWN, ABSENT])
def test_frames_that_are_unknown_or_without_the_object_take_no_part_in_mask_losses(state: int):
    batch = make_batch([["box"]], num_frames=3)
    both = distiller()(batch)
    alone = []
    for hidden in (1, 2):
        states, masks = batch.states.clone(), batch.masks.clone()
        states[0, hidden], masks[0, hidden] = state, False
        alone.append(distiller()(replace(batch, states=states, masks=masks)))
        assert alone[-1]["mse"].item() == pytest.approx(both["mse"].item(), rel=1e-6)  # the teacher sees it all
    for name in ("focal", "dice", "iou"):
        second, first = (losses[name].item() for losses in alone)
        assert first != pytest.approx(second, rel=1e-4)
        assert both[name].item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_occlusion_counts_known_frames_only():
    batch = make_batch([["box"]], num_frames=3)
    states = torch.tensor([[1, 0, UNKNOWN]])
    model = distiller(occlusion_weight=1.0)
    found = []
    model.rollout.follow(model.rollout.start(batch), lambda t, c, heads: found.append(heads), model.memory)
    wanted = torch.nn.functional.softplus(found[0].object_logits)  # absent: -log(1 - sigmoid)
    losses = model(replace(batch, states=states))
    assert losses["occlusion"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert losses["dice"].item() == 0


def test_clips_count_alike():
    values, weights = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 9.0]]), torch.tensor([[1.0, 1], [1, 0], [0, 0]])
    clip = torch.tensor([0, 0, 1])
    assert mean_per_clip(values, weights, clip, 2).item() == pytest.approx((9 / 3 + 0) / 2)
    assert mean_per_clip(values[:, 0], weights[:, 0], clip, 2).item() == pytest.approx((6 / 2 + 0) / 2)


def test_prompts_of_several_kinds_are_as_they_would_be_alone():
    batch = make_batch([["click", "mask", "box"]])
    rollout = distiller().rollout
    together = rollout.start(batch)
    for row, kind in enumerate(batch.kinds):
        alone = rollout.start(
            replace(
                batch,
                kinds=[kind],
                clip_of_object=torch.tensor([0]),
                masks=batch.masks[row : row + 1],
                points=batch.points[row : row + 1],
                labels=batch.labels[row : row + 1],
            )
        )
        torch.testing.assert_close(together.first.low[row], alone.first.low[0])
        torch.testing.assert_close(together.first.pointer[row], alone.first.pointer[0])
        torch.testing.assert_close(together.first_map[row], alone.first_map[0])


@torch.no_grad()
def test_the_teacher_follows_as_the_tracker_does():
    batch = make_batch([["click"]], num_frames=4)
    model, tracker = video_model(), video_model().tracker
    followed = []
    rollout = distiller().rollout
    rollout.follow(rollout.start(batch), lambda t, conditioned, heads: followed.append(heads.low))
    bank = MemoryBank()
    for t in range(4):
        frame = model.encode(batch.embeddings[:, t].float())
        gathered = tracker.gather(bank.plan(t, 4), bank.records) if t else None
        points = None if t else (batch.points[:, :1], batch.labels[:, :1])
        heads = tracker.predict_masks(tracker.condition(frame.top, gathered), frame.high_res, 1, points)
        remembered = tracker.encode_memory(frame.top, heads.low, heads.object_logits, from_prompt=t == 0)
        bank.add(t, tracker.remember(remembered, heads), cond=t == 0)
        if t:
            torch.testing.assert_close(followed[t - 1], heads.low)


def test_evaluation_of_a_student_that_is_the_teacher():
    batch = make_batch(MIXED)
    model = distiller()
    model.memory = video_model().tracker.memory
    result = model.evaluate(batch)
    assert result.teacher.shape == (3, 2, SIDE, SIDE)
    assert result.agreement.eq(1).all()
    assert distiller().evaluate(batch).agreement.lt(1).any()


def test_padding_takes_no_part():
    batch = replace(make_batch([["box"]]), sizes=torch.tensor([[CONFIG.img_size // 2, CONFIG.img_size]]))
    outside = batch.masks.clone()
    outside[:, 1:, SIDE // 2 :] ^= True
    for name, value in distiller()(batch).items():
        assert distiller()(replace(batch, masks=outside))[name].item() == pytest.approx(value.item(), rel=1e-6)
    assert not distiller().evaluate(batch).student[:, :, SIDE // 2 :].any()


def test_a_batch_without_objects_gives_zeros_with_a_graph():
    model = distiller()
    loss, grads = gradients(model, make_batch([]))
    assert loss == 0
    assert all(grad is not None and not grad.any() for grad in grads)


def _train_step(argv: list[str]) -> int:
    """Run in two processes: each has one clip, DDP averages."""
    with distributed.start("cpu") as world:
        model = DistributedDataParallel(distiller())
        model(part(make_batch(MIXED), [world.rank]))["total"].backward()
        torch.save([p.grad for p in model.module.parameters()], f"{argv[0]}/{world.rank}.pt")
    return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
def test_two_processes_give_the_gradients_of_one_on_the_joined_batch(tmp_path):
    video_model()  # built once, before the fork
    assert join(fork(_train_step, [str(tmp_path)], 2)) == [0, 0]
    _, wanted = gradients(distiller(), make_batch(MIXED))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, other, joined in zip(first, second, wanted, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, joined, rtol=1e-3, atol=1e-3 * joined.abs().max().item())


def test_a_dense_student_of_all_layers_without_pooling_is_the_teacher():
    memory = MemoryConfig(perceiver=False, num_layers=CONFIG.attention_layers, ffn_dim=128, pool_size=1)
    losses = distiller(memory)(make_batch([["mask"]]))
    assert losses["mse"].item() < 1e-8
