from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sam3.engine import files
from sam3.engine.weights import (
    digest,
    load_strict,
    load_weights,
    normalise_sam3_keys,
    same_bytes,
    save_weights,
    strip_prefix,
)
from tests.manifests import manifest_tensors

META = {"backbone": "repvit_m1_1", "preprocess": {"mean": [127.5, 127.5, 127.5], "resize": "pad"}}
SUFFIXES = (".pt", ".pth", ".safetensors")


class RunsCode:
    """Pickles into a call that makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def assorted() -> dict[str, torch.Tensor]:
    """Each kind of tensor that could go wrong on the way to a file and back."""
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),  # odd length: would misalign what follows
        "complex": torch.polar(torch.ones(6, 4), torch.arange(24.0).reshape(6, 4)),
        "half": torch.tensor([1.5, -0.0, float("nan"), float("inf")], dtype=torch.float16),
        "bfloat": torch.tensor([[1.5, 3e38]], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
        "transposed": base.t(),
        "rows": base[1:3],
        "expanded": torch.tensor([2.0]).expand(3, 5),
        "every sixth of six": torch.arange(6.0)[::6],
        "shared": base,
        "double": torch.tensor([0.1], dtype=torch.float64),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_keeps_every_bit(tmp_path, suffix):
    tensors = assorted()
    save_weights(tmp_path / f"w{suffix}", tensors, META)
    found = load_weights(tmp_path / f"w{suffix}")
    assert found.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        wanted = tensor.detach().resolve_conj()
        assert same_bytes(found.tensors[key], wanted), key
        assert found.tensors[key].is_contiguous()
        assert type(found.tensors[key]) is torch.Tensor
    assert found.meta == META
    assert found.path == tmp_path / f"w{suffix}"
    assert [p.name for p in tmp_path.iterdir()] == [f"w{suffix}"]


def test_a_view_does_not_carry_its_whole_storage_into_the_file(tmp_path):
    save_weights(tmp_path / "w.pt", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "w.pt").stat().st_size < 10_000


def test_safetensors_agree_with_the_library_in_both_directions(tmp_path):
    tensors = {k: v.detach().resolve_conj().clone() for k, v in assorted().items()}
    save_weights(tmp_path / "ours.safetensors", tensors, META)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(same_bytes(theirs[key], tensors[key]) for key in tensors)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"meta": '{"a": 1}', "format": "pt"})
    found = load_weights(tmp_path / "theirs.safetensors")
    assert all(same_bytes(found.tensors[key], tensors[key]) for key in tensors)
    assert (found.meta, found.payload) == ({"a": 1}, {})


@pytest.mark.parametrize("source", [".pt", ".safetensors"])
def test_mapped_tensors_go_to_the_other_format(tmp_path, source):
    tensors = {key: t for key, t in manifest_tensors("sam3").items() if "freqs_cis" in key or "num_batches" in key}
    assert any(tensor.is_complex() for tensor in tensors.values())
    save_weights(tmp_path / f"a{source}", tensors)
    target = ".safetensors" if source == ".pt" else ".pt"
    save_weights(tmp_path / f"b{target}", load_weights(tmp_path / f"a{source}").tensors)
    found = load_weights(tmp_path / f"b{target}").tensors
    assert all(same_bytes(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("wrap", ["model", "state_dict", None])
def test_state_dict_is_found_wherever_it_lies(tmp_path, wrap):
    tensors = {"a.weight": torch.ones(2), "b": torch.tensor(3)}
    content = {wrap: tensors, "epoch": 7, "meta": {"backbone": "x"}} if wrap else tensors
    torch.save(content, tmp_path / "c.pth")
    found = load_weights(tmp_path / "c.pth")
    assert list(found.tensors) == ["a.weight", "b"]
    assert found.payload == ({"epoch": 7} if wrap else {})
    assert found.meta == ({"backbone": "x"} if wrap else {})


def test_files_of_old_torch_versions_are_read(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_weights(tmp_path / "old.pth").tensors["a"].tolist() == [0, 1, 2]


def test_reading_maps_the_file_and_leaves_it_alone(tmp_path):
    for name in ("w.pt", "w.safetensors"):
        save_weights(tmp_path / name, {"a": torch.ones(1000)})
        found = load_weights(tmp_path / name)
        assert name in Path("/proc/self/maps").read_text() if sys.platform == "linux" else True
        found.tensors["a"].zero_()  # a private map: training on it must not write into the file
        assert load_weights(tmp_path / name).tensors["a"].sum() == 1000


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_named_and_not_run(tmp_path, zipped):
    path, trace = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"model": RunsCode(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil.pth would run Python code when opened \((posix|nt)\.mkdir\)"):
        load_weights(path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_named_and_not_run(tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"model": RunsCode(trace)}))
    with pytest.raises(ValueError, match="bare pickle, which may run code"):
        load_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    path = tmp_path / f"w{suffix}"
    save_weights(path, {str(i): torch.randn(50) for i in range(20)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=f"w{suffix}.* is cut off"):
        load_weights(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("lfs.pt", b"version https://git-lfs.github.com/spec/v1\n", "no weight file .*git-lfs"),
        ("page.pt", b"<html>Not Found</html>", "<html>"),
        ("none.pt", b"", "it is empty"),
        ("none.safetensors", b"", "cut off, damaged"),
        ("page.safetensors", b"<html>Not Found</html>", "cut off, damaged"),
    ],
)
def test_foreign_files_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ([torch.ones(1)], "holds a list"),
        ({"model": {"a": torch.ones(1), "b": 3}}, "'model' of .* is not a dict of tensors: b "),
        ({"epoch": 3}, "not a dict of tensors: epoch"),
        ({0: torch.ones(1)}, "not a dict of tensors: 0"),
        ({"model": {"a": torch.ones(1)}, "meta": "repvit"}, "'meta' of .* is a str"),
    ],
)
def test_files_without_a_state_dict_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "c.pth")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_weights(tmp_path / "no.pt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_weights(tmp_path)


def test_safetensors_with_broken_meta(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"meta": "{"})
    with pytest.raises(ValueError, match=r"'meta' of .* is not JSON"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "tensors", "meta", "message"),
    [
        ("w.npz", {"a": torch.ones(1)}, {}, "no weight format"),
        ("w.pt", {}, {}, "there are no tensors"),
        ("w.pt", {"a": torch.ones(1, device="meta")}, {}, "'a' cannot be written .* on meta"),
        ("w.pt", {"a": torch.eye(2).to_sparse()}, {}, "'a' cannot be written .*sparse"),
        ("w.safetensors", {"a": torch.ones(1, dtype=torch.complex128)}, {}, "complex128"),
        ("w.pt", {"a": torch.ones(1)}, {"path": Path()}, "plain numbers, strings"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, tensors, meta, message):
    with pytest.raises(ValueError, match=message):
        save_weights(tmp_path / name, tensors, meta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_seen_before_writing(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 3999)
    with pytest.raises(OSError, match=r"needs .* but only 4.00 kB are free"):
        save_weights(tmp_path / f"w{suffix}", {"a": torch.ones(1000)})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_disk_that_fills_up_while_writing_leaves_the_old_file(tmp_path, suffix):
    import resource

    path = tmp_path / f"w{suffix}"
    save_weights(path, {"a": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=f"could not write .*w{suffix}, is the disk full"):
            save_weights(path, {str(i): torch.zeros(10_000) for i in range(10)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_weights(path).tensors["a"].tolist() == [1, 1, 1]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_weights(tmp_path / "file" / "w.pt", {"a": torch.ones(3)})


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    save_weights(path, {"a": torch.full((3,), 5.0)})
    code = (
        "import sys, torch\n"
        "from sam3.engine.weights import save_weights\n"
        "big = {str(i): torch.zeros(4_000_000) for i in range(50)}\n"
        "print('start', flush=True)\n"
        "save_weights(sys.argv[1], big)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "start\n"
    deadline = time.monotonic() + 60
    while not any(p.name.endswith(".tmp") and p.stat().st_size > 1_000_000 for p in tmp_path.iterdir()):
        assert time.monotonic() < deadline
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL  # it was still writing
    assert load_weights(path).tensors["a"].tolist() == [5, 5, 5]


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("freqs_cis", torch.ones(4, 2, dtype=torch.complex64))


def rotary_tensors() -> dict[str, torch.Tensor]:
    return {
        "linear.weight": torch.arange(6.0).reshape(3, 2),
        "linear.bias": torch.tensor([1.0, 2.0, 3.0]),
        "freqs_cis": torch.full((4, 2), 1 - 2j),
    }


def test_load_strict_copies_into_existing_parameters():
    module, tensors = Rotary(), rotary_tensors()
    weight = module.linear.weight
    load_strict(module, tensors, source="f.pt")
    assert module.linear.weight is weight
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in tensors.items())
    weight.data.zero_()
    assert tensors["linear.weight"].sum() == 15


def test_load_strict_gives_a_meta_module_the_tensors_themselves():
    with torch.device("meta"):
        module = Rotary()
    tensors = rotary_tensors()
    load_strict(module, tensors, source="f.pt")
    assert module.linear.weight.data_ptr() == tensors["linear.weight"].data_ptr()
    assert module.linear.weight.requires_grad
    assert torch.equal(module.freqs_cis, tensors["freqs_cis"])


def test_load_strict_names_every_fault_at_once():
    tensors = rotary_tensors()
    del tensors["linear.bias"]
    tensors |= {"linear.weight": torch.ones(2, 3), "extra.a": torch.ones(1), "freqs_cis": torch.ones(4, 2)}
    module = Rotary()
    before = module.linear.weight.clone()
    with pytest.raises(ValueError) as error:
        load_strict(module, tensors, source="f.pt")
    text = str(error.value)
    assert text.startswith("f.pt does not fit Rotary: 1 missing: linear.bias; 1 unexpected: extra.a; 2 misshapen: ")
    assert "linear.weight (2, 3) instead of (3, 2)" in text
    assert "freqs_cis (4, 2) instead of (4, 2) complex" in text
    assert torch.equal(module.linear.weight, before)


def test_load_strict_allows_named_gaps_and_no_idle_ones():
    module, tensors = Rotary(), rotary_tensors()
    del tensors["linear.bias"]
    tensors["tracker.x"] = torch.ones(1)
    load_strict(module, tensors, source="f.pt", allowed_missing=["linear.b"], allowed_unexpected=["tracker."])
    with pytest.raises(ValueError, match="allowed to be missing, but no such key is: linera"):
        load_strict(
            module, tensors, source="f", allowed_missing=["linear.b", "linera"], allowed_unexpected=["tracker."]
        )
    with pytest.raises(ValueError, match="allowed to be unexpected, but no such key is: traker"):
        load_strict(module, tensors, source="f", allowed_missing=["linear.b"], allowed_unexpected=["traker."])


def test_digest():
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor([1 + 2j])
    found = digest({"a": a, "b": b})
    # Worked out from what is digested: a line for each tensor, then its bytes.
    lines = [b"a torch.float32 (2, 3)\n", a.numpy().tobytes(), b"b torch.complex64 (1,)\n", b.numpy().tobytes()]
    assert found == hashlib.sha256(b"".join(lines)).hexdigest()
    assert found == digest({"b": b, "a": a.T.contiguous().T})
    others = [{"a": a}, {"a": a, "c": b}, {"a": a.reshape(3, 2), "b": b}, {"a": a.int(), "b": b}, {"a": a + 1, "b": b}]
    assert found not in map(digest, others)
    assert digest({"x": torch.tensor(0.0)}) != digest({"x": torch.tensor(-0.0)})


def test_strip_prefix_selects():
    assert list(strip_prefix({"a.b.c": torch.ones(1), "a.d": torch.ones(1), "x": torch.ones(1)}, "a.")) == ["b.c", "d"]
    assert strip_prefix({"x": torch.ones(1)}, "a.") == {}


def test_normalise_sam3_keys():
    official = manifest_tensors("sam3")
    assert list(normalise_sam3_keys(official)) == list(official)
    assert list(normalise_sam3_keys({f"module.{key}": t for key, t in official.items()})) == list(official)
    image_only = {
        key.removeprefix("detector.").replace("tracker.", "inst_interactive_predictor.model.", 1): tensor
        for key, tensor in official.items()
    }
    assert list(normalise_sam3_keys(image_only)) == list(official)
    with pytest.raises(ValueError, match=r"x.pt is no SAM3 checkpoint: .* found image_encoder"):
        normalise_sam3_keys({"image_encoder.a": torch.ones(1)}, "x.pt")
