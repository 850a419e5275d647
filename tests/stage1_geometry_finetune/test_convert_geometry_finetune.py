from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sam3 import merged_model
from sam3.engine import files, merge
from sam3.engine.files import sha256
from sam3.engine.merge import STUDENT_TRUNK, TRUNK
from sam3.engine.weights import load_weights, same_bytes, save_weights
from stage1_geometry_finetune import convert_geometry_finetune
from stage1_geometry_finetune.convert_geometry_finetune import main
from tests.manifests import manifest_tensors
from tests.stage1_geometry_finetune.public_files import write_public

TEACHER = {"name": "sam3.pt", "sha256": "a" * 64}
PREPROCESS = {"img_size": 1008, "resize": "pad", "mean": [127.5] * 3, "std": [127.5] * 3}
META = {"backbone": "repvit_m1_1", "teacher": TEACHER}

# The user's document, from the first line to the last.
DOCUMENT = """\
Student encoder keys extracted: 653
Keys matched in pretrained: 653
Replaced 653 weights in pretrained model

=== Verification ===
  ✓ c.weight
  ✓ bn.weight
  ✓ bn.bias

============================================================
Output saved to: output/efficient_sam3_repvit_m_geometry.pt
Total keys in output: 1698
Image encoder weights replaced: 653
✓ All weights successfully replaced!
============================================================
"""


@pytest.fixture
def built(monkeypatch):
    """Stands in for the real model and students, which the shrunken tensors do not fit; lists the calls."""
    monkeypatch.setattr(merged_model, "recognise_student", lambda tensors, prefix: ("repvit_m1_1", 4))
    calls = []
    monkeypatch.setattr(merged_model, "build_efficientsam3_image_model", lambda **kw: calls.append(kw))
    return calls


def merged_tensors() -> dict[str, torch.Tensor]:
    """A merged RV-M model: all 1698 keys."""
    student = {f"{STUDENT_TRUNK}.{key}": tensor for key, tensor in manifest_tensors("es_rv_m").items()}
    return student | {k: t for k, t in manifest_tensors("sam3").items() if not k.startswith(f"{TRUNK}.")}


def finetuned_tensors() -> dict[str, torch.Tensor]:
    """The student with other values, none of them left as it was."""
    return {key: tensor * 2 + 3 for key, tensor in manifest_tensors("es_rv_m").items()}


def write_checkpoint(path: Path, tensors=None, meta=META) -> None:
    tensors = finetuned_tensors() if tensors is None else tensors
    model = {f"student_trunk.{key}": tensor for key, tensor in tensors.items()}
    torch.save({"model": model, "epoch": 29, "step": 7500, "optimizer": {"state": {}}, "meta": meta}, path)


@pytest.fixture
def inputs(tmp_path):
    """A merged model and a fine-tuning checkpoint with all keys of the real ones."""
    meta = META | {"preprocess": PREPROCESS, "student": {"file": "stage1.pth"}}
    torch.save({"model": merged_tensors(), "meta": meta, "license": "SAM"}, tmp_path / "merged.pt")
    write_checkpoint(tmp_path / "ckpt_epoch_29.pth")
    return tmp_path


def convert(folder: Path, *flags: str, pretrained: str = "merged.pt") -> int:
    paths = ["--finetune-ckpt", str(folder / "ckpt_epoch_29.pth"), "--pretrained", str(folder / pretrained)]
    return main([*paths, *flags])


