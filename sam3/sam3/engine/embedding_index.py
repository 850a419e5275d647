"""From a key to its place in the embedding store: one sorted table, built once, memory-mapped by every process.

A dict of a million keys takes over 100 MB in each loader worker; this table takes about 20 MB once per machine.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sam3.engine.files import atomic_path

if TYPE_CHECKING:
    from sam3.engine.embedding_format import Shard

logger = logging.getLogger(__name__)


class KeyIndex:
    """Sorted rows (key, shard number, line). Where a key occurs twice, the first shard and line win."""

    def __init__(self, table: np.ndarray) -> None:
        self._table = np.asarray(table)  # plain views: a memmap object takes long over each element
        self._keys, self._shards, self._lines = (self._table[name] for name in ("key", "shard", "line"))

    @classmethod
    def build(cls, keys_of_shards: Iterable[Sequence[bytes]]) -> KeyIndex:
        """keys_of_shards: for each shard, its keys in the order of its records."""
        shards = list(keys_of_shards)
        flat = np.array([key for keys in shards for key in keys] or [b""], dtype=np.bytes_)[: sum(map(len, shards))]
        table = np.empty(len(flat), dtype=[("key", flat.dtype), ("shard", "<u2"), ("line", "<u4")])
        table["key"] = flat
        table["shard"] = np.repeat(np.arange(len(shards)), [len(keys) for keys in shards])
        table["line"] = np.concatenate([np.arange(len(keys)) for keys in shards] or [[]])
        table = table[np.argsort(flat, kind="stable")]
        first = np.ones(len(table), dtype=bool)
        first[1:] = table["key"][1:] != table["key"][:-1]
        return cls(table[first])

    @classmethod
    def open(
        cls, folder: Path, shards: Sequence[Shard], record_bytes: int, read_keys: Callable[[Shard], Sequence[bytes]]
    ) -> KeyIndex:
        """The index of `shards`, from the cache file beside them if it still fits their sizes and times.

        `read_keys` gives a shard's keys after checking them against records of `record_bytes`.
        Several processes may do this at once: the file appears whole, and all of them would write the same.
        Where the folder cannot be written to, the index stays in memory.
        """
        path = folder / f".index-{_fingerprint(shards, record_bytes)}.npy"
        if not path.exists():
            index = cls.build(read_keys(shard) for shard in shards)
            try:
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, index._table)
                _remove_stale(folder, keep=path)
            except OSError as error:
                logger.info("%s: the index is kept in memory, it cannot be cached (%s)", folder, error)
                return index
        return cls(np.load(path, mmap_mode="r"))

    def find(self, key: str) -> tuple[int, int] | None:
        """(shard number, line) of `key`, or None."""
        wanted = key.encode()
        row = bisect.bisect_left(self._keys, wanted)
        if row == len(self._keys) or self._keys[row] != wanted:
            return None
        return int(self._shards[row]), int(self._lines[row])

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that have no row, in the order given; a million take about a second."""
        if not len(self) or not keys:
            return list(keys)
        wanted = np.array([key.encode() for key in keys], dtype=np.bytes_)
        known = np.ascontiguousarray(self._keys)
        rows = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        return [key for key, found in zip(keys, known[rows] == wanted, strict=True) if not found]

    def keys(self) -> list[str]:
        return [key.decode() for key in self._keys]

    def __len__(self) -> int:
        return len(self._table)


def _fingerprint(shards: Sequence[Shard], record_bytes: int) -> str:
    """Changes whenever a shard is added, removed, grown or rewritten, and with the size of a record."""
    digest = hashlib.sha256(f"{record_bytes}\n".encode())
    for shard in shards:
        for path in (shard.keys_path, shard.values_path):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _remove_stale(folder: Path, keep: Path) -> None:
    for path in folder.glob(".index-*.npy"):
        if path != keep:
            path.unlink(missing_ok=True)
