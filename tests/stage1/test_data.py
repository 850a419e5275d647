"""Stage 1's batches: what is in them, and that workers, processes and restarts change nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import stage1
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import EmbeddingReader, store_meta
from sam3.engine.loader import build_loader
from sam3.engine.losses import build_valid_mask
from sam3.engine.sa1b import list_sa1b
from sam3.engine.sampler import EpochSampler
from sam3.transforms import Preprocess, read_image
from stage1.data.augmentation import Augmentation, seed_of
from stage1.data.dataset import Stage1Dataset
from tests.samples import write_record, write_sa1b

SHAPE = (3, 4, 4)
PREPROCESS = Preprocess(img_size=56)


def target(key):
    return torch.full(SHAPE, float(seed_of(key) % 1000))


@pytest.fixture
def data(tmp_path):
    """(root, images, store) with six training pictures."""
    write_sa1b(tmp_path, num_train=6, num_val=0)
    images = list_sa1b(tmp_path, "train")
    with EmbeddingWriter(tmp_path / "store", store_meta(SHAPE)) as writer:
        for key in images.keys():  # noqa: SIM118
            writer.add(key, seed_of(key, 3), target(key))
    return tmp_path, images, EmbeddingReader(tmp_path / "store")


def sampler(count, batch_size=4, **options):
    return EpochSampler(count, batch_size, drop_last=False, padding=False, **options)


def same(a, b):
    assert a.keys == b.keys
    for name in ("images", "sizes", "seeds"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.embeddings is None) == (b.embeddings is None)
    if a.embeddings is not None:
        assert torch.equal(a.embeddings.data, b.embeddings.data)
    return True


def test_batch_holds_what_the_parts_give(data):
    _, images, store = data
    batches = list(build_loader(Stage1Dataset(images, PREPROCESS, store), sampler(6, shuffle=False), 0))
    assert [batch.keys for batch in batches] == [images.keys()[:4], images.keys()[4:]]
    batch = batches[0]
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 56, 56)
    assert batch.embeddings.data.dtype == torch.float16
    assert batch.skipped == []
    for row, key in enumerate(batch.keys):
        fitted, size = PREPROCESS.fit(read_image(images.path(row)))
        assert torch.equal(batch.images[row], fitted)
        assert tuple(batch.sizes[row].tolist()) == size
        assert torch.equal(batch.embeddings.values()[row], target(key))
        assert batch.seeds[row] == seed_of(key, 3)


def test_without_store_seeds_come_from_keys(data):
    _, images, _ = data
    batch = Stage1Dataset(images, PREPROCESS, seed=11).load([0, 2])
    assert batch.embeddings is None
    assert batch.seeds.tolist() == [seed_of("sa_1", 11), seed_of("sa_3", 11)]
    assert len({seed_of(f"sa_{i}") for i in range(1000)}) == 1000
    assert seed_of("sa_1", 0) != seed_of("sa_1", 1)
    assert all(0 <= seed_of(f"sa_{i}") < 2**31 for i in range(1000))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_workers_give_what_one_process_gives(data, method):
    _, images, store = data
    dataset = Stage1Dataset(images, PREPROCESS, store, Augmentation())
    alone = [list(build_loader(dataset, sampler(6, batch_size=2), 0)) for _ in range(2)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loader = build_loader(dataset, sampler(6, batch_size=2), 2, start_method=method)
    assert len(loader) == 3
    for epoch in range(2):  # workers stay for the second
        batches = list(loader)
        assert all(same(a, b) for a, b in zip(alone[epoch], batches, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_int8_store_through_workers(data):
    root, images, _ = data
    with EmbeddingWriter(root / "store8", store_meta(SHAPE, "int8")) as writer:
        for key in images.keys():  # noqa: SIM118
            writer.add(key, 1, target(key))
    dataset = Stage1Dataset(images, PREPROCESS, EmbeddingReader(root / "store8"))
    for batch in build_loader(dataset, sampler(6), 2):
        assert batch.embeddings.data.dtype == torch.int8
        expected = torch.stack([target(key) for key in batch.keys])
        assert torch.allclose(batch.embeddings.values(), expected, rtol=1e-6)


# Augmentation -----------------------------------------------------------------------------------------------------


def test_augmentation_is_inside_the_picture_and_differs_by_seed():
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    augment = Augmentation()
    assert torch.equal(augment(picture, 7), augment(picture, 7))
    assert len({augment(picture, seed).sum().item() for seed in range(8)}) == 8
    flip_only = Augmentation(flip=1, brightness=0, contrast=0, saturation=0)
    assert torch.equal(flip_only(picture, 3), picture.flip(2))
    turned = sum(torch.equal(Augmentation(0.5, 0, 0, 0)(picture, seed), picture.flip(2)) for seed in range(100))
    assert 30 < turned < 70
    # One step's setting does not disturb the draws of the others.
    bright = [Augmentation(0, 0.2, 0, 0)(picture, seed) for seed in range(3)]
    assert all(torch.equal(Augmentation(1, 0.2, 0, 0)(picture, s), bright[s].flip(2)) for s in range(3))
    assert Augmentation(**augment.to_meta()) == augment


def test_padding_stays_zero_under_augmentation(data):
    _, images, store = data
    batch = next(iter(build_loader(Stage1Dataset(images, PREPROCESS, store, Augmentation()), sampler(6), 0)))
    for picture, (h, w) in zip(batch.images, batch.sizes.tolist(), strict=True):
        assert not picture[:, h:].any()
        assert not picture[:, :, w:].any()
        assert picture[:, :h, :w].any()


def environment():
    root = Path(stage1.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{root / 'sam3'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}


def test_stored_seed_replays_in_another_process(data):
    """The exporter sees a picture under the seed it stores; training, elsewhere, sees the same."""
    root, images, _ = data
    exported = Stage1Dataset(images, PREPROCESS, None, Augmentation(), seed=3).load(range(6))
    code = textwrap.dedent(f"""
        import hashlib, sys
        from sam3.engine.embeddings import EmbeddingReader
        from sam3.engine.sa1b import list_sa1b
        from sam3.transforms import Preprocess
        from stage1.data.augmentation import Augmentation
        from stage1.data.dataset import Stage1Dataset
        dataset = Stage1Dataset(list_sa1b({str(root)!r}, "train"), Preprocess(img_size=56),
                                EmbeddingReader({str(root / "store")!r}), Augmentation())
        batch = dataset.load(range(6))
        print(hashlib.sha256(batch.images.contiguous().numpy().tobytes()).hexdigest())
    """)
    here = hashlib.sha256(exported.images.contiguous().numpy().tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert there.stdout.strip() == here
    plain = Stage1Dataset(images, PREPROCESS).load(range(6))
    assert not torch.equal(plain.images, exported.images)


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["pad", "square"])
def test_pictures_of_all_shapes(tmp_path, resize):
    shapes = [(1, 1), (1, 300), (300, 1), (56, 56), (57, 55), (400, 90)]
    for number, (rows, columns) in enumerate(shapes):
        write_record(tmp_path, "train", f"sa_{number}", np.full((rows, columns, 3), 100, np.uint8))
    preprocess = Preprocess(img_size=56, resize=resize)
    batch = Stage1Dataset(list_sa1b(tmp_path, "train"), preprocess).load(range(len(shapes)))
    for row, (rows, columns) in enumerate(shapes):
        h, w = batch.sizes[row].tolist()
        assert (h, w) == preprocess.fitted_size(rows, columns)
        assert max(h, w) == 56
        inside = batch.images[row, :, :h, :w].int()
        assert (inside - 100).abs().max() <= 2
        assert batch.images[row].int().sum() == inside.sum()


def test_valid_mask_agrees_with_interpolated_ones():
    """The mask the losses use, against its definition: ones over the picture, resized to the grid, above one half."""
    sizes = torch.tensor([[h, w] for h in (1, 7, 8, 13, 14, 21, 22, 100, 224) for w in (3, 8, 112, 223, 224)])
    ones = torch.zeros(len(sizes), 1, 224, 224)
    for plane, (h, w) in zip(ones, sizes.tolist(), strict=True):
        plane[:, :h, :w] = 1
    expected = (F.interpolate(ones, (16, 16), mode="bilinear", align_corners=False) > 0.5).float()
    assert torch.equal(build_valid_mask(sizes, 224, 16), expected)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(data):
    """Picture 2 is cut, picture 3 empty, picture 5 gone."""
    root, images, store = data
    folder = root / "images" / "train"
    cut = folder / "sa_2.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "sa_3.jpg").write_bytes(b"")
    (folder / "sa_5.jpg").unlink()
    return images, store


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_raise_or_are_left_out(damaged, workers):
    images, store = damaged
    strict = build_loader(Stage1Dataset(images, PREPROCESS, store), sampler(6, 3, shuffle=False), workers)
    with pytest.raises(ValueError, match=r"^picture .*sa_2\.jpg is truncated") as caught:
        list(strict)
    assert "\n" not in str(caught.value)
    dataset = Stage1Dataset(images, PREPROCESS, store, skip_bad=True)
    first, second = build_loader(dataset, sampler(6, 3, shuffle=False), workers)
    assert first.keys == ["sa_1"]
    assert first.images.shape == (1, 3, 56, 56)
    assert torch.equal(first.embeddings.values()[0], target("sa_1"))
    assert first.seeds.tolist() == [seed_of("sa_1", 3)]
    assert [key for key, _ in first.skipped] == ["sa_2", "sa_3"]
    assert "truncated" in first.skipped[0][1]
    assert "empty" in first.skipped[1][1]
    assert second.keys == ["sa_4", "sa_6"]
    assert [key for key, _ in second.skipped] == ["sa_5"]


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_of_bad_pictures_only(damaged, workers):
    images, store = damaged
    dataset = Stage1Dataset(images.select({"sa_2", "sa_3"}), PREPROCESS, store, skip_bad=True)
    (batch,) = build_loader(dataset, sampler(2), workers)
    assert len(batch) == 0
    assert batch.images.shape == (0, 3, 56, 56)
    assert len(batch.embeddings) == 0
    assert len(batch.skipped) == 2


def test_missing_file_raises_naming_it(damaged):
    images, _ = damaged
    with pytest.raises(FileNotFoundError, match=r"sa_5\.jpg"):
        Stage1Dataset(images, PREPROCESS)[4]


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_embedding_raises_even_when_skipping(data, workers):
    root, _, store = data
    write_record(root, "train", "sa_99", np.zeros((20, 20, 3), np.uint8))
    images = list_sa1b(root, "train")
    loader = build_loader(Stage1Dataset(images, PREPROCESS, store, skip_bad=True), sampler(7), workers)
    with pytest.raises(ValueError, match=r"^no teacher embedding for 'sa_99'"):
        list(loader)
    if workers:  # they end with the loader: nothing else holds it, such as the error
        processes = loader.pictures._iterator._workers
        start = time.monotonic()
        del loader
        assert not any(process.is_alive() for process in processes)
        assert time.monotonic() - start < 4  # workers that do not hear of it are waited for, 5 s each


def test_png_under_a_jpg_name_works(data):
    root, images, _ = data
    Image.new("RGB", (40, 30), (9, 8, 7)).save(root / "images" / "train" / "sa_1.jpg", format="PNG")
    batch = Stage1Dataset(images, PREPROCESS)[0]
    assert batch.images[0, :, 0, 0].tolist() == [9, 8, 7]


def test_batches_are_dataclasses_of_tensors(data):
    """Moving them to a device relies on it."""
    _, images, store = data
    batch = next(iter(build_loader(Stage1Dataset(images, PREPROCESS, store), sampler(6), 0)))
    names = {field.name for field in dataclasses.fields(batch)}
    assert names == {"images", "sizes", "seeds", "keys", "embeddings", "skipped"}