def test_command_and_output_of_the_document(inputs, built, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    Path("output_geometry_finetune/es_rv_m").mkdir(parents=True)
    Path("output").mkdir()
    Path("ckpt_epoch_29.pth").rename("output_geometry_finetune/es_rv_m/ckpt_epoch_29.pth")
    Path("merged.pt").rename("output/efficient_sam3_repvit_m.pt")
    command = """
      --finetune-ckpt output_geometry_finetune/es_rv_m/ckpt_epoch_29.pth
      --pretrained output/efficient_sam3_repvit_m.pt
      --output output/efficient_sam3_repvit_m_geometry.pt"""
    assert main(command.split()) == 0
    loading = (
        "Loading finetuned checkpoint: output_geometry_finetune/es_rv_m/ckpt_epoch_29.pth\n"
        "Loading pretrained model: output/efficient_sam3_repvit_m.pt\n"
    )
    out = capsys.readouterr().out
    assert out.startswith(loading + DOCUMENT)
    proof, size = out.removeprefix(loading + DOCUMENT).splitlines()
    assert proof.startswith(
        "Proof: 1698 tensors read back, 0 missing, 0 unexpected; 653 bit-equal to the student, 1045"
    )
    assert size.startswith("Size: ")

    found = load_weights("output/efficient_sam3_repvit_m_geometry.pt").tensors
    merged, finetuned = merged_tensors(), finetuned_tensors()
    assert list(found) == list(merged)
    wanted = merged | {f"{STUDENT_TRUNK}.{key}": tensor for key, tensor in finetuned.items()}
    assert all(same_bytes(tensor, wanted[key]) for key, tensor in found.items())
    assert sum(not same_bytes(tensor, merged[key]) for key, tensor in found.items()) == 653
    assert [call["with_sam2_neck"] for call in built] == [True]


def test_other_entries_are_kept_and_meta_tells_the_origin(inputs, built):
    assert convert(inputs) == 0
    found = load_weights(inputs / "merged_geometry.pt")
    assert (found.entry, found.payload) == ("model", {"license": "SAM"})
    assert found.meta == {
        "backbone": "repvit_m1_1",
        "embed_dim": 4,
        "teacher": TEACHER,
        "preprocess": PREPROCESS,
        "student": {"file": "ckpt_epoch_29.pth", "epoch": 29, "step": 7500},
    }


@pytest.mark.parametrize("entry", ["model", "state_dict", None])
def test_tensors_are_wrapped_as_they_came(inputs, built, capsys, entry):
    torch.save({entry: merged_tensors()} if entry else merged_tensors(), inputs / "other.pth")
    assert convert(inputs, pretrained="other.pth") == 0
    content = torch.load(inputs / "other_geometry.pt", weights_only=True)
    tensors = content[entry] if entry else content
    assert len(tensors) == 1698
    assert set(content) - set(tensors) == ({entry, "meta"} if entry else set())
    assert ("is a bare state dict" in capsys.readouterr().out) == (entry is None)


def test_a_bare_file_cannot_state_an_output_stride(inputs, built):
    torch.save(merged_tensors(), inputs / "bare.pth")
    write_checkpoint(inputs / "ckpt_epoch_29.pth", meta=META | {"output_stride": 16})
    with pytest.raises(
        ValueError, match=r"cannot say that the student's output stride is 16; give an --output that ends"
    ):
        convert(inputs, "--dry-run", pretrained="bare.pth")
    with pytest.raises(
        ValueError, match=r"output stride of 16, \S+ one with 32; give the merged model that the fine-tun"
    ):
        convert(inputs)
    assert convert(inputs, "--output", str(inputs / "stated.safetensors"), pretrained="bare.pth") == 0
    assert load_weights(inputs / "stated.safetensors").meta["output_stride"] == 16


def test_order_of_the_pretrained_file_is_kept(inputs, built):
    backwards = dict(reversed(merged_tensors().items()))
    torch.save({"model": backwards}, inputs / "backwards.pt")
    assert convert(inputs, pretrained="backwards.pt") == 0
    assert list(load_weights(inputs / "backwards_geometry.pt").tensors) == list(backwards)


def test_safetensors_in_and_out(inputs, built):
    merged = load_weights(inputs / "merged.pt")
    save_weights(inputs / "m.safetensors", merged.tensors, merged.meta, payload=merged.payload)
    assert convert(inputs) == 0
    assert convert(inputs, pretrained="m.safetensors") == 0
    a, b = load_weights(inputs / "merged_geometry.pt"), load_weights(inputs / "m_geometry.safetensors")
    assert a.tensors.keys() == b.tensors.keys()
    assert all(same_bytes(tensor, b.tensors[key]) for key, tensor in a.tensors.items())
    assert (a.meta, a.payload) == (b.meta, b.payload)
    assert list(b.tensors) == list(load_weights(inputs / "m.safetensors").tensors)


def test_values_take_the_type_of_their_place(inputs, built):
    halved = {key: t.half() if t.is_floating_point() else t for key, t in merged_tensors().items()}
    torch.save({"model": halved}, inputs / "half.pt")
    assert convert(inputs, pretrained="half.pt") == 0
    found = load_weights(inputs / "half_geometry.pt").tensors
    for key, tensor in finetuned_tensors().items():
        wanted = tensor.half() if tensor.is_floating_point() else tensor
        assert same_bytes(found[f"{STUDENT_TRUNK}.{key}"], wanted)


def test_values_out_of_range_of_their_place_are_refused(inputs, built):
    key = f"{STUDENT_TRUNK}.head.3.bias"
    torch.save({"model": merged_tensors() | {key: torch.zeros(4, dtype=torch.float16)}}, inputs / "merged.pt")
    write_checkpoint(inputs / "ckpt_epoch_29.pth", finetuned_tensors() | {"head.3.bias": torch.full((4,), 1e6)})
    refused(inputs, r"head.3.bias has values that torch.float16 cannot hold")


def test_public_checkpoint(inputs, built, capsys):
    write_public(inputs / "ckpt_epoch_29.pth", finetuned_tensors())
    assert convert(inputs) == 0
    out = capsys.readouterr().out
    assert "ckpt_epoch_29.pth does not say which SAM3 file it was trained from" in out
    assert DOCUMENT.split("=====")[0] in out
    found = load_weights(inputs / "merged_geometry.pt")
    assert len(found.tensors) == 1698
    assert all(same_bytes(found.tensors[f"{STUDENT_TRUNK}.{k}"], t) for k, t in finetuned_tensors().items())
    assert found.meta["student"] == {"file": "ckpt_epoch_29.pth", "epoch": 29}
    assert found.meta["preprocess"] == PREPROCESS


def test_frozen_parts_and_wrappers_are_passed_over(inputs, built):
    frozen = {"sam3.convs.0.weight": torch.ones(2), "teacher_trunk.weight": torch.ones(2)}
    wrapped = {f"module.student_trunk.{key}": tensor for key, tensor in (finetuned_tensors() | frozen).items()}
    torch.save({"model": wrapped}, inputs / "ckpt_epoch_29.pth")
    assert convert(inputs) == 0
    assert len(load_weights(inputs / "merged_geometry.pt").tensors) == 1698


@pytest.mark.parametrize("prefix", ["encoder", "encoder.", ""])
def test_other_prefixes(inputs, built, prefix):
    dot = "." if prefix else ""
    torch.save(
        {f"{prefix.strip('.')}{dot}{k}": t for k, t in finetuned_tensors().items()}, inputs / "ckpt_epoch_29.pth"
    )
    assert convert(inputs, "--student-prefix", prefix, "--target-prefix", STUDENT_TRUNK) == 0
    assert (inputs / "merged_geometry.pt").exists()


# What is refused -----------------------------------------------------------------------------------------------------


def refused(folder: Path, message: str, *flags: str, **options) -> None:
    """The conversion fails with this message and leaves the folder as it was."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(folder, *flags, **options)
    assert sorted(path.name for path in folder.iterdir()) == before


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The fine-tuned student with some tensors replaced or, where None, left out; `__` stands for a dot."""
    student = finetuned_tensors() | {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in student.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head__3__bias": None}, rf"1 not in \S+ckpt_epoch_29.pth: {STUDENT_TRUNK}.head.3.bias; give the model"),
        ({"head__9__bias": torch.ones(4)}, rf"1 not in \S+merged.pt: {STUDENT_TRUNK}.head.9.bias; give"),
        ({"head__3__bias": torch.ones(5)}, r"1 of another shape: \S+head.3.bias \(5,\) instead of \(4,\)"),
        ({"head__3__bias": torch.ones(4, 1)}, r"1 of another shape: \S+head.3.bias \(4, 1\) instead of \(4,\)"),
        ({"head__1__num_batches_tracked": torch.tensor(1.5)}, r"of another type: \S+num_batches_tracked torch.float32"),
        ({"head__3__bias": torch.tensor([1, 2, float("nan"), 4])}, r"NaN or infinite values in \S+head.3.bias"),
        ({"head__3__bias": torch.tensor([1, 2, float("inf"), 4])}, r"NaN or infinite values in \S+head.3.bias"),
    ],
)
def test_tensors_that_do_not_fit(inputs, built, changes, message):
    write_checkpoint(inputs / "ckpt_epoch_29.pth", changed(**changes))
    refused(inputs, message)


