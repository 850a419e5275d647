"""The store of teacher embeddings: reading it. `embedding_format` says what lies on disk, `embedding_writer` writes.

Letters: `B` images, `C` channels, `H W` rows and columns of the embedding grid.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.engine import batch
from sam3.engine.embedding_format import (
    DTYPES,
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
from sam3.engine.prefetch import ReusedMemory

__all__ = [
    "EmbeddingBatch",
    "EmbeddingReader",
    "RecordLayout",
    "Shard",
    "list_shards",
    "meta_differences",
    "plan",
    "read_meta",
    "store_meta",
]

logger = logging.getLogger(__name__)


@dataclass
class EmbeddingBatch:
    """Embeddings as they are stored.

    data: `(B, C, H, W)` float16 or int8; scales: `(B, C)` float32 for int8, else None; seeds: `(B,)` int64.
    """

    data: Tensor
    seeds: Tensor
    scales: Tensor | None = None

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The embeddings `(B, C, H, W)` as `dtype`, computed where `data` lies."""
        if self.scales is None:
            return self.data.to(dtype)
        return (self.data.float() * self.scales[:, :, None, None]).to(dtype)

    def pin_memory(self) -> EmbeddingBatch:
        """A copy in page-locked memory; a DataLoader calls this."""
        return batch.pin(self)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice) -> EmbeddingBatch:
        scales = None if self.scales is None else self.scales[rows]
        return EmbeddingBatch(self.data[rows], self.seeds[rows], scales)


