"""Settings of the distillation: defaults of the method, files, overrides, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from distillation.config import LOSSES, DistillationConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_defaults_are_those_of_the_method():
    config = DistillationConfig()
    assert list(config.loss_weights.values()) == [5, 5, 2, 2, 1, 2, 1, 1] and len(LOSSES) == 8
    assert (config.batch_size, config.grad_accum_steps, config.pin_memory) == (1, 8, False)
    assert dataclasses.astuple(config.phase(1)) == (1, 5, 1e-4, 500)
    assert dataclasses.astuple(config.phase(2)) == (2, 10, 5e-5, 0)
    assert config.phase(1).with_features and not config.phase(2).with_features
    assert config.teacher == "sam3_checkpoints/sam3.pt"
    assert dataclasses.replace(config, teacher_backend="hf").teacher == "facebook/sam3"
    assert config.pretrained and not dataclasses.replace(config, student="tiny").pretrained


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_gives_the_same_config_again(tmp_path: Path, suffix: str):
    config = DistillationConfig(prompts=("a", "b"), num_train=7, phase2_lr=3e-5)
    path = tmp_path / f"config{suffix}"
    dump = json.dumps if suffix == ".json" else yaml.safe_dump
    path.write_text(dump(config.to_dict()))
    assert load_config(path) == config


def test_later_sources_win(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\nbatch_size: 2\nphase1_lr: 1e-3\n")
    config = load_config(path, ["batch_size=3", "prompts=[one, two things]"], seed=None, batch_size=4)
    assert (config.seed, config.batch_size, config.phase1_lr) == (1, 4, 1e-3)
    assert config.prompts == ("one", "two things")
    assert load_config(None, ["num_train=null"]).num_train is None


def test_a_file_may_leave_to_later_sources_what_its_values_need(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("teacher_mode: trunk_cache\n")
    assert load_config(path, cache_dir="cache").cache_dir == "cache"
    with pytest.raises(ValueError, match=r"trunk_cache needs cache_dir \(--cache-dir\)"):
        load_config(path)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("distillation*.yaml")))
def test_shipped_files_load(name: str):
    assert load_config(CONFIGS / name)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["mask_los_weight=1"], ["mask_los_weight", "mask_loss_weight"]),
        (["nonsense=1"], ["nonsense", "DistillationConfig", "sa1b_dir"]),
        (["batch_size"], ["key=value", "batch_size"]),
        (["prompts=[a"], ["--opts", "prompts=[a", "YAML"]),
        (["batch_size=0"], ["batch_size", "at least 1", "0"]),
        (["batch_size=1.5"], ["batch_size", "1.5", "int"]),
        (["phase1_lr=nan"], ["phase1_lr", "nan"]),
        (["phase1_lr=fast"], ["phase1_lr", "fast"]),
        (["strict_memory=1"], ["strict_memory", "bool"]),
        (["matcher=nearest"], ["matcher", "nearest", "hungarian"]),
        (["prompts=[]"], ["prompts"]),
        (["prompts=['']"], ["prompts"]),
        (["student_std=[1, 0, 1]"], ["student_std"]),
        (["student=tiny", "student_pretrained=true"], ["tiny", "student_pretrained"]),
        (["teacher_mode=trunk_cache"], ["trunk_cache", "--cache-dir"]),
        (["teacher_mode=trunk_cache", "cache_dir=x", "horizontal_flip=true"], ["horizontal_flip", "online"]),
        ([f"{weight}=0" for weight in list(LOSSES.values())[:6]], ["output losses"]),
        (["memory_budget_gb=0"], ["memory_budget_gb"]),
    ],
)
def test_what_cannot_work_is_refused(opts: list[str], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        load_config(None, opts)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.json", "{", ["c.json", "not valid json"]),
        ("c.yaml", "a: [", ["c.yaml", "not valid yaml"]),
        ("c.yaml", "- 1", ["c.yaml", "list"]),
        ("c.yaml", "sead: 1", ["c.yaml", "sead", "seed"]),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, words: list[str]):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError) as refusal:
        load_config(path)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")