def test_no_student_in_the_checkpoint(inputs, built, capsys):
    refused(inputs, r"no student below 'trunk\.'; it has keys below student_trunk.backbone, ", "--student-prefix=trunk")
    assert "Student encoder keys extracted: 0" in capsys.readouterr().out
    torch.save({"model": finetuned_tensors()}, inputs / "ckpt_epoch_29.pth")
    refused(inputs, r"no student below 'student_trunk\.'; it has keys below backbone.model, head.0, .*--student-prefix")


def test_pretrained_without_a_student(inputs, built, capsys):
    torch.save({"model": manifest_tensors("sam3")}, inputs / "sam3.pt")
    refused(inputs, r"sam3.pt has none of the student's keys below .*give a merged model", pretrained="sam3.pt")
    assert "Keys matched in pretrained: 0" in capsys.readouterr().out
    refused(inputs, "none of the student's keys below 'image_encoder.'", "--target-prefix", "image_encoder.")


def test_pretrained_that_kept_the_teachers_trunk(inputs, built):
    torch.save({"model": merged_tensors() | manifest_tensors("sam3")}, inputs / "merged.pt")
    refused(inputs, "420 of the teacher's tensors below")


def test_another_student_is_named(inputs):
    write_checkpoint(inputs / "ckpt_epoch_29.pth", manifest_tensors("es_ev_s", full=True), meta={})
    student = {f"{STUDENT_TRUNK}.{key}": t for key, t in manifest_tensors("es_rv_m", full=True).items()}
    torch.save({"model": merged_tensors() | student}, inputs / "merged.pt")
    refused(inputs, r"holds ES-EV-S \(efficientvit_b0\), but .*merged.pt holds ES-RV-M \(repvit_m1_1\)")


