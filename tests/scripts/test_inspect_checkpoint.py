from __future__ import annotations

import re

import pytest
import torch

from distillation.export import export_student
from sam3.engine.merge import STUDENT_TRUNK, TRUNK, plan_merge
from sam3.engine.weights import WeightFile, save_weights
from sam3.model.tracker_config import MemoryConfig
from scripts.inspect_checkpoint import main
from tests.distillation.slim import tiny_student
from tests.manifests import manifest_tensors


def inspect(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def row(out: str, name: str) -> list[str]:
    """Tensors and elements of a module in the table."""
    return re.search(rf"^  {re.escape(name)} +(\d+) +([\d,]+) ", out, re.MULTILINE).groups()


def test_sam3(tmp_path, capsys):
    save_weights(tmp_path / "sam3.pt", manifest_tensors("sam3"))
    out = inspect(capsys, tmp_path / "sam3.pt")
    assert "sam3.pt: SAM3 with its own image encoder" in out
    assert row(out, TRUNK)[0] == "420"
    assert row(out, "detector.transformer.decoder")[0] == "175"
    assert (row(out, "tracker")[0], row(out, "tracker.transformer")[0]) == ("203", "106")
    assert "\n  tracker: 309 tensors; memory: SAM3's dense one, read by 4 layers of attention\n" in out
    assert row(out, "total")[0] == "1465"
    assert "complex64, float32" in out


@pytest.mark.parametrize(
    ("stem", "name"), [("es_rv_s", "ES-RV-S (repvit_m0_9)"), ("es_ev_s", "ES-EV-S (efficientvit_b0)")]
)
def test_student_checkpoint(tmp_path, capsys, stem, name):
    content = {"model": manifest_tensors(stem, full=True), "epoch": 4, "step": 123, "meta": {"embed_size": 72}}
    torch.save(content, tmp_path / "c.pth")
    out = inspect(capsys, tmp_path / "c.pth")
    assert f"c.pth: checkpoint of a student, {name} with 1024 output channels," in out
    assert "epoch: 4\n  step: 123\n" in out
    assert '{"embed_size": 72}' in out
    assert row(out, "head")[0] == "8"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_merged_file_with_and_without_leftovers(tmp_path, capsys, suffix):
    sam3, student = WeightFile(manifest_tensors("sam3")), WeightFile(manifest_tensors("es_ev_s", full=True))
    clean = plan_merge(student, sam3, STUDENT_TRUNK, [TRUNK])
    save_weights(tmp_path / f"m{suffix}", clean.tensors, {"backbone": "efficientvit_b0"})
    out = inspect(capsys, tmp_path / f"m{suffix}")
    assert f"m{suffix}: SAM3 merged with a student, ES-EV-S (efficientvit_b0)" in out
    assert (row(out, f"{STUDENT_TRUNK}.backbone")[0], row(out, f"{STUDENT_TRUNK}.head")[0]) == ("186", "8")
    assert "WARNING" not in out
    bloated = plan_merge(student, sam3, STUDENT_TRUNK, ["image_encoder"])
    save_weights(tmp_path / f"b{suffix}", bloated.tensors)
    assert "WARNING: 420 tensors of the teacher's trunk are still in it" in inspect(capsys, tmp_path / f"b{suffix}")


def test_compressed_memory(tmp_path, capsys):
    sam3 = manifest_tensors("sam3")
    memory = {"memory_attention.layers.0.linear1.weight": torch.ones(2), "spatial_perceiver.latents": torch.ones(3)}
    merged = sam3 | {f"tracker.{key}": tensor for key, tensor in memory.items()}
    light = {key: tensor for key, tensor in merged.items() if not key.startswith("tracker.transformer.")}
    meta = {"memory": MemoryConfig(perceiver=False, pool_size=1).to_meta()}
    phrase = "the whole map, read by 2 layers of attention"
    for name, tensors in (("memory", memory), ("merged", merged), ("light", light)):
        save_weights(tmp_path / f"{name}.pt", tensors, meta)
    out = inspect(capsys, tmp_path / "memory.pt")
    assert f"memory.pt: checkpoint of a compressed memory, {phrase}, " in out
    assert "tracker:" not in out
    out = inspect(capsys, tmp_path / "merged.pt")
    assert f"tracker: 311 tensors; memory compressed: {phrase}; beside it, unused: SAM3's dense one" in out
    assert (row(out, "tracker.memory_attention")[0], row(out, "tracker.spatial_perceiver")[0]) == ("1", "1")
    assert f"tracker: 205 tensors; memory compressed: {phrase}\n" in inspect(capsys, tmp_path / "light.pt")

    save_weights(tmp_path / "light.pt", light)
    assert "memory compressed: of sizes that the file does not state" in inspect(capsys, tmp_path / "light.pt")
    save_weights(tmp_path / "light.pt", light, {"memory": {"a": 1}})
    assert "memory compressed: stated in another way (memory meta has the fields ['a']" in inspect(
        capsys, tmp_path / "light.pt"
    )


def test_files_without_tracker_or_memory(tmp_path, capsys):
    def save(*without: str) -> None:
        save_weights(
            tmp_path / "s.pt", {k: t for k, t in manifest_tensors("sam3").items() if not k.startswith(without)}
        )

    save("tracker.")
    assert "\n  tracker: none: no video, no clicks\n" in inspect(capsys, tmp_path / "s.pt")
    save("tracker.transformer.")
    assert "tracker: 203 tensors; memory: none, WARNING" in inspect(capsys, tmp_path / "s.pt")


def test_a_strange_student_is_called_so(tmp_path, capsys):
    save_weights(tmp_path / "s.pt", manifest_tensors("es_ev_s"))  # shapes cut to 4
    assert "a student, which is none of the known ones (the weights fit no student" in inspect(
        capsys, tmp_path / "s.pt"
    )


def test_distilled_student(tmp_path, capsys):
    student = tiny_student()
    export_student(student, tmp_path / "s.pt", {"prompts": ["all objects"]})
    out = inspect(capsys, tmp_path / "s.pt")
    assert "s.pt: exported file of a distilled student, 10 queries at 112 px, for phrases only," in out
    assert '"prompts": ["all objects"]' in out
    assert row(out, "mask_decoder")[0] == str(len(student.mask_decoder.state_dict()))
    assert "tracker:" not in out
    save_weights(tmp_path / "t.pth", student.state_dict(), {"student": student.config.to_meta()})
    out = inspect(capsys, tmp_path / "t.pth")
    assert "t.pth: training checkpoint of a distilled student, 10 queries at 112 px," in out
    save_weights(tmp_path / "t.pth", student.state_dict())
    out = inspect(capsys, tmp_path / "t.pth")
    assert "of a distilled student, which cannot be used (the sizes of the student are not" in out


def test_other_files(tmp_path, capsys):
    torch.save({"a.b": torch.ones(2, 3)}, tmp_path / "x.pt")
    out = inspect(capsys, tmp_path / "x.pt")
    assert "neither a SAM3 nor a student checkpoint" in out
    assert row(out, "total") == ("1", "6")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main([str(tmp_path / "no.pt")])


def test_diff(tmp_path, capsys):
    same, value = torch.arange(3.0), torch.tensor([1.0, 2.0])
    a = {"same": same, "value": value, "shape": torch.ones(2), "type": torch.ones(1), "a1": same, "a2": same}
    b = {"same": same, "value": value + torch.tensor([0.0, 0.5]), "shape": torch.ones(3), "type": torch.ones(1).half()}
    save_weights(tmp_path / "a.pt", a)
    save_weights(tmp_path / "b.safetensors", b | {"b1": same, "flags": torch.tensor([True])})
    out = inspect(capsys, tmp_path / "a.pt", "--diff", tmp_path / "b.safetensors", "--names", "1")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        f"2 only in {tmp_path / 'a.pt'}",
        "a1",
        "... and 1 more",
        f"2 only in {tmp_path / 'b.safetensors'}",
        *lines[4:6],
        "2 other shape or type",
        "shape: (2,) torch.float32 / (3,) torch.float32",
        "... and 1 more",
        "1 other values",
        "value: largest difference 0.5",
        "1 equal in every bit",
    ]
    assert lines[5] == "... and 1 more"


@pytest.mark.parametrize(
    "values", [torch.tensor([True, False]), torch.tensor([1 + 1j, 3j]), torch.tensor([], dtype=torch.int64)]
)
def test_diff_of_odd_types(tmp_path, capsys, values):
    save_weights(tmp_path / "a.pt", {"x": values})
    save_weights(tmp_path / "b.pt", {"x": values.flip(0)})
    out = inspect(capsys, tmp_path / "a.pt", "--diff", tmp_path / "b.pt")
    assert ("1 other values" in out) == (values.numel() > 0)
