"""README and its sisters against the code: paths, flags, whole commands, config keys, tables, Python examples."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from sam3.backbones.student import BACKBONES
from sam3.engine.config import get, leaf_keys
from sam3.model.tracker_config import MemoryConfig, TrackerConfig
from sam3.tracker_builder import assemble_tracker, build_memory
from stage1.compare_models import summary
from stage1.config import stage1_defaults
from stage1_geometry_finetune.config import geometry_defaults
from stage2 import config as stage2_config
from tests.scripts.test_launch import command as launched

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "data/README.md")
LISTS = ("docs/faults.md", "sam3_checkpoints/README.md")  # they name files, too
PATH = re.compile(
    r"(?<![\w/.-])(?:(?:benchmarks|configs|data|distillation|docs|sam3|scripts|stage1|stage1_geometry_finetune|stage2|tests)/[\w./-]*|(?=train_distill))\w+\.(?:md|py|sh|svg|txt|yaml)\b"
)
KEY = re.compile(r"\b(?:AUG|DATA|DISTILL|MODEL|TRAIN)(?:\.[A-Z0-9_]+)+")
SHARED = (
    *(f"sam3/sam3/engine/{name}.py" for name in ("cli", "config", "stage_config", "training_run")),
    *("stage1/config.py", "stage1_geometry_finetune/config.py", "stage2/config.py", "scripts/launch.sh"),
)
# Sources beside a program's own that define its flags; a launcher passes on what it does not know.
FLAGS_FROM = {
    "save_stage1_embeddings.sh": "stage1/save_embedding_stage1.py",
    "train_stage1_student.sh": "stage1/train_stage1.py",
    "train_geometry_finetune.sh": "stage1_geometry_finetune/train_geometry_finetune.py",
    "download_sa1b.sh": "data/download_files.py",
    "download_sa_v.sh": "data/download_files.py",
    "save_embeddings.sh": "stage2/save_video_embeddings_stage2.py",
    "train_memory.sh": "stage2/train_memory_stage2.py",
    "convert_weights.sh": "stage2/convert_memory_weights_stage2.py",
    "train_prompt_distill.sh": "scripts/train_prompt_distill.py",
}
LAUNCHERS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*/scripts/*.sh"), ROOT / "scripts/train_prompt_distill.sh")
}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands(document: str) -> list[str]:
    """Lines of the bash blocks, continued ones joined, comments cut off."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text_of(document), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


def programs(document: str) -> list[tuple[str, str]]:
    """(program of this project, what follows it) of the commands, environment and torchrun's own flags left out."""
    found = []
    for command in commands(document):
        paths = (match for match in PATH.finditer(command) if match[0].endswith((".py", ".sh")))
        if (match := next(paths, None)) is not None:
            found.append((match[0], command[match.end() :]))
    return found


