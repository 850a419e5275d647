"""scripts/setup_env.sh and scripts/test.sh with a pip that only writes down what it was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PYTEST = "pytest --numprocesses 2 --dist loadscope"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A repository, in a folder with a blank in its name, whose .venv has a fake pip and a fake ruff."""
    root = tmp_path / "a house"
    (root / "scripts").mkdir(parents=True)
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("setup_env.sh", "test.sh"):
        shutil.copy(SCRIPTS / name, root / "scripts")
    (root / "setup.py").write_text("first")
    (root / "pyproject.toml").write_text("")
    write_program(
        root / ".venv/bin/python",
        f"""case "$1 $2 $3" in
        "-m pip install") echo "$*" >>pip.log; exit "${{PIP_CODE:-0}}" ;;
        "-m pip "*) exit 0 ;;
        "-m pytest"*) shift 2; echo "pytest $*"; exit "${{PYTEST_CODE:-0}}" ;;
        esac
        exec "{sys.executable}" "$@"
        """,
    )
    write_program(root / ".venv/bin/ruff", 'echo "ruff $*"; exit "${RUFF_CODE:-0}"\n')
    return root


def write_program(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def run(house: Path, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **settings}
    command = ["bash", f"scripts/{script}", *arguments]
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=60)


def installs(house: Path) -> list[str]:
    """What pip was asked to install since the last call."""
    log = house / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line for line in lines if "install" in line]


def test_installs_once_and_again_after_a_change(house: Path) -> None:
    assert run(house, "setup_env.sh").returncode == 0
    assert installs(house) == ["-m pip install --quiet --upgrade pip", "-m pip install -e .[dev]"]
    second = run(house, "setup_env.sh")
    assert second.returncode == 0 and ".venv is up to date" in second.stdout
    assert installs(house) == []
    (house / "setup.py").write_text("second")
    assert run(house, "setup_env.sh").returncode == 0
    assert len(installs(house)) == 2


def test_a_failed_installation_is_tried_again(house: Path) -> None:
    failed = run(house, "setup_env.sh", PIP_CODE="1")
    assert failed.returncode == 1 and "error: the installation stopped" in failed.stderr
    installs(house)
    assert run(house, "setup_env.sh").returncode == 0
    assert len(installs(house)) == 2


def test_an_interpreter_that_is_too_old_is_refused(house: Path) -> None:
    shutil.rmtree(house / ".venv")
    write_program(house / "old_python", "exit 1\n")
    result = run(house, "setup_env.sh", PYTHON="./old_python")
    assert result.returncode == 1
    assert result.stderr == "error: PYTHON=./old_python does not run or is older than Python 3.10\n"


def test_test_script_runs_all_steps_and_forwards_arguments(house: Path) -> None:
    result = run(house, "test.sh")
    assert result.returncode == 0, result.stderr
    assert "ruff check .\n" in result.stdout and "ruff format --check .\n" in result.stdout
    assert f"{PYTEST} tests\n" in result.stdout and "[test] all passed" in result.stdout
    result = run(house, "test.sh", "-m", "not slow", "tests/data")
    assert f"{PYTEST} -m not slow tests/data\n" in result.stdout


@pytest.mark.parametrize(("setting", "failed"), [("RUFF_CODE", "lint, format"), ("PYTEST_CODE", "pytest")])
def test_a_failing_step_is_named_and_the_others_run(house: Path, setting: str, failed: str) -> None:
    result = run(house, "test.sh", **{setting: "3"})
    assert result.returncode == 1
    assert result.stderr == f"[test] failed: {failed}\n"
    assert f"{PYTEST} tests\n" in result.stdout
