"""Workers that prepare pictures and a thread that reads embeddings, while the device computes.

A stage gives a dataset that loads whole batches; see `PictureDataset` and `PictureBatch` for what it must have.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from yacs.config import CfgNode

from sam3.engine import distributed
from sam3.engine.distributed import World
from sam3.engine.embeddings import EmbeddingBatch, EmbeddingReader
from sam3.engine.files import human_bytes
from sam3.engine.prefetch import ReusedMemory, prefetch
from sam3.engine.sampler import EpochSampler
from sam3.transforms import Preprocess

SHARED_MEMORY = Path("/dev/shm")

logger = logging.getLogger("sam3.loader")


class PictureBatch(Protocol):
    """A dataclass of tensors, and of what the loader looks at.

    keys: of the pictures it holds; their number is its length. embeddings: what the teacher stored for them, or None.
    skipped: (key, reason) of pictures that were asked for but cannot be used.
    """

    keys: list[str]
    embeddings: EmbeddingBatch | None
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def pin_memory(self) -> PictureBatch:
        """A copy in page-locked memory: `return batch.pin(self)`."""


Batch = TypeVar("Batch", bound=PictureBatch)


class PictureDataset(Protocol[Batch]):
    """Pictures in batches. store: the teacher's embeddings, or None. preprocess: gives the size of a picture."""

    store: EmbeddingReader | None
    preprocess: Preprocess

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int], epoch: int) -> Batch:
        """The batch of pictures `indices` as epoch `epoch` (0, 1, ...) shows them, still without embeddings.

        Runs in a worker. What is random in it may depend on the epoch and the pictures, not on the worker.
        """

    def read_embeddings(self, batch: Batch, memory: ReusedMemory | None, pin: bool) -> Batch:
        """`batch` with its embeddings, if there is a store. memory, pin: where to put them. Not in a worker."""


class _Announced(Sampler[tuple[int, list[int]]]):
    """Lists of indices, each with its epoch: workers that outlive an epoch would not hear of the next otherwise."""

    def __init__(self, batches: EpochSampler) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch = self.batches.epoch  # the sampler may be sent on while these are under way
        for indices in self.batches:
            yield epoch, indices


class _Messenger(Dataset):
    """Hands a worker's error over as it is; a DataLoader would wrap it in pages of text about the worker."""

    def __init__(self, dataset: PictureDataset[Batch]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, order: tuple[int, list[int]]) -> Batch | Exception:
        epoch, indices = order
        try:
            return self.dataset.load(indices, epoch)
        except (ValueError, OSError) as error:
            return error.with_traceback(None)


class PictureLoader(Generic[Batch]):
    """Iterates over complete batches; each `iter` is one pass of the sampler, from where it stands."""

    def __init__(self, dataset: PictureDataset[Batch], pictures: DataLoader, device: torch.device) -> None:
        self.dataset, self.pictures, self.device = dataset, pictures, device
        self._memory = ReusedMemory()
        self._left_out: set[str] = set()

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Batch]:
        with _signals_held_back():
            pictures = iter(self.pictures)  # here, so that workers start from the caller's thread
        batches = self._complete(pictures)
        if self.dataset.store is None or self.pictures.num_workers == 0:
            return batches
        return prefetch(batches, setup=self._enter_device if self.pictures.pin_memory else None)

    def _complete(self, pictures: Iterator[Batch | Exception]) -> Iterator[Batch]:
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

    def _report(self, batch: Batch) -> None:
        """A line in the log for each picture that is left out, once."""
        for key, reason in batch.skipped:
            if key not in self._left_out:
                self._left_out.add(key)
                logger.warning(f"left out (picture {len(self._left_out)} that cannot be used): {reason}")

    def _enter_device(self) -> None:
        torch.cuda.set_device(self.device)  # page-locking in a new thread would wake GPU 0 otherwise


def build_loader(
    dataset: PictureDataset[Batch],
    batches: EpochSampler,
    num_workers: int,
    device: torch.device | str = "cpu",
    pin_memory: bool = True,
    prefetch_factor: int = 2,
    start_method: str | None = None,
) -> PictureLoader[Batch]:
    """A loader of what `dataset.load` gives for each list of indices that `batches` yields, with its epoch.

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
        batch_sampler=_Announced(batches),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # else each epoch would draw from the global one
        **workers,
    )
    return PictureLoader(dataset, pictures, device)


# From the shared config keys ------------------------------------------------------------------------------------------


def train_sampler(config: CfgNode, num_samples: int, world: World) -> EpochSampler:
    """Shuffled batches of DATA.BATCH_SIZE; in a launcher's dry run, one process's share of the real run."""
    return EpochSampler(
        num_samples,
        config.DATA.BATCH_SIZE,
        rank=world.rank,
        world_size=distributed.planned_world_size(),
        seed=config.SEED,
    )


def once_sampler(num_samples: int, batch_size: int, world: World) -> EpochSampler:
    """Each sample once over all processes and in order, for validation and export."""
    return EpochSampler(
        num_samples,
        batch_size,
        rank=world.rank,
        world_size=world.size,
        shuffle=False,
        drop_last=False,
        padding=False,
    )


def loader_from_config(
    config: CfgNode, dataset: PictureDataset, batches: EpochSampler, device: torch.device
) -> PictureLoader:
    """`build_loader` with the config's DATA keys."""
    data = config.DATA
    return build_loader(dataset, batches, data.NUM_WORKERS, device, data.PIN_MEMORY, data.PREFETCH_FACTOR)


# In the workers -------------------------------------------------------------------------------------------------------


def _as_it_is(batch: Any) -> Any:
    return batch


# Terminals, torchrun and schedulers signal the whole process group, but it is for the main process to decide: it may
# need more batches, and time to save, and ends its workers itself.
IGNORED_IN_WORKERS = {getattr(signal, name) for name in ("SIGINT", "SIGUSR1") if hasattr(signal, name)}


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started inside get no signal of the group before `_start_worker` has said what becomes of it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *IGNORED_IN_WORKERS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for number in IGNORED_IN_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_IN_WORKERS)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_word, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_at_parents_word() -> None:
    """Obey SIGTERM from the parent only."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        logger.debug("left a SIGTERM to the main process")
    os._exit(0)


def _warn_if_shared_memory_is_small(dataset: PictureDataset[Batch], batches: EpochSampler, num_batches: int) -> None:
    """Containers often get 64 MB of it; running out ends a worker with a bus error and no explanation."""
    if not SHARED_MEMORY.is_dir():
        return
    needed = num_batches * batches.batch_size * 3 * dataset.preprocess.img_size**2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        logger.warning(
            "the loader may hold %s in %s, where %s are free; lower DATA.NUM_WORKERS or DATA.BATCH_SIZE, or give the "
            "container more (docker run --shm-size)",
            human_bytes(needed), SHARED_MEMORY, human_bytes(free),
        )  # fmt: skip
