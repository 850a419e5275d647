"""What a run learns from: pictures, annotations and embeddings that fit together, or a message."""

from __future__ import annotations

import logging

import pytest
import torch

from sam3.engine import distributed, image_list
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import store_meta
from sam3.engine.sa1b import annotation_path
from sam3.transforms import Preprocess
from stage1_geometry_finetune.config import geometry_defaults
from stage1_geometry_finetune.prompts import build_sampling
from stage1_geometry_finetune.sources import open_sources
from tests.samples import write_sa1b

SHAPE = (3, 4, 4)
TEACHER = {"name": "tiny", "sha256": "ab" * 32}


def write_store(folder, keys, preprocess=None, augmentation=None):
    meta = store_meta(
        SHAPE,
        preprocess=(preprocess or Preprocess(img_size=56)).to_meta(),
        augmentation=augmentation or {"enabled": False},
        teacher=TEACHER,
    )
    with EmbeddingWriter(folder, meta) as writer:
        for key in keys:
            writer.add(key, 0, torch.zeros(SHAPE))


@pytest.fixture
def root(tmp_path):
    """12 train and 2 val pictures, all of them stored in `store`."""
    write_store(tmp_path / "store", write_sa1b(tmp_path, num_train=12, num_val=2))
    return tmp_path


def config_for(root, *options):
    config = geometry_defaults()
    config.merge_from_list([
        *("DATA.DATA_PATH", str(root), "DATA.IMG_SIZE", 56, "DISTILL.TEACHER_EMBED_PATH", str(root / "store")),
        *("DISTILL.EMBED_DIM", 3, "DISTILL.EMBED_SIZE", 4),
        *options,
    ])  # fmt: skip
    return config


def test_everything_is_there(root):
    config = config_for(root)
    sources = open_sources(config)
    assert len(sources.train) == 12
    assert sources.val.keys() == ["sa_13", "sa_14"]
    assert sources.teacher_meta == TEACHER
    assert sources.left_out == {}
    assert "14 embeddings (3, 4, 4) float16, tiny (sha256 abababababab)" in sources.describe()
    batch = sources.train_dataset(config).load([0, 1], 0)
    assert batch.boxes.shape == (2, 2, 4)
    assert batch.gt_masks is None
    assert not torch.equal(batch.boxes, batch.targets)
    batch = sources.val_dataset(config).load([0, 1], 0)
    assert batch.gt_masks.shape == (2, 2, 16, 16)
    assert torch.equal(batch.boxes, batch.targets)


def test_caps(root):
    def counts(*options):
        sources = open_sources(config_for(root, *options))
        return len(sources.train), None if sources.val is None else len(sources.val)

    assert counts("DATA.NUM_SAMPLES", 5, "DATA.NUM_VAL_SAMPLES", 1) == (5, 1)
    assert counts("DATA.NUM_VAL_SAMPLES", 0) == (12, None)
    assert counts("DATA.NUM_VAL_SAMPLES", -1, "DATA.DEBUG", True) == (12, 2)


def test_every_key_reaches_the_sampling(root):
    options = {
        "DISTILL.MAX_PROMPTS": 5,
        "DISTILL.USE_POINT_PROMPTS": False,
        "DISTILL.PROMPT_MIX_PROB_BOX": 0.25,
        "DISTILL.PROMPT_LAYOUT": "per_image",
        "DISTILL.POINT_SOURCE": "mask",
        "DATA.BOX_JITTER": False,
        "DATA.FILTER_BY_AREA": [10, None],
        "DATA.SORT_BY_AREA": False,
        "DISTILL.DECODE_ITERS": 3,
        "DISTILL.POINTS_PER_REFINE_ITER": 2,
        "DISTILL.POINTS_PER_REFINE_ITER_MIN": 3,
        "DISTILL.POINTS_PER_REFINE_ITER_MAX": 4,
    }
    config = config_for(root)
    for key, value in options.items():
        group, name = key.split(".")
        config[group][name] = value
    sampling = build_sampling(config)
    assert list(vars(sampling).values()) == [
        *(5, True, False, False, 0.25, "per_image", "mask", False, (10, None), False, None, 3, 2, 3, 4)
    ]
    assert build_sampling(config_for(root, "DATA.LOAD_GT_MASK", True)).mask_nms == 0.8
    mixed = build_sampling(config_for(root, "DISTILL.PROMPT_MIX", True))
    assert mixed.prompt_mix
    sources = open_sources(config_for(root))
    assert sources.train_dataset(config_for(root, "DISTILL.NO_RAND", True)).same_every_epoch
    assert not sources.train_dataset(config_for(root)).same_every_epoch


# Pictures without annotations -------------------------------------------------------------------------------------


def test_no_annotation_folder(root, caplog):
    (root / "annotations" / "val").rename(root / "val")
    sources = open_sources(config_for(root))
    assert (len(sources.train), sources.val, sources.left_out) == (12, None, {})
    assert caplog.messages == [
        f"no folder {root}/annotations/val: prompts come from SA-1B's annotation files, so there will be no validation"
    ]
    (root / "annotations" / "train").rename(root / "train")
    with pytest.raises(ValueError, match=r"^no folder .*annotations/train: .*reorg_sa1b\.py"):
        open_sources(config_for(root, "DATA.SKIP_BAD_IMAGES", True))


