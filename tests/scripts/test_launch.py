"""The launchers, as bash runs them. `--print-command` shows what would start."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.processes import ROOT, environment

TRAIN = "stage1/scripts/train_stage1_student.sh"
SAVE = "stage1/scripts/save_stage1_embeddings.sh"
TUNE = "stage1_geometry_finetune/scripts/train_geometry_finetune.sh"
SCRIPTS = sorted(p.relative_to(ROOT) for p in (*ROOT.glob("scripts/*.sh"), *ROOT.glob("*/scripts/*.sh")))
KNOBS = (
    *("CFG", "DATA_PATH", "OUTPUT", "BATCH_SIZE", "GPUS", "DEVICE", "NNODES", "NODE_RANK", "MASTER_PORT"),
    *("PRETRAINED", "SAM3_CHECKPOINT", "TEACHER_EMBED_PATH"),
)

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def launch(script: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in environment().items() if k not in KNOBS}
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        cwd=cwd, env={**clean, "PYTHON": sys.executable, **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def command(script: str, *arguments: str, **options) -> list[str]:
    done = launch(script, *arguments, "--print-command", **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("+ ")
    words = shlex.split(done.stdout[2:])
    assert words[0] == sys.executable
    return words[1:]


def test_defaults():
    assert command(SAVE) == [
        *("-m", "torch.distributed.run", "--nproc_per_node", "8", "--nnodes", "1", "--master_port", "29501"),
        *("stage1/save_embedding_stage1.py", "--cfg", "stage1/configs/teacher/sam_vit_huge_sa1b.yaml"),
        *("--data-path", "data/sa-1b", "--output", "output/stage1_teacher"),
    ]
    assert command(TRAIN) == [
        *("-m", "torch.distributed.run", "--nproc_per_node", "8", "--nnodes", "1", "--master_port", "29502"),
        *("stage1/train_stage1.py", "--cfg", "stage1/configs/es_rv_m.yaml", "--data-path", "data/sa-1b"),
    ]
    assert command("stage1/scripts/save_image_embeddings.sh") == command(SAVE)
    cfg = "stage1_geometry_finetune/configs/es_rv_m.yaml"
    assert command(TUNE) == [
        *("-m", "torch.distributed.run", "--nproc_per_node", "8", "--nnodes", "1", "--master_port", "29503"),
        *("stage1_geometry_finetune/train_geometry_finetune.py", "--cfg", cfg, "--data-path", "data/sa-1b"),
    ]


def test_knobs_of_the_geometry_stage():
    """What is not given is left to the config file."""
    given = {
        "CFG": "own.yaml",
        "DATA_PATH": "pictures",
        "OUTPUT": "out",
        "BATCH_SIZE": "4",
        "PRETRAINED": "merged.pt",
        "SAM3_CHECKPOINT": "sam3.pt",
        "TEACHER_EMBED_PATH": "embeddings",
    }
    flags = [
        *("--cfg", "own.yaml", "--data-path", "pictures", "--output", "out", "--batch-size", "4"),
        *("--pretrained", "merged.pt", "--sam3-checkpoint", "sam3.pt", "--teacher-embed-path", "embeddings"),
    ]
    program = "stage1_geometry_finetune/train_geometry_finetune.py"
    for words in (
        command(TUNE, "GPUS=0", *(f"{key}={value}" for key, value in given.items())),
        command(TUNE, GPUS="0", **given),
    ):
        assert words == [program, *flags, "--device", "cpu"]
    assert command(TUNE, "GPUS=0", *(f"{key}=" for key in given)) == [program, "--device", "cpu"]


def test_only_cpu_needs_no_gpus():
    words = command(TRAIN, "GPUS=2", "--only-cpu")
    assert words[3] == "2"
    assert words[-3:] == ["--device", "cpu", "--only-cpu"]


def test_argument_over_environment_over_default():
    words = command(TRAIN, "BATCH_SIZE=3", "OUTPUT=a b", GPUS="2", BATCH_SIZE="5", DATA_PATH="")
    assert words[3] == "2"
    assert words[-4:] == ["--output", "a b", "--batch-size", "3"]
    assert "--data-path" not in words


def test_extras_keep_their_order_and_opts_pass_through():
    extras = ["--tag", "A=B", "--eval", "--opts", "DATA.X", "3", "TRAIN.EPOCHS=2", "GPUS=7", "it's"]
    words = command(TRAIN, "GPUS=1", *extras[:3], "BATCH_SIZE=4", *extras[3:])
    assert words[3] == "1"
    assert words[-len(extras) - 2 :] == ["--batch-size", "4", *extras]


def test_no_gpu_is_one_plain_cpu_process():
    words = command(TRAIN, "GPUS=0")
    assert words[0] == "stage1/train_stage1.py"
    assert words[-2:] == ["--device", "cpu"]


def test_several_cpu_processes_and_machines():
    words = command(TRAIN, "GPUS=2", "DEVICE=cpu", "NNODES=3", "NODE_RANK=1", "MASTER_PORT=4242")
    assert words[2:12] == [
        *("--nproc_per_node", "2", "--nnodes", "3", "--node_rank", "1"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:4242"),
    ]
    assert words[-2:] == ["--device", "cpu"]
    assert "host:1" in command(TRAIN, "NNODES=2", "RDZV_ENDPOINT=host:1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BACH_SIZE=3"], "BACH_SIZE is not a setting of this launcher; known: CFG DATA_PATH OUTPUT BATCH_SIZE GPUS"),
        (["GPUS=two"], "GPUS must be a whole number, got 'two'"),
        (["GPUS="], "GPUS must be a whole number, got ''"),
        (["NNODES=0"], "NNODES must be at least 1"),
        (["GPUS=0", "NNODES=2"], "GPUS=0 is one process on one machine"),
    ],
)
def test_wrong_settings_exit_with_2(arguments, message):
    done = launch(TRAIN, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_from_another_folder(tmp_path):
    words = command(TRAIN, "GPUS=0", cwd=tmp_path)
    assert words[:3] == [str(ROOT / "stage1/train_stage1.py"), "--cfg", str(ROOT / "stage1/configs/es_rv_m.yaml")]
    assert words[3:5] == ["--data-path", "data/sa-1b"]


@pytest.fixture
def toy(tmp_path) -> str:
    """A launcher of a program that prints its arguments and what it can import."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, sam3.engine.files, stage1\n"
        "print(sys.argv[1:], os.environ.get('SAM3_PLANNED_WORLD_SIZE'), sam3.engine.files.__file__)\n"
        "sys.exit(5 if '--fail' in sys.argv else 0)\n"
    )
    launcher = tmp_path / "toy.sh"
    relative = Path(*[".."] * (len(ROOT.parts) - 1)) / program.relative_to(ROOT.anchor)
    launcher.write_text(f'SCRIPT={relative}\nFLAGS="OUTPUT:--output"\n. "{ROOT}/scripts/launch.sh"\n')
    return str(launcher)


