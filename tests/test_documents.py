"""README and its sisters against the code: paths, flags, config keys, the table of students."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sam3.backbones.student import BACKBONES
from sam3.engine.config import leaf_keys
from stage1.compare_models import summary
from stage1.config import stage1_defaults
from stage1_geometry_finetune.config import geometry_defaults

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "data/README.md")
PATH = re.compile(
    r"(?<![\w/.-])(?:benchmarks|data|docs|sam3|scripts|stage1|stage1_geometry_finetune|tests)/[\w./-]*\w\.(?:md|py|sh|svg|txt|yaml)\b"
)
SHARED = (
    *(f"sam3/sam3/engine/{name}.py" for name in ("cli", "config", "stage_config", "training_run")),
    *("stage1/config.py", "stage1_geometry_finetune/config.py", "scripts/launch.sh"),
)
# Sources beside a program's own that define its flags; a launcher passes on what it does not know.
FLAGS_FROM = {
    "save_stage1_embeddings.sh": "stage1/save_embedding_stage1.py",
    "train_stage1_student.sh": "stage1/train_stage1.py",
    "train_geometry_finetune.sh": "stage1_geometry_finetune/train_geometry_finetune.py",
    "download_sa1b.sh": "data/download_files.py",
}
FOREIGN = ("pip", "torchrun", "pytest", "ruff")  # programs of others


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands(document: str) -> list[str]:
    """Lines of the bash blocks, continued ones joined, comments cut off."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text_of(document), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str):
    found = set(PATH.findall(text_of(document)))
    assert found
    assert not [path for path in found if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_of_commands_are_known_to_their_programs(document: str):
    checked = 0
    for command in commands(document):
        program = next(
            (word for word in command.split() if PATH.fullmatch(word) and word.endswith((".py", ".sh"))), None
        )
        if program is None or any(name in command for name in FOREIGN):
            continue
        sources = [program, *SHARED, FLAGS_FROM.get(Path(program).name, program)]
        known = "".join((ROOT / source).read_text(encoding="utf-8") for source in sources)
        unknown = [flag for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", command) if f'"{flag}"' not in known]
        assert not [flag for flag in unknown if f"{flag} " not in known], command
        checked += 1
    assert checked


@pytest.mark.parametrize("document", DOCUMENTS)
def test_config_keys_exist(document: str):
    known = {key for defaults in (stage1_defaults(), geometry_defaults()) for key in leaf_keys(defaults)}
    named = set(re.findall(r"\b(?:DATA|DISTILL|MODEL|TRAIN)(?:\.[A-Z_]+)+", text_of(document)))
    assert not named - known, f"{document} names {named - known}"


def test_table_of_students_is_what_the_command_prints():
    printed = {line.split()[0]: line.split() for line in summary().splitlines() if line.startswith("ES-")}
    lines = [line for line in text_of("README.md").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0]: row for row in rows if row[0].startswith("ES-")}
    assert table.keys() == printed.keys() == {spec.display_name for spec in BACKBONES.values()}
    for spec in BACKBONES.values():
        name, architecture, params, *smaller = printed[spec.display_name]
        assert table[name] == [name, architecture, params, " ".join(smaller), f"`stage1/configs/{spec.stem}.yaml`"]
