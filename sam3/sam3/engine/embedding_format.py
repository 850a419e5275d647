"""What lies on disk in a store of embeddings.

A folder of shards, one per exporting rank, and one description:

    rank<r>-keys.txt     one key a line, UTF-8; line i names record i
    rank<r>-values.bin   fixed-size records back to back, no header
    rank<r>-crc32.bin    one little-endian uint32 per record, over the whole record
    meta.json            shape, dtype, and whatever else must not change between writer and reader

A record is an int32 augmentation seed, then the embedding `(C, H, W)` in C order, all little-endian:
`float16` (4 + 2 C H W bytes), or `int8` with one float32 scale per channel before it (4 + 4 C + C H W bytes).
Stores of the plain format, without the checksums and the description, are read too: with a warning and a given shape.

Letters: `C` channels, `H W` rows and columns of the embedding grid.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    from isal.isal_zlib import crc32  # the same checksum, about six times as fast as zlib's
except ImportError:
    from zlib import crc32

META_FILE = "meta.json"
DTYPES = {"float16": torch.float16, "int8": torch.int8}
SEED = struct.Struct("<i")
CRC_BYTES = 4


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
        crc = crc32(part, crc)
    return crc
