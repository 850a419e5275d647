"""The row that stage2/evaluate_vos.py --untrained adds: a compressed memory as its training finds it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from sam3.engine.weights import load_weights, save_weights, strip_prefix
from sam3.tracker_builder import COMPRESSED_MEMORY, build_video_model
from stage2.evaluate_vos import describe, load_predictor, untrained
from tests.stage2.vos import UPPER, nothing, run, tell, write_light, write_sav

STAYS = dict.fromkeys(range(0, 17, 4), UPPER)
NAMES = ("--names", "dense", "light", "--untrained")
CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    return partial(tell, monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sav(tmp_path / "data", {"a": [STAYS]})


@pytest.fixture(scope="module")
def light_file(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_light(tmp_path_factory.mktemp("light"), teacher_file)


def changed(path: Path, source: Path, part: str) -> Path:
    """A checkpoint with other values in the tensors that begin so."""
    file = load_weights(source)
    assert any(key.startswith(part) for key in file.tensors)
    tensors = {key: (tensor + key.startswith(part)).to(tensor.dtype) for key, tensor in file.tensors.items()}
    save_weights(path, tensors, file.meta)
    return path


def test_it_comes_before_the_trained_one_and_has_results_of_its_own(
    teacher_file: Path, light_file: Path, data: Path, tmp_path: Path, told
):
    answers = {"dense": nothing, "light, untrained": lambda *_: UPPER, "light": nothing}
    files, output = [teacher_file, light_file], tmp_path / "out"
    told(**answers)
    run(files, data, output, *NAMES[:-1])

    made = told(**answers)
    code, results = run(files, data, output, *NAMES)
    assert code == 0 and [session.name for predictor in made for session in predictor.sessions] == ["a"]
    rows = {row["name"]: row for row in results["models"]}
    assert [(name, row["jf"]) for name, row in rows.items()] == [("dense", 0), ("light, untrained", 1), ("light", 0)]
    own, other = rows["light, untrained"], rows["light"]
    assert all(own[key] == other[key] for key in ("checkpoint", "sha256", "parameters"))
    assert own["untrained"]["layers"] == str(teacher_file) and other["untrained"] is None
    options = {name: json.loads((output / name / "results/a.json").read_text())["options"] for name in rows}
    assert options["light, untrained"] == {**options["light"], "untrained": own["untrained"]["sha256"]}

    made = told(**answers)
    assert run(files, data, output, *NAMES) == (0, results) and made == [], "nothing is left to do"
    files[0] = changed(tmp_path / "other.pt", teacher_file, "tracker.transformer.encoder.layers.0.")
    run(files, data, output, *NAMES)
    assert len(made) == 2, "another dense memory is another start"


def test_its_memory_is_what_training_begins_with(teacher_file: Path, light_file: Path):
    before = torch.get_rng_state()
    entry = untrained(describe("light", light_file), str(teacher_file))
    model = load_predictor(entry, CPU, None).model
    assert torch.equal(torch.get_rng_state(), before)
    found = model.tracker.state_dict()
    dense = build_video_model(teacher_file, CPU).tracker.transformer.encoder.state_dict()
    ends = {"0": "0", "1": "3"}  # the first and the last of four
    for key, tensor in strip_prefix(found, "memory_attention.").items():
        begin, _, rest = key.removeprefix("layers.").partition(".")
        source = f"layers.{ends[begin]}.{rest}" if key.startswith("layers.") else key
        assert torch.equal(tensor, dense[source]), key
    trained = build_video_model(light_file, CPU).state_dict()
    for key, tensor in model.state_dict().items():
        if not key.removeprefix("tracker.").startswith(COMPRESSED_MEMORY):
            assert torch.equal(tensor, trained[key]), key
    again = load_predictor(entry, CPU, None).model.tracker
    assert all(torch.equal(tensor, found[key]) for key, tensor in again.state_dict().items())
    assert again.memory.attention is again.memory_attention and again.memory.perceiver is again.spatial_perceiver
    assert not any(module.training for module in again.modules())


def test_without_a_fitting_dense_checkpoint_the_layers_are_random(
    teacher_file: Path, light_file: Path, data: Path, tmp_path: Path, told, capsys: pytest.CaptureFixture[str]
):
    """The first model, with which masks are compared, is the first checkpoint still."""
    told(**{"light, untrained": nothing, "light": lambda *_: UPPER, "dense": lambda *_: UPPER})
    stranger = changed(tmp_path / "stranger.pt", teacher_file, "tracker.no_obj_ptr")
    names = ("--names", "light", "dense", "--untrained", "--save-masks")
    _, results = run([light_file, stranger], data, tmp_path / "out", *names)
    rows = results["models"]
    assert [row["name"] for row in rows] == ["light, untrained", "light", "dense"]
    assert rows[0]["untrained"]["layers"] is None
    assert [row["agreement"] for row in rows] == [0, 1, 1]
    assert "agreement is J against the masks of light; videos with masks of both: light, untrained: 1, dense: 1" in (
        capsys.readouterr().out
    )


def test_it_tracks(teacher_file: Path, light_file: Path, data: Path, tmp_path: Path):
    code, results = run([teacher_file, light_file], data, tmp_path / "out", *NAMES)
    assert code == 0 and [row["num_objects"] for row in results["models"]] == [1, 1, 1]


def test_nothing_to_forget(teacher_file: Path, data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="none of the checkpoints has a compressed memory; leave out --untrained"):
        run(teacher_file, data, tmp_path / "out", "--untrained")
