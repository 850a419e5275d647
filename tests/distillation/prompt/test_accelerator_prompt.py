"""Training on CUDA or MPS beside the CPU: nothing may stay behind on another device. Skipped without either."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam3.engine.distributed import choose_device
from tests.distillation.prompt.runs import settings, train
from tests.distillation.prompt.test_train_prompt_distill import MODES
from tests.stage1.runs import metrics

DEVICE = choose_device("auto")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA or MPS"),
]


@pytest.mark.parametrize("mode", ["mixed", "everything"])
def test_losses_are_those_of_the_cpu(models: Path, photos: Path, tmp_path: Path, mode: str):
    """Teachers in fp16, the student under bf16 autocast."""
    names = ("train/task_loss", "train/dist_loss", "val/iou")
    found = {}
    for device in (str(DEVICE), "cpu"):
        output = tmp_path / device.replace(":", "_")
        values = settings(models, photos, output, **MODES[mode], train__device=device, train__lr=1e-5)
        assert train(values, "--max-steps", "1") == 0
        found[device] = [metrics(output, name)[0] for name in names]
    assert found[str(DEVICE)] == pytest.approx(found["cpu"], rel=0.1, abs=0.02)
