"""What one run learns from: the splits, what is left out or refused, and embeddings of another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from yacs.config import CfgNode

from sam3.engine.files import sha256
from sam3.engine.video_embeddings import VideoEmbeddings
from sam3.transforms import Preprocess
from stage2 import config as stage2_config
from stage2 import save_video_embeddings_stage2
from stage2.data.augmentation import Augmentation, Jitter
from stage2.data.sources import Sources, open_sources, split_videos
from tests.samples import TINY_MAP, write_sav_video

SQUARE = Preprocess(img_size=224, resize="square")  # of the tiny teacher
YAML = Path(__file__).resolve().parents[2] / "stage2/configs/efficient_memory.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short videos; to be left as they are."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(10):
        write_sav_video(root, f"sav_{i:06d}", np.ones((2, 1, 30, 40), dtype=bool), 8, every=4)
    return root


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, root: Path) -> Path:
    output = tmp_path_factory.mktemp("stored")
    arguments = ["--data_dir", root, "--output_dir", output, "--checkpoint", teacher_file, "--frame_stride", 4]
    assert save_video_embeddings_stage2.main(list(map(str, [*arguments, "--num_workers", 0, "--device", "cpu"]))) == 0
    return output


def config_of(root: Path, stored: Path | None = None, **keys: Any) -> CfgNode:
    """keys: with __ for dots."""
    pairs = {"DATA.SAV_ROOT": root, "DATA.USE_PRECOMPUTED": stored is not None, "OUTPUT": "out"}
    if stored is not None:
        pairs["DATA.EMBEDDING_DIR"] = stored
    pairs |= {name.replace("__", "."): value for name, value in keys.items()}
    words = ["--config", str(YAML), *(str(word) for pair in pairs.items() for word in pair)]
    return stage2_config.load(stage2_config.make_parser("").parse_intermixed_args(words))


def opened(config: CfgNode, teacher: str = "") -> Sources:
    return open_sources(config, SQUARE, TINY_MAP, {"sha256": teacher}, config.DATA.SKIP_BAD_VIDEOS)


def test_videos_are_dealt_by_their_names_and_never_to_both(root: Path):
    names = [f"v{i}" for i in range(1000)]
    train, val = split_videos(names, config_of(root, DATA__NUM_VAL_SAMPLES=-1))
    assert len(train) == 950 and len(val) == 50 and not set(train) & set(val)
    assert train == sorted(train) and val == sorted(val)
    assert split_videos(names[::-1], config_of(root, DATA__NUM_VAL_SAMPLES=-1)) == (train, val)
    other, _ = split_videos(names, config_of(root, SEED=7))
    assert other != train
    # most keep their side when others come
    more, more_val = split_videos([*names, *(f"w{i}" for i in range(100))], config_of(root, DATA__NUM_VAL_SAMPLES=-1))
    assert len(set(val) & set(more)) <= 5 and len(set(train) & set(more_val)) <= 12
    assert len(split_videos(names, config_of(root, DATA__NUM_VAL_SAMPLES=7))[1]) == 7
    half, half_val = split_videos(names, config_of(root, DATA__SUBSET=0.5))
    assert (len(half), len(half_val)) == (475, 25)
    tiny, tiny_val = split_videos(names, config_of(root, DATA__DEBUG=True))
    assert (len(tiny), len(tiny_val)) == (7, 1)


def test_few_videos_still_give_both_splits(root: Path):
    config = config_of(root)
    assert [tuple(map(len, split_videos(names, config))) for names in ("a", "ab", "abcdef")] == [(1, 0), (1, 1), (5, 1)]
    none = config_of(root, DATA__VAL_SPLIT=0.0, DATA__TRAIN_SPLIT=1.0)
    assert tuple(map(len, split_videos("abc", none))) == (3, 0)
    assert tuple(map(len, split_videos("abc", config_of(root, DATA__NUM_VAL_SAMPLES=0)))) == (2, 0)


def test_an_epoch_holds_at_least_one_optimizer_step(root: Path):
    config = config_of(root, DATA__BATCH_SIZE=2, TRAIN__EFFECTIVE_BATCH=32)
    sources = opened(config)
    assert (len(sources.train), len(sources.val)) == (9, 1)
    assert len(sources.train_dataset(config)) == 36 and len(sources.val_dataset(config)) == 1
    small = config_of(root, DATA__BATCH_SIZE=2, TRAIN__ACCUMULATION_STEPS=1)
    assert len(opened(small).train_dataset(small)) == 9
    without = config_of(root, DATA__NUM_VAL_SAMPLES=0)
    assert opened(without).val_dataset(without) is None


def test_the_config_reaches_the_dataset(root: Path, sa1b: Path):
    keys = {"AUG.ENABLED": True, "AUG.HFLIP": 0.25, "AUG.AFFINE.DEGREES": 5.0, "AUG.GRAYSCALE": 0.0}
    keys |= {"AUG.COLOR_JITTER.BRIGHTNESS": 0.2, "AUG.FRAME_JITTER.SATURATION": 0.3, "DATA.SA1B_RATIO": 0.5}
    keys |= {"DATA.SA1B_ROOT": sa1b, "DATA.NUM_FRAMES": 3, "DATA.FRAME_SKIP": 8, "DATA.MAX_OBJECTS": 2}
    keys |= {"DISTILL.PROMPTS.MASK": 0.0, "DISTILL.PROMPTS.BOX": 1.0, "DISTILL.PROMPTS.CLICK": 0.0}
    config = config_of(root, DATA__TIME_REVERSAL=0.0, **keys)
    sources = opened(config)
    clips = sources.train_dataset(config)
    assert clips.augmentation == Augmentation(0.25, 5.0, 20.0, Jitter(0.2, 0.03, 0.03), Jitter(0.1, 0.05, 0.3), 0.0)
    sampling = clips.sampling
    assert (sampling.num_frames, sampling.skip, sampling.max_objects, sampling.reversal) == (3, 8, 2, 0.0)
    assert clips.prompts.box == 1.0 and clips.mask_size == 64 and clips.seed == 42
    batch = clips.load(range(12))
    assert set(batch.kinds) == {"box"} and batch.images.shape == (12, 3, 3, 224, 224)
    assert {key.split("_")[0] for key in batch.keys} == {"sav", "sa"}
    val = sources.val_dataset(config)
    assert val.augmentation is None and val.stills is None
    assert "50% of the clips of 8 still pictures" in sources.describe()
    with pytest.raises(ValueError, match=r"no folder .*annotations/train, but clips of still pictures"):
        opened(config_of(root, **(keys | {"DATA.SA1B_ROOT": root})))


def test_embeddings_are_opened_and_checked(root: Path, stored: Path, teacher_file: Path):
    config = config_of(root, stored)
    sources = opened(config, sha256(teacher_file))
    assert isinstance(sources.store, VideoEmbeddings) and not sources.left_out
    assert f"stored in {stored}: {TINY_MAP} fp16 of 10 videos, {teacher_file.name}" in sources.describe()
    clips = sources.train_dataset(config)
    batch = clips.read_embeddings(clips.load([0, 1]))
    assert batch.images is None and batch.embeddings.shape == (2, 8, *TINY_MAP)
    with pytest.raises(ValueError, match=r"teacher.sha256: found '[0-9a-f]{64}', wanted 'another'"):
        opened(config, "another")
    pad = Preprocess(img_size=224, resize="pad")
    with pytest.raises(ValueError, match=r"preprocess.resize"):
        open_sources(config, pad, TINY_MAP, {"sha256": sha256(teacher_file)})
    with pytest.raises(ValueError, match=r"feature_shape"):
        open_sources(config, SQUARE, (1024, 72, 72), {"sha256": sha256(teacher_file)})
    with pytest.raises(FileNotFoundError, match=r"no video embeddings in .*gone"):
        opened(config_of(root, root / "gone"))


def test_frames_are_taken_from_those_that_are_stored(root: Path, stored: Path, teacher_file: Path, tmp_path: Path):
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "global_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frame_stride": 8}))
    with pytest.raises(ValueError, match=r"FRAME_SKIP must be a multiple of 8, .*--frame_stride.*, got 4"):
        opened(config_of(root, tmp_path), sha256(teacher_file))
    sources = opened(config_of(root, tmp_path, DATA__FRAME_SKIP=8), sha256(teacher_file))
    clips = sources.train_dataset(config_of(root, tmp_path, DATA__FRAME_SKIP=8))
    assert {number for frames in clips.load(range(9)).frames for _, number in frames} == {0}


def test_videos_that_lack_something_are_refused_or_left_out(
    root: Path, stored: Path, teacher_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    videos, some = tmp_path / "videos", tmp_path / "stored"
    shutil.copytree(root, videos)
    shutil.copytree(stored, some)
    (videos / "sav_000003" / "sav_000003_manual.json").unlink()
    with pytest.raises(ValueError, match=r"1 of 10 videos have no annotations \(manual, auto\) .*: sav_000003; give"):
        opened(config_of(videos))
    for i in (3, 5, 7):
        (some / f"sav_{i:06d}" / "metadata.json").unlink()
    config, digest = config_of(videos, some), sha256(teacher_file)
    with pytest.raises(ValueError, match=r"3 of 10 videos have no embeddings .*: sav_000003, sav_000005, sav_000007"):
        opened(config_of(root, some), digest)
    with pytest.raises(ValueError, match=r"leave them out with DATA.SKIP_BAD_VIDEOS True"):
        opened(config, digest)
    config = config_of(videos, some, DATA__SKIP_BAD_VIDEOS=True)
    sources = opened(config, digest)
    assert set(sources.train) | set(sources.val) == {f"sav_{i:06d}" for i in range(10) if i not in (3, 5, 7)}
    first, second = sources.left_out.items()
    assert first[0].startswith("no annotations") and first[1] == ["sav_000003"]
    assert second[0].startswith("no embeddings") and second[1] == ["sav_000005", "sav_000007"]
    assert sources.train_dataset(config).skip_bad
    assert "they are left out" in caplog.text
    with pytest.raises(ValueError, match=r"10 of 10 videos have no annotations \(auto\)"):
        opened(config_of(root, DATA__KINDS="['auto']", DATA__SKIP_BAD_VIDEOS=True))
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone; make it with data/extract_sav_frames.py"):
        opened(config_of(root / "gone"))


def test_processes_that_see_other_videos_are_told(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stage2.data.sources.distributed.gather_objects", lambda value: [value, "another"])
    with pytest.raises(ValueError, match=r"the processes of this run see different data in .*videos"):
        opened(config_of(root))