@pytest.mark.parametrize("document", (*DOCUMENTS, *LISTS))
def test_named_files_exist(document: str):
    found = set(PATH.findall(text_of(document)))
    assert found
    assert not [path for path in found if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_of_commands_are_known_to_their_programs(document: str):
    assert programs(document)
    for program, rest in programs(document):
        sources = [program, *SHARED, FLAGS_FROM.get(Path(program).name, program)]
        known = "".join((ROOT / source).read_text(encoding="utf-8") for source in sources)
        unknown = [flag for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", rest) if f'"{flag}"' not in known]
        assert not [flag for flag in unknown if f"{flag} " not in known], program + rest


class Parsed(Exception):
    """A program's arguments are parsed; what it does with them is tested elsewhere."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch):
    """Programs end with `Parsed` once their arguments are."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self, *args, original=original, **kwargs):
            original(self, *args, **kwargs)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)


def parse_command(program: str, words: list[str]) -> None:
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    with pytest.raises(Parsed):
        module.main(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_parse(document: str, parse_only, monkeypatch: pytest.MonkeyPatch):
    """Those of Python programs as they stand, those of launchers as the command that they start."""
    knobs = [key for launcher in LAUNCHERS.values() for key in re.findall(r"([A-Z0-9_]+):--", launcher)]
    for key in knobs:
        monkeypatch.delenv(key, raising=False)
    for program, rest in programs(document):
        words = shlex.split(rest)
        if program.endswith(".py"):
            parse_command(program, words)
        elif program in LAUNCHERS and shutil.which("bash"):  # the others take their arguments themselves
            started = launched(program, *words)
            place = next(i for i, word in enumerate(started) if word.endswith(".py"))
            parse_command(started[place], started[place + 1 :])


def test_pairs_of_commands_make_a_config():
    parsed = 0
    for program, rest in programs("README.md"):
        if program == "stage2/train_memory_stage2.py":
            parser = stage2_config.make_parser("")
            assert stage2_config.load(parser.parse_intermixed_args(shlex.split(rest))).OUTPUT == "output/stage2_memory"
            parsed += 1
    assert parsed == 2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_config_keys_exist(document: str):
    defaults = (stage1_defaults(), geometry_defaults(), stage2_config.stage2_defaults())
    known = {key for tree in defaults for key in leaf_keys(tree)} | {*stage2_config.ALIASES}
    named = set(KEY.findall(text_of(document)))
    assert not named - known, f"{document} names {named - known}"


def test_table_of_keys_states_the_defaults():
    defaults = stage2_config.stage2_defaults()
    rows = re.findall(r"^\| `([A-Z0-9_.]+)` \|.*\| `([^`]*)` \|$", text_of("README.md"), flags=re.MULTILINE)
    assert len(rows) >= 14
    for key, stated in rows:
        value = get(defaults, stage2_config.ALIASES.get(key, key))
        assert (float(stated) if isinstance(value, float) else stated) == (
            value if isinstance(value, float) else str(value)
        ), key


def test_counts_of_the_memory_are_those_of_the_modules():
    config = TrackerConfig()
    with torch.device("meta"):
        tracker, memory = assemble_tracker(config), build_memory(config, MemoryConfig())
    dense, ours, perceiver, whole = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (tracker.transformer, memory.attention, memory.perceiver, tracker)
    )
    kept = memory.compress(torch.zeros(1, config.mem_dim, config.grid, config.grid, device="meta")).shape[1]
    pointers = config.max_obj_ptrs * config.dim // config.mem_dim
    for row in (
        f"| memory attention | 4 layers, {dense:,} parameters | 2 layers, {ours:,}: 50 % fewer |",
        f"| Perceiver | none | {perceiver:,} parameters |",
        f"| trained in all | | {ours + perceiver:,} parameters |",
        f"| tokens of a remembered frame | {config.grid**2} | 512 latents, of which {kept} tokens are kept and read |",
        f"| {7 * config.grid**2 + pointers:,} | {7 * kept + pointers} |",
        f"({whole:,} parameters)",
    ):
        assert row in text_of("README.md"), row


def test_counts_of_the_slim_student_are_those_of_the_module():
    from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config

    with torch.device("meta"):
        student = EfficientSAM3(EfficientSAM3Config.preset("full"))
    for name, part in student.named_children():
        if count := sum(p.numel() for p in part.parameters()):
            assert f"| {name.replace('_', ' ')} | {count:,} |" in text_of("README.md"), name
    total = sum(p.numel() for p in student.parameters())
    assert f"| **all** | **{total:,}** | of which {student.freeze_unused():,} " in text_of("README.md")


def test_python_examples_name_what_there_is():
    examples = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), flags=re.DOTALL | re.MULTILINE)
    assert examples
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_table_of_students_is_what_the_command_prints():
    printed = {line.split()[0]: line.split() for line in summary().splitlines() if line.startswith("ES-")}
    lines = [line for line in text_of("README.md").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0]: row for row in rows if row[0].startswith("ES-")}
    assert table.keys() == printed.keys() == {spec.display_name for spec in BACKBONES.values()}
    for spec in BACKBONES.values():
        name, architecture, params, *smaller = printed[spec.display_name]
        assert table[name] == [name, architecture, params, " ".join(smaller), f"`stage1/configs/{spec.stem}.yaml`"]
