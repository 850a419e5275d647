"""Workers that prepare pictures and a thread that reads embeddings, while the device computes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from sam3.engine.files import human_bytes
from sam3.engine.prefetch import ReusedMemory, prefetch
from stage1.data.dataset import Stage1Batch, Stage1Dataset

SHARED_MEMORY = Path("/dev/shm")

logger = logging.getLogger("sam3.stage1")


class Stage1Loader:
    """Iterates over complete batches; each `iter` is one pass of the sampler, from where it stands."""

    def __init__(self, dataset: Stage1Dataset, pictures: DataLoader[Stage1Batch], device: torch.device) -> None:
        self.dataset, self.pictures, self.device = dataset, pictures, device
        self._memory = ReusedMemory()

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Stage1Batch]:
        pictures = iter(self.pictures)  # here, so that workers start from the caller's thread
        if self.dataset.store is None:
            return pictures
        pin = self.pictures.pin_memory
        complete = (self.dataset.read_embeddings(batch, None if pin else self._memory, pin) for batch in pictures)
        if self.pictures.num_workers == 0:
            return complete
        return prefetch(complete, setup=self._enter_device if pin else None)

    def _enter_device(self) -> None:
        torch.cuda.set_device(self.device)  # page-locking in a new thread would wake GPU 0 otherwise


def build_loader(
    dataset: Stage1Dataset,
    batches: Sampler[list[int]],
    num_workers: int,
    device: torch.device | str = "cpu",
    pin_memory: bool = True,
    prefetch_factor: int = 2,
    start_method: str | None = None,
) -> Stage1Loader:
    """A loader of `Stage1Batch`, one for each list of indices that `batches` (an `EpochSampler`) yields.

    num_workers: processes that prepare pictures; a thread here reads the embeddings. 0 does all in the calling thread.
    Workers stay alive between epochs, each has one thread and prepares `prefetch_factor` batches ahead. pin_memory
    acts on CUDA only. start_method: `fork`, `spawn`, ...; None is the platform's own.
    The global random generators are neither used nor changed.
    """
    device = torch.device(device)
    pin = pin_memory and device.type == "cuda"
    if pin and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    workers: dict[str, Any] = {}
    if num_workers > 0:
        workers = {
            "persistent_workers": True,
            "prefetch_factor": prefetch_factor,
            "worker_init_fn": _start_worker,
            "multiprocessing_context": start_method,
        }
        _warn_if_shared_memory_is_small(dataset, batches, num_workers * prefetch_factor)
    pictures = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # else each epoch would draw from the global one
        **workers,
    )
    return Stage1Loader(dataset, pictures, device)


def _as_it_is(batch: Stage1Batch) -> Stage1Batch:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Terminals, torchrun and schedulers signal the whole process group, but it is for the main process to decide:
    # it may need more batches, and time to save, and ends its workers itself.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_word, daemon=True).start()


def _end_at_parents_word() -> None:
    """Obey SIGTERM from the parent only."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        logger.debug("left a SIGTERM to the main process")
    os._exit(0)


def _warn_if_shared_memory_is_small(dataset: Stage1Dataset, batches: Any, num_batches: int) -> None:
    """Containers often get 64 MB of it; running out ends a worker with a bus error and no explanation."""
    batch_size = getattr(batches, "batch_size", None)
    if batch_size is None or not SHARED_MEMORY.is_dir():
        return
    needed = num_batches * batch_size * 3 * dataset.preprocess.img_size**2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        logger.warning(
            "the loader may hold %s in %s, where %s are free; lower DATA.NUM_WORKERS or DATA.BATCH_SIZE, or give the "
            "container more (docker run --shm-size)",
            human_bytes(needed), SHARED_MEMORY, human_bytes(free),
        )  # fmt: skip
