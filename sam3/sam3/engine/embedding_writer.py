"""Writing the embedding store so that a kill at any moment costs at most the records in flight.

Per record the values are written first, then the checksum, then the key line: a key never names missing bytes.
A start repairs what a kill left half written, skips what any shard already holds, and appends.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.engine.embedding_format import (
    CRC_BYTES,
    META_FILE,
    SEED,
    RecordLayout,
    Shard,
    list_shards,
    meta_differences,
    plan,
    read_meta,
    record_crc,
    store_meta,
)
from sam3.engine.embedding_index import KeyIndex
from sam3.engine.files import fsync, human_bytes, require_free_space, write_json
from sam3.engine.locks import FileLock

MAX_SEED = 2**31
MAX_QUEUE_BYTES = 512 << 20
SYNC_BYTES = 256 << 20

logger = logging.getLogger(__name__)


@dataclass
class _Record:
    key: str
    parts: list[memoryview | bytes]
    crc: Future[int]


class EmbeddingWriter:
    """Appends embeddings to shard `rank<rank>` of a store. A context manager; `close` leaves everything on disk.

    meta: from `store_meta`; a store begun with other fields is refused, naming them.
    With several ranks: build the writer on all of them, wait for each other, ask `pending`, wait, then add. Each rank
    also repairs the shards that a run with more ranks left behind.

    One background thread writes, fed by a queue of at most `max_queue_bytes`; its errors reach the next call made
    here. Files are pushed to the device every `sync_bytes`, while writing goes on, and on `flush` and `close`.
    Raises ValueError if another process writes this shard, OSError if the folder cannot be written to or fills up.
    """

    def __init__(
        self,
        folder: str | Path,
        meta: dict[str, Any],
        rank: int = 0,
        world_size: int = 1,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        sync_bytes: int = SYNC_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.meta = store_meta(**meta)
        self.layout = RecordLayout.from_meta(self.meta)
        self.sync_bytes = sync_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        shard = Shard(self.folder, f"rank{rank}")
        self._lock = FileLock(self.folder / f".{shard.name}.lock", f"writing {shard.keys_path}")
        try:
            self._claim_meta()
            for other in list_shards(self.folder):
                number = other.name.removeprefix("rank")
                if number.isdigit() and int(number) >= world_size and int(number) % world_size == rank:
                    with FileLock(self.folder / f".{other.name}.lock", f"repairing {other.keys_path}"):
                        ShardFiles(other, self.layout).close()
            self._files = ShardFiles(shard, self.layout)
            fsync(self.folder)  # makes the names of new files durable
        except BaseException:
            self._lock.release()
            raise
        self.resumed = self._files.count
        self._known: KeyIndex | None = None
        self._added: set[str] = set()
        self._error: BaseException | None = None
        self._closed = False
        self._queue: queue.Queue[_Record | None] = queue.Queue(max(1, max_queue_bytes // self.layout.record_bytes))
        self._checksums = ThreadPoolExecutor(2, thread_name_prefix="embedding-crc")
        self._syncs = ThreadPoolExecutor(1, thread_name_prefix="embedding-sync")
        self._thread = threading.Thread(target=self._run, name="embedding-writer", daemon=True)
        self._thread.start()

    def _claim_meta(self) -> None:
        if read_meta(self.folder) is None:
            shards = list_shards(self.folder)
            # Looked at again: another rank may have begun the store in between.
            if read_meta(self.folder) is None:
                if shards:
                    raise ValueError(
                        f"{self.folder} holds {len(shards)} shards but no {META_FILE}, so it is unknown what they were "
                        "written with; choose another folder"
                    )
                write_json(self.folder / META_FILE, self.meta)
        if differences := meta_differences(read_meta(self.folder) or {}, self.meta, exact=True):
            raise ValueError(
                f"the embeddings in {self.folder} were begun by another run ({'; '.join(differences)}); "
                "choose another folder, or remove that one"
            )

    @property
    def written(self) -> int:
        """Records of this shard on disk, those of earlier runs included."""
        return self._files.count

    def pending(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that no shard of the store holds yet, in order."""
        return [key for key in self._known_keys().missing(keys) if key not in self._added]

    def _known_keys(self) -> KeyIndex:
        # Read at the first use, not at the start, so that every rank's repair is over by then.
        if self._known is None:
            shards = list_shards(self.folder)
            self._known = KeyIndex.build(complete_keys(shard, self.layout) for shard in shards)
        return self._known

    def add(self, key: str, seed: int, values: Tensor) -> bool:
        """Store one embedding `(C, H, W)`; False if the store holds the key already."""
        return self.add_batch([key], [seed], values[None]) == 1

    def add_batch(self, keys: Sequence[str], seeds: Sequence[int] | Tensor, values: Tensor) -> int:
        """Queue the embeddings `(B, C, H, W)` of `keys`, floating point on any device; returns how many were new.

        seeds: B integers in [0, 2^31). The caller must not change `values` afterwards. ValueError names the key of
        an embedding that is not finite as stored (float16 ends at 65504); nothing of its batch is written then.
        """
        self._raise_error()
        if self._closed:
            raise ValueError(f"the writer of {self.folder} is closed")
        if tuple(values.shape) != (len(keys), *self.layout.shape) or not values.is_floating_point():
            raise ValueError(
                f"{len(keys)} embeddings come as {values.dtype} {tuple(values.shape)}; the store wants floating-point "
                f"(B, {', '.join(map(str, self.layout.shape))})"
            )
        seeds = [int(seed) for seed in seeds]
        if len(seeds) != len(keys) or not all(0 <= seed < MAX_SEED for seed in seeds):
            raise ValueError(f"{len(keys)} keys need as many seeds in [0, 2^31), found {seeds}")
        new = self._new_rows(keys)
        if not new:
            return 0
        data, scales = _encode(values.detach() if len(new) == len(keys) else values.detach()[new], self.layout)
        if not data.is_cuda:  # on CUDA the check below runs there, faster than the host
            data = data.cpu()
        _require_finite([keys[row] for row in new], data if scales is None else scales)
        data, scales = data.cpu(), None if scales is None else scales.cpu()
        for row, source in enumerate(new):
            parts: list[memoryview | bytes] = [SEED.pack(seeds[source])]
            if scales is not None:
                parts.append(memoryview(scales[row].numpy()).cast("B"))
            parts.append(memoryview(data[row].numpy()).cast("B"))
            self._added.add(keys[source])
            self._queue.put(_Record(keys[source], parts, self._checksums.submit(record_crc, parts)))
        self._raise_error()
        return len(new)

    def _new_rows(self, keys: Sequence[str]) -> list[int]:
        rows = []
        for row, key in enumerate(keys):
            if not key or "\n" in key or "\0" in key:
                raise ValueError(f"{key!r} cannot be a key: it is empty or holds a line break or NUL")
            if key not in self._added and self._known_keys().find(key) is None and key not in keys[:row]:
                rows.append(row)
        return rows

    def flush(self) -> None:
        """Wait until all that was added is on the device. Raises what went wrong in the background."""
        self._queue.join()
        self._raise_error()
        self._files.sync()

    def close(self) -> None:
        """Write what is queued, push it to the device, release the shard. Raises what went wrong in the background."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._checksums.shutdown()
        self._syncs.shutdown()
        try:
            self._raise_error()
            self._files.sync()
        finally:
            self._files.close()
            self._lock.release()

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            logger.exception("closing the embedding store failed as well")  # the first error goes on

    def _raise_error(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, OSError) and self._error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                self._error.errno,
                f"the disk of {self.folder} is full after {self.written} records; they are safe. Free some space and "
                "run the same command again, it goes on from there",
            ) from self._error
        raise self._error

    def _run(self) -> None:
        unsynced, sync = 0, None
        while (record := self._queue.get()) is not None:
            try:
                if self._error is None:  # after an error the queue is only emptied, so that nobody waits for it
                    self._files.append(record.key, record.parts, record.crc)
                    unsynced += self.layout.record_bytes
                    if unsynced >= self.sync_bytes:
                        if sync is not None:
                            sync.result()  # at most two intervals are not yet safe from a power cut
                        unsynced, sync = 0, self._syncs.submit(self._files.sync)
            except BaseException as error:  # raised again in the caller's thread
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()


class ShardFiles:
    """The three files of one shard, open for appending, after removing what a kill left half written."""

    def __init__(self, shard: Shard, layout: RecordLayout) -> None:
        self.shard, self.layout = shard, layout
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        paths = (shard.values_path, shard.crc_path, shard.keys_path)
        self._values, self._crcs, self._keys = (os.open(path, flags, 0o666) for path in paths)
        try:
            self.count = self._repair()
        except BaseException:
            self.close()
            raise

    def _repair(self) -> int:
        """Cut the files back to their last whole record; returns the number of records."""
        keys = self.shard.read_keys()
        sizes = [os.fstat(handle).st_size for handle in (self._values, self._crcs)]
        count = min(len(keys), sizes[0] // self.layout.record_bytes)
        crcs = sizes[1] // CRC_BYTES
        # More than a sync interval lost means that a file was removed or replaced: no reason to throw records away.
        if (count - crcs) * self.layout.record_bytes > 2 * SYNC_BYTES or (count > 0 and crcs == 0):
            raise ValueError(
                f"{self.shard.crc_path} holds {crcs} checksums for {count} records; restore it, or remove the three "
                f"files of shard {self.shard.name} to export them again"
            )
        count = self._drop_damaged_tail(min(count, crcs))
        self._keys_size = sum(len(key) + 1 for key in keys[:count])
        before = (sizes[0], len(keys))
        self._cut(count)
        if before != (count * self.layout.record_bytes, count):
            logger.info(
                "%s: cut back from %s and %d keys to %d whole records",
                self.shard.values_path, human_bytes(before[0]), before[1], count,
            )  # fmt: skip
        return count

    def _drop_damaged_tail(self, count: int) -> int:
        """A power cut may leave the sizes right and blocks empty, among what was not yet synced; checksums tell."""
        crcs, record = self.shard.read_crcs(), self.layout.record_bytes
        first = max(0, count - 1 - 2 * SYNC_BYTES // record)
        with self.shard.values_path.open("rb") as values:
            values.seek(first * record)
            for line in range(first, count):
                if record_crc([values.read(record)]) != crcs[line]:
                    return line
        return count

    def _cut(self, count: int) -> None:
        # The keys go first: were this interrupted, no key would name missing bytes.
        ends = (self._keys_size, count * CRC_BYTES, count * self.layout.record_bytes)
        for handle, end in zip((self._keys, self._crcs, self._values), ends, strict=True):
            if os.fstat(handle).st_size != end:
                os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)

    def append(self, key: str, parts: Sequence[memoryview | bytes], crc: Future[int]) -> None:
        """Write one record; on an error cut the files back to the records before it."""
        line = key.encode() + b"\n"
        try:
            _write_exactly(self._values, parts)
            _write_exactly(self._crcs, [crc.result().to_bytes(CRC_BYTES, "little")])
            _write_exactly(self._keys, [line])
        except BaseException:
            self._cut(self.count)
            raise
        self.count += 1
        self._keys_size += len(line)

    def sync(self) -> None:
        """Values before keys, as they were written."""
        for handle in (self._values, self._crcs, self._keys):
            os.fsync(handle)

    def close(self) -> None:
        for handle in (self._values, self._crcs, self._keys):
            os.close(handle)


def complete_keys(shard: Shard, layout: RecordLayout) -> list[bytes]:
    """Keys of `shard` whose values and checksums are all there, whatever a kill left behind them."""
    if not (shard.keys_path.exists() and shard.values_path.exists() and shard.crc_path.exists()):
        return []
    records = shard.values_path.stat().st_size // layout.record_bytes
    return shard.read_keys()[: min(records, shard.crc_path.stat().st_size // CRC_BYTES)]


def check_free_space(folder: str | Path, num_images: int, meta: dict[str, Any]) -> int:
    """Bytes that `num_images` more records need; OSError naming what is lacking if the disk has fewer free."""
    needed = plan(num_images, meta)
    require_free_space(folder, needed, f"storing {num_images} embeddings")
    return needed


def _encode(values: Tensor, layout: RecordLayout) -> tuple[Tensor, Tensor | None]:
    """`(B, C, H, W)` as stored: float16 and None, or int8 with float32 scales `(B, C)`; on the device of `values`."""
    if layout.dtype == "float16":
        return values.to(torch.float16).contiguous(), None
    values = values.float()
    scales = values.abs().amax((2, 3)) / 127  # (B, C)
    steps = values / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None, None]
    return steps.round().clamp(-127, 127).to(torch.int8).contiguous(), scales.contiguous()


def _require_finite(keys: Sequence[str], values: Tensor) -> None:
    if values.dtype == torch.float16 and values.device.type == "cpu":
        finite = [_is_finite(row.numpy()) for row in values]
    else:
        extremes = torch.stack([torch.stack(torch.aminmax(row)) for row in values])  # (B, 2); NaN passes through
        finite = extremes.isfinite().all(1).tolist()
    for key, good in zip(keys, finite, strict=True):
        if not good:
            raise ValueError(
                f"the embedding of {key!r} holds NaN or Inf, or exceeds what the store can hold; "
                "check the picture and the teacher's weights, or run the teacher in float32"
            )


def _is_finite(values: np.ndarray) -> bool:
    """For float16: infinities and NaN are the largest bit patterns of either sign. Five times as fast as on floats."""
    return int(values.view(np.int16).max()) < 0x7C00 and int(values.view(np.uint16).max()) < 0xFC00


def _write_exactly(handle: int, parts: Sequence[memoryview | bytes]) -> None:
    rest = [memoryview(part) for part in parts]
    while rest:
        count = os.writev(handle, rest) if hasattr(os, "writev") else os.write(handle, rest[0])
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = rest[0][count:]
