"""The store of teacher features: its files byte by byte, and what reading it refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from distillation.prompt.config import PromptDistillConfig
from distillation.prompt.prompts import Prompts, grid
from distillation.prompt.store import MAX_OPEN, FeatureStore, expected_of
from distillation.prompt.store_format import (
    FILES,
    FORMAT_VERSION,
    KIND,
    PromptRecord,
    bytes_per_picture,
    differences,
    is_complete,
    shape_of,
    write_features,
)

ALL = tuple(FILES)
SIDE = 64  # pixels, so the grid is 4 x 4


def meta(**changes) -> dict:
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "teacher": {"name": "A", "type": "vit_b", "sha256": "0"},
        "dtype": "float32",
        "mode": "single",
        "grid_points": None,
        "image_size": SIDE,
        "components": list(ALL),
        "enc_projection": "neck",
        "encoder_channels": 256,
        "tap": "input_keys",
        "multimask": False,
        "hooks": {"encoder_patch": ["image_encoder.blocks[30]", "image_encoder.blocks.10"]},
        "prompts": {"source": "auto", "seed": 0},
        "computed_in": {"device": "cpu"},
        "tools": {"torch": "2"},
        **changes,
    }


def record(count: int = 2, masks: int = 1) -> PromptRecord:
    points, labels = torch.arange(count * 6.0).reshape(count, 3, 2), torch.tensor([[1, 1, -1]] * count)
    names = [f"obj_{i}" for i in range(count)]
    return PromptRecord(Prompts(points, labels), names, (48, 64), (90, 120), torch.rand(count, masks))


def features(of: dict, count: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape_of(name, of, count), generator=generator) for name in of["components"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with one picture `a`."""
    write_store(tmp_path, meta())
    return tmp_path


def write_store(root: Path, of: dict, keys: tuple[str, ...] = ("a",)) -> None:
    root.mkdir(exist_ok=True)
    (root / "meta.json").write_text(json.dumps(of))
    for key in keys:
        write_features(root / "train", key, of, features(of), record(masks=3 if of["multimask"] else 1))


def test_files_of_a_picture_of_1024_pixels_are_as_large_as_stated(tmp_path: Path):
    stated = {"enc_patch": 2_097_152, "prompt_embed": 2_097_152, "mask_token": 2_048, "dense_logits": 131_072}
    for dtype, factor in (("float16", 1), ("float32", 2)):
        of = meta(image_size=1024, dtype=dtype)
        write_features(tmp_path / dtype, "x", of, features(of, 1), record(1))
        found = {path.stem[2:]: path.stat().st_size for path in (tmp_path / dtype).glob("*.npy")}
        assert found == {name: factor * size + 128 for name, size in stated.items()}
        assert bytes_per_picture(of, 1) == sum(found.values())
    assert sum(stated.values()) == 4_327_424
    raw = meta(image_size=1024, dtype="float16", encoder_channels=1280, components=["encoder_patch"])
    assert bytes_per_picture(raw, 5) == 10_485_760 + 128
    everything = meta(image_size=1024, dtype="float16", mode="everything", components=["decoder_mask_token"])
    assert bytes_per_picture(everything, 32**2) == 2_097_152 + 128


def test_what_is_read_is_what_was_written(folder: Path):
    store, written = FeatureStore(folder, "train"), features(meta())
    for name in ALL:
        assert torch.equal(store.read("a", name), written[name])
    assert torch.equal(store.read("a", "decoder_mask_token", 1), written["decoder_mask_token"][1])
    assert torch.equal(store.read("a", "dense_mask_logits", "obj_1"), written["dense_mask_logits"][1])
    assert torch.equal(store.read("a", "encoder_patch", 1), written["encoder_patch"])  # one for all prompts
    prompts, names = store.prompts("a")
    assert torch.equal(prompts.points, record().prompts.points) and torch.equal(prompts.labels, record().prompts.labels)
    assert prompts.boxes is None and names == ["obj_0", "obj_1"]
    assert store.record("a").input_size == (48, 64) and store.record("a").original_size == (90, 120)
    assert store.read("a", "ious").shape == (2, 1) and store.read("a", "ious", 0).shape == (1,)


