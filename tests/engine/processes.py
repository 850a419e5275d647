"""Starts programs in processes of their own: forked from the test, which is quick, or as a user would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from sam3.engine.cli import Main, run_main

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without torchrun's, with the repository importable and one thread a process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return {**kept, "PYTHONPATH": f"{ROOT / 'sam3'}:{ROOT}", "OMP_NUM_THREADS": "1", **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(program: str, arguments: Sequence[str], num_processes: int = 2) -> subprocess.Popen[str]:
    """The program (a path below the repository) in several processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--nnodes", "1"]
    command += ["--master_port", str(free_port()), str(ROOT / program), *arguments]
    return start(command, PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1")


def start(command: Sequence[str], **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment(**extra), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stdout, stderr


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def fork(main: Main, argv: Sequence[str], num_processes: int = 1) -> list[BaseProcess]:
    """`main(argv)` in forks of the test, which have what torchrun would give them if there are several."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_forked, args=(main, list(argv), rank, num_processes, port))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    return processes


def _forked(main: Main, argv: list[str], rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_main(main, argv)


def join(processes: Sequence[BaseProcess], timeout_s: float = 60) -> list[int | None]:
    """Exit codes; what still runs after the time is killed."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes
