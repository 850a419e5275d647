"""Appending, resuming, and everything that may interrupt it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sam3.engine import embedding_writer
from sam3.engine.embedding_verify import verify_store
from sam3.engine.embedding_writer import EmbeddingWriter, check_free_space
from sam3.engine.embeddings import EmbeddingReader, store_meta
from sam3.engine.locks import FileLock
from tests.engine.test_embeddings import SHAPE, embedding, write, write_by_hand

META = store_meta(SHAPE)
RECORD = 16
FILES = ("rank0-keys.txt", "rank0-values.bin", "rank0-crc32.bin")


def sizes(folder):
    return [(folder / name).stat().st_size for name in FILES]


def test_appends_and_drops_what_is_there(tmp_path):
    write(tmp_path, ["a", "b", "a"])
    with EmbeddingWriter(tmp_path, META) as writer:
        assert writer.resumed == 2
        assert writer.pending(["c", "b", "a"]) == ["c"]
        new = torch.stack([embedding(i) for i in range(4)])
        assert writer.add_batch(["b", "c", "c", "d"], [0, 1, 2, 3], new) == 2
        assert writer.pending(["c", "e"]) == ["e"]
        assert not writer.add("d", 8, embedding(8))
    reader = EmbeddingReader(tmp_path, verify_crc=True)
    assert (tmp_path / "rank0-keys.txt").read_text() == "a\nb\nc\nd\n"
    assert [reader.read(key)[1] for key in "abcd"] == [0, 1, 1, 3]
    assert torch.equal(reader.read("d")[0], embedding(3))


def test_flush_puts_everything_on_disk(tmp_path):
    with EmbeddingWriter(tmp_path, META) as writer:
        for i in range(20):
            writer.add(f"k{i}", i, embedding(i))
        writer.flush()
        assert writer.written == 20
        assert sizes(tmp_path)[1] == 20 * RECORD


def test_queue_is_bounded(tmp_path):
    with EmbeddingWriter(tmp_path, META, max_queue_bytes=3 * RECORD) as writer:
        assert writer._queue.maxsize == 3
        for i in range(50):
            writer.add(f"k{i}", i, embedding(i))
    assert verify_store(tmp_path).num_records == 50


def test_gpu_and_low_precision_inputs_are_cast(tmp_path):
    with EmbeddingWriter(tmp_path, META) as writer:
        writer.add("a", 0, embedding(1).bfloat16())
        writer.add("b", 0, embedding(1).double().requires_grad_())
        writer.add("c", 0, embedding(1).expand(2, *SHAPE)[0])
    reader = EmbeddingReader(tmp_path)
    assert torch.equal(reader.read("b")[0], embedding(1))
    assert torch.equal(reader.read("c")[0], embedding(1))


# Torn files --------------------------------------------------------------------------------------------------------

# Bytes cut off (negative) or added to (keys, values, checksums) of a store with the keys aa, bb, cc; records kept.
TORN = {
    "values ahead by half a record": ((0, 7, 0), 3),
    "values ahead by one record": ((0, RECORD, 0), 3),
    "checksum ahead": ((0, RECORD, 4), 3),
    "checksum half written": ((0, RECORD, 2), 3),
    "key half written": ((1, RECORD, 4), 3),
    "key without its newline": ((2, RECORD, 4), 3),
    "values cut in a record": ((0, -3, 0), 2),
    "values cut between records": ((0, -RECORD, 0), 2),
    "checksum cut": ((0, 0, -1), 2),
    "keys cut in a line": ((-1, 0, 0), 2),
    "keys cut by two lines and a half": ((-7, 0, 0), 0),
    "all at different records": ((-4, -2 * RECORD, -3), 1),
}


@pytest.mark.parametrize("case", TORN)
def test_repairs_every_kind_of_torn_tail(tmp_path, case):
    changes, kept = TORN[case]
    write(tmp_path, ["aa", "bb", "cc"])
    for name, change in zip(FILES, changes, strict=True):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:change] if change < 0 else data + b"x" * change)
    with EmbeddingWriter(tmp_path, META) as writer:
        assert writer.resumed == kept
        assert sizes(tmp_path) == [3 * kept, RECORD * kept, 4 * kept]
        for number, key in enumerate(["aa", "bb", "cc", "dd"]):
            writer.add(key, number, embedding(number))
    report = verify_store(tmp_path, ["aa", "bb", "cc", "dd"])
    assert report.ok, str(report)
    assert report.num_records == 4
    assert torch.equal(EmbeddingReader(tmp_path).read("cc")[0], embedding(2))


def test_last_record_with_lost_blocks_is_written_again(tmp_path):
    """After a power cut sizes may be right and the last blocks zero."""
    write(tmp_path, ["a", "b", "c"])
    values = tmp_path / "rank0-values.bin"
    values.write_bytes(values.read_bytes()[:RECORD] + bytes(2 * RECORD))
    with EmbeddingWriter(tmp_path, META) as writer:
        assert writer.resumed == 1
        assert writer.pending(["a", "b", "c"]) == ["b", "c"]


def test_a_lost_block_before_a_sound_record_is_found(tmp_path):
    write(tmp_path, ["a", "b", "c"])
    values = tmp_path / "rank0-values.bin"
    data = values.read_bytes()
    values.write_bytes(data[:RECORD] + bytes(RECORD) + data[2 * RECORD :])
    with EmbeddingWriter(tmp_path, META) as writer:
        assert writer.pending(["a", "b", "c"]) == ["b", "c"]


def test_syncs_go_on_beside_writing_and_their_errors_arrive(tmp_path, monkeypatch):
    with EmbeddingWriter(tmp_path / "good", META, sync_bytes=3 * RECORD) as writer:
        for i in range(30):
            writer.add(f"k{i}", i, embedding(i))
    assert verify_store(tmp_path / "good").num_records == 30

    def refuse(self):
        raise OSError(errno.EIO, "sync failed")

    with pytest.raises(OSError, match="sync failed"), EmbeddingWriter(tmp_path / "bad", META, sync_bytes=1) as writer:
        monkeypatch.setattr(embedding_writer.ShardFiles, "sync", refuse)
        for i in range(30):
            writer.add(f"k{i}", i, embedding(i))


def test_lost_checksums_are_no_reason_to_throw_records_away(tmp_path):
    write(tmp_path, ["a", "b"])
    (tmp_path / "rank0-crc32.bin").unlink()
    with pytest.raises(ValueError, match=r"rank0-crc32\.bin holds 0 checksums for 2 records"):
        EmbeddingWriter(tmp_path, META)
    assert (tmp_path / "rank0-values.bin").stat().st_size == 2 * RECORD
    EmbeddingReader(tmp_path).read("b")
    with FileLock(tmp_path / ".rank0.lock", "testing"):
        pass  # the refused writer holds no lock


# World sizes -------------------------------------------------------------------------------------------------------


def test_resumes_under_another_world_size(tmp_path):
    keys = [f"k{i}" for i in range(9)]
    for rank in range(3):
        write(tmp_path, keys[rank:6:3], rank=rank, world_size=3)
    # A kill left the third rank's shard torn; nobody has that rank any more.
    with (tmp_path / "rank2-values.bin").open("ab") as file:
        file.write(b"half")
    with pytest.raises(ValueError, match=r"rank2-values\.bin"):
        EmbeddingReader(tmp_path)
    writers = [EmbeddingWriter(tmp_path, META, rank, 2) for rank in range(2)]
    pending = [writer.pending(keys) for writer in writers]
    assert pending == [keys[6:], keys[6:]]
    for rank, writer in enumerate(writers):
        for key in pending[0][rank::2]:
            writer.add(key, 1, embedding(1))
        writer.close()
    assert verify_store(tmp_path, keys).ok
    assert EmbeddingReader(tmp_path).keys() == keys
    assert (tmp_path / "rank2-keys.txt").read_text() == "k2\nk5\n"


def test_a_shard_has_one_writer(tmp_path):
    with EmbeddingWriter(tmp_path, META):
        with pytest.raises(ValueError, match="this process is already writing"):
            EmbeddingWriter(tmp_path, META)
        code = (
            "import sys; from sam3.engine.embedding_writer import EmbeddingWriter\n"
            f"try: EmbeddingWriter({str(tmp_path)!r}, {META!r})\n"
            "except ValueError as error: sys.exit(str(error))"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert "another process is writing" in other.stderr
        EmbeddingWriter(tmp_path, META, rank=1, world_size=2).close()
    EmbeddingWriter(tmp_path, META).close()


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused_naming_the_key(tmp_path, bad, dtype):
    values = torch.stack([embedding(0), embedding(1)])
    values[1, 1, 0, 2] = bad
    with EmbeddingWriter(tmp_path, store_meta(SHAPE, dtype)) as writer:
        with pytest.raises(ValueError, match="'sick' holds NaN or Inf"):
            writer.add_batch(["well", "sick"], [0, 1], values)
        assert writer.add("well", 0, values[0])
    assert (tmp_path / "rank0-keys.txt").read_text() == "well\n"


def test_float16_overflow_is_refused(tmp_path):
    with EmbeddingWriter(tmp_path, META) as writer, pytest.raises(ValueError, match="'big'"):
        writer.add("big", 0, embedding(0) + 70000)


def test_wrong_inputs_are_refused(tmp_path):
    with EmbeddingWriter(tmp_path, META) as writer:
        with pytest.raises(ValueError, match=r"wants floating-point \(B, 2, 1, 3\)"):
            writer.add("a", 0, torch.zeros(2, 3, 1))
        with pytest.raises(ValueError, match=r"torch\.int64"):
            writer.add("a", 0, torch.zeros(SHAPE, dtype=torch.int64))
        for key in ("", "a\nb", "a\0"):
            with pytest.raises(ValueError, match="cannot be a key"):
                writer.add(key, 0, embedding(0))
        for seed in (-1, 2**31):
            with pytest.raises(ValueError, match="seeds"):
                writer.add("a", seed, embedding(0))
        writer.add("a", 2**31 - 1, embedding(0))
    with pytest.raises(ValueError, match="closed"):
        writer.add("b", 0, embedding(0))
    assert EmbeddingReader(tmp_path).read("a")[1] == 2**31 - 1


def test_other_meta_and_foreign_stores_are_refused(tmp_path):
    write(tmp_path / "a", ["a"], teacher={"sha256": "1"})
    with pytest.raises(ValueError, match=r"begun by another run \(teacher\.sha256: found '1', wanted '2'\)"):
        EmbeddingWriter(tmp_path / "a", store_meta(SHAPE, teacher={"sha256": "2"}))
    with pytest.raises(ValueError, match=r"teacher\.sha256: found '1', wanted 'nothing'"):
        EmbeddingWriter(tmp_path / "a", META)
    EmbeddingWriter(tmp_path / "a", store_meta(SHAPE, teacher={"sha256": "1"})).close()
    write_by_hand(tmp_path / "plain", ["a"])
    with pytest.raises(ValueError, match=r"1 shards but no meta\.json"):
        EmbeddingWriter(tmp_path / "plain", META)


# Full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_left", [0, 5, RECORD, RECORD + 3, RECORD + 4, 3 * RECORD + 9])
def test_full_disk_leaves_a_sound_store_and_one_message(tmp_path, monkeypatch, bytes_left):
    write(tmp_path, ["before"])
    left = bytes_left

    def limited_writev(handle, parts):
        nonlocal left
        data = b"".join(parts)[:left]
        if not data:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= len(data)
        return os.write(handle, data)

    monkeypatch.setattr(embedding_writer.os, "writev", limited_writev)
    with (
        pytest.raises(OSError, match=r"is full after \d records; they are safe") as caught,
        EmbeddingWriter(tmp_path, META) as writer,
    ):
        for i in range(200):
            writer.add(f"k{i}", i, embedding(i))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    report = verify_store(tmp_path)
    assert report.ok, str(report)
    assert report.num_records == 1 + bytes_left // (RECORD + 4 + 3)
    write(tmp_path, [f"k{i}" for i in range(5)])
    assert verify_store(tmp_path, ["before", *(f"k{i}" for i in range(5))]).ok


def test_error_while_closing_does_not_hide_the_first_one(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(embedding_writer.os, "writev", refuse)
    with pytest.raises(RuntimeError, match="teacher broke"), EmbeddingWriter(tmp_path, META) as writer:
        writer.add("a", 0, embedding(0))
        raise RuntimeError("teacher broke")
    EmbeddingWriter(tmp_path, META).close()  # released


def test_free_space_is_checked(tmp_path, monkeypatch):
    assert check_free_space(tmp_path, 2, META) == 2 * (RECORD + 20)
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 30)
    with pytest.raises(OSError, match=r"storing 2 embeddings needs 72 B .* only 30 B are free"):
        check_free_space(tmp_path, 2, META)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        EmbeddingWriter(tmp_path / "file" / "store", META)


# SIGKILL -----------------------------------------------------------------------------------------------------------

EXPORT = """
import sys, torch
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import store_meta
with EmbeddingWriter(sys.argv[1], store_meta((64, 24, 24)), max_queue_bytes=8 * 73732, sync_bytes=1 << 20) as writer:
    print("resumed", writer.resumed, flush=True)
    for key in writer.pending([f"sa_{i}" for i in range(4000)]):
        number = int(key[3:])
        writer.add(key, number, torch.full((64, 24, 24), number / 4.0))
        print(number, flush=True)