def test_half_precision_comes_back_as_float32_within_a_thousandth(tmp_path: Path):
    of = meta(dtype="float16")
    write_store(tmp_path, of)
    for name, wanted in features(of).items():
        found = FeatureStore(tmp_path, "train").read("a", name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        assert np.load(tmp_path / "train" / f"a_{FILES[name]}.npy").flags.c_contiguous


def test_boxes_a_grid_and_no_prompt_come_back(tmp_path: Path):
    of = meta(components=["encoder_patch"])
    kinds = {
        "box": (Prompts(boxes=torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])), ["p", "q"], 2),
        "grid": (grid(2, (48, 64)), [], 4),
        "none": (Prompts(), [""], 1),
    }
    (tmp_path / "meta.json").write_text(json.dumps(of))
    for key, (prompts, names, count) in kinds.items():
        entry = PromptRecord(prompts, names, (48, 64), (90, 120), torch.zeros(count, 1))
        write_features(tmp_path / "train", key, of, features(of, count), entry)
    store = FeatureStore(tmp_path, "train")
    for key, (prompts, names, count) in kinds.items():
        found, found_names = store.prompts(key)
        assert found_names == names and len(found) == count
        for one, other in zip(vars(found).values(), vars(prompts).values(), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_what_is_read_belongs_to_the_reader(folder: Path):
    store = FeatureStore(folder, "train")
    store.read("a", "encoder_patch").zero_()
    assert torch.equal(store.read("a", "encoder_patch"), features(meta())["encoder_patch"])


def test_few_files_stay_open_and_none_travels_to_a_worker(tmp_path: Path):
    of = meta(components=["decoder_mask_token"])
    keys = tuple(f"k{i}" for i in range(40))
    write_store(tmp_path, of, keys)
    store = FeatureStore(tmp_path, "train")
    for key in keys:  # two files each
        store.read(key, "decoder_mask_token", 0)
    assert len(store._open) == MAX_OPEN
    data = pickle.dumps(store)
    assert len(data) < 5000
    assert torch.equal(pickle.loads(data).read("k3", "decoder_mask_token"), store.read("k3", "decoder_mask_token"))


def test_output_keys_have_a_map_for_each_prompt(tmp_path: Path):
    of = meta(tap="output_keys", components=["prompt_embed"])
    write_store(tmp_path, of)
    store = FeatureStore(tmp_path, "train")
    assert store.is_per_prompt("prompt_embed") and store.read("a", "prompt_embed").shape == (2, 256, 4, 4)
    assert store.read("a", "prompt_embed", "obj_0").shape == (256, 4, 4)
    assert not FeatureStore(tmp_path, "train").is_per_prompt("encoder_patch")


# What a training wants -----------------------------------------------------------------------------------------------


def test_a_fitting_training_passes(folder: Path):
    config = PromptDistillConfig.from_dict(
        {
            "distillation": {"enable": True, **{name: {"enable": True} for name in ALL}},
            "teachers": [{"name": "A", "hooks": {"encoder_patch": "image_encoder.blocks[10]"}}],
            "model": {"image_size": SIDE},
        }
    )
    FeatureStore(folder, "train").check(expected_of(config, config.teachers[0]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("teacher", ["B"], "teacher: found 'A', wanted 'B'"),
        ("image_size", 1024, "image_size: found 64, wanted 1024"),
        ("tap", "output_keys", "tap: found 'input_keys', wanted 'output_keys'"),
        ("multimask", True, "multimask: found False, wanted True"),
        ("mode", "everything", "mode: found 'single', wanted 'everything'"),
        ("hooks", {"encoder_patch": "image_encoder.neck"}, "hook of encoder_patch: found .*blocks.10, wanted .*neck"),
    ],
)
def test_another_training_is_refused(folder: Path, field: str, value, message: str):
    fitting = {"teacher": ["A"], "image_size": SIDE, "mode": "single", "tap": "input_keys", "multimask": False}
    with pytest.raises(ValueError, match=message):
        FeatureStore(folder, "train").check({**fitting, "components": ALL, field: value})


def test_what_no_component_depends_on_is_not_compared(folder: Path):
    store = FeatureStore(folder, "train")
    store.check({"components": ["encoder_patch"], "tap": "output_keys", "multimask": True, "grid_points": 5})


def test_another_grid_is_refused(tmp_path: Path):
    write_store(tmp_path, meta(mode="everything", grid_points=4))
    wanted = {"mode": "everything", "components": ["decoder_mask_token"]}
    FeatureStore(tmp_path, "train").check({**wanted, "grid_points": 4})
    with pytest.raises(ValueError, match="grid_points: found 4, wanted 32"):
        FeatureStore(tmp_path, "train").check({**wanted, "grid_points": 32})


def test_a_folder_named_for_the_teacher_may_have_its_own_label(tmp_path: Path):
    of = meta()
    of["teacher"]["name"] = "SAM_vitH"
    write_store(tmp_path / "SAM_vitH", of)
    config = PromptDistillConfig.from_dict(
        {
            "distillation": {"enable": True, "encoder_patch": {"enable": True}},
            "teachers": [{"name": "SAM-H", "precomputed_dir": str(tmp_path / "SAM_vitH")}, {"name": "other"}],
            "model": {"image_size": SIDE},
        }
    )
    store = FeatureStore(config.store_folder(config.teachers[0]), "train")
    store.check(expected_of(config, config.teachers[0]))
    with pytest.raises(ValueError, match="found 'SAM_vitH', wanted 'other'"):
        store.check(expected_of(config, config.teachers[1]))


def test_a_component_that_was_not_written_says_what_to_switch_off(tmp_path: Path):
    write_store(tmp_path, meta(components=["encoder_patch"]))
    store = FeatureStore(tmp_path, "train")
    with pytest.raises(ValueError, match=r"no dense_mask_logits.*dense_mask_logits\.enable false.*dense_logits"):
        store.check({"components": ["encoder_patch", "dense_mask_logits"]})
    with pytest.raises(ValueError, match=r"no dense_mask_logits"):
        store.read("a", "dense_mask_logits")


def test_features_of_no_prompt_do_not_serve_prompts(tmp_path: Path):
    write_store(tmp_path, meta(prompts={"source": "none"}))
    store = FeatureStore(tmp_path, "train")
    store.check({"components": ["encoder_patch", "prompt_embed"]})
    with pytest.raises(ValueError, match="prompts: found none, wanted those of masks for decoder_mask_token"):
        store.check({"components": ["encoder_patch", "decoder_mask_token"]})


# What is missing or damaged ------------------------------------------------------------------------------------------


def test_no_store_and_no_split(tmp_path: Path, folder: Path):
    with pytest.raises(FileNotFoundError, match=r"extract_teacher_features.*use_precomputed_features false"):
        FeatureStore(tmp_path / "elsewhere", "train")
    with pytest.raises(FileNotFoundError, match=r"no features of the split 'val'.*--splits val"):
        FeatureStore(folder, "val")


def test_a_missing_file_is_named_with_both_ways_out(folder: Path):
    path = folder / "train" / "a_dense_logits.npy"
    path.unlink()
    store = FeatureStore(folder, "train")
    assert store.missing(["a", "b"], ["encoder_patch"]) == ["b"]
    assert store.missing(["a", "b"], ALL) == ["a", "b"]
    store.read("a", "encoder_patch")
    with pytest.raises(
        FileNotFoundError, match=rf"{path}.*extract_teacher.*or set distillation.dense_mask_logits.enable"
    ):
        store.read("a", "dense_mask_logits")
    with pytest.raises(FileNotFoundError, match=r"b_prompts.npz"):
        store.prompts("b")


def test_a_mask_without_a_prompt_is_named(folder: Path):
    with pytest.raises(ValueError, match=r"no prompt of the mask 'obj_7'.*obj_0, obj_1"):
        FeatureStore(folder, "train").read("a", "decoder_mask_token", "obj_7")
    with pytest.raises(ValueError, match=r"2 prompts .* no row 2"):
        FeatureStore(folder, "train").read("a", "decoder_mask_token", 2)


def test_a_cut_off_or_misshapen_file_is_named(folder: Path):
    path = folder / "train" / "a_mask_token.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert not is_complete(folder / "train", "a", meta())
    with pytest.raises(ValueError, match=r"a_mask_token.npy is cut off or damaged"):
        FeatureStore(folder, "train").read("a", "decoder_mask_token")
    np.save(path, np.zeros((2, 4, 255), np.float32))
    with pytest.raises(ValueError, match=r"\(2, 4, 255\), wanted float32 \(2, 4, 256\)"):
        FeatureStore(folder, "train").read("a", "decoder_mask_token")
    path.write_bytes(whole)
    assert is_complete(folder / "train", "a", meta())
    (folder / "train" / "a_prompts.npz").write_bytes(b"PK\x03\x04 cut")
    assert not is_complete(folder / "train", "a", meta())
    with pytest.raises(ValueError, match=r"a_prompts.npz is damaged"):
        FeatureStore(folder, "train").prompts("a")


def test_nothing_in_the_prompts_is_ever_executed(folder: Path):
    path = folder / "train" / "a_prompts.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "mask_names": np.array([{"a": 1}, None], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        FeatureStore(folder, "train").prompts("a")


def test_values_that_are_not_finite_are_neither_written_nor_read(folder: Path):
    of = meta(dtype="float16")
    wrong = features(of)
    wrong["prompt_embed"][0, 0, 0] = 1e6  # beyond float16
    with pytest.raises(ValueError, match="prompt_embed holds values that are not finite in float16"):
        write_features(folder / "new", "a", of, wrong, record())
    assert not (folder / "new").exists()
    path = folder / "train" / "a_enc_patch.npy"
    array = np.load(path)
    array[0, 0, 0] = np.nan
    np.save(path, array)
    with pytest.raises(ValueError, match=r"a_enc_patch.npy holds values that are not finite"):
        FeatureStore(folder, "train").read("a", "encoder_patch")


def test_another_program_or_version_is_refused(folder: Path):
    for text, message in (
        (json.dumps(meta(format_version=2)), "version 2; wanted"),
        ("{}", "does not describe"),
        ("cut of", "does not describe"),
    ):
        (folder / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            FeatureStore(folder, "train")


def test_metas_are_compared_but_for_the_machine():
    assert differences(meta(), meta(tools={}, computed_in={"device": "cuda"})) == []
    assert differences(meta(), meta(tap="output_keys")) == ["tap: found 'input_keys', wanted 'output_keys'"]
