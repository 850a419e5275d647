"""The model of a phase, the same at another size and after the phase before; runs that are stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillation.supervised import config as supervised_config
from distillation.supervised import run
from distillation.supervised.model import SupervisedSam3
from distillation.supervised.run import build_model
from sam3.engine import checkpoint
from sam3.engine.from_scratch import OUTSIDE
from sam3.engine.training_run import run_stage
from sam3.engine.weights import load_for_any_size

ROOT = Path(__file__).resolve().parents[3]


def build(phase: str, *opts: object) -> SupervisedSam3:
    words = [
        "--cfg",
        str(ROOT / "configs" / f"tiny_sam3_{phase}.yaml"),
        "--device",
        "cpu",
        "--opts",
        "SEED",
        "1",
        *map(str, opts),
    ]
    return build_model(supervised_config.load(supervised_config.make_parser("").parse_args(words)))


def save(model: SupervisedSam3, path: Path) -> dict[str, Tensor]:
    torch.save({"model": model.state_dict()}, path)
    return model.state_dict()


def test_distances_are_those_of_whole_pictures():
    """Attention's positions in a part of a picture are those of the upper left of a whole one."""
    part, whole = (build("image", "DATA.IMG_SIZE", size).detector.backbone.vision_backbone.trunk for size in (112, 224))
    for ours, theirs in zip(part.blocks, whole.blocks, strict=True):
        table = theirs.attn.freqs_cis
        if theirs.whole_image:
            table = table.view(16, 16, -1)[:8, :8].flatten(0, 1)
        torch.testing.assert_close(ours.attn.freqs_cis, table)


def test_a_phase_goes_on_from_the_one_before(tmp_path: Path):
    words = save(build("words"), tmp_path / "words.pth")
    assert any(key.startswith(OUTSIDE) for key in words)
    image = build("image")
    load_for_any_size(image, tmp_path / "words.pth", OUTSIDE)
    key = "detector.backbone.vision_backbone.trunk.blocks.1.attn.qkv.weight"
    assert torch.equal(image.state_dict()[key], words[key])
    for key in (key for key in image.state_dict() if key.startswith(OUTSIDE)):
        assert torch.equal(image.state_dict()[key], words[key]), key


def test_what_is_no_part_of_sam3_may_be_missing(tmp_path: Path):
    """An exported file has no heads for outlines; a model may go without them."""
    own = save(build("words"), tmp_path / "words.pth")
    plain = build("image", "LOSS.OUTLINE_WEIGHT", 0)
    load_for_any_size(plain, tmp_path / "words.pth", OUTSIDE)
    assert not any(key.startswith(OUTSIDE) for key in plain.state_dict())
    save(plain, tmp_path / "plain.pth")
    again = build("words")
    before = again.state_dict()["outlines.turn.weight"].clone()
    load_for_any_size(again, tmp_path / "plain.pth", OUTSIDE)
    assert torch.equal(again.state_dict()["outlines.turn.weight"], before)
    key = "detector.backbone.language_backbone.resizer.weight"
    assert torch.equal(again.state_dict()[key], own[key])
    with pytest.raises(ValueError, match="outlines"):
        load_for_any_size(build("words"), tmp_path / "plain.pth")


def train(phase: str, output: Path, *flags: str) -> Path:
    """The phase's last checkpoint after three steps with batches of two scenes; each step is kept."""
    flags = (*flags, "--output", str(output), "--device", "cpu", "--max-steps", "3", "--batch-size", "2")
    opts = ("DATA.NUM_VAL_SCENES=2", "TRAIN.EFFECTIVE_BATCH=2", "TRAIN.WARMUP_STEPS=1", "TRAIN.SAVE_INTERVAL=1")
    words = ["--cfg", str(ROOT / "configs" / f"tiny_sam3_{phase}.yaml"), *flags, "--opts", *opts, "TENSORBOARD=False"]
    assert run_stage(words, supervised_config.make_parser(""), supervised_config.load, run.build_run) == 0
    return output / checkpoint.LATEST


@pytest.mark.parametrize("phase", ["words", "closeup"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(phase: str, tmp_path: Path):
    last = train(phase, tmp_path / "whole")
    first = tmp_path / "whole/ckpt_step_1.pth"
    again = train(phase, tmp_path / "resumed", "--resume", str(first))
    before, wanted, found = map(checkpoint.load, (first, last, again))
    assert (before["step"], wanted["step"], found["step"]) == (1, 3, 3)
    assert not all(torch.equal(tensor, before["model"][key]) for key, tensor in wanted["model"].items())
    assert set(wanted["model"]) == set(found["model"])
    for key, tensor in wanted["model"].items():
        assert torch.equal(tensor, found["model"][key]), key
