"""What Stage 2's converter refuses, and with which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sam3.engine.merge import TRUNK
from sam3.engine.weights import load_weights, save_weights
from sam3.model.tracker_config import TINY_MEMORY
from stage2.frozen_parts import tracker_meta
from tests.stage2.clips import distiller
from tests.stage2.memory_files import convert, write_checkpoint, write_inputs

POOLED_MAP = dataclasses.replace(TINY_MEMORY, perceiver=False)


@pytest.fixture
def inputs(tmp_path: Path, teacher_file: Path) -> Path:
    return write_inputs(tmp_path, teacher_file)


def refused(folder: Path, message: str, *flags: str, base: str = "sam3.pt") -> None:
    with pytest.raises(ValueError, match=message):
        convert(folder, *flags, base=base)
    assert not list(folder.glob("*merged.pt*"))


def change_base(folder: Path, change) -> None:
    file = load_weights(folder / "sam3.pt")
    tensors = {key: tensor.clone() for key, tensor in file.tensors.items()}
    save_weights(folder / "changed.pt", change(tensors) or tensors, file.meta)


def without(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(start)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["backbone.model.stem.weight", "head.0.weight"], "a Stage-1 checkpoint, which stage1/convert_stage1_weights"),
        (["student_trunk.backbone.model.a"], "a geometry fine-tuning checkpoint, which stage1_geometry_finetune/conv"),
        (["detector.a", "tracker.memory_attention.b"], "it is a whole model, which goes to --sam3_weights"),
        (["perceiver.latents", "attention.norm"], r"no compressed memory .*keys below perceiver, attention; give a"),
    ],
)
def test_other_files_are_no_memory(inputs, keys, message):
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=dict.fromkeys(keys, torch.ones(1)))
    refused(inputs, message)


def test_a_file_of_optimizer_states_only(inputs):
    torch.save({"optimizer": {"state": {}}, "step": 5}, inputs / "ckpt_best.pth")
    refused(inputs, "ckpt_best.pth is not a dict of tensors: optimizer, step are of other types")


@pytest.mark.parametrize("lacking", ["memory_attention.norm.", "memory_attention.layers.1.", "spatial_perceiver."])
def test_a_memory_with_gaps(inputs, lacking):
    state = without(distiller().state_dict(), lacking)
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=state)
    refused(inputs, rf"ckpt_best.pth merged into .*sam3.pt does not fit Sam3Tracker: \d+ missing: .*{lacking}")


def test_a_memory_of_other_sizes_than_stated(inputs):
    state = distiller(dataclasses.replace(TINY_MEMORY, num_latents=8)).state_dict()
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=state)
    refused(inputs, r"1 misshapen: spatial_perceiver.latents .*\(8, 32\)")
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", TINY_MEMORY, memory=POOLED_MAP.to_meta())
    refused(inputs, r"48 unexpected: spatial_perceiver\.")


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (None, r"does not state the sizes of its memory \(meta.memory\)"),
        ({"perceiver": True}, r"ckpt_best.pth: memory meta has the fields \['perceiver'\]"),
        (7, r"ckpt_best.pth: .*train it again with this version"),
        (TINY_MEMORY.to_meta() | {"num_latents_2d": 15}, r"2-D latents fill a square grid: .* got 15"),
        (TINY_MEMORY.to_meta() | {"num_latents": "16"}, r"ckpt_best.pth merged into .*: "),
    ],
)
def test_memory_meta(inputs, memory, message):
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", memory=memory)
    refused(inputs, message)


def test_tensors_that_would_be_lost(inputs):
    """Copies of frozen parts are left out; what was trained beside the memory is not lost silently."""
    own = load_weights(inputs / "sam3.pt").tensors["tracker.maskmem_tpos_enc"]
    for extra, message in ((own + 1, "maskmem_tpos_enc"), (None, "mem_proj.weight")):
        name = "maskmem_tpos_enc" if extra is not None else "mem_proj.weight"
        state = distiller().state_dict() | {name: torch.ones(2) if extra is None else extra}
        write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=state)
        refused(inputs, f"1 tensors that are neither of the memory nor those of .*sam3.pt: {message}; Stage 2 trains")
    state = distiller().state_dict() | {"maskmem_tpos_enc": own}
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=state)
    assert convert(inputs, "--no_verify") == 0
    assert len(load_weights(inputs / "merged.pt").tensors) == 657 - 106 + 102


def test_values_that_are_not_finite(inputs):
    state = distiller().state_dict()
    payload = torch.load(inputs / "ckpt_best.pth", weights_only=True)
    payload["model"] = state | {"memory_attention.norm.bias": torch.full((64,), float("inf"))}
    torch.save(payload, inputs / "ckpt_best.pth")
    refused(inputs, "ckpt_best.pth has NaN or infinite values in memory_attention.norm.bias; take an earlier")


def test_bases_that_are_none(inputs):
    change_base(inputs, lambda tensors: without(tensors, "tracker."))
    refused(inputs, r"changed.pt has no tracker \(tracker\.\*\), which video needs", base="changed.pt")
    change_base(inputs, lambda tensors: without(tensors, "detector.backbone.vision_backbone.sam2_convs."))
    refused(inputs, r"changed.pt has no second neck .*give the full sam3.pt", base="changed.pt")
    change_base(inputs, lambda tensors: without(tensors, "tracker.maskmem_tpos_enc"))
    refused(inputs, "changed.pt: .*no tensor 'maskmem_tpos_enc'", base="changed.pt")
    change_base(inputs, lambda tensors: without(tensors, f"{TRUNK}."))
    refused(inputs, "changed.pt: not a SAM3 checkpoint: no tensor 'backbone.vision_backbone.trunk", base="changed.pt")
    refused(inputs, "ckpt_step_5.pth is no SAM3 checkpoint: wanted keys below 'detector.'", base=write_checkpoint(
        inputs / "ckpt_step_5.pth", inputs / "sam3.pt").name)  # fmt: skip


def test_another_tracker(inputs, capsys):
    def shift(tensors):
        tensors["tracker.obj_ptr_proj.layers.0.bias"][0] += 1e-6

    change_base(inputs, shift)
    message = r"neck and tracker in .*changed.pt are not those .* give sam3.pt, which .*--allow-other-teacher"
    refused(inputs, message, base="changed.pt")
    assert convert(inputs, "--allow-other-teacher", "--no_verify", base="changed.pt") == 0
    assert "Warning: neck and tracker in " in capsys.readouterr().out


@pytest.mark.parametrize("part", ["tracker.transformer.encoder.norm.bias", "detector.dot_prod_scoring.hs_proj.bias"])
def test_what_the_memory_does_not_meet_may_differ(inputs, part):
    def shift(tensors):
        tensors[part] += 1

    change_base(inputs, shift)
    assert convert(inputs, "--no_verify", base="changed.pt") == 0


def test_tracker_of_other_sizes(inputs):
    stated = tracker_meta(load_weights(inputs / "sam3.pt"))
    assert {name: stated[name] for name in ("dim", "mem_dim", "grid")} == {"dim": 64, "mem_dim": 16, "grid": 16}
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", tracker=stated | {"grid": 72, "dim": 256})
    message = r"trained for a tracker of other sizes than that of .*sam3.pt: dim 256, not 64; grid 72, not 16; give"
    refused(inputs, message, "--allow-other-teacher")


def test_a_checkpoint_that_states_no_tracker(inputs, capsys):
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", tracker=None, teacher=None)
    assert convert(inputs, "--no_verify") == 0
    assert "does not say which tracker it was trained with" in capsys.readouterr().out


def test_the_run_finds_values_that_are_not_finite(inputs):
    state = distiller().state_dict()
    state["memory_attention.norm.weight"] = torch.full_like(state["memory_attention.norm.weight"], 3e38)
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=state)
    refused(inputs, "gives NaN or infinite values in the second of two frames")
