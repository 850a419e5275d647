from __future__ import annotations

import argparse
import json

import pytest
import yaml
from yacs.config import CfgNode

from sam3.engine.config import (
    SHARED_FLAGS,
    add_config_arguments,
    dump_config,
    flag_values_from,
    get,
    load_config,
    remove,
    shared_defaults,
    to_dict,
)
from sam3.engine.environment import write_env


@pytest.fixture
def defaults() -> CfgNode:
    return shared_defaults()


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path, defaults):
    write(tmp_path / "a/grand.yaml", "SEED: 1\nPRINT_FREQ: 1\nSAVE_FREQ: 2\nKEEP_LAST: 1\nTAG: grand\n")
    write(tmp_path / "a/base.yaml", "BASE: grand.yaml\nPRINT_FREQ: 2\nKEEP_LAST: 2\nTAG: base\n")
    cfg = write(tmp_path / "run.yaml", "BASE: ['a/base.yaml']\nKEEP_LAST: 3\nTAG: file\nDATA:\n  BATCH_SIZE: 7\n")
    config = load_config(defaults, cfg, ["TAG", "opts", "DATA.BATCH_SIZE=8"], {"DATA.BATCH_SIZE": 9})
    assert (config.SEED, config.PRINT_FREQ, config.SAVE_FREQ, config.KEEP_LAST) == (1, 2, 2, 3)
    assert (config.TAG, config.DATA.BATCH_SIZE) == ("opts", 9)
    assert defaults.SEED == 0


def test_two_bases_the_later_one_wins(tmp_path, defaults):
    write(tmp_path / "one.yaml", "SEED: 1\nKEEP_LAST: 1\n")
    write(tmp_path / "two.yaml", "SEED: 2\n")
    config = load_config(defaults, write(tmp_path / "c.yaml", "BASE: [one.yaml, two.yaml]\n"))
    assert (config.SEED, config.KEEP_LAST) == (2, 1)


def test_base_cycle_is_named(tmp_path, defaults):
    write(tmp_path / "a.yaml", "BASE: b.yaml\n")
    write(tmp_path / "b.yaml", "BASE: a.yaml\n")
    with pytest.raises(ValueError, match=r"BASE leads back to itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(defaults, tmp_path / "a.yaml")


def test_the_result_is_frozen(defaults):
    config = load_config(defaults)
    with pytest.raises(AttributeError):
        config.SEED = 3


def test_texts_that_yaml_does_not_take_for_numbers(tmp_path, defaults):
    text = "TRAIN:\n  BASE_LR: 1e-3\n  CLIP_GRAD: 5\n  OPTIMIZER:\n    BETAS: (0.8, 0.99)\nDATA:\n  MEAN: [1, 2, 3]\n"
    config = load_config(
        defaults, write(tmp_path / "c.yaml", text), ["TRAIN.OPTIMIZER.BETAS", "[0.5, 0.6]", "TAG", "3"]
    )
    assert config.TRAIN.BASE_LR == 0.001
    assert config.TRAIN.CLIP_GRAD == 5.0
    assert type(config.TRAIN.CLIP_GRAD) is float
    assert config.TRAIN.OPTIMIZER.BETAS == (0.5, 0.6)
    assert config.DATA.MEAN == [1, 2, 3]
    assert config.TAG == "3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "DATA:\n  BACH_SIZE: 3\n",
            r"unknown config key DATA\.BACH_SIZE in .*c\.yaml; did you mean DATA\.BATCH_SIZE\?",
        ),
        ("XYZZY: 3\n", r"unknown config key XYZZY in .*c\.yaml$"),
        ("SEED: many\n", r"SEED in .*c\.yaml is 'many' of type str, wanted int as in its default 0"),
        ("SEED: 1.5\n", "of type float, wanted int"),
        ("SEED: true\n", "of type bool, wanted int"),
        ("SEED: null\n", "of type NoneType, wanted int"),
        ("TAG: 2024\n", "of type int, wanted str"),
        ("DATA: 3\n", "DATA in .* is a group of keys, but got 3"),
        ("SEED:\n  A: 3\n", "of type dict, wanted int"),
        ("AMP_DTYPE: bf17\n", "AMP_DTYPE is 'bf17'; choose one of auto, bf16, fp16"),
        ("TRAIN:\n  START_EPOCH: 3\n", r"TRAIN\.START_EPOCH \(in .*c\.yaml\) cannot be set: it follows from"),
        ("OLD:\n  A: 3\n", r"OLD.* cannot be set: it belongs to stage 9"),
        ("- 1\n- 2\n", "holds a list; wanted keys and values"),
        ("A: [1\n", r"c\.yaml cannot be parsed: .*line 2"),
    ],
)
def test_what_is_wrong_is_named_with_its_source(tmp_path, defaults, content, message):
    retired = {"TRAIN.START_EPOCH": "it follows from the checkpoint", "OLD": "it belongs to stage 9"}
    with pytest.raises(ValueError, match="(?s)" + message):
        load_config(defaults, write(tmp_path / "c.yaml", content), retired=retired)


def test_missing_file_and_base(tmp_path, defaults):
    with pytest.raises(FileNotFoundError, match=r"nope\.yaml does not exist"):
        load_config(defaults, tmp_path / "nope.yaml")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist"):
        load_config(defaults, write(tmp_path / "c.yaml", "BASE: gone.yaml\n"))


def test_opts_errors(defaults):
    with pytest.raises(ValueError, match=r"'SEED' has no value"):
        load_config(defaults, opts=["SEED"])
    with pytest.raises(ValueError, match=r"unknown config key SEDE in --opts; did you mean SEED"):
        load_config(defaults, opts=["SEDE", "3"])


