"""The released sizes: a 446M-parameter trunk with synthetic weights, 1008 px pictures, 10.6 MB records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import EmbeddingReader, store_meta
from sam3.engine.weights import save_weights
from sam3.model.vitdet import ViT
from sam3.transforms import Preprocess
from stage1 import save_embedding_stage1, train_stage1
from tests.samples import write_sa1b
from tests.stage1.runs import ROOT

pytestmark = pytest.mark.slow
RECORD_BYTES = 4 + 2 * 1024 * 72 * 72


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAM3's trunk with random weights in the layout of sam3.pt (1.8 GB); removed afterwards."""
    path = tmp_path_factory.mktemp("full") / "sam3.pt"
    torch.manual_seed(0)
    trunk = ViT()
    save_weights(path, {f"detector.backbone.vision_backbone.trunk.{k}": v for k, v in trunk.state_dict().items()})
    yield path
    path.unlink()


def test_export_at_full_size(teacher_file: Path, tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=1, num_val=0, height=600, width=900)
    arguments = ["--cfg", str(ROOT / "stage1/configs/teacher/sam_vit_huge_sa1b.yaml"), "--device", "cpu"]
    arguments += ["--data-path", str(tmp_path / "data"), "--output", str(tmp_path / "export"), "--batch-size", "1"]
    arguments += ["--opts", "MODEL.RESUME", str(teacher_file), "DATA.NUM_WORKERS", "0"]
    assert save_embedding_stage1.main(arguments) == 0
    store = tmp_path / "export/embeddings"
    assert (store / "rank0-values.bin").stat().st_size == RECORD_BYTES == 10_616_836
    values, _ = EmbeddingReader(store).read("sa_1")
    assert values.shape == (1024, 72, 72)
    assert values.std() > 0.1
    # The trunk's own output, kept in int8: half the bytes, nearly the same direction in every cell.
    meta = EmbeddingReader(store).meta | {"dtype": "int8"}
    with EmbeddingWriter(tmp_path / "int8", meta) as writer:
        writer.add("sa_1", 0, values)
    assert (tmp_path / "int8/rank0-values.bin").stat().st_size <= 0.51 * RECORD_BYTES
    small, _ = EmbeddingReader(tmp_path / "int8").read("sa_1")
    cosine = torch.nn.functional.cosine_similarity(small, values, dim=0)
    print(f"int8 against float16 at full size: cosine {cosine.mean():.6f} on average, {cosine.min():.6f} at the least")
    assert cosine.mean() >= 0.9999


@pytest.mark.parametrize("stem", ["es_ev_s", "es_rv_m", "es_tv_s"])
def test_training_at_full_size(stem: str, tmp_path: Path):
    keys = write_sa1b(tmp_path / "data", num_train=2, num_val=1, height=600, width=900)
    meta = store_meta(
        (1024, 72, 72),
        preprocess=Preprocess().to_meta(),
        augmentation={"enabled": False},
        teacher={"name": "synthetic", "sha256": "0" * 64},
    )
    generator = torch.Generator().manual_seed(0)
    with EmbeddingWriter(tmp_path / "embeddings", meta) as writer:
        for key in keys:
            writer.add(key, 0, torch.randn(1024, 72, 72, generator=generator))
    arguments = ["--cfg", str(ROOT / f"stage1/configs/{stem}.yaml"), "--device", "cpu", "--batch-size", "2"]
    arguments += ["--data-path", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--opts"]
    arguments += ["DISTILL.TEACHER_EMBED_PATH", str(tmp_path / "embeddings"), "DATA.NUM_WORKERS", "0"]
    arguments += ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "PRINT_FREQ", "1", "TENSORBOARD", "False"]
    assert train_stage1.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # Teacher and fresh student are unrelated here: cosine near 0, squared error near 1 plus the student's own power.
    assert lines[0]["train/loss_cosine"] == pytest.approx(1, abs=0.1)
    assert 0.9 < lines[0]["train/loss_mse"] < 3
    assert (tmp_path / "run/ckpt_epoch_0.pth").exists()