"""


def environment():
    root = Path(embedding_writer.__file__).parents[3]
    return {**os.environ, "PYTHONPATH": f"{root / 'sam3'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}


def test_sigkill_at_random_moments_loses_only_what_is_in_flight(tmp_path):
    draw, stored = random.Random(5), 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", EXPORT, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
        ) as child:
            assert child.stdout is not None
            assert int(child.stdout.readline().split()[1]) >= stored
            time.sleep(draw.uniform(0.01, 0.25))
            child.send_signal(signal.SIGKILL)
            added = [int(line) for line in child.stdout.read().splitlines() if line.strip()]
        if not (tmp_path / "rank0-keys.txt").exists():
            continue
        EmbeddingWriter(tmp_path, store_meta((64, 24, 24))).close()  # repairs
        report = verify_store(tmp_path)
        assert report.ok, str(report)
        assert report.num_records == report.num_keys  # none repeated
        stored = report.num_records
        # Queue of 8, one being written, one between the queue and the thread, and one being added.
        assert not added or stored >= added[-1] + 1 - 11
    assert stored > 0
    keys = (tmp_path / "rank0-keys.txt").read_text().split()
    assert keys == [f"sa_{i}" for i in range(stored)]
    values, seed = EmbeddingReader(tmp_path, verify_crc=True).read(f"sa_{stored - 1}")
    assert seed == stored - 1
    assert values.eq(
        torch.tensor((stored - 1) / 4.0).half().float()
    ).all()  # a fast disk takes more than float16 tells apart


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_every_kind_of_non_finite_float16_is_found(bad: float):
    values = torch.tensor([0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8], dtype=torch.float16)
    assert embedding_writer._is_finite(values.numpy())
    # the sign of NaN is set by bits, because arithmetic may drop it
    bits = torch.tensor(bad, dtype=torch.float16).view(torch.int16)
    for sign in (bits, bits | -(2**15)):
        values[3] = sign.view(torch.float16)
        assert not embedding_writer._is_finite(values.numpy())
