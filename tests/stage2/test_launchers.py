"""Stage 2's launchers, as bash runs them; what all launchers share is tested in tests/scripts/test_launch.py."""

from __future__ import annotations

import shutil

import pytest

from tests.scripts.test_launch import command, launch

SAVE, TRAIN, CONVERT = (f"stage2/scripts/{name}.sh" for name in ("save_embeddings", "train_memory", "convert_weights"))
KNOBS = ("DATA_DIR", "CHECKPOINT", "RESUME", "STAGE2_WEIGHTS", "SAM3_WEIGHTS")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(autouse=True)
def without_knobs(monkeypatch):
    for name in KNOBS:
        monkeypatch.delenv(name, raising=False)


def torchrun(processes: int, port: int) -> list[str]:
    words = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--nnodes", "1"]
    return [*words, "--master_port", str(port)]


def test_defaults_are_the_documented_commands():
    assert command(SAVE) == [
        *torchrun(1, 29500),
        *("stage2/save_video_embeddings_stage2.py", "--data_dir", "data/sa-v/extracted_frames"),
        *("--output_dir", "output/stage2_embeddings", "--batch_size", "8"),
    ]
    assert command(TRAIN) == [
        *torchrun(8, 29504),
        *("stage2/train_memory_stage2.py", "--config", "stage2/configs/efficient_memory.yaml"),
        *("--output_dir", "output/stage2_memory"),
    ]
    assert command(CONVERT) == [
        *("stage2/convert_memory_weights_stage2.py", "--stage2_weights", "output/stage2_memory/ckpt_best.pth"),
        *("--sam3_weights", "sam3_checkpoints/sam3.pt", "--output_path", "output/efficient_sam3_memory.pt"),
    ]


def test_knobs_and_trailing_pairs():
    words = command(TRAIN, "GPUS=0", "CFG=own.yaml", "RESUME=a.pth", "OUTPUT=", "DATA.SAV_ROOT", "x", "TRAIN.LR=1e-4")
    assert words == [
        *("stage2/train_memory_stage2.py", "--config", "own.yaml", "--resume", "a.pth", "--device", "cpu"),
        *("DATA.SAV_ROOT", "x", "TRAIN.LR=1e-4"),
    ]
    words = command(SAVE, "GPUS=2", "CHECKPOINT=c.pt", "BATCH_SIZE=4", "--frame_stride", "4")
    assert words[-6:] == ["--batch_size", "4", "--checkpoint", "c.pt", "--frame_stride", "4"]


def test_the_converter_is_one_plain_process_whatever_the_environment_says():
    words = command(CONVERT, "OUTPUT=full.pt", "SAM3_WEIGHTS=", GPUS="4", DEVICE="cuda", NNODES="2")
    assert words == [
        *("stage2/convert_memory_weights_stage2.py", "--stage2_weights", "output/stage2_memory/ckpt_best.pth"),
        *("--output_path", "full.pt"),
    ]
    done = launch(CONVERT, "GPUS=2")
    assert done.returncode == 2
    assert "GPUS is not a setting of this launcher; known: STAGE2_WEIGHTS SAM3_WEIGHTS OUTPUT PYTHON" in done.stderr
