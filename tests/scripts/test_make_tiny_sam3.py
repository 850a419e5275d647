"""The random checkpoint: same bytes for the same seed, and embeddings that follow the picture."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sam3.engine.weights import load_weights, same_bytes
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model, build_teacher_trunk
from scripts.make_tiny_sam3 import main
from tests.parity.fill import image


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "new folder" / "tiny.pt"
    assert main(["--output", str(path)]) == 0
    return path


def test_layout_and_seed(tiny, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "same.pt"), "--seed", "1"]) == 0
    assert "657 entries, 2.91M parameters" in capsys.readouterr().out
    main(["--output", str(tmp_path / "other.pt"), "--seed", "2"])
    first, same, other = (load_weights(p).tensors for p in (tiny, tmp_path / "same.pt", tmp_path / "other.pt"))
    assert all(key.startswith(("detector.", "tracker.")) for key in first)
    assert all(same_bytes(tensor, same[key]) for key, tensor in first.items())
    key = "detector.transformer.decoder.query_embed.weight"
    assert not same_bytes(first[key], other[key])


def test_embeddings_depend_on_picture_and_place(tiny):
    trunk = build_teacher_trunk(tiny, device="cpu")
    pictures = torch.stack([torch.from_numpy(image(224, 224, seed=seed)) for seed in range(2)])
    maps = trunk(pictures.permute(0, 3, 1, 2) / 127.5 - 1)[-1].flatten(2)  # (2, C, G * G)
    assert maps.std() > 0.5
    assert torch.cosine_similarity(maps[0], maps[1], dim=0).mean() < 0.9  # pictures
    assert torch.cosine_similarity(maps[0], maps[0].mean(1, keepdim=True), dim=0).mean() < 0.9  # places


def test_finds_some_things_with_masks_of_some_size(tiny):
    processor = Sam3Processor(build_sam3_image_model(tiny, device="cpu"))
    state = processor.set_image(Image.fromarray(image(200, 300, seed=0)))
    state = processor.set_text_prompt("a red car", state)
    assert 0 < len(state["scores"]) <= 20
    assert 0.01 < state["masks"].float().mean() < 0.99


def test_unknown_preset_is_a_usage_error():
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "huge"])
    assert stop.value.code == 2
