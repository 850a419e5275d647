"""Command lines of Stage 1 at the tiny preset, in this process and in others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stage1 import train_stage1

ROOT = Path(__file__).parent.parent.parent
SAVE = "stage1/save_embedding_stage1.py"
TRAIN = "stage1/train_stage1.py"


def teacher_arguments(teacher: Path, data: Path, output: Path, *flags: str, **opts: Any) -> list[str]:
    """Arguments of the export; `opts` are config keys with `__` for the dot."""
    config = ROOT / "stage1/configs/teacher/sam3_tiny.yaml"
    opts = {"MODEL__RESUME": teacher, "DATA__NUM_WORKERS": 0, "DATA__BATCH_SIZE": 3, **opts}
    return command_line(config, data, output, flags, opts)


def student_arguments(exported: Path, data: Path, output: Path, *flags: str, **opts: Any) -> list[str]:
    """Arguments of a training of 2 epochs with 4 steps each; `exported` is the export's output folder."""
    config = ROOT / "stage1/configs/es_ev_s_tiny.yaml"
    opts = {
        "DISTILL__TEACHER_EMBED_PATH": exported / "embeddings",
        "DATA__NUM_WORKERS": 0,
        "DATA__BATCH_SIZE": 2,
        "TRAIN__EPOCHS": 2,
        "TENSORBOARD": False,
        "PRINT_FREQ": 1,
        **opts,
    }
    return command_line(config, data, output, flags, opts)


def command_line(config: Path, data: Path, output: Path, flags: Sequence[str], opts: Mapping[str, Any]) -> list[str]:
    """Arguments of a program of any stage; `opts` are config keys with `__` for the dot."""
    pairs = [str(item) for key, value in opts.items() for item in (key.replace("__", "."), value)]
    return ["--cfg", str(config), "--data-path", str(data), "--output", str(output), *flags, "--opts", *pairs]


def start(script: str, arguments: list[str], processes: int = 0, *torchrun: str, **env: str) -> subprocess.Popen:
    """Start a program, under torchrun if `processes` > 0; output goes to pipes, stderr joined to stdout."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += list(torchrun) or ["--master_port", str(free_port())]
    return subprocess.Popen(
        [*command, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def finish(process: subprocess.Popen, timeout_s: float = 300) -> tuple[int, str]:
    """Exit code and output."""
    text, _ = process.communicate(timeout=timeout_s)
    return process.returncode, text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(exported: Path, data: Path, output: Path, *flags: str, **opts: Any) -> int:
    """A training in this process: see `student_arguments`."""
    return train_stage1.main(student_arguments(exported, data, output, *flags, **opts))


def metrics(output: Path, name: str) -> list[float]:
    """What a run recorded under a name, in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def model_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The student's weights in a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["model"]


def assert_same_weights(first: Path, second: Path) -> None:
    """Every tensor of two checkpoints bit-equal."""
    one, other = model_of(first), model_of(second)
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, such as {different[0]}"