def test_the_program_runs_and_its_exit_code_is_the_launchers(toy, tmp_path):
    done = launch(toy, "GPUS=0", "OUTPUT=o", "--fail", cwd=tmp_path)
    assert done.returncode == 5
    assert "['--output', 'o', '--device', 'cpu', '--fail'] None" in done.stdout
    assert str(ROOT / "sam3/sam3/engine/files.py") in done.stdout


def test_dry_run_is_one_process_that_knows_the_plan(toy):
    done = launch(toy, "GPUS=4", "NNODES=2", "--opts", "A", "1", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run --nproc_per_node 4" in done.stdout.splitlines()[0]
    assert "['--opts', 'A', '1', '--dry-run'] 8" in done.stdout


def test_more_gpus_than_there_are(toy):
    done = launch(toy, "GPUS=99")
    assert done.returncode == 1
    assert re.search(r"GPUS=99, but \d+ are visible here; give GPUS=\d+", done.stderr)


def test_a_missing_python():
    done = launch(TRAIN, "PYTHON=/nowhere/python", "GPUS=1")
    assert done.returncode == 1
    assert "torch cannot be imported by /nowhere/python" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_only_what_bash_3_2_knows(script):
    """macOS ships bash 3.2."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", (ROOT / script).read_text())
    newer = {
        "case conversion": r"\$\{\w+(\[.\])?(,|\^)",
        "associative array or nameref": r"(declare|local|typeset)\s+-\w*[An]",
        "mapfile": r"\b(mapfile|readarray)\b",
        "transformation": r"\$\{[^}]*@[QEPAa]\}",
        "append both streams": r"&>>|\|&",
        "test -v": r"\[\[?\s+-v\s",
        "negative index": r"\[-\d+\]",
        "time format": r"%\([^)]*\)T",
        "coproc": r"\bcoproc\b",
        "empty array under set -u": r'(?<!\+)"\$\{extras\[@\]\}"',
    }
    for what, pattern in newer.items():
        assert not re.search(pattern, text), f"{script}: {what}"
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck():
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_any_free_port_for_processes_of_one_machine():
    words = command(TRAIN, "GPUS=2", "DEVICE=cpu", "MASTER_PORT=0")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--local_addr", "127.0.0.1"]
    assert words[: len(torchrun)] == torchrun
    done = launch(TRAIN, "NNODES=2", "MASTER_PORT=0", "--print-command")
    assert done.returncode == 2 and "MASTER_PORT=0 is for one machine; give RDZV_ENDPOINT=host:port" in done.stderr
    assert "host:1" in command(TRAIN, "NNODES=2", "MASTER_PORT=0", "RDZV_ENDPOINT=host:1")


@pytest.mark.parametrize(("given", "count", "wanted"), [("", 2, None), ("", 10_000, "1"), ("3", 2, "3")])
def test_processes_on_the_cpu_share_its_cores(tmp_path: Path, given: str, count: int, wanted: str | None):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "threads=$OMP_NUM_THREADS"\n')
    python.chmod(0o755)
    done = launch(TRAIN, f"GPUS={count}", "DEVICE=cpu", PYTHON=str(python), OMP_NUM_THREADS=given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = wanted or str(max(1, cores // 2))
    assert done.stdout.splitlines()[-1] == f"threads={wanted}"


def test_launchers_of_distillation_and_of_judging_videos():
    words = command(
        "scripts/train_distill.sh", "GPUS=0", "PHASE=1", "TEACHER=t.pt", "--opts", "batch_size=2", "log_dir=x"
    )
    assert words == [
        *("train_distill.py", "--config", "configs/distillation.yaml", "--teacher", "t.pt", "--phase", "1"),
        *("--device", "cpu", "--opts", "batch_size=2", "log_dir=x"),
    ]
    words = command("stage2/scripts/evaluate_vos.sh", "GPUS=0", "DATA_PATH=v", "--checkpoints", "a.pt", "b.pt")
    assert words == [
        *("stage2/evaluate_vos.py", "--data", "v", "--device", "cpu", "--checkpoints", "a.pt", "b.pt"),
    ]
