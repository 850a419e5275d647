"""The loader: workers and threads change nothing, hear of epochs, keep memory apart and end when told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from sam3.engine import loader as loader_module
from sam3.engine.loader import build_loader
from sam3.engine.pictures import empty_images
from sam3.engine.sampler import EpochSampler
from tests.engine.toy_pictures import ToyPictures, write_toy_store

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def toy(tmp_path: Path) -> ToyPictures:
    return ToyPictures(6, write_toy_store(tmp_path / "store", 6))


def sampler(count: int = 6, batch_size: int = 2, **options) -> EpochSampler:
    return EpochSampler(count, batch_size, drop_last=False, padding=False, **options)


def numbers(batches) -> list[list[int]]:
    """Picture numbers of each batch; keys, pixels and embeddings must say the same."""
    found = []
    for batch in batches:
        wanted = [int(key.removeprefix("toy_")) for key in batch.keys]
        assert batch.images[:, 0, 0, 0].tolist() == batch.images[:, 2, 7, 7].tolist() == wanted
        assert batch.embeddings.values()[:, 1, 2, 3].tolist() == wanted
        found.append(wanted)
    return found


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_samplers(toy: ToyPictures, workers: int):
    order = sampler(seed=3)
    loader = build_loader(toy, order, workers)
    assert len(loader) == 3
    assert numbers(loader) == list(order)


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_workers_that_stay_hear_of_the_epoch(toy: ToyPictures, workers: int, method: str | None):
    order = sampler()
    loader = build_loader(toy, order, workers, start_method=method)
    processes = set()
    for epoch in (0, 1, 7):
        order.set_position(epoch)
        batches = list(loader)
        assert torch.cat([batch.epochs for batch in batches]).tolist() == [epoch] * 6
        assert numbers(batches) == list(order)
        if workers:
            processes |= {worker.pid for worker in loader.pictures._iterator._workers}
    assert len(processes) == workers  # the same ones in all epochs


def test_an_epoch_under_way_keeps_its_number(toy: ToyPictures):
    order = sampler()
    batches = iter(build_loader(toy, order, 0))
    first = next(batches)
    order.set_position(5)
    assert torch.cat([batch.epochs for batch in (first, *batches)]).tolist() == [0] * 6


def test_the_random_state_is_left(toy: ToyPictures):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    list(build_loader(toy, sampler(), 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_batches_are_not_overwritten(toy: ToyPictures):
    loader = build_loader(toy, sampler(batch_size=1), 2)
    kept = list(loader) + list(loader)
    assert sorted(number for (number,) in numbers(kept)) == sorted([*range(6), *range(6)])


def test_epoch_may_be_left_and_entered_in_the_middle(toy: ToyPictures):
    order = sampler(batch_size=1)
    whole = list(order)
    loader = build_loader(toy, order, 2)
    for batch in loader:
        assert numbers([batch]) == whole[:1]
        break
    order.set_position(0, 4)
    assert numbers(loader) == whole[4:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_as_it_was_raised(toy: ToyPictures, workers: int):
    toy.broken = 3
    with pytest.raises(ValueError, match=r"^picture toy_3 is broken$"):
        list(build_loader(toy, sampler(), workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_left_out_is_reported_once(toy: ToyPictures, workers: int, caplog: pytest.LogCaptureFixture):
    toy.bad = 2
    loader = build_loader(toy, sampler(batch_size=1), workers)
    for _ in range(2):
        assert sorted(map(len, loader)) == [0, 1, 1, 1, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "left out (picture 1 that cannot be used): toy_2 is empty"
    ]


def test_a_missing_embedding_ends_the_workers(tmp_path: Path):
    loader = build_loader(ToyPictures(7, write_toy_store(tmp_path / "store", 6)), sampler(7), 2)
    with pytest.raises(ValueError, match=r"^no teacher embedding for 'toy_6'"):
        list(loader)
    processes = loader.pictures._iterator._workers
    start = time.monotonic()
    del loader  # nothing else holds it, such as the error
    assert not any(process.is_alive() for process in processes)
    assert time.monotonic() - start < 4  # workers that do not hear of it are waited for, 5 s each


def test_small_shared_memory_is_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    usage = loader_module.shutil.disk_usage("/")
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", Path("/"))
    build_loader(ToyPictures(6), sampler(batch_size=4), 2)
    assert "3.07 kB" in caplog.text  # 2 workers x 2 ahead x 4 pictures x 8 x 8 x 3 bytes
    assert "--shm-size" in caplog.text


def test_empty_images_are_zero_and_channels_last():
    images = empty_images(2, 5)
    assert images.shape == (2, 3, 5, 5) and images.dtype == torch.uint8 and not images.any()
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert empty_images(0, 5).shape == (0, 3, 5, 5)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs POSIX signals")
@pytest.mark.parametrize("slow_start", [0.0, 2.0])
def test_workers_outlive_signals_to_the_group_and_obey_the_parent(slow_start):
    """torchrun sends SIGTERM to all processes of a rank; the main one still gets its batches, saves, and ends them.

    slow_start: seconds a worker needs before it can set up its own signals; the group's arrive meanwhile.
    """
    code = textwrap.dedent(f"""
        import signal, time
        from torch.utils.data._utils import signal_handling
        from sam3.engine.loader import build_loader
        from sam3.engine.sampler import EpochSampler
        from tests.engine.toy_pictures import ToyPictures
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *args: None)
        set_handlers = signal_handling._set_worker_signal_handlers
        signal_handling._set_worker_signal_handlers = lambda: (set_handlers(), time.sleep({slow_start}))
        loader = build_loader(ToyPictures(6), EpochSampler(6, 1, drop_last=False), 2)
        batches = iter(loader)
        worker = loader.pictures._iterator._workers[0]
        print("ready", flush=True)
        input()
        print(sum(1 for _ in batches), sum(1 for _ in loader))
        worker.terminate()
        worker.join(20)
        print("ended", worker.exitcode)
    """)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'sam3'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment,
        start_new_session=True,
    ) as run:  # fmt: skip
        assert run.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.killpg(run.pid, number)
        time.sleep(0.5)
        out, err = run.communicate("go on\n", timeout=120)
    assert out.split() == ["6", "6", "ended", "0"], err
    assert "Traceback" not in err
