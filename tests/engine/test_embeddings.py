"""The store's bytes, its reader and its index."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import struct
import threading
import zlib

import numpy as np
import pytest
import torch

from sam3.engine.embedding_index import KeyIndex
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import (
    EmbeddingReader,
    RecordLayout,
    list_shards,
    meta_differences,
    plan,
    read_meta,
    store_meta,
)

SHAPE = (2, 1, 3)
VALUES = [1.5, -2.0, 0.25, 1024.0, -0.5, 0.0]


def embedding(number: int) -> torch.Tensor:
    return torch.tensor(VALUES).reshape(SHAPE) + number


def write(folder, keys, rank=0, first=0, world_size=1, **options):
    with EmbeddingWriter(folder, store_meta(SHAPE, **options), rank, world_size) as writer:
        for number, key in enumerate(keys, first):
            writer.add(key, number, embedding(number))


def write_by_hand(folder, keys, name="rank0", first=0):
    """The plain format, byte by byte."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
    with (folder / f"{name}-values.bin").open("wb") as file:
        for number in range(first, first + len(keys)):
            file.write(struct.pack("<i6e", number, *(value + number for value in VALUES)))


def test_sizes_of_the_real_thing():
    assert RecordLayout((1024, 72, 72)).record_bytes == 10_616_836
    assert RecordLayout((1024, 72, 72), "int8").record_bytes == 4 + 4 * 1024 + 1024 * 72 * 72
    assert RecordLayout((1024, 72, 72), "int8").record_bytes / 10_616_836 <= 0.51
    assert plan(1000, store_meta((1024, 72, 72))) == 1000 * (10_616_836 + 4 + 16)


def test_writer_makes_the_bytes_of_the_hand_written_file(tmp_path):
    write(tmp_path / "ours", ["b", "a", "ä"])
    write_by_hand(tmp_path / "hand", ["b", "a", "ä"])
    for name in ("rank0-keys.txt", "rank0-values.bin"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "hand" / name).read_bytes()
    record = (tmp_path / "hand" / "rank0-values.bin").read_bytes()
    crcs = b"".join(struct.pack("<I", zlib.crc32(record[i : i + 16])) for i in range(0, 48, 16))
    assert (tmp_path / "ours" / "rank0-crc32.bin").read_bytes() == crcs
    meta = json.loads((tmp_path / "ours" / "meta.json").read_text())
    assert meta == {"shape": [2, 1, 3], "dtype": "float16"}


def test_reads_by_key_in_any_order(tmp_path):
    write(tmp_path, [f"k{i}" for i in range(5)])
    reader = EmbeddingReader(tmp_path, verify_crc=True)
    assert len(reader) == 5
    assert "k3" in reader
    assert "k" not in reader
    batch = reader.read_batch(["k3", "k0", "k3"])
    assert batch.seeds.tolist() == [3, 0, 3]
    assert batch.data.dtype == torch.float16
    assert torch.equal(batch.values(), torch.stack([embedding(i) for i in (3, 0, 3)]))
    values, seed = reader.read("k4")
    assert seed == 4
    assert torch.equal(values, embedding(4))
    assert reader.read_seeds(["k2", "k1"]).tolist() == [2, 1]
    assert reader.missing(["x", "k1", "k9"]) == ["x", "k9"]
    reader.announce(["k1", "k2"])


def test_reads_into_the_callers_memory_only_if_it_fits(tmp_path):
    write(tmp_path, ["a"])
    reader = EmbeddingReader(tmp_path)
    room = torch.zeros(3, *SHAPE, dtype=torch.float16)
    assert reader.read_into("a", room[1]) == 0
    assert torch.equal(room[1].float(), embedding(0))
    assert not room[0].any()
    assert not room[2].any()
    with pytest.raises(ValueError, match="float32"):
        reader.read_into("a", torch.zeros(SHAPE))
    with pytest.raises(ValueError, match=r"\(6,\)"):
        reader.read_into("a", room[1].flatten())
    with pytest.raises(ValueError, match="contiguous"):
        reader.read_into("a", torch.zeros(1, 3, 2, dtype=torch.float16).permute(2, 0, 1))
    with pytest.raises(ValueError, match="room for 2"):
        reader.read_batch(["a"], reader.allocate(2))


def test_missing_key_says_what_to_do(tmp_path):
    write(tmp_path, ["a"])
    with pytest.raises(ValueError) as caught:
        EmbeddingReader(tmp_path).read("sa_223750")
    assert str(caught.value) == (
        f"no teacher embedding for 'sa_223750' in {tmp_path}; write them with "
        "bash stage1/scripts/save_stage1_embeddings.sh"
    )