def test_opts_are_never_run(defaults):
    """A text that is no literal stays a text, and here has the wrong type."""
    with pytest.raises(ValueError, match="of type str, wanted int"):
        load_config(defaults, opts=["SEED", "__import__('os').getpid()"])


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_the_dump_starts_the_same_run(tmp_path, defaults, name):
    config = load_config(defaults, opts=["TRAIN.BASE_LR", "3e-7", "TRAIN.OPTIMIZER.BETAS", "(0.1, 0.2)"])
    dump_config(config, tmp_path / name)
    assert load_config(defaults, tmp_path / name) == config
    raw = (tmp_path / name).read_text()
    parsed = json.loads(raw) if name.endswith("json") else yaml.safe_load(raw)
    assert parsed["TRAIN"]["OPTIMIZER"]["BETAS"] == [0.1, 0.2]
    assert to_dict(config)["TRAIN"]["BASE_LR"] == 3e-7


ALIASES = {"TRAIN.BATCH": "DATA.BATCH_SIZE"}


def test_two_names_of_one_key(tmp_path, defaults):
    cfg = write(tmp_path / "c.yaml", "TRAIN:\n  BATCH: 5\n")
    for opts, wanted in (
        ([], 5),
        (["DATA.BATCH_SIZE", "2"], 2),
        (["TRAIN.BATCH", "3"], 3),
        (["TRAIN.BATCH", "3", "DATA.BATCH_SIZE", "3"], 3),
        (["TRAIN.BATCH", "3", "TRAIN.BATCH", "4"], 4),
    ):
        config = load_config(defaults, cfg, opts, aliases=ALIASES)
        assert wanted == config.DATA.BATCH_SIZE
    config = load_config(defaults, cfg, flag_values={"DATA.BATCH_SIZE": 9}, aliases=ALIASES)
    assert config.DATA.BATCH_SIZE == 9
    assert "BATCH" not in config.TRAIN
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(defaults, tmp_path / "config.yaml", aliases=ALIASES) == config
    both = r"DATA\.BATCH_SIZE and TRAIN\.BATCH are two names of one key, but .*c\.yaml sets them to 5 and 6; leave one"
    with pytest.raises(ValueError, match=both):
        load_config(
            defaults,
            write(tmp_path / "c.yaml", "DATA:\n  BATCH_SIZE: 5\nTRAIN:\n  BATCH: 6\n"),
            ["DATA.BATCH_SIZE", "7"],
            aliases=ALIASES,
        )
    with pytest.raises(ValueError, match=r"TRAIN\.BATCH in --opts is 'x' of type str, wanted int"):
        load_config(defaults, opts=["TRAIN.BATCH", "x"], aliases=ALIASES)


@pytest.mark.parametrize("name", ["--config", "--cfg"])
def test_pairs_at_the_end(name, defaults):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, SHARED_FLAGS, defaults, trailing=True)
    parse = parser.parse_intermixed_args
    args = parse([name, "a.yaml", "--seed", "3", "DATA.NUM_SAMPLES", "-1", "--device", "cpu", "TAG=b"])
    assert (args.cfg, args.opts) == ("a.yaml", ["DATA.NUM_SAMPLES", "-1", "TAG=b"])
    assert parse([name, "a.yaml"]).opts == []
    config = load_config(defaults, opts=args.opts, flag_values=flag_values_from(args, SHARED_FLAGS))
    assert (config.DATA.NUM_SAMPLES, config.TAG, config.SEED) == (-1, "b", 3)


def test_remove(defaults):
    for key in ("TRAIN.LR_SCHEDULER.NAME", "DATA", "NONE.SUCH", "TAG"):
        remove(defaults, key)
    assert "NAME" not in defaults.TRAIN.LR_SCHEDULER and "DATA" not in defaults and "TAG" not in defaults


def parse(arguments: list[str], defaults: CfgNode) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, SHARED_FLAGS, defaults)
    return parser.parse_args(["--cfg", "x.yaml", *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--batch-size", "0"], {"DATA.BATCH_SIZE": 0}),
        (["--batch_size=4"], {"DATA.BATCH_SIZE": 4}),
        (["--disable_amp"], {"AMP_ENABLE": False}),
        (["--disable-amp", "--only-cpu"], {"AMP_ENABLE": False, "DEVICE": "cpu"}),
        (["--resume"], {"MODEL.RESUME": "auto"}),
        (["--resume", "a.pth"], {"MODEL.RESUME": "a.pth"}),
        (["--output", ""], {"OUTPUT": ""}),
        (["--opts", "DATA.NUM_SAMPLES", "-1", "--seed", "3"], {"SEED": 3}),
    ],
)
def test_flags(arguments, expected, defaults):
    namespace = parse(arguments, defaults)
    assert flag_values_from(namespace, SHARED_FLAGS) == expected
    config = load_config(defaults, None, namespace.opts, expected)
    assert all(get(config, key) == value for key, value in expected.items())


def test_flags_that_disagree(defaults):
    with pytest.raises(ValueError, match=r"--only-cpu sets DEVICE to 'cpu', but --device sets it to 'cuda'"):
        flag_values_from(parse(["--device", "cuda", "--only-cpu"], defaults), SHARED_FLAGS)


def test_opts_may_be_given_twice(defaults):
    assert parse(["--opts", "SEED", "1", "--opts", "TAG=b"], defaults).opts == ["SEED", "1", "TAG=b"]


def test_environment_file(tmp_path):
    write_env(tmp_path / "env.json", ["train.py", "--x"])
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["argv"] == ["train.py", "--x"]
    assert content["versions"]["torch"].startswith("2.")
    assert content["world_size"] == 1
