"""A step at the released sizes: 1008 px, the full frozen heads with synthetic weights, the text encoder run once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import store_meta
from sam3.engine.files import sha256
from sam3.engine.weights import save_weights
from sam3.model.config import Sam3Config
from sam3.model.necks import PassThroughTrunk
from sam3.model_builder import assemble_image_model
from sam3.transforms import Preprocess
from tests.samples import write_sa1b
from tests.stage1.runs import ROOT, finish, start

pytestmark = pytest.mark.slow
MEMORY_GIB = 16


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of sam3.pt's detector but the trunk, with random weights (1.6 GB); removed afterwards."""
    path = tmp_path_factory.mktemp("full") / "sam3.pt"
    torch.manual_seed(0)
    model = assemble_image_model(Sam3Config.preset("full"), PassThroughTrunk(1024))
    save_weights(path, {f"detector.{key}": value for key, value in model.state_dict().items()})
    del model
    yield path
    path.unlink()


def test_training_at_full_size(heads_file: Path, tmp_path: Path):
    keys = write_sa1b(tmp_path / "data", num_train=1, num_val=0, height=600, width=900)
    meta = store_meta(
        (1024, 72, 72),
        preprocess=Preprocess().to_meta(),
        augmentation={"enabled": False},
        teacher={"name": heads_file.name, "sha256": sha256(heads_file)},
    )
    with EmbeddingWriter(tmp_path / "embeddings", meta) as writer:
        writer.add(keys[0], 0, torch.randn(1024, 72, 72, generator=torch.Generator().manual_seed(0)))
    config = ROOT / "stage1_geometry_finetune/configs/es_rv_m.yaml"
    arguments = ["--cfg", str(config), "--device", "cpu", "--batch-size", "1", "--accumulation-steps", "1"]
    arguments += ["--data-path", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--pretrained", ""]
    arguments += ["--sam3-checkpoint", str(heads_file), "--teacher-embed-path", str(tmp_path / "embeddings")]
    arguments += ["--opts", "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    code, text = finish(start("stage1_geometry_finetune/train_geometry_finetune.py", arguments), timeout_s=1200)
    assert code == 0, text
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    print(f"a step of RV-M, 1 picture, 2 prompts: {line['train/max_mem_gib']:.1f} GiB, {line['train/step_ms']:.0f} ms")
    assert 0 < line["train/max_mem_gib"] < MEMORY_GIB
    assert all(0 < line[f"train/loss_{name}"] < 10 for name in ("mse", "bce", "dice"))
    assert line["train/grad_norm"] > 0
    saved = torch.load(tmp_path / "run/ckpt_epoch_0.pth", weights_only=True)["model"]
    assert len(saved) == 653 and all(key.startswith("student_trunk.") for key in saved)
    assert len(list(heads_file.parent.glob("visual_text_*.safetensors"))) == 1
