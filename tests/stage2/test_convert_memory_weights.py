from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sam3.backbones.student import build_student
from sam3.engine import files
from sam3.engine.files import sha256
from sam3.engine.weights import WeightFile, load_weights, same_bytes, save_weights
from sam3.model.tracker_config import TINY_MEMORY, MemoryConfig, TrackerConfig
from sam3.tracker_builder import build_memory, build_video_model
from sam3.transforms import Preprocess
from stage1 import convert_stage1_weights
from stage2 import convert_memory_weights_stage2
from stage2.convert_memory_weights_stage2 import check_fit, main, parse_args, plan_conversion
from stage2.frozen_parts import tracker_meta
from stage2.rollout import Rollout
from tests.manifests import manifest_tensors
from tests.samples import TINY_MAP
from tests.scripts.test_launch import command
from tests.stage2.clips import CONFIG, distiller, make_batch
from tests.stage2.memory_files import convert, write_checkpoint, write_inputs

POOLED_MAP = dataclasses.replace(TINY_MEMORY, perceiver=False)
NUM_SAM3, NUM_DENSE, NUM_MEMORY = 657, 106, 102  # entries of the tiny preset


@pytest.fixture
def inputs(tmp_path: Path, teacher_file: Path) -> Path:
    return write_inputs(tmp_path, teacher_file)