class EmbeddingReader:
    """Random access to a store by key. Safe to use before and after a fork, and cheap to pickle to spawned workers.

    folder: the store. shape, dtype: needed only where there is no `meta.json`.
    expect: fields that the store's meta must have; a ValueError names those that differ.
    verify_crc: compare each record read with its checksum. write_command: named in the message about a missing key.
    Raises FileNotFoundError if the folder holds no shard, ValueError naming the shard if its files disagree.
    """

    def __init__(
        self,
        folder: str | Path,
        shape: Sequence[int] | None = None,
        dtype: str = "float16",
        expect: Mapping[str, Any] | None = None,
        verify_crc: bool = False,
        write_command: str = "bash stage1/scripts/save_stage1_embeddings.sh",
    ) -> None:
        self.folder = Path(folder)
        self.verify_crc = verify_crc
        self.write_command = write_command
        self.meta = read_meta(self.folder)
        self.layout = self._agree(shape, dtype, expect)
        self.shards = list_shards(self.folder)
        if not self.shards:
            raise FileNotFoundError(f"no embedding shards in {self.folder}; write them with {write_command}")
        self._check_shards()
        self._open()

    def _agree(self, shape: Sequence[int] | None, dtype: str, expect: Mapping[str, Any] | None) -> RecordLayout:
        expect = dict(expect or {})
        if self.meta is None:
            shape = shape or expect.get("shape")
            if shape is None:
                raise ValueError(f"{self.folder} has no {META_FILE}; state the shape (C, H, W) of its records")
            logger.warning("%s has no %s: its shape is taken as given, its teacher is unknown", self.folder, META_FILE)
            return RecordLayout(tuple(shape), expect.get("dtype", dtype))
        if shape is not None:
            expect["shape"] = list(shape)
        if differences := meta_differences(self.meta, expect):
            raise ValueError(
                f"the embeddings in {self.folder} were written for another run ({'; '.join(differences)}); "
                f"change the config or export again with {self.write_command}"
            )
        return RecordLayout.from_meta(self.meta)

    def _check_shards(self) -> None:
        for shard in self.shards:
            for path in (shard.keys_path, shard.values_path):
                if not path.exists():
                    raise ValueError(
                        f"shard {shard.name} in {self.folder} has no {path.name}; restore or remove the shard"
                    )
        if self.verify_crc and (lacking := [s.crc_path.name for s in self.shards if not s.crc_path.exists()]):
            raise ValueError(
                f"{self.folder} has no {', '.join(lacking)}, so its records cannot be checked; turn the check off"
            )

    def _open(self) -> None:
        self._index = KeyIndex.open(self.folder, self.shards, self.layout.record_bytes, self._read_keys)
        self._handles: dict[int, int] = {}
        self._crcs: dict[int, np.ndarray] = {}
        self._seek_lock = threading.Lock()

    def _read_keys(self, shard: Shard) -> list[bytes]:
        keys = shard.read_keys(open_end=self.meta is None)
        size, record = shard.values_path.stat().st_size, self.layout.record_bytes
        if size != len(keys) * record:
            raise ValueError(
                f"{shard.values_path} has {size} bytes = {size / record:.2f} records of {record}, but "
                f"{shard.keys_path.name} names {len(keys)}; run the export again to repair it, or restore the shard"
            )
        return keys

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_index", "_handles", "_crcs", "_seek_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def close(self) -> None:
        """Close the shards' files; they open again on the next read."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __len__(self) -> int:
        """Number of different keys."""
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return self._index.find(key) is not None

    def keys(self) -> list[str]:
        """All keys, sorted by their bytes."""
        return self._index.keys()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have no record."""
        return self._index.missing(list(keys))

    def allocate(self, count: int, memory: ReusedMemory | None = None, pin: bool = False) -> EmbeddingBatch:
        """Room for `count` records: new, from `memory`, or page-locked for CUDA (where torch itself reuses it)."""
        shape, dtype = (count, *self.layout.shape), DTYPES[self.layout.dtype]
        if pin or count == 0:
            data = torch.empty(shape, dtype=dtype, pin_memory=pin)
        else:
            data = (memory or ReusedMemory()).take(count * self.layout.data_bytes).view(dtype).view(shape)
        scales = torch.empty(shape[:2], pin_memory=pin) if self.layout.scale_bytes else None
        return EmbeddingBatch(data, torch.empty(count, dtype=torch.int64, pin_memory=pin), scales)

    def read(self, key: str) -> tuple[Tensor, int]:
        """The embedding of `key` as float32 `(C, H, W)`, and its seed."""
        record = self.read_batch([key])
        return record.values()[0], int(record.seeds[0])

    def read_batch(self, keys: Sequence[str], out: EmbeddingBatch | None = None) -> EmbeddingBatch:
        """Records of `keys`, in that order, read in the order of the disk into `out` (or new memory)."""
        out = self.allocate(len(keys)) if out is None else out
        if len(out) != len(keys):
            raise ValueError(f"room for {len(out)} embeddings, but {len(keys)} keys")
        places = [self._find(key) for key in keys]
        for row in sorted(range(len(keys)), key=places.__getitem__):
            scales = None if out.scales is None else out.scales[row]
            out.seeds[row] = self._read_at(keys[row], places[row], out.data[row], scales)
        return out

    def read_into(self, key: str, out: Tensor, scales: Tensor | None = None) -> int:
        """Copy the record of `key` straight into `out` and return its seed.

        out: contiguous CPU tensor `(C, H, W)` of the store's dtype; scales: float32 `(C,)`, for int8 stores only.
        """
        return self._read_at(key, self._find(key), out, scales)

    def read_seeds(self, keys: Sequence[str]) -> Tensor:
        """Only the seeds of `keys`, int64 `(B,)`."""
        seed = bytearray(SEED.size)
        seeds = []
        for key in keys:
            shard, line = self._find(key)
            self._read_exactly(shard, [memoryview(seed)], line * self.layout.record_bytes)
            seeds.append(SEED.unpack(seed)[0])
        return torch.tensor(seeds, dtype=torch.int64)

    def announce(self, keys: Sequence[str]) -> None:
        """Ask the system to have the records of `keys` in memory soon, without waiting for them."""
        if hasattr(os, "posix_fadvise"):
            record = self.layout.record_bytes
            for shard, line in sorted(map(self._find, keys)):
                os.posix_fadvise(self._handle(shard), line * record, record, os.POSIX_FADV_WILLNEED)

    def _find(self, key: str) -> tuple[int, int]:
        place = self._index.find(key)
        if place is None:
            raise ValueError(f"no teacher embedding for {key!r} in {self.folder}; write them with {self.write_command}")
        return place

    def _read_at(self, key: str, place: tuple[int, int], out: Tensor, scales: Tensor | None) -> int:
        shard, line = place
        layout = self.layout
        seed = bytearray(SEED.size)
        parts = [memoryview(seed)]
        if layout.scale_bytes:
            if scales is None:
                raise ValueError("an int8 store needs room for its scales, float32 (C,)")
            parts.append(_byte_view(scales, layout.shape[:1], torch.float32))
        parts.append(_byte_view(out, layout.shape, DTYPES[layout.dtype]))
        self._read_exactly(shard, parts, line * layout.record_bytes)
        if self.verify_crc and record_crc(parts) != self._shard_crcs(shard)[line]:
            raise ValueError(
                f"record {line} ({key!r}) of {self.shards[shard].values_path} does not match its checksum; "
                f"remove the shard's three files and export again with {self.write_command}"
            )
        return SEED.unpack(seed)[0]

    def _shard_crcs(self, shard: int) -> np.ndarray:
        if shard not in self._crcs:
            crcs = self.shards[shard].read_crcs()
            records = self.shards[shard].values_path.stat().st_size // self.layout.record_bytes
            if len(crcs) < records:
                raise ValueError(f"{self.shards[shard].crc_path} holds {len(crcs)} checksums for {records} records")
            self._crcs[shard] = crcs
        return self._crcs[shard]

    def _handle(self, shard: int) -> int:
        if shard not in self._handles:
            self._handles[shard] = os.open(self.shards[shard].values_path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return self._handles[shard]

    def _read_exactly(self, shard: int, parts: Sequence[memoryview], offset: int) -> None:
        """Scatter the bytes from `offset` on over `parts`. Positioned reads share no file offset between processes."""
        handle, rest = self._handle(shard), list(parts)
        while rest:
            count = self._read_some(handle, rest, offset)
            if count == 0:
                raise ValueError(f"{self.shards[shard].values_path} ends at byte {offset}, in the middle of a record")
            offset += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]

    def _read_some(self, handle: int, parts: list[memoryview], offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(handle, parts, offset)
        with self._seek_lock, open(handle, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            return file.readinto(parts[0])


def _byte_view(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> memoryview:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device.type != "cpu":
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"a record reads into a CPU tensor {dtype} {tuple(shape)}, not {found}")
    if not tensor.is_contiguous():
        raise ValueError("a record reads into a contiguous tensor only")
    return memoryview(tensor.detach().numpy()).cast("B")
