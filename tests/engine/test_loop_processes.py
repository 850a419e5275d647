"""Training in real processes: several of them, killed, stopped, and in another number afterwards."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam3.engine import checkpoint
from sam3.engine.distributed import World
from tests.engine import toy_train
from tests.engine.processes import ROOT, environment, finish, fork, free_port, join, start, torchrun, wait_for
from tests.engine.test_loop import assert_same

TOY = "tests/engine/toy_train.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
CPU = World(0, 1, 0, torch.device("cpu"))


def steps_in_log(path: Path) -> bool:
    return path.exists() and "step 2/" in path.read_text()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    """Gradients of 2 x 4 samples, accumulated twice with no_sync, are those of 8 samples accumulated twice."""
    arguments = ["--output", str(tmp_path), "--plain", "--accumulation", "2"]
    assert join(fork(toy_train.main, arguments, 2)) == [0, 0]
    _, joined = toy_train.run(None, CPU, batch_size=8, accumulation=2, noisy=False, clip_grad=1.0)
    shared = checkpoint.load(tmp_path / "ckpt_epoch_1.pth")
    assert shared["world_size"] == 2
    assert shared["step"] == 4
    assert not any(name.startswith("module.") for name in shared["model"])
    for name, tensor in joined.student.state_dict().items():
        torch.testing.assert_close(shared["model"][name], tensor, atol=1e-6, rtol=1e-5)


def test_stopped_in_one_process_both_save_and_the_rerun_is_bit_equal(tmp_path):
    """SIGUSR1 reaches process 1 only; both stop after the same step. Then the same command goes on to the end."""
    arguments = ["--epochs", "3", "--accumulation", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert join(fork(toy_train.main, ["--output", str(whole), *arguments], 2)) == [0, 0]

    processes = fork(toy_train.main, ["--output", str(cut), "--sleep-s", "0.02", *arguments], 2)
    wait_for(lambda: steps_in_log(cut / "log_rank1.txt"), "step 2")
    os.kill(processes[1].pid, signal.SIGUSR1)
    assert join(processes) == [128 + signal.SIGUSR1] * 2
    stops = [(cut / f"log_rank{rank}.txt").read_text().splitlines()[-1] for rank in (0, 1)]
    places = [re.search(r"stopped by SIGUSR1 in epoch (\d+) after step (\d+)", stop).groups() for stop in stops]
    assert places[0] == places[1]
    epoch, step = places[0]
    assert checkpoint.newest(cut).name == f"ckpt_epoch_{epoch}_step_{step}.pth"

    assert join(fork(toy_train.main, ["--output", str(cut), *arguments], 2)) == [0, 0]
    first, second = (checkpoint.load(folder / "ckpt_epoch_2.pth") for folder in (whole, cut))
    assert_same(first, second)
    assert torch.equal(first["rng"][1]["torch"], second["rng"][1]["torch"])


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(tmp_path):
    process = torchrun(TOY, ["--output", str(tmp_path), "--epochs", "9", "--sleep-s", "0.03"])
    wait_for(lambda: steps_in_log(tmp_path / "log_rank0.txt"), "step 2")
    process.terminate()
    assert finish(process)[0] != 0
    assert re.fullmatch(r"ckpt_epoch_\d_step_\d+\.pth", checkpoint.newest(tmp_path).name)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sigterm_during_validation_saves_what_was_before_it(tmp_path, num_processes):
    arguments = ["--output", str(tmp_path), "--epochs", "1", "--validate-s", "60"]
    processes = fork(toy_train.main, arguments, num_processes)
    wait_for(lambda: all((tmp_path / f"validating_{r}").exists() for r in range(num_processes)), "validation")
    for process in processes:
        process.terminate()
    assert join(processes, timeout_s=30) == [143] * num_processes
    saved = checkpoint.load(checkpoint.newest(tmp_path))
    assert (saved["step"], saved["samples"], saved["epoch_complete"]) == (8 // num_processes, 32, False)


def test_one_program_exits_with_the_signals_code(tmp_path):
    process = start([sys.executable, TOY, "--output", str(tmp_path), "--epochs", "9", "--sleep-s", "0.03"])
    wait_for(lambda: steps_in_log(tmp_path / "log_rank0.txt"), "step 2")
    process.send_signal(signal.SIGTERM)
    code, _, stderr = finish(process)
    assert code == 143
    assert re.fullmatch(r"stopped by SIGTERM in epoch \d after step \d+; saved .*\n", stderr)


def test_resume_with_fewer_processes_uses_each_sample_once(tmp_path):
    """Two processes use 3 x 8 of 32 samples; one process goes on with the last 8 in two batches of 4."""
    assert join(fork(toy_train.main, ["--output", str(tmp_path), "--max-steps", "3"], 2)) == [0, 0]
    saved = checkpoint.load(tmp_path / "ckpt_epoch_0_step_3.pth")
    assert (saved["samples"], saved["world_size"], len(saved["rng"])) == (24, 2, 2)
    states = []
    for _ in range(2):
        result, model = toy_train.run(None, CPU, epochs=1, resume=tmp_path / "ckpt_epoch_0_step_3.pth")
        assert result.position == checkpoint.Position(1, 5, 0)
        states.append(model.state_dict())
    for name, tensor in states[0].items():  # the new random numbers are the same each time
        assert torch.equal(tensor, states[1][name])


def kill_arguments(output: Path) -> list[str]:
    return ["--output", str(output), "--epochs", "3", "--save-steps", "1", "--sleep-s", "0.002"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_it_ends_bit_equal(tmp_path, seed):
    moments = random.Random(seed)
    kills = 0
    for attempt in range(60):
        (process,) = fork(toy_train.main, kill_arguments(tmp_path / "cut"))
        process.join(moments.uniform(0.02, 0.25 + 0.05 * attempt))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode == 0:
            break
        else:
            pytest.fail(f"exit code {process.exitcode} after {kills} kills")
    assert kills > 0
    toy_train.main(kill_arguments(tmp_path / "cut"))  # finds the run finished
    # In a child as well: the number of threads, which a fork may change, decides the last bits of a sum.
    (process,) = fork(toy_train.main, kill_arguments(tmp_path / "whole"))
    process.join()
    assert process.exitcode == 0
    first, second = (checkpoint.load(tmp_path / name / "ckpt_epoch_2.pth") for name in ("whole", "cut"))
    assert_same(first, second)
    assert not list((tmp_path / "cut").glob(".*.tmp"))


@pytest.mark.slow
def test_two_machines_meet_on_the_loopback_address(tmp_path):
    """The launcher with NNODES=2, twice, one process each."""
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f'SCRIPT={TOY}\nFLAGS="OUTPUT:--output"\n. "{ROOT}/scripts/launch.sh"\n')
    output = tmp_path / "out"
    knobs = [f"OUTPUT={output}", "NNODES=2", "GPUS=1", "DEVICE=cpu", f"RDZV_ENDPOINT=127.0.0.1:{free_port()}"]
    knobs += [f"PYTHON={sys.executable}", "--plain"]
    nodes = [
        subprocess.Popen(
            ["bash", str(launcher), f"NODE_RANK={rank}", *knobs],
            cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for node in nodes:
        code, _, stderr = finish(node)
        assert code == 0, stderr
    _, joined = toy_train.run(None, CPU, batch_size=8, noisy=False, clip_grad=1.0)
    shared = checkpoint.load(output / "ckpt_epoch_1.pth")
    assert shared["world_size"] == 2
    for name, tensor in joined.student.state_dict().items():
        torch.testing.assert_close(shared["model"][name], tensor, atol=1e-6, rtol=1e-5)
