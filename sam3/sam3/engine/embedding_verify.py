"""Checking an embedding store without any model: sizes, checksums, finite values, duplicates, coverage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sam3.engine.embedding_format import DTYPES, SEED, RecordLayout, Shard, list_shards, read_meta, record_crc
from sam3.engine.files import human_bytes

NUM_SHOWN = 20


@dataclass
class StoreReport:
    """What `verify_store` found. `ok` if there is no problem and no expected key is missing.

    duplicates: keys that a second shard holds too, as the padding of a distributed sampler causes: harmless.
    """

    folder: Path
    num_records: int = 0
    num_keys: int = 0
    num_bytes: int = 0
    num_unchecked: int = 0
    problems: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems and not self.missing

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.num_records} records of {self.num_keys} keys, {human_bytes(self.num_bytes)}: "
            + ("sound" if self.ok else f"{len(self.problems)} problems, {len(self.missing)} keys missing")
        ]
        if self.num_unchecked:
            lines.append(f"  {self.num_unchecked} records have no checksum; only their values were looked at")
        for title in ("problems", "missing", "duplicates", "unexpected"):
            entries = getattr(self, title)
            lines += [f"  {title[:-1] if title.endswith('s') else title}: {entry}" for entry in entries[:NUM_SHOWN]]
            if len(entries) > NUM_SHOWN:
                lines.append(f"  ... and {len(entries) - NUM_SHOWN} more {title}")
        return "\n".join(lines)


def verify_store(
    folder: str | Path,
    expected_keys: Iterable[str] | None = None,
    shape: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> StoreReport:
    """Read the whole store once and report what is wrong with it, naming shard and line.

    expected_keys: keys that must be there. shape: `(C, H, W)`, only for stores without `meta.json`.
    progress: called with the bytes of each record read. Raises FileNotFoundError if there is no shard,
    ValueError if the record size is unknown.
    """
    folder = Path(folder)
    report = StoreReport(folder)
    shards = list_shards(folder)
    if not shards:
        raise FileNotFoundError(f"no embedding shards in {folder}; there is nothing to verify")
    meta = read_meta(folder)
    if meta is None and shape is None:
        raise ValueError(f"{folder} has no meta.json; state the shape (C, H, W) of its records")
    layout = RecordLayout.from_meta(meta or {"shape": shape})
    places: dict[bytes, str] = {}
    for shard in shards:
        _verify_shard(shard, layout, meta is None, places, report, progress)
    report.num_keys = len(places)
    if expected_keys is not None:
        wanted = set(expected_keys)
        found = {key.decode(errors="replace") for key in places}
        report.missing, report.unexpected = sorted(wanted - found), sorted(found - wanted)
    return report


def _verify_shard(
    shard: Shard,
    layout: RecordLayout,
    open_end: bool,
    places: dict[bytes, str],
    report: StoreReport,
    progress: Callable[[int], None] | None,
) -> None:
    for path in (shard.keys_path, shard.values_path):
        if not path.exists():
            report.problems.append(f"{path.name} does not exist")
            return
    keys, size = shard.read_keys(open_end), shard.values_path.stat().st_size
    if size != len(keys) * layout.record_bytes:
        report.problems.append(
            f"{shard.values_path.name} has {size} bytes = {size / layout.record_bytes:.2f} records of "
            f"{layout.record_bytes}, but {shard.keys_path.name} names {len(keys)}"
        )
    crcs = shard.read_crcs() if shard.crc_path.exists() else None
    if crcs is None:
        report.num_unchecked += len(keys)
    elif shard.crc_path.stat().st_size != 4 * len(keys):
        report.problems.append(
            f"{shard.crc_path.name} holds {len(crcs)} checksums, {shard.keys_path.name} {len(keys)} keys"
        )
    _verify_keys(shard, keys, places, report)
    report.num_bytes += size
    record = bytearray(layout.record_bytes)
    with shard.values_path.open("rb", buffering=0) as values:
        for line in range(min(len(keys), size // layout.record_bytes)):
            values.readinto(record)
            report.num_records += 1
            if fault := _fault(record, layout, None if crcs is None or line >= len(crcs) else int(crcs[line])):
                report.problems.append(
                    f"{shard.values_path.name} record {line} ({keys[line].decode(errors='replace')}) {fault}"
                )
            if progress is not None:
                progress(len(record))


def _verify_keys(shard: Shard, keys: Sequence[bytes], places: dict[bytes, str], report: StoreReport) -> None:
    for line, key in enumerate(keys):
        place = f"{shard.keys_path.name} line {line + 1}"
        text = key.decode(errors="replace")
        if not key or text.encode() != key:
            report.problems.append(f"{place} is empty or not UTF-8")
        elif key not in places:
            places[key] = place
        elif places[key].startswith(f"{shard.keys_path.name} "):
            report.problems.append(f"{place} repeats {text!r} of {places[key]}")
        else:
            report.duplicates.append(f"{place} has {text!r}, as {places[key]} does")


def _fault(record: bytearray, layout: RecordLayout, crc: int | None) -> str:
    """What is wrong with one record, or an empty string."""
    if crc is not None and record_crc([record]) != crc:
        return "does not match its checksum"
    if SEED.unpack_from(record)[0] < 0:
        return f"has the seed {SEED.unpack_from(record)[0]}, wanted one in [0, 2^31)"
    floats = np.float32 if layout.scale_bytes else np.float16
    count = layout.shape[0] if layout.scale_bytes else layout.data_bytes // DTYPES[layout.dtype].itemsize
    numbers = torch.from_numpy(np.frombuffer(record, floats, count, offset=SEED.size))
    if not torch.stack(torch.aminmax(numbers)).isfinite().all():
        return "holds NaN or Inf"
    return ""