@pytest.fixture(scope="module")
def student_file(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> Path:
    """A merged Stage-1 model, which pads its pictures."""
    folder = tmp_path_factory.mktemp("stage1")
    meta = {
        "backbone": "efficientvit_b0",
        "embed_size": CONFIG.grid,
        "preprocess": Preprocess(CONFIG.img_size, "pad").to_meta(),
        "teacher": {"name": teacher_file.name, "sha256": sha256(teacher_file)},
    }
    save_weights(folder / "student.pth", build_student("efficientvit_b0", *TINY_MAP[:2]).state_dict(), meta)
    flags = ["--student-ckpt", folder / "student.pth", "--sam3-ckpt", teacher_file, "--output", folder / "merged.pt"]
    assert convert_stage1_weights.main([str(flag) for flag in flags]) == 0
    return folder / "merged.pt"


def expected(base: Path, checkpoint_path: Path, keep_dense: bool = False) -> dict[str, Tensor]:
    memory = {f"tracker.{key}": tensor for key, tensor in load_weights(checkpoint_path).tensors.items()}
    dropped = ("tracker.memory_attention.", "tracker.spatial_perceiver.")
    dropped += () if keep_dense else ("tracker.transformer.",)
    return memory | {k: t for k, t in load_weights(base).tensors.items() if not k.startswith(dropped)}


def check_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(same_bytes(tensor, wanted[key]) for key, tensor in found.items())


# What is written ------------------------------------------------------------------------------------------------------


def test_commands_of_the_document(inputs, student_file, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    for folder in ("sam3_checkpoints", "output/stage2_memory"):
        Path(folder).mkdir(parents=True)
    Path("sam3.pt").rename("sam3_checkpoints/sam3.pt")
    Path("ckpt_best.pth").rename("output/stage2_memory/ckpt_best.pth")
    shutil.copy(student_file, "output/efficient_sam3_efficientvit_b0.pt")
    first = """
      --stage2_weights output/stage2_memory/ckpt_best.pth
      --sam3_weights sam3_checkpoints/sam3.pt
      --output_path output/efficient_sam3_memory.pt"""
    second = """
      --stage2_weights output/stage2_memory/ckpt_best.pth
      --sam3_weights output/efficient_sam3_efficientvit_b0.pt
      --output_path output/efficient_sam3_full.pt"""
    assert main(first.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "Memory:  output/stage2_memory/ckpt_best.pth (16 + 16 latents by a Perceiver of 2 layers, 2-D ones pooled 2x2"
    )
    total = NUM_SAM3 - NUM_DENSE + NUM_MEMORY
    assert lines[2:] == [
        "Removed: 106 tensors, 706.05 kB",
        f"Output:  output/efficient_sam3_memory.pt ({total} tensors, 11.57 MB)",
        "Memory parameters copied: 102 -> prefix 'tracker.'",
        "SAM3 params replaced=0, dropped=106 (106 of the dense attention), kept=551",
        "Merged checkpoint saved to: output/efficient_sam3_memory.pt",
        f"Proof: {total} tensors read back, 0 missing, 0 unexpected; 102 bit-equal to the memory, 551 to SAM3; the "
        "video model loads it strictly and followed an object through two frames",
        lines[-1],
    ]
    assert lines[-1].startswith("Size: 11.8")
    trained = Path("output/stage2_memory/ckpt_best.pth")
    merged = load_weights("output/efficient_sam3_memory.pt")
    check_equal(merged.tensors, expected(Path("sam3_checkpoints/sam3.pt"), trained))
    assert MemoryConfig.from_meta(merged.meta["memory"]) == TINY_MEMORY

    assert main(second.split()) == 0
    assert "Note: the memory was trained on frames made by Preprocess(" in capsys.readouterr().out
    full, student = load_weights("output/efficient_sam3_full.pt"), load_weights(student_file)
    check_equal(full.tensors, expected(student_file, trained))
    origin = {"file": "ckpt_best.pth", "epoch": 2, "step": 500, "teacher": full.meta["stage2"]["teacher"]}
    assert full.meta == {**student.meta, "memory": TINY_MEMORY.to_meta(), "stage2": origin}
    assert full.meta["preprocess"]["resize"] == "pad"
    assert origin["teacher"]["sha256"] == sha256("sam3_checkpoints/sam3.pt")
    assert build_video_model("output/efficient_sam3_full.pt", "cpu").preprocess.resize == "pad"


@pytest.mark.parametrize("memory", [TINY_MEMORY, POOLED_MAP])
def test_the_merged_model_follows_objects_as_the_student_did(inputs, memory):
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", memory)
    assert convert(inputs, "--no_verify") == 0
    student = distiller(memory).memory
    student.attention.eval()
    batch = make_batch([["mask", "click"], ["box"]], num_frames=4)
    noise = torch.randn(2, 4, *TINY_MAP, generator=torch.Generator().manual_seed(3))
    batch = dataclasses.replace(batch, embeddings=noise)

    def follow(model_file: str, memory=None) -> list[Tensor]:
        model = build_video_model(inputs / model_file, "cpu", with_trunk=False)
        rollout, seen = Rollout(model), []
        with torch.no_grad():
            clip = rollout.start(batch)
            rollout.follow(clip, lambda t, conditioned, heads: seen.extend([conditioned, heads.candidates]), memory)
        return seen

    merged, trained, dense = follow("merged.pt"), follow("sam3.pt", student), follow("sam3.pt")
    assert len(merged) == 6
    assert all(torch.equal(a, b) for a, b in zip(merged, trained, strict=True))
    assert not torch.equal(merged[0], dense[0])


@pytest.mark.parametrize("entry", ["model", "state_dict", None])
def test_wrappings_of_the_base(inputs, capsys, entry):
    """Its other entries are kept; a file without a place for the memory's sizes gets one."""
    tensors, others = (
        load_weights(inputs / "sam3.pt").tensors,
        {"license": "SAM", "numbers": [1, 2], "t": torch.ones(2)},
    )
    torch.save({entry: tensors, **others, "meta": {"a": 1}} if entry else tensors, inputs / "other.pth")
    assert convert(inputs, "--no_verify", base="other.pth") == 0
    content = torch.load(inputs / "merged.pt", weights_only=True)
    check_equal(content[entry or "model"], expected(inputs / "sam3.pt", inputs / "ckpt_best.pth"))
    assert set(content["meta"]) == {"memory", "stage2"} | ({"a"} if entry else set())
    assert set(content) == {entry or "model", "meta"} | (set(others) if entry else set())
    if entry:
        assert (content["license"], content["numbers"], content["t"].tolist()) == ("SAM", [1, 2], [1.0, 1.0])
    assert ("is a bare state dict" in capsys.readouterr().out) == (entry is None)


def test_safetensors_in_and_out(inputs):
    save_weights(inputs / "sam3.safetensors", load_weights(inputs / "sam3.pt").tensors, payload={"license": "SAM"})
    assert convert(inputs, base="sam3.safetensors", output="merged.safetensors") == 0
    found = load_weights(inputs / "merged.safetensors")
    check_equal(found.tensors, expected(inputs / "sam3.pt", inputs / "ckpt_best.pth"))
    assert found.payload == {"license": "SAM"}
    assert found.meta["memory"] == TINY_MEMORY.to_meta()


def test_module_is_stripped_at_the_start_only(inputs):
    wrapped = {f"module.{key}": tensor for key, tensor in load_weights(inputs / "sam3.pt").tensors.items()}
    save_weights(inputs / "ddp.pt", wrapped)
    state = {f"module.{key}": tensor for key, tensor in distiller().state_dict().items()}
    wanted = expected(inputs / "sam3.pt", inputs / "ckpt_best.pth")
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=state)
    assert convert(inputs, "--no_verify", base="ddp.pt") == 0
    check_equal(load_weights(inputs / "merged.pt").tensors, wanted)
    inside = {key.replace("layers.0", "module.layers.0"): tensor for key, tensor in distiller().state_dict().items()}
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", model=inside)
    with pytest.raises(ValueError, match=r"no tensor 'memory_attention\.layers\.0"):
        convert(inputs, base="ddp.pt")


def test_dense_attention_is_kept_on_request(inputs, capsys):
    assert convert(inputs, "--keep_dense_attention") == 0
    out = capsys.readouterr().out
    assert "106 tensors of the dense attention stay, unused" in out
    assert "replaced=0, dropped=0 (0 of the dense attention), kept=657" in out
    found = load_weights(inputs / "merged.pt").tensors
    assert len(found) == NUM_SAM3 + NUM_MEMORY
    check_equal(found, expected(inputs / "sam3.pt", inputs / "ckpt_best.pth", keep_dense=True))
    assert build_video_model(inputs / "merged.pt", "cpu").tracker.config.memory == TINY_MEMORY


def test_a_memory_in_the_base_is_replaced(inputs, capsys):
    assert convert(inputs, "--no_verify") == 0
    write_checkpoint(inputs / "ckpt_best.pth", inputs / "sam3.pt", POOLED_MAP)
    capsys.readouterr()
    assert convert(inputs, base="merged.pt", output="again.pt") == 0
    assert "replaced=54, dropped=48 (0 of the dense attention), kept=551" in capsys.readouterr().out
    again = load_weights(inputs / "again.pt")
    check_equal(again.tensors, expected(inputs / "sam3.pt", inputs / "ckpt_best.pth"))
    assert not any("spatial_perceiver" in key for key in again.tensors)
    assert again.meta["memory"] == POOLED_MAP.to_meta()
    with pytest.raises(ValueError, match=r"again.pt has no dense attention .* leave out --keep_dense_attention"):
        convert(inputs, "--keep_dense_attention", base="again.pt", output="third.pt")


def test_counts_at_full_size():
    """On names and shapes of the released file, without its values."""
    base = WeightFile(manifest_tensors("sam3", full=True), path=Path("sam3.pt"))
    with torch.device("meta"):
        memory = build_memory(TrackerConfig(), MemoryConfig())
    parts = {"memory_attention": memory.attention, "spatial_perceiver": memory.perceiver}
    tensors = {
        f"{name}.{key}": torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
    }
    sizes = [sum(t.numel() for key, t in tensors.items() if key.startswith(name)) for name in parts]
    assert sizes == [2_961_408, 3_315_520]
    stage2 = WeightFile(tensors, path=Path("ckpt_best.pth"))
    plan = plan_conversion(stage2, base, keep_dense=False)
    check_fit(plan, base, MemoryConfig())
    assert (plan.copied, plan.replaced, plan.appended) == (102, 106, 1465 - 106)
    dropped = sum(base.tensors[key].numel() for key in plan.replaced_keys)
    assert dropped == 5_922_304
    assert sum(key.startswith("tracker.") for key in plan.tensors) == 309 - 106 + 102
    kept = plan_conversion(stage2, base, keep_dense=True)
    check_fit(kept, base, MemoryConfig())
    assert (kept.copied, kept.replaced, kept.appended) == (102, 0, 1465)


def test_the_digest_is_that_of_the_parts_that_stay(inputs, student_file):
    """The same in SAM3, in a student merged into it, and after the memory was put in."""
    assert convert(inputs, "--no_verify") == 0
    files = (inputs / "sam3.pt", student_file, inputs / "merged.pt")
    assert len({tracker_meta(load_weights(path))["sha256"] for path in files}) == 1


# How it is written ----------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(inputs, capsys):
    before = sorted(inputs.rglob("*"))
    assert convert(inputs, "--dry-run", output="new/merged.pt") == 0
    assert "Dry run: nothing written; " in capsys.readouterr().out
    assert sorted(inputs.rglob("*")) == before


def test_a_result_that_fails_is_not_left(inputs, monkeypatch):
    """And what stood there stays; --no_verify leaves out the run, not the loading."""
    (inputs / "merged.pt").write_bytes(b"older")

    def fail(path):
        raise ValueError(f"{path.name} fails")

    monkeypatch.setattr(convert_memory_weights_stage2, "follow_noise", fail)
    with pytest.raises(ValueError, match="fails"):
        convert(inputs)
    assert (inputs / "merged.pt").read_bytes() == b"older"
    assert sorted(path.name for path in inputs.iterdir()) == ["ckpt_best.pth", "merged.pt", "sam3.pt"]
    assert convert(inputs, "--no_verify") == 0
    monkeypatch.setattr(convert_memory_weights_stage2, "build_video_model", lambda path, **kw: fail(path))
    with pytest.raises(ValueError, match="fails"):
        convert(inputs, "--no_verify", output="second.pt")
    assert not (inputs / "second.pt").exists()


def test_full_disk(inputs, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"writing merged.pt needs .* only 1.00 kB are free"):
        convert(inputs)


def test_inputs_are_never_overwritten(inputs):
    for name in ("sam3.pt", "ckpt_best.pth"):
        with pytest.raises(ValueError, match="is one of the inputs"):
            convert(inputs, output=name)
    with pytest.raises(FileNotFoundError, match=r"gone\.pt does not exist"):
        convert(inputs, base="gone.pt")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_launcher_gives_the_defaults():
    for knobs in ([], ["SAM3_WEIGHTS=", "OUTPUT="]):
        args = parse_args(command("stage2/scripts/convert_weights.sh", *knobs)[1:])
        assert args == parse_args(["--stage2_weights", "output/stage2_memory/ckpt_best.pth"])
