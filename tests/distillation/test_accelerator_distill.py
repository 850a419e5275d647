"""Phase 1 on CUDA or MPS beside the CPU, the student in half precision there. Skipped without either."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam3.engine.distributed import choose_device
from tests.distillation.runs import run
from tests.samples import write_sa1b
from tests.stage1.runs import metrics

DEVICE = choose_device("auto")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA or MPS"),
]


def test_losses_are_those_of_the_cpu(tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=8, num_val=3)
    found = {}
    for device in (str(DEVICE), "cpu"):
        output = tmp_path / device.replace(":", "_")
        settings = {"device": device, "student_dropout": 0.0, "teacher_dtype": "fp32"}
        assert run(tmp_path / "data", output, "--phase", "1", "--max-steps", "1", **settings) == 0
        found[device] = metrics(output / "phase1", "train/total_loss")[0]
    assert found[str(DEVICE)] == pytest.approx(found["cpu"], rel=0.05)