def test_damaged_students_are_named(inputs):
    """The shrunken tensors are those of no real student."""
    refused(inputs, r"ckpt_epoch_29.pth: the weights fit no student; nearest is ")


def test_checkpoint_that_states_another_backbone(inputs, built):
    write_checkpoint(inputs / "ckpt_epoch_29.pth", meta={"backbone": "tiny_vit_5m"})
    refused(inputs, r"says that it is a 'tiny_vit_5m', but its weights are those of ES-RV-M")


def test_another_teacher_is_refused_unless_allowed(inputs, built, capsys):
    write_checkpoint(inputs / "ckpt_epoch_29.pth", meta={"teacher": {"sha256": "b" * 64}})
    refused(inputs, r"trained from the SAM3 file with SHA-256 b{64}, .*merged.pt has a{64}; .*--allow-other-teacher")
    assert convert(inputs, "--allow-other-teacher") == 0
    out = capsys.readouterr().out
    assert "Warning: " in out
    assert "✓ All weights successfully replaced!" in out


def test_pretrained_that_names_no_teacher_gets_a_note(inputs, built, capsys):
    torch.save({"model": merged_tensors()}, inputs / "public.pt")
    assert convert(inputs, pretrained="public.pt") == 0
    assert "public.pt does not say which SAM3 file" in capsys.readouterr().out


def test_inputs_are_never_overwritten(inputs, built):
    before = sha256(inputs / "merged.pt")
    for name in ("merged.pt", "ckpt_epoch_29.pth"):
        refused(inputs, "is one of the inputs", "--output", str(inputs / name))
    assert sha256(inputs / "merged.pt") == before


def test_entries_that_the_format_cannot_hold(inputs, built):
    torch.save({"model": merged_tensors(), "epoch": 3}, inputs / "merged.pt")
    refused(
        inputs, r"m.safetensors cannot hold the entries epoch .* write a .pt", "--output", f"{inputs}/m.safetensors"
    )


def test_model_that_does_not_load_leaves_the_older_file(inputs, built, monkeypatch):
    def refuse(**kw):
        raise ValueError("1 missing: detector.x")

    (inputs / "merged_geometry.pt").write_bytes(b"older")
    monkeypatch.setattr(merged_model, "build_efficientsam3_image_model", refuse)
    refused(inputs, "1 missing: detector.x")
    assert (inputs / "merged_geometry.pt").read_bytes() == b"older"


def test_full_disk(inputs, built, monkeypatch):
    before = sorted(path.name for path in inputs.iterdir())
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"writing merged_geometry.pt needs .* only 1.00 kB are free"):
        convert(inputs)
    assert sorted(path.name for path in inputs.iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_disk_that_fills_up_while_writing(inputs, built):
    import resource

    before = sorted(path.name for path in inputs.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="is the disk full"):
            convert(inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in inputs.iterdir()) == before


def test_dry_run_checks_and_writes_nothing(inputs, built, capsys):
    before = sorted(path.name for path in inputs.iterdir())
    assert convert(inputs, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "Keys matched in pretrained: 653" in out
    assert "nothing written" in out
    assert sorted(path.name for path in inputs.iterdir()) == before
    write_checkpoint(inputs / "ckpt_epoch_29.pth", changed(head__3__bias=None))
    refused(inputs, "head.3.bias", "--dry-run")


def test_file_that_changes_behind_the_proof_gets_a_cross(inputs, built, capsys, monkeypatch):
    def spoil(output, plan, *args, **options):
        proof = merge.write_merge(output, plan, *args, **options)
        key = plan.student_keys[1]
        save_weights(output, plan.tensors | {key: plan.tensors[key] + 1})
        return proof

    monkeypatch.setattr(convert_geometry_finetune, "write_merge", spoil)
    with pytest.raises(ValueError, match=r"changed while it was read back: \S+0.0.bn.weight;"):
        convert(inputs)
    out = capsys.readouterr().out
    assert "  ✓ c.weight\n  ✗ bn.weight\n  ✓ bn.bias\n" in out
    assert "successfully" not in out


def test_missing_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--pretrained", "merged.pt"])
    assert stop.value.code == 2
