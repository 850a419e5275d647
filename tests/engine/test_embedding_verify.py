"""What the check of a store finds."""

from __future__ import annotations

import struct

import pytest

from sam3.engine.embedding_verify import verify_store
from tests.engine.test_embeddings import SHAPE, write, write_by_hand


def test_sound_store(tmp_path):
    write(tmp_path, ["a", "b"])
    write(tmp_path, ["c"], rank=1, first=2, world_size=2)
    seen = []
    report = verify_store(tmp_path, ["a", "b", "c"], progress=seen.append)
    assert report.ok
    assert (report.num_records, report.num_keys, report.num_bytes, report.num_unchecked) == (3, 3, 48, 0)
    assert seen == [16, 16, 16]
    assert "3 records of 3 keys, 48 B: sound" in str(report)


def test_coverage(tmp_path):
    write(tmp_path, ["a", "b"])
    report = verify_store(tmp_path, ["b", "c", "d"])
    assert not report.ok
    assert report.missing == ["c", "d"]
    assert report.unexpected == ["a"]
    assert "2 keys missing" in str(report)
    assert "missing: c" in str(report)


def test_damage_is_named_by_shard_and_record(tmp_path):
    write(tmp_path, ["a", "b", "c"])
    values = tmp_path / "rank0-values.bin"
    data = bytearray(values.read_bytes())
    data[20] ^= 4
    values.write_bytes(data[:-2])
    problems = verify_store(tmp_path).problems
    assert problems == [
        "rank0-values.bin has 46 bytes = 2.88 records of 16, but rank0-keys.txt names 3",
        "rank0-values.bin record 1 (b) does not match its checksum",
    ]


def test_duplicates(tmp_path):
    """Between shards they come from padding and do no harm; within one they should not be."""
    write_by_hand(tmp_path, ["a", "b", "a"], "rank0")
    write_by_hand(tmp_path, ["b"], "rank1")
    report = verify_store(tmp_path, shape=SHAPE)
    assert report.problems == ["rank0-keys.txt line 3 repeats 'a' of rank0-keys.txt line 1"]
    assert report.duplicates == ["rank1-keys.txt line 1 has 'b', as rank0-keys.txt line 2 does"]
    assert (report.num_records, report.num_keys, report.num_unchecked) == (4, 2, 4)
    assert "4 records have no checksum" in str(report)


def test_values_without_checksum_are_looked_at(tmp_path):
    write_by_hand(tmp_path, ["a", "b", "c"])
    values = tmp_path / "rank0-values.bin"
    nan = struct.pack("<i6e", 0, 1, 2, float("nan"), 4, 5, 6)
    negative = struct.pack("<i6e", -7, 1, 2, 3, 4, 5, 6)
    values.write_bytes(values.read_bytes()[:16] + nan + negative)
    assert verify_store(tmp_path, shape=SHAPE).problems == [
        "rank0-values.bin record 1 (b) holds NaN or Inf",
        "rank0-values.bin record 2 (c) has the seed -7, wanted one in [0, 2^31)",
    ]


def test_missing_files_checksums_and_bad_keys(tmp_path):
    write(tmp_path, ["a", "b"])
    crcs = tmp_path / "rank0-crc32.bin"
    crcs.write_bytes(crcs.read_bytes()[:4])
    assert verify_store(tmp_path).problems == ["rank0-crc32.bin holds 1 checksums, rank0-keys.txt 2 keys"]
    (tmp_path / "rank0-keys.txt").write_bytes(b"\n\xff\n")
    assert [problem[:35] for problem in verify_store(tmp_path).problems[1:]] == [
        "rank0-keys.txt line 1 is empty or n",
        "rank0-keys.txt line 2 is empty or n",
    ]
    (tmp_path / "rank0-values.bin").unlink()
    assert verify_store(tmp_path).problems == ["rank0-values.bin does not exist"]
    with pytest.raises(FileNotFoundError):
        verify_store(tmp_path / "none")


def test_int8_store(tmp_path):
    write(tmp_path, ["a"], dtype="int8")
    assert verify_store(tmp_path, ["a"]).ok
    data = bytearray((tmp_path / "rank0-values.bin").read_bytes())
    data[4:8] = struct.pack("<f", float("inf"))
    (tmp_path / "rank0-values.bin").write_bytes(data)
    (tmp_path / "rank0-crc32.bin").unlink()
    assert verify_store(tmp_path).problems == ["rank0-values.bin record 0 (a) holds NaN or Inf"]


def test_long_lists_are_cut_in_the_text(tmp_path):
    write(tmp_path, ["a"])
    text = str(verify_store(tmp_path, [f"k{i:02}" for i in range(30)]))
    assert "missing: k19" in text
    assert "k20" not in text
    assert "... and 10 more missing" in text