def test_train_pictures_without_annotation_file(root, caplog):
    keys = [f"sa_{i}" for i in range(1, 12)]
    for key in keys:
        annotation_path(root, "train", key).unlink()
    with pytest.raises(ValueError, match=r"^11 pictures in .*train have no JSON file") as caught:
        open_sources(config_for(root))
    assert ": " + ", ".join(sorted(keys)[:10]) + " and 1 more;" in str(caught.value)
    sources = open_sources(config_for(root, "DATA.SKIP_BAD_IMAGES", True))
    assert sources.train.keys() == ["sa_12"]
    assert list(sources.left_out.values()) == [sorted(keys)]
    assert "11 pictures in" in caplog.text
    annotation_path(root, "train", "sa_12").unlink()
    with pytest.raises(FileNotFoundError, match=r"the 12 there have no JSON file in .*annotations/train"):
        open_sources(config_for(root, "DATA.SKIP_BAD_IMAGES", True))


def test_val_pictures_without_annotation_file_stop_no_training(root, caplog):
    annotation_path(root, "val", "sa_13").unlink()
    sources = open_sources(config_for(root))
    assert sources.val.keys() == ["sa_14"]
    assert sources.left_out == {f"val: no annotation file in {root}/annotations/val": ["sa_13"]}
    assert "1 pictures in" in caplog.text
    annotation_path(root, "val", "sa_14").unlink()
    with caplog.at_level(logging.INFO):
        assert open_sources(config_for(root)).val is None
    assert "the 2 there have no JSON file" in caplog.text


def test_folders_are_listed_once(root, monkeypatch):
    listed = []
    real = image_list.os.scandir

    def counted(folder):
        listed.append(str(folder))
        return real(folder)

    monkeypatch.setattr("sam3.engine.image_list.os.scandir", counted)
    open_sources(config_for(root))
    assert sorted(folder for folder in listed if "images" in folder) == [f"{root}/images/train", f"{root}/images/val"]


def test_no_data_set(root, tmp_path):
    with pytest.raises(ValueError, match="--data-path"):
        open_sources(config_for(root, "DATA.DATA_PATH", ""))
    with pytest.raises(FileNotFoundError, match=r"no folder .*none/images/train"):
        open_sources(config_for(root, "DATA.DATA_PATH", str(tmp_path / "none")))


def test_no_val_split_means_no_validation(root):
    (root / "images" / "val").rename(root / "elsewhere")
    config = config_for(root)
    sources = open_sources(config)
    assert sources.val is None
    assert sources.val_dataset(config) is None


def test_processes_that_see_other_pictures(root, monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda digest: [digest, "other"])
    with pytest.raises(ValueError, match="see different pictures"):
        open_sources(config_for(root))


# Stores -----------------------------------------------------------------------------------------------------------


def test_store_that_lacks_pictures(root):
    write_store(root / "part", ["sa_1", "sa_2", "sa_13"])
    options = ("DISTILL.TEACHER_EMBED_PATH", str(root / "part"))
    with pytest.raises(ValueError, match=r"no teacher embedding for 10 of 12 pictures .*sa_3.*SKIP_BAD_IMAGES"):
        open_sources(config_for(root, *options))
    sources = open_sources(config_for(root, *options, "DATA.SKIP_BAD_IMAGES", True))
    assert sources.train.keys() == ["sa_1", "sa_2"]
    assert sources.val.keys() == ["sa_13"]
    assert [len(keys) for keys in sources.left_out.values()] == [10, 1]
    assert all("no teacher embedding" in reason for reason in sources.left_out)


def test_store_of_augmented_pictures(root):
    augmentation = {"enabled": True, "flip": 0.5, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
    write_store(root / "flipped", ["sa_1"], augmentation=augmentation)
    with pytest.raises(ValueError, match=r"^the embeddings in .*flipped and .* DISTILL\.NO_RAND True"):
        open_sources(config_for(root, "DISTILL.TEACHER_EMBED_PATH", str(root / "flipped")))


def test_store_of_another_run(root):
    write_store(root / "other", ["sa_1"], preprocess=Preprocess(img_size=56, resize="square"))
    with pytest.raises(ValueError, match=r"preprocess\.resize: found 'square', wanted 'pad'"):
        open_sources(config_for(root, "DISTILL.TEACHER_EMBED_PATH", str(root / "other")))
    with pytest.raises(ValueError, match=r"shape: found \[3, 4, 4\], wanted \[5, 4, 4\]"):
        open_sources(config_for(root, "DISTILL.EMBED_DIM", 5))


def test_no_store(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no embedding shards"):
        open_sources(config_for(root, "DISTILL.TEACHER_EMBED_PATH", str(tmp_path / "none")))
    with pytest.raises(ValueError, match="--teacher-embed-path"):
        open_sources(config_for(root, "DISTILL.TEACHER_EMBED_PATH", ""))
