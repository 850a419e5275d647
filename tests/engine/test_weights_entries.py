"""What stands beside the tensors of a weight file: meta, other entries, the entry that holds the tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from sam3.engine import files
from sam3.engine.weights import load_weights, num_bytes, save_weights

META = {"backbone": "repvit_m1_1", "preprocess": {"mean": [127.5, 127.5, 127.5], "resize": "pad"}}


@pytest.mark.parametrize("entry", ["model", "state_dict", None])
def test_entries_come_back_as_they_were_written(tmp_path, entry):
    tensors = {"a.weight": torch.ones(2), "b": torch.tensor(3)}
    extras = {"meta": META, "payload": {"epoch": 7, "optimizer": {"state": [torch.ones(3)]}}} if entry else {}
    save_weights(tmp_path / "c.pt", tensors, **extras, entry=entry)
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    assert list(content) == ([entry, "meta", "epoch", "optimizer"] if entry else ["a.weight", "b"])
    found = load_weights(tmp_path / "c.pt")
    assert list(found.tensors) == ["a.weight", "b"]
    assert (found.entry, found.meta, found.payload.get("epoch")) == (entry, *((META, 7) if entry else ({}, None)))


def test_texts_beside_safetensors_come_back(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)}, META, payload={"license": "SAM", "format": "np"})
    found = load_weights(tmp_path / "w.safetensors")
    assert (found.meta, found.payload) == (META, {"license": "SAM"})


@pytest.mark.parametrize(
    ("name", "extras", "message"),
    [
        ("w.safetensors", {"payload": {"license": "SAM", "epoch": 3}}, "cannot hold the entries epoch beside tensors"),
        ("w.pt", {"meta": {"a": 1}, "payload": {"epoch": 3}, "entry": None}, "no place for meta, epoch"),
    ],
)
def test_entries_without_a_place_are_refused(tmp_path, name, extras, message):
    with pytest.raises(ValueError, match=message):
        save_weights(tmp_path / name, {"a": torch.ones(1)}, **extras)
    assert not list(tmp_path.iterdir())


def test_payload_counts_for_the_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 100_000)
    save_weights(tmp_path / "w.pt", {"a": torch.ones(1)})
    with pytest.raises(OSError, match=r"only 100.00 kB are free"):
        save_weights(tmp_path / "w.pt", {"a": torch.ones(1)}, payload={"optimizer": [{"exp_avg": torch.ones(25_000)}]})


def test_a_yacs_configuration_is_read_as_a_dict_and_no_other_class_is(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "config": CfgNode({"A": {"B": [1, "x"]}})}, tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth")
    assert found.payload == {"config": {"A": {"B": [1, "x"]}}}
    assert type(found.payload["config"]["A"]).__name__ == "OrderedDict"
    torch.save({"model": {"a": torch.ones(1)}, "config": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"would run Python code when opened \(pathlib"):
        load_weights(tmp_path / "w.pth")


def test_num_bytes():
    assert num_bytes({"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(2, 2).expand(5, 2, 2)}) == 6 + 80