def test_reads_what_plain_code_wrote(tmp_path, caplog):
    """Two shards in any order, no meta, no checksums, a key in both."""
    write_by_hand(tmp_path, ["z", "a"], "rank10", first=0)
    write_by_hand(tmp_path, ["m", "a"], "rank2", first=5)
    with pytest.raises(ValueError, match="state the shape"):
        EmbeddingReader(tmp_path)
    reader = EmbeddingReader(tmp_path, shape=SHAPE)
    assert "no meta.json" in caplog.text
    assert [shard.name for shard in reader.shards] == ["rank2", "rank10"]
    assert reader.keys() == ["a", "m", "z"]
    assert reader.read("a")[1] == 6  # of the first shard
    assert torch.equal(reader.read("z")[0], embedding(0))
    with pytest.raises(ValueError, match=r"rank2-crc32\.bin"):
        EmbeddingReader(tmp_path, shape=SHAPE, verify_crc=True)
    # A cached index does not excuse a wrong shape.
    with pytest.raises(ValueError, match=r"rank2-values\.bin has 32 bytes = 1\.60 records of 20"):
        EmbeddingReader(tmp_path, shape=(2, 1, 4))


def test_plain_store_may_lack_the_last_newline_but_ours_may_not(tmp_path):
    write_by_hand(tmp_path / "plain", ["a", "b"])
    (tmp_path / "plain" / "rank0-keys.txt").write_text("a\nb")
    assert EmbeddingReader(tmp_path / "plain", SHAPE).keys() == ["a", "b"]
    write(tmp_path / "ours", ["a", "bcd"])
    (tmp_path / "ours" / "rank0-keys.txt").write_text("a\nbc")  # half written
    with pytest.raises(ValueError, match=r"2\.00 records of 16, but rank0-keys\.txt names 1"):
        EmbeddingReader(tmp_path / "ours")


def test_cut_shard_missing_file_and_empty_folder_are_named(tmp_path):
    write(tmp_path, ["a", "b"], rank=3, world_size=4)
    values = tmp_path / "rank3-values.bin"
    values.write_bytes(values.read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"rank3-values\.bin has 27 bytes = 1\.69 records of 16.*names 2.*export again"
    ):
        EmbeddingReader(tmp_path)
    values.unlink()
    with pytest.raises(ValueError, match=r"shard rank3 .* has no rank3-values\.bin"):
        EmbeddingReader(tmp_path)
    with pytest.raises(FileNotFoundError, match="no embedding shards"):
        EmbeddingReader(tmp_path / "nowhere", SHAPE)


def test_shard_cut_after_opening_is_noticed(tmp_path):
    write(tmp_path, ["a", "b"])
    reader = EmbeddingReader(tmp_path)
    os.truncate(tmp_path / "rank0-values.bin", 20)
    with pytest.raises(ValueError, match=r"rank0-values\.bin ends at byte 20"):
        reader.read("b")


def test_checksum_mismatch_names_record_and_shard(tmp_path):
    write(tmp_path, ["a", "b"])
    values = tmp_path / "rank0-values.bin"
    data = bytearray(values.read_bytes())
    data[25] ^= 1
    values.write_bytes(data)
    assert EmbeddingReader(tmp_path).read("b")  # not looked at
    with pytest.raises(ValueError, match=r"record 1 \('b'\) of .*rank0-values\.bin does not match its checksum"):
        EmbeddingReader(tmp_path, verify_crc=True).read("b")


def test_other_meta_is_refused_naming_the_fields(tmp_path):
    write(tmp_path, ["a"], preprocess={"resize": "square", "img_size": 8}, teacher={"sha256": "11"})
    expect = {"shape": SHAPE, "preprocess": {"resize": "pad", "img_size": 8}, "teacher": {"sha256": "22"}}
    with pytest.raises(ValueError) as caught:
        EmbeddingReader(tmp_path, expect=expect)
    assert "preprocess.resize: found 'square', wanted 'pad'; teacher.sha256: found '11', wanted '22'" in str(
        caught.value
    )
    assert "img_size" not in str(caught.value)
    with pytest.raises(ValueError, match="shape: found"):
        EmbeddingReader(tmp_path, shape=(2, 1, 4))
    EmbeddingReader(tmp_path, expect={"teacher": {"sha256": "11"}})  # fields it does not ask about do not matter


def test_damaged_meta(tmp_path):
    write(tmp_path, ["a"])
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is not JSON"):
        EmbeddingReader(tmp_path)
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_meta(tmp_path)


def test_meta_helpers():
    assert meta_differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}}) == []
    assert meta_differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}}, exact=True) == ["c: found 2, wanted 'nothing'"]
    assert meta_differences({"x": [1, 2]}, {"x": (1, 2)}) == []
    with pytest.raises(ValueError, match="three positive"):
        store_meta((1, 2))
    with pytest.raises(ValueError, match="float8"):
        store_meta(SHAPE, "float8")


# Index -------------------------------------------------------------------------------------------------------------


def test_index_is_cached_and_follows_the_shards(tmp_path):
    write(tmp_path, ["a"])
    assert EmbeddingReader(tmp_path).keys() == ["a"]
    (cached,) = tmp_path.glob(".index-*.npy")
    written = cached.stat().st_mtime_ns
    EmbeddingReader(tmp_path)
    assert cached.stat().st_mtime_ns == written
    write(tmp_path, ["b"], rank=1, first=1, world_size=2)
    assert EmbeddingReader(tmp_path).keys() == ["a", "b"]
    assert len(list(tmp_path.glob(".index-*.npy"))) == 1


