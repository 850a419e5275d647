"""Writer and reader of frame embeddings: bytes on disk, whole videos only, resumption, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sam3.engine import video_embedding_format
from sam3.engine.video_embeddings import VideoEmbeddings, VideoEmbeddingWriter, video_meta

SHAPE = (6, 4, 4)
TEACHER = {"name": "sam3.pt", "sha256": "a" * 64}
PREPROCESS = {"img_size": 56, "resize": "square", "mean": [127.5] * 3, "std": [127.5] * 3}


def meta(**changes: Any) -> dict[str, Any]:
    return video_meta(**{"shape": SHAPE, "teacher": TEACHER, "preprocess": PREPROCESS, **changes})


def grid(video: str, number: int) -> Tensor:
    """A value of its own for each frame, exact in every type: halves up to 64."""
    seed = number + 1000 * len(video)
    return torch.randint(-128, 128, SHAPE, generator=torch.Generator().manual_seed(seed)) / 2


def write(folder: Path, videos: dict[str, Sequence[int]], batch_size: int = 4, stride: int = 1, **changes: Any) -> int:
    """Store what is missing of `videos`, in batches that cross from video to video; returns how many frames it was."""
    writer = VideoEmbeddingWriter(folder, meta(**changes), stride)
    frames = [(video, number) for video, numbers in videos.items() for number in writer.missing(video, numbers)]
    writer.describe(completed=False)
    with writer:
        for i in range(0, len(frames), batch_size):
            chosen = frames[i : i + batch_size]
            writer.add(chosen, torch.stack([grid(*frame) for frame in chosen]))
    writer.describe(completed=True, data_dir="frames")
    return len(frames)


@pytest.mark.parametrize(
    ("save_format", "dtype", "stored"),
    [("pt", "fp16", torch.float16), ("pt", "bf16", torch.bfloat16), ("pt", "fp32", torch.float32),
     ("npy", "fp16", torch.float16), ("npy", "fp32", torch.float32)],
)  # fmt: skip
def test_what_is_written_is_read(tmp_path: Path, save_format: str, dtype: str, stored: torch.dtype):
    write(tmp_path, {"b": range(5), "a": [0, 4, 8]}, save_format=save_format, dtype=dtype)
    embeddings = VideoEmbeddings(tmp_path, SHAPE, {"teacher": TEACHER, "preprocess": {"resize": "square"}})
    assert embeddings.videos == ("a", "b")
    assert embeddings.numbers("a") == (0, 4, 8) and embeddings.numbers("b") == (0, 1, 2, 3, 4)
    for video, number in (("a", 8), ("b", 0), ("b", 3)):
        values = embeddings.read(video, number)
        assert values.dtype == stored and torch.equal(values.float(), grid(video, number))
    again = pickle.loads(pickle.dumps(embeddings))
    assert torch.equal(again.read("a", 4).float(), grid("a", 4))


def test_a_file_holds_its_own_frame_and_nothing_else(tmp_path: Path):
    write(tmp_path, {"v": range(8)}, batch_size=8, dtype="fp32")
    values = 6 * 4 * 4 * 4
    sizes = {path.stat().st_size for path in (tmp_path / "v").glob("*.pt")}
    assert len(sizes) == 1 and values < sizes.pop() <= values + video_embedding_format.FILE_OVERHEAD
    stored = torch.load(tmp_path / "v/00003.pt", weights_only=True)
    assert stored.untyped_storage().nbytes() == values
    raw = (tmp_path / "v/00003.pt").read_bytes()
    assert grid("v", 3).numpy().tobytes() in raw and grid("v", 4).numpy().tobytes() not in raw
    first = raw
    write(tmp_path / "again", {"v": [3]}, dtype="fp32")
    assert (tmp_path / "again/v/00003.pt").read_bytes() == first  # no names of temporary files, no times


def test_metadata_of_video_and_folder(tmp_path: Path):
    write(tmp_path, {"sav_1": [0, 4, 8]}, stride=4)
    shared = {
        "version": 1,
        "feature_shape": [6, 4, 4],
        "dtype": "fp16",
        "save_format": "pt",
        "image_size": 56,
        "backbone_stride": 14,
        "teacher": TEACHER,
        "preprocess": PREPROCESS,
        "frame_stride": 4,
        "completed": True,
    }
    video = {"video_name": "sav_1", "num_frames": 3, "frames": ["00000", "00004", "00008"]}
    assert json.loads((tmp_path / "sav_1/metadata.json").read_text()) == {**shared, **video}
    folder = {"num_videos": 1, "data_dir": "frames"}
    assert json.loads((tmp_path / "global_metadata.json").read_text()) == {**shared, **folder}


def test_reading_does_not_change_the_file(tmp_path: Path):
    for save_format in ("pt", "npy"):
        folder = tmp_path / save_format
        write(folder, {"v": [0]}, save_format=save_format)
        before = (folder / f"v/00000.{save_format}").read_bytes()
        VideoEmbeddings(folder).read("v", 0).zero_()
        assert (folder / f"v/00000.{save_format}").read_bytes() == before


def test_an_unfinished_video_is_no_video_and_is_gone_on_with(tmp_path: Path):
    writer = VideoEmbeddingWriter(tmp_path, meta())
    assert writer.missing("v", range(6)) == [0, 1, 2, 3, 4, 5]
    writer.describe(completed=False)
    with writer:
        writer.add([("v", 0), ("v", 1)], torch.stack([grid("v", 0), grid("v", 1)]))
    with pytest.raises(FileNotFoundError, match=r"no video in .* is complete yet"):
        VideoEmbeddings(tmp_path)
    kept = (tmp_path / "v/00001.pt").stat().st_mtime_ns
    (tmp_path / "v/00000.pt").write_bytes((tmp_path / "v/00000.pt").read_bytes()[:300])  # as after a power cut
    assert write(tmp_path, {"v": range(6)}) == 5
    assert (tmp_path / "v/00001.pt").stat().st_mtime_ns == kept
    embeddings = VideoEmbeddings(tmp_path)
    assert all(torch.equal(embeddings.read("v", i).float(), grid("v", i)) for i in range(6))
    assert write(tmp_path, {"v": range(6)}) == 0


def test_only_the_metadata_was_missing(tmp_path: Path):
    write(tmp_path, {"v": range(3)})
    (tmp_path / "v/metadata.json").unlink()
    assert write(tmp_path, {"v": range(3)}) == 0
    assert VideoEmbeddings(tmp_path).numbers("v") == (0, 1, 2)


def test_frames_of_unknown_origin_are_made_again(tmp_path: Path):
    write(tmp_path, {"v": range(3), "w": [0]})
    (tmp_path / "v/metadata.json").unlink()
    (tmp_path / "global_metadata.json").unlink()
    assert write(tmp_path, {"v": range(3), "w": [0]}) == 3  # w's metadata still vouches for its frame


def test_a_finer_stride_adds_frames_and_a_coarser_one_keeps_them(tmp_path: Path):
    write(tmp_path, {"v": range(0, 9, 4)}, stride=4)
    assert write(tmp_path, {"v": range(0, 9, 2)}, stride=2) == 2
    assert VideoEmbeddings(tmp_path).numbers("v") == (0, 2, 4, 6, 8)
    assert write(tmp_path, {"v": range(0, 9, 4)}, stride=4) == 0
    assert VideoEmbeddings(tmp_path).numbers("v") == (0, 2, 4, 6, 8)
    (tmp_path / "v/00004.pt").unlink()
    assert write(tmp_path, {"v": [4]}) == 1
    assert VideoEmbeddings(tmp_path).numbers("v") == (0, 2, 4, 6, 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": {"name": "sam3.pt", "sha256": "b" * 64}}, r"teacher.sha256: found 'aaa.*', wanted 'bbb"),
        ({"preprocess": {**PREPROCESS, "resize": "pad"}}, r"preprocess.resize: found 'square', wanted 'pad'"),
        ({"dtype": "fp32"}, r"dtype: found 'fp16', wanted 'fp32'"),
        ({"save_format": "npy"}, r"save_format: found 'pt', wanted 'npy'"),
        ({"shape": (6, 8, 8)}, r"feature_shape: found \[6, 4, 4\], wanted \[6, 8, 8\]"),
    ],
)
def test_embeddings_of_another_run_do_not_mix(tmp_path: Path, changes: dict[str, Any], named: str):
    write(tmp_path, {"v": range(3)})
    with pytest.raises(ValueError, match=rf"are of another run \(.*{named}.*choose another --output_dir"):
        write(tmp_path, {"w": range(3)}, **changes)
    (tmp_path / "global_metadata.json").unlink()
    with pytest.raises(ValueError, match=named):
        write(tmp_path, {"v": range(3)}, **changes)


def test_another_models_embeddings_are_refused(tmp_path: Path):
    write(tmp_path, {"v": range(3)})
    with pytest.raises(ValueError, match=r"teacher.sha256: found 'a.*', wanted 'c.*; write others with python stage2/"):
        VideoEmbeddings(tmp_path, SHAPE, {"teacher": {"sha256": "c" * 64}})
    with pytest.raises(ValueError, match=r"feature_shape: found \[6, 4, 4\], wanted \[1024, 72, 72\]"):
        VideoEmbeddings(tmp_path, (1024, 72, 72))
    path = tmp_path / "v/metadata.json"
    path.write_text(path.read_text().replace("a" * 64, "d" * 64))
    with pytest.raises(ValueError, match=r"v/metadata.json is of another run than global_metadata.json \(teacher"):
        VideoEmbeddings(tmp_path).numbers("v")


def test_missing_and_damaged_frames_are_named(tmp_path: Path):
    write(tmp_path, {"v": range(0, 17, 4)})
    embeddings = VideoEmbeddings(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"frame 3 of video 'v' is not stored in .* \(5 frames from 0 to 16"):
        embeddings.read("v", 3)
    with pytest.raises(FileNotFoundError, match=r"no complete embeddings of video 'x' in"):
        embeddings.read("x", 0)
    path = tmp_path / "v/00004.pt"
    whole = path.read_bytes()
    for damage in (b"", whole[:100], whole[:-30], b"\x80\x02garbage"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"00004.pt is damaged \({len(damage)} bytes\).*remove that file and run"):
            embeddings.read("v", 4)
    torch.save(torch.zeros(6, 4, 5, dtype=torch.float16), path)
    with pytest.raises(ValueError, match=r"holds torch.float16 \(6, 4, 5\), wanted torch.float16 \(6, 4, 4\)"):
        embeddings.read("v", 4)
    torch.save(torch.zeros(SHAPE), path)
    with pytest.raises(ValueError, match=r"holds torch.float32 .* wanted torch.float16"):
        embeddings.read("v", 4)
    torch.save({"values": 1}, path)
    with pytest.raises(ValueError, match="holds a dict, wanted a tensor"):
        embeddings.read("v", 4)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"the embedding .*00004.pt is gone; run python stage2/"):
        embeddings.read("v", 4)
    assert write(tmp_path, {"v": range(0, 17, 4)}) == 1  # as the message says
    assert torch.equal(embeddings.read("v", 4).float(), grid("v", 4))


def test_damaged_numpy_files_are_named(tmp_path: Path):
    write(tmp_path, {"v": [0]}, save_format="npy")
    path = tmp_path / "v/00000.npy"
    for damage in (b"", path.read_bytes()[:150], b"\x93NUMPY nonsense"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"00000.npy is damaged"):
            VideoEmbeddings(tmp_path).read("v", 0)
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"00000.npy is damaged"):
        VideoEmbeddings(tmp_path).read("v", 0)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path):
    write(tmp_path, {"v": [0]})
    torch.save(Path("x"), tmp_path / "v/00000.pt")  # a class that is not on torch's list
    with pytest.raises(ValueError, match=r"00000.pt is damaged"):
        VideoEmbeddings(tmp_path).read("v", 0)


def test_folders_without_a_good_description(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no video embeddings in .*; write them with python stage2/"):
        VideoEmbeddings(tmp_path)
    path = tmp_path / "global_metadata.json"
    for text, message in (
        ("{broken", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "states no version, feature_shape"),
        (json.dumps({**meta(), "version": 2}), "states version 2, wanted 1"),
        (json.dumps({**meta(), "dtype": "fp8"}), "states fp8 in .pt files; known: fp16"),
        (json.dumps({**meta(), "feature_shape": [4, 4]}), r"shape \(4, 4\) in .* must be three"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            VideoEmbeddings(tmp_path)
    with pytest.raises(ValueError, match="numpy has no bf16"):
        meta(dtype="bf16", save_format="npy")


def test_values_that_are_not_finite_are_left_out(tmp_path: Path):
    values = torch.ones(3, *SHAPE)
    values[0, 0, 0, 0], values[1, 5, 3, 3] = float("nan"), 70000.0  # float16 ends at 65504
    writer = VideoEmbeddingWriter(tmp_path, meta())
    writer.missing("v", range(3))
    with writer:
        writer.add([("v", 0), ("v", 1), ("v", 2)], values)
    assert sorted(writer.rejected) == [("v", 0), ("v", 1)]
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["00002.pt"]


def test_a_full_disk_is_reported_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(values: Tensor, file: Any) -> None:
        file.write(b"PK")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(video_embedding_format.torch, "save", full)
    with pytest.raises(OSError, match=r"could not write .*00000.pt, is the disk full .* pos 64 vs 0; frames"):
        write(tmp_path, {"v": range(3)})
    assert not list((tmp_path / "v").iterdir())


def test_an_error_in_a_thread_stops_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    writer = VideoEmbeddingWriter(tmp_path, meta(), num_threads=1)
    writer.missing("v", range(100))
    monkeypatch.setattr(video_embedding_format, "atomic_path", refused)
    with pytest.raises(OSError, match="Permission denied"), writer:
        for number in range(100):
            writer.add([("v", number)], grid("v", number)[None])
        pytest.fail("100 batches went into a queue that holds two")
    with pytest.raises(ValueError, match=r"1 frames come as \(1, 6, 4, 5\), wanted"):
        VideoEmbeddingWriter(tmp_path, meta()).add([("v", 0)], torch.zeros(1, 6, 4, 5))
