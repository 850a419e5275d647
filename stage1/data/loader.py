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
from torch.utils.data import DataLoader, Dataset, Sampler

from sam3.engine.files import human_bytes
from sam3.engine.prefetch import ReusedMemory, prefetch
from stage1.data.dataset import Stage1Batch, Stage1Dataset

SHARED_MEMORY = Path("/dev/shm")

logger = logging.getLogger("sam3.stage1")


class _Messenger(Dataset):
    """Hands a worker's error over as it is; a DataLoader would wrap it in pages of text about the worker."""

    def __init__(self, dataset: Stage1Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Stage1Batch | Exception:
        try:
            return self.dataset.__getitems__(indices)
        except (ValueError, OSError) as error:
            return error.with_traceback(None)


class Stage1Loader:
    """Iterates over complete batches; each `iter` is one pass of the sampler, from where it stands."""

    def __init__(self, dataset: Stage1Dataset, pictures: DataLoader[Stage1Batch], device: torch.device) -> None:
        self.dataset, self.pictures, self.device = dataset, pictures, device
        self._memory = ReusedMemory()
        self._left_out: set[str] = set()

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Stage1Batch]:
        pictures = iter(self.pictures)  # here, so that workers start from the caller's thread
        batches = self._complete(pictures)
        if self.dataset.store is None or self.pictures.num_workers == 0:
            return batches
        return prefetch(batches, setup=self._enter_device if self.pictures.pin_memory else None)

    def _complete(self, pictures: Iterator[Stage1Batch | Exception]) -> Iterator[Stage1Batch]:
        pin = self.pictures.pin_memory
        for batch in pictures:
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    del batch  # a cycle of exception and frame would keep the workers; see `prefetch`
            self._report(batch)
            yield self.dataset.read_embeddings(batch, None if pin else self._memory, pin)
            del batch  # else it would be held while the next one is made

    def _report(self, batch: Stage1Batch) -> None:
        """A line in the log for each picture that is left out, once."""
        for key, reason in batch.skipped:
            if key not in self._left_out:
                self._left_out.add(key)
                logger.warning(f"left out (picture {len(self._left_out)} that cannot be read): {reason}")

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
        _Messenger(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # else each epoch would draw from the global one
        **workers,
    )
    return Stage1Loader(dataset, pictures, device)


def _as_it_is(batch: Any) -> Any:
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
