"""The import rule of the house, and the ways of starting a program that must all work."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folder -> top-level packages of this project that its files may import.
ALLOWED = {
    "sam3": {"sam3"},
    "stage1": {"sam3", "stage1"},
    "stage1_geometry_finetune": {"sam3", "stage1_geometry_finetune"},
    "stage2": {"sam3", "stage2"},
    "data": {"sam3"},
    "distillation": {"sam3", "distillation"},
    "scripts": {"sam3", "stage2", "distillation"},
    "benchmarks": {"sam3", "stage1", "stage1_geometry_finetune", "stage2", "distillation", "benchmarks", "tests"},
}
OWN = {*ALLOWED, "tests"}
# Inside the package: these do not know each other.
STRANGERS = {
    "sam3/sam3/engine": ("sam3.model", "sam3.backbones", "sam3.sam"),
    "sam3/sam3/model/": ("sam3.engine",),
    "sam3/sam3/backbones": ("sam3.engine",),
    "sam3/sam3/sam": ("sam3.engine",),
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folders_import_only_what_they_may(folder: str):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        own = {name.split(".")[0] for name in imported_modules(path)} & OWN
        assert own <= ALLOWED[folder], f"{path.relative_to(ROOT)} imports {own - ALLOWED[folder]}"


@pytest.mark.parametrize("folder", sorted(STRANGERS))
def test_engine_and_models_do_not_know_each_other(folder: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        wrong = {name for name in imported_modules(path) if name.startswith(STRANGERS[folder])}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_nobody_says_sam3_sam3_or_touches_the_path():
    for path in sorted(ROOT.glob("*/**/*.py")):
        if ".venv" in path.parts or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        assert "from sam3.sam3" not in text and "import sam3.sam3" not in text, path
        assert "sys.path" not in text, path


def run(command: list[str], folder: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env={**clean, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = "from sam3.model_builder import build_sam3_image_model; print(build_sam3_image_model.__name__)"


def test_import_from_the_root_and_from_elsewhere(tmp_path: Path):
    assert run([sys.executable, "-c", IMPORT], ROOT).strip() == "build_sam3_image_model"
    assert run([sys.executable, "-c", IMPORT], tmp_path).strip() == "build_sam3_image_model"


def test_scripts_start_from_the_root_and_from_elsewhere(tmp_path: Path):
    scripts = ("train_stage1", "save_embedding_stage1", "convert_stage1_weights")
    geometry = ("train_geometry_finetune", "convert_geometry_finetune")
    for script in (
        *(f"stage1/{name}.py" for name in scripts),
        *(f"stage1_geometry_finetune/{name}.py" for name in geometry),
        "train_distill.py",
    ):
        for folder in (ROOT, tmp_path):
            assert "usage" in run([sys.executable, str(ROOT / script), "--help"], folder)
    prompts = ("scripts/train_prompt_distill", "scripts/extract_teacher_features", "scripts/download_sam1")
    for script in (*prompts, "scripts/make_tiny_sam1", "data/make_sample_prompts"):
        assert "usage" in run([sys.executable, str(ROOT / f"{script}.py"), "--help"], tmp_path)
    steps = ("save_video_embeddings", "train_memory", "convert_memory_weights")
    for script in (*(f"{name}_stage2" for name in steps), "evaluate_vos"):
        assert "usage" in run([sys.executable, str(ROOT / f"stage2/{script}.py"), "--help"], tmp_path)


def test_compare_models_needs_only_the_package_folder():
    text = run([sys.executable, "stage1/compare_models.py", "--help"], ROOT, PYTHONPATH="sam3")
    assert "--student" in text


def test_a_program_in_the_root_and_pytest_find_the_package(tmp_path: Path):
    code = "import runpy, sys; sys.path[0] = sys.argv[1]; " + IMPORT
    assert run([sys.executable, "-c", code, str(ROOT)], tmp_path).strip() == "build_sam3_image_model"
    collected = run([sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/engine/test_losses.py"], ROOT)
    assert "test_masked_cosine" in collected