def test_index_stays_in_memory_where_it_cannot_be_written(tmp_path, monkeypatch):
    write(tmp_path, ["a"])

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr("sam3.engine.embedding_index.atomic_path", refuse)
    reader = EmbeddingReader(tmp_path)
    assert pickle.loads(pickle.dumps(reader)).read("a")[1] == 0
    assert not list(tmp_path.glob(".index-*.npy"))


def test_index_against_a_dict():
    draw = np.random.default_rng(0)
    shards = [[f"sa_{n}".encode() for n in draw.integers(0, 4000, 900)] for _ in range(3)]
    expected: dict[str, tuple[int, int]] = {}
    for number, keys in enumerate(shards):
        for line, key in enumerate(keys):
            expected.setdefault(key.decode(), (number, line))
    index = KeyIndex.build(shards)
    assert len(index) == len(expected)
    assert {key: index.find(key) for key in expected} == expected
    assert index.find("sa_") is None
    assert index.missing(["sa_5000", *expected]) == ["sa_5000"]
    assert KeyIndex.build([]).find("x") is None
    assert KeyIndex.build([[], []]).missing(["x"]) == ["x"]


# Processes ---------------------------------------------------------------------------------------------------------


def read_seed(reader, key, results):
    results.put(reader.read(key)[1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reader_serves_other_processes(tmp_path, method):
    write(tmp_path, [f"k{i}" for i in range(4)])
    reader = EmbeddingReader(tmp_path)
    reader.read("k0")  # its files are open now
    assert len(pickle.dumps(reader)) < 2000  # no index inside
    context = multiprocessing.get_context(method)
    results = context.Queue()
    workers = [context.Process(target=read_seed, args=(reader, f"k{i}", results)) for i in range(2)]
    for worker in workers:
        worker.start()
    seeds = sorted(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert seeds == [0, 1]


def test_threads_read_at_once(tmp_path):
    write(tmp_path, [f"k{i}" for i in range(20)])
    reader = EmbeddingReader(tmp_path)
    wrong = []

    def read_all():
        for i in range(20):
            if reader.read(f"k{i}")[1] != i:
                wrong.append(i)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reads_without_preadv(tmp_path, monkeypatch):
    write(tmp_path, ["a", "b"])
    monkeypatch.delattr(os, "preadv")
    values, seed = EmbeddingReader(tmp_path, verify_crc=True).read("b")
    assert seed == 1
    assert torch.equal(values, embedding(1))


@pytest.mark.parametrize("read_ranks", [1, 2, 5])
def test_three_ranks_write_any_number_reads(tmp_path, read_ranks):
    keys = [f"sa_{i}" for i in range(10)]
    for rank in range(3):
        write_keys = keys[rank::3] + keys[: 2 if rank == 2 else 0]  # padding repeats the head
        with EmbeddingWriter(tmp_path, store_meta(SHAPE), rank, 3) as writer:
            for key in write_keys:
                writer.add(key, int(key[3:]), embedding(int(key[3:])))
    assert len(list_shards(tmp_path)) == 3
    found = {}
    for rank in range(read_ranks):
        reader = EmbeddingReader(tmp_path)
        found.update({key: reader.read(key)[1] for key in keys[rank::read_ranks]})
    assert found == {key: i for i, key in enumerate(keys)}


# int8 --------------------------------------------------------------------------------------------------------------


def test_int8_bytes_by_hand(tmp_path):
    values = torch.tensor([[[127.0, -254.0, 1.0]], [[0.0, 0.0, 0.0]]])
    with EmbeddingWriter(tmp_path, store_meta(SHAPE, "int8")) as writer:
        writer.add("a", 9, values)
    record = (tmp_path / "rank0-values.bin").read_bytes()
    # Scale of the first channel 254 / 127 = 2; 127 / 2 and 1 / 2 round to even.
    assert record == struct.pack("<i2f6b", 9, 2.0, 0.0, 64, -127, 0, 0, 0, 0)
    reader = EmbeddingReader(tmp_path, verify_crc=True)
    batch = reader.read_batch(["a"])
    assert batch.data.dtype == torch.int8
    assert batch.scales.tolist() == [[2.0, 0.0]]
    assert torch.equal(batch.values()[0], torch.tensor([[[128.0, -254.0, 0.0]], [[0.0, 0.0, 0.0]]]))
    with pytest.raises(ValueError, match="scales"):
        reader.read_into("a", torch.zeros(SHAPE, dtype=torch.int8))


def test_int8_is_close_on_smooth_embeddings(tmp_path):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 64, 12, 12, generator=generator) * torch.rand(64, 1, 1, generator=generator) * 30
    values = torch.nn.functional.interpolate(coarse, 72, mode="bicubic")
    with EmbeddingWriter(tmp_path, store_meta(values.shape[1:], "int8")) as writer:
        writer.add_batch(["a", "b"], [1, 2], values)
    stored = EmbeddingReader(tmp_path).read_batch(["a", "b"]).values()
    assert torch.nn.functional.cosine_similarity(stored, values, dim=1).mean() >= 0.9999
