"""The students against the outputs of the public reference implementation, at 1008 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.backbones.student import BACKBONES, StudentTrunk
from tests.backbones.samples import filled
from tests.parity.fill import image, probe

REFERENCE = np.load(Path(__file__).parents[1] / "parity" / "students.npz")
CHANNELS = {
    "efficientvit_b0": 128,
    "efficientvit_b1": 256,
    "efficientvit_b2": 384,
    "repvit_m0_9": 384,
    "repvit_m1_1": 512,
    "repvit_m2_3": 640,
    "tiny_vit_5m": 320,
    "tiny_vit_11m": 448,
    "tiny_vit_21m": 576,
}
FAST = "efficientvit_b0"


def relative_error(ours: torch.Tensor, entry: str) -> float:
    theirs = REFERENCE[entry]
    return float(np.linalg.norm(probe(ours) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in BACKBONES])
def test_outputs_equal_the_reference(name: str) -> None:
    x = torch.from_numpy(image(1008, 1008, seed=0)).permute(2, 0, 1)[None] / 127.5 - 1
    assert relative_error(x, "input") == 0
    trunk = StudentTrunk(filled(name))
    seen = []
    trunk.model.backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.inference_mode():
        maps = trunk(x)
    assert trunk.channel_list == [1024]
    assert [m.shape for m in maps] == [(1, 1024, 72, 72)]
    assert seen[0].shape == (1, CHANNELS[name], 32, 32)
    stem = BACKBONES[name].stem
    assert relative_error(seen[0], f"{stem}.backbone") < 1e-4
    assert relative_error(maps[0], stem) < 1e-4
