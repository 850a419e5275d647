"""The store of teacher embeddings: what lies on disk, and the reader.

A folder of shards, one per exporting rank, and one description:

    rank<r>-keys.txt     one key a line, UTF-8; line i names record i
    rank<r>-values.bin   fixed-size records back to back, no header
    rank<r>-crc32.bin    one little-endian uint32 per record, over the whole record
    meta.json            shape, dtype, and whatever else must not change between writer and reader

A record is an int32 augmentation seed, then the embedding `(C, H, W)` in C order, all little-endian:
`float16` (4 + 2 C H W bytes), or `int8` with one float32 scale per channel before it (4 + 4 C + C H W bytes).
Stores of the plain format, without the checksums and the description, are read too: with a warning and a given shape.

Letters: `B` images, `C` channels, `H W` rows and columns of the embedding grid.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.engine import batch
from sam3.engine.embedding_index import KeyIndex
from sam3.engine.prefetch import ReusedMemory

META_FILE = "meta.json"
DTYPES = {"float16": torch.float16, "int8": torch.int8}
SEED = struct.Struct("<i")
CRC_BYTES = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordLayout:
    """Where things lie in one record. shape: `(C, H, W)`; dtype: `float16` or `int8`."""

    shape: tuple[int, int, int]
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or not all(isinstance(side, int) and side > 0 for side in self.shape):
            raise ValueError(f"embedding shape {self.shape!r} must be three positive integers (C, H, W)")
        if self.dtype not in DTYPES:
            raise ValueError(f"embedding dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> RecordLayout:
        """The layout that `meta["shape"]` and `meta["dtype"]` (default float16) state."""
        if "shape" not in meta:
            raise ValueError(f"store meta states no shape; it has the fields {sorted(meta)}")
        return cls(tuple(meta["shape"]), meta.get("dtype", "float16"))

    @property
    def scale_bytes(self) -> int:
        return 4 * self.shape[0] if self.dtype == "int8" else 0

    @property
    def data_bytes(self) -> int:
        channels, height, width = self.shape
        return channels * height * width * DTYPES[self.dtype].itemsize

    @property
    def record_bytes(self) -> int:
        return SEED.size + self.scale_bytes + self.data_bytes


def store_meta(shape: Sequence[int], dtype: str = "float16", **fields: Any) -> dict[str, Any]:
    """A store's description as plain JSON values; `fields` are what else reader and writer must agree on."""
    meta = {"shape": list(shape), "dtype": dtype, **fields}
    RecordLayout.from_meta(meta)
    return json.loads(json.dumps(meta))


def plan(num_images: int, meta: Mapping[str, Any]) -> int:
    """Bytes that a store of `num_images` records takes: records, checksums and about 16 bytes a key."""
    return num_images * (RecordLayout.from_meta(meta).record_bytes + CRC_BYTES + 16)


def read_meta(folder: str | Path) -> dict[str, Any] | None:
    """What `meta.json` in `folder` states; None if there is no such file. ValueError if it is damaged."""
    path = Path(folder) / META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); restore it, or move the store away and export again"
        ) from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} holds a {type(meta).__name__}, wanted a JSON object")
    return meta


def meta_differences(found: Mapping[str, Any], wanted: Mapping[str, Any], exact: bool = False) -> list[str]:
    """`["preprocess.resize: found 'square', wanted 'pad'", ...]` for the fields in which `found` differs.

    Fields that only `found` has are passed over, unless `exact`.
    """
    found, wanted = _flatten(found), _flatten(json.loads(json.dumps(wanted)))
    names = [*wanted, *(name for name in found if exact and name not in wanted)]
    return [
        f"{name}: found {found.get(name, 'nothing')!r}, wanted {wanted.get(name, 'nothing')!r}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@dataclass(frozen=True)
class Shard:
    """The three files of one exporting rank."""

    folder: Path
    name: str

    @property
    def keys_path(self) -> Path:
        return self.folder / f"{self.name}-keys.txt"

    @property
    def values_path(self) -> Path:
        return self.folder / f"{self.name}-values.bin"

    @property
    def crc_path(self) -> Path:
        return self.folder / f"{self.name}-crc32.bin"

    def read_keys(self, open_end: bool = False) -> list[bytes]:
        """Its keys in file order. A last line without newline is half written: dropped, unless `open_end`."""
        lines = self.keys_path.read_bytes().split(b"\n")
        return lines if open_end and lines[-1] else lines[:-1]

    def read_crcs(self) -> np.ndarray:
        """Its checksums, uint32."""
        return np.fromfile(self.crc_path, dtype="<u4")


def list_shards(folder: str | Path) -> list[Shard]:
    """All shards in `folder`, ordered by the number in their names."""
    folder = Path(folder)
    names = {re.sub(r"-(keys\.txt|values\.bin)$", "", path.name) for path in folder.glob("*-keys.txt")}
    names |= {path.name.removesuffix("-values.bin") for path in folder.glob("*-values.bin")}
    return [Shard(folder, name) for name in sorted(names, key=_numbers_first)]


def _numbers_first(name: str) -> tuple[int, str]:
    digits = re.search(r"\d+", name)
    return (int(digits.group()) if digits else 1 << 62, name)


def record_crc(parts: Iterable[memoryview | bytes]) -> int:
    """CRC-32 over a record given in pieces."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


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
