"""Clips in batches: pictures, masks and prompts that fit each other, from files and embeddings, always the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3.engine.image_list import ImageList
from sam3.engine.loader import build_loader
from sam3.engine.sa1b import list_sa1b
from sam3.engine.sampler import EpochSampler
from sam3.engine.video_embeddings import VideoEmbeddings
from sam3.model.tracker_config import TINY_MEMORY
from sam3.tracker_builder import build_memory, build_video_model
from sam3.transforms import Preprocess, read_image
from stage2 import save_video_embeddings_stage2
from stage2.data.augmentation import Augmentation
from stage2.data.batch import ABSENT, PRESENT, ClipBatch
from stage2.data.clips import ClipSampling
from stage2.data.prompts import PromptSampling
from stage2.data.sav_dataset import SavDataset, clip_generator
from stage2.data.stills import Stills
from stage2.model import MemoryDistiller
from stage2.rollout import Rollout
from stage2.trunk import load_trunk
from tests.samples import TINY_MAP, write_record, write_sav_video

SQUARE = Preprocess(img_size=224, resize="square")  # of the tiny teacher
CELLS = 64
NAMES = ["sav_000001", "sav_000002", "sav_000003"]
SAMPLING = ClipSampling(num_frames=3, max_objects=2)


def moving(frames: int, num_objects: int, rows: int, columns: int) -> np.ndarray:
    """Masks (frames, objects, H, W) of squares that move to the right; the last object comes in the third frame."""
    masks = np.zeros((frames, num_objects, rows, columns), dtype=bool)
    for t in range(frames):
        for i in range(num_objects):
            if i < num_objects - 1 or t >= 2:
                masks[t, i, 5 + 12 * i : 25 + 12 * i, 4 + 3 * t : 24 + 3 * t] = True
    return masks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 7, 2 and 1 annotated frames; to be left as they are."""
    root = tmp_path_factory.mktemp("videos")
    write_sav_video(root, NAMES[0], moving(7, 3, 60, 90), 27)
    write_sav_video(root, NAMES[1], moving(2, 2, 90, 60), 8, every=4)
    write_sav_video(root, NAMES[2], moving(1, 2, 60, 60), 1)
    return root


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, root: Path) -> Path:
    output = tmp_path_factory.mktemp("stored")
    arguments = ["--data_dir", root, "--output_dir", output, "--checkpoint", teacher_file, "--frame_stride", 4]
    arguments += ["--num_workers", 0, "--device", "cpu"]
    assert save_video_embeddings_stage2.main(list(map(str, arguments))) == 0
    return output


def dataset(root: Path, names: list[str] = NAMES, preprocess: Preprocess = SQUARE, **options) -> SavDataset:
    sampling, prompts = options.pop("sampling", SAMPLING), options.pop("prompts", PromptSampling())
    return SavDataset(root, names, preprocess, CELLS, sampling, prompts, **options)


def assert_same(first: ClipBatch, second: ClipBatch) -> None:
    for name, value in vars(first).items():
        other = getattr(second, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize("resize", ["square", "pad"])
def test_a_batch_holds_pictures_masks_and_prompts_of_the_same_frames(root: Path, resize: str):
    preprocess = Preprocess(img_size=224, resize=resize)
    clips = dataset(root, preprocess=preprocess)
    kinds: set[str] = set()
    for epoch in range(4):
        batch = clips.load([0, 1, 2], epoch)
        assert batch.images.shape == (3, 3, 3, 224, 224) and batch.embeddings is None and not batch.skipped
        assert batch.sizes.tolist() == [list(preprocess.fitted_size(*size)) for size in ((60, 90), (90, 60), (60, 60))]
        num_objects = len(batch.kinds)
        assert batch.masks.shape == (num_objects, 3, CELLS, CELLS) and batch.states.shape == (num_objects, 3)
        assert batch.points.shape == (num_objects, 2, 2) and batch.labels.shape == (num_objects, 2)
        assert batch.clip_of_object.tolist() == sorted(batch.clip_of_object.tolist())
        assert set(batch.clip_of_object.tolist()) == {0, 1, 2} and (batch.states[:, 0] == PRESENT).all()
        assert torch.equal(batch.masks.flatten(2).any(2), batch.states == PRESENT)
        assert batch.num_frames == 3 and len(batch) == 3
        for clip, frames in enumerate(batch.frames):
            assert batch.keys[clip] == f"{NAMES[clip]}/{frames[0][1]:05d}"
            for t, (name, number) in enumerate(frames):
                assert name == NAMES[clip] and number % 4 == 0
                picture = read_image(root / name / f"{number:05d}.jpg")
                assert torch.equal(batch.images[clip, t], preprocess.fit(picture)[0])
        check_prompts(batch)
        kinds |= set(batch.kinds)
    assert kinds == {"mask", "box", "click"}


def check_prompts(batch: ClipBatch) -> None:
    """Clicks and boxes, in pixels of the square, lie on the masks, in cells."""
    for row, kind in enumerate(batch.kinds):
        cells = (batch.points[row] + 0.5) * CELLS / 224
        mask = batch.masks[row, 0]
        if kind == "click":
            x, y = cells[0].long().tolist()
            assert mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any()
        elif kind == "box":
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            tight = torch.tensor([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]])
            sides = (tight[1] - tight[0]) / 10
            assert ((cells - tight).abs() <= sides + 1.5).all()


def test_clips_depend_on_seed_epoch_and_index_only(root: Path):
    clips = dataset(root, length=12)
    assert len(clips) == 12
    assert_same(clips.load([0, 5, 9], 3), dataset(root, length=12).load([0, 5, 9], 3))
    alone, together = clips.load([3], 1), clips.load([8, 3], 1)
    rows = together.clip_of_object == 1
    assert together.frames[1] == alone.frames[0] and torch.equal(together.images[1], alone.images[0])
    assert torch.equal(together.masks[rows], alone.masks) and torch.equal(together.points[rows], alone.points)
    assert [name for (name, _), *_ in clips.load(range(6)).frames] == NAMES * 2
    # the same video, other clips: by index, by epoch and by seed
    starts = {tuple(clips.load([index], epoch).frames[0]) for index in (0, 3, 6, 9) for epoch in range(3)}
    starts |= {tuple(dataset(root, seed=seed).load([0]).frames[0]) for seed in range(3)}
    assert len(starts) >= 6
    assert clip_generator(1, 2, 3).random() == clip_generator(1, 2, 3).random() != clip_generator(1, 3, 2).random()


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_workers_give_what_the_main_process_gives(root: Path, augmentation: Augmentation | None):
    def batches(num_workers: int) -> list[ClipBatch]:
        clips = dataset(root, length=8, augmentation=augmentation)
        return list(build_loader(clips, EpochSampler(8, 2, seed=1), num_workers))

    alone = batches(0)
    assert len(alone) == 4 and all(batch.images.stride()[-3] == 1 for batch in alone)  # channels last: no copy was made
    for first, second in zip(alone, batches(2), strict=True):
        assert_same(first, second)


def test_reversal_turns_frames_masks_and_pictures(root: Path):
    always, never = (
        dataset(root, sampling=dataclasses.replace(SAMPLING, reversal=share), prompts=PromptSampling(1.0, 0.0, 0.0))
        for share in (1.0, 0.0)
    )
    found = 0
    for epoch in range(12):
        there, back = never.load([0], epoch), always.load([0], epoch)
        assert [n for _, n in back.frames[0]] == sorted((n for _, n in back.frames[0]), reverse=True)
        assert [n for _, n in there.frames[0]] == sorted(n for _, n in there.frames[0])
        if back.frames[0] == there.frames[0][::-1] and len(back.kinds) == len(there.kinds):
            assert torch.equal(back.images.flip(1), there.images)
            if (there.states == PRESENT).all() and len(there.kinds) == 2:
                found += torch.equal(back.masks.flip(1), there.masks)
    assert found


def test_short_videos_repeat_their_last_frame(root: Path):
    clips = dataset(root, NAMES[1:], sampling=dataclasses.replace(SAMPLING, num_frames=5, reversal=0.0))
    batch = clips.load([0, 1])
    assert [[n for _, n in frames] for frames in batch.frames] == [[0, 4, 4, 4, 4], [0] * 5]
    assert torch.equal(batch.images[1, 0], batch.images[1, 4]) and torch.equal(batch.masks[:, 2], batch.masks[:, 4])


# Embeddings -----------------------------------------------------------------------------------------------------------


def test_embeddings_are_what_the_trunk_gives_for_the_pictures(root: Path, stored: Path, teacher_file: Path):
    store = VideoEmbeddings(stored, TINY_MAP, {"preprocess": SQUARE.to_meta()})
    loader = build_loader(dataset(root, length=6, store=store), EpochSampler(6, 3, seed=2), 1)
    trunk = load_trunk(teacher_file)
    pictures = build_loader(dataset(root, length=6), EpochSampler(6, 3, seed=2), 0)
    for read, raw in zip(loader, pictures, strict=True):
        assert read.images is None and read.embeddings.shape == (3, 3, *TINY_MAP)
        assert read.embeddings.dtype == torch.float16 and read.embeddings.is_contiguous()
        computed = trunk(raw.images.flatten(0, 1), raw.sizes.repeat_interleave(3, dim=0)).view(3, 3, *TINY_MAP)
        torch.testing.assert_close(read.embeddings.float(), computed, atol=4e-3, rtol=4e-3)
        read.embeddings, read.images = None, raw.images
        assert_same(read, raw)


def test_the_training_step_takes_both(root: Path, stored: Path, teacher_file: Path):
    losses = []
    store = VideoEmbeddings(stored)
    for own, with_trunk in ((dataset(root, store=store), False), (dataset(root), True)):
        model = build_video_model(teacher_file, device="cpu", with_trunk=with_trunk)
        torch.manual_seed(0)
        distiller = MemoryDistiller(Rollout(model), build_memory(model.tracker.config, TINY_MEMORY)).train()
        losses.append(distiller(own.read_embeddings(own.load([0, 1, 2])))["total"])
    assert losses[0].requires_grad and losses[0] > 0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)


def test_embeddings_of_frames_that_are_missing_are_named(root: Path, stored: Path, tmp_path: Path):
    copied = tmp_path / "stored"
    shutil.copytree(stored, copied)
    clips = dataset(root, NAMES[2:], store=VideoEmbeddings(copied))
    (copied / NAMES[2] / "00000.pt").write_bytes(b"no tensor")
    with pytest.raises(ValueError, match=r"sav_000003/00000.pt is damaged"):
        clips.read_embeddings(clips.load([0]))
    (copied / NAMES[2] / "00000.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sav_000003/00000.pt is gone"):
        clips.read_embeddings(clips.load([0]))
    lenient = dataset(root, store=VideoEmbeddings(copied), skip_bad=True)
    batch = lenient.read_embeddings(lenient.load([0, 2]))
    assert NAMES[2] not in {frames[0][0] for frames in batch.frames} and batch.embeddings.shape[0] == 2
    ((name, reason),) = batch.skipped
    assert name == NAMES[2] and "00000.pt is gone" in reason
    with pytest.raises(ValueError, match="no augmentation"):
        dataset(root, store=VideoEmbeddings(stored), augmentation=Augmentation())


# Validation -----------------------------------------------------------------------------------------------------------


def test_validation_shows_the_same_clips_every_time(root: Path):
    sampling = dataclasses.replace(SAMPLING, reversal=1.0)
    clips = dataset(
        root, training=False, sampling=sampling, augmentation=Augmentation(), prompts=PromptSampling(0.0, 1.0, 0.0)
    )
    batch = clips.load([0, 1, 2], 0)
    assert_same(batch, clips.load([0, 1, 2], 7))
    assert all(frames == sorted(frames) for frames in batch.frames)
    rows = (batch.clip_of_object == 1).nonzero()[:, 0]
    (mask,) = batch.masks[rows, 0]  # one object: the other comes in later than this video goes
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    tight = torch.tensor([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]]) * 224 / CELLS
    box = batch.points[batch.clip_of_object == 1][0]
    assert (box - tight).abs().max() < 224 / CELLS + 2  # as annotated: corner pixels are nearly 4 pixels wide


def test_what_cannot_be_used_leaves_its_batch_in_validation(root: Path, tmp_path: Path):
    write_sav_video(tmp_path, "empty", np.zeros((3, 1, 30, 30), dtype=bool), 12)
    shutil.copytree(root / NAMES[0], tmp_path / NAMES[0])
    clips = dataset(tmp_path, ["empty", NAMES[0]], training=False)
    batch = clips.load([0, 1])
    assert [frames[0][0] for frames in batch.frames] == [NAMES[0]] and batch.images.shape[0] == 1
    assert torch.equal(batch.images[0, 0], clips.load([1]).images[0, 0]) and batch.images[0, 0].any()
    ((name, reason),) = batch.skipped
    assert name == "empty" and "none of the objects in" in reason and "empty" in reason
    nothing = clips.load([0])
    assert len(nothing) == 0 and nothing.masks.shape == (0, 3, CELLS, CELLS) and nothing.sizes.shape == (0, 2)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_in_training_another_video_takes_the_place(root: Path, tmp_path: Path):
    names = ["empty_1", "empty_2", NAMES[0]]
    for name in names[:2]:
        write_sav_video(tmp_path, name, np.zeros((3, 1, 30, 30), dtype=bool), 12)
    with pytest.raises(ValueError, match=r"2 videos or pictures gave no clip; of the last one, none of the objects"):
        dataset(tmp_path, names[:2]).load([0])
    shutil.copytree(root / NAMES[0], tmp_path / NAMES[0])
    clips = dataset(tmp_path, names, length=12)
    batch = clips.load(range(12))
    assert len(batch) == 12 and {frames[0][0] for frames in batch.frames} == {NAMES[0]}
    assert set(batch.clip_of_object.tolist()) == set(range(12))
    assert {name for name, _ in batch.skipped} == {"empty_1", "empty_2"}
    assert len({tuple(frames) for frames in batch.frames}) > 3
    assert_same(batch, clips.load(range(12)))


def test_files_that_are_wrong_raise_or_are_passed_over(root: Path, tmp_path: Path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    frame = tmp_path / NAMES[2] / "00000.jpg"
    frame.write_bytes(frame.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"sav_000003/00000.jpg is truncated"):
        dataset(tmp_path).load([2])
    path = tmp_path / NAMES[1] / f"{NAMES[1]}_manual.json"
    document = json.loads(path.read_text())
    document["video_width"] = 61.0
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"frame [04] of .*sav_000002 cannot be decoded"):
        dataset(tmp_path).load([1])
    batch = dataset(tmp_path, skip_bad=True).load([0, 1, 2])
    assert len(batch) == 3 and {frames[0][0] for frames in batch.frames} == {NAMES[0]}
    assert {name for name, _ in batch.skipped} == set(NAMES[1:])
    assert all(batch.images[clip].flatten(1).any() for clip in range(3))
    (tmp_path / NAMES[0] / "00004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"sav_000001_manual.json annotates 7 frames, but 1 \(4\)"):
        dataset(tmp_path).load([0])
    with pytest.raises(ValueError, match=r"3 videos or pictures gave no clip; of the last one, .*sav_0"):
        dataset(tmp_path, skip_bad=True).load([0])
    with pytest.raises(ValueError, match="no videos of"):
        dataset(tmp_path, [])


# Still pictures -------------------------------------------------------------------------------------------------------


def test_still_pictures_become_clips(root: Path, sa1b: Path):
    stills = Stills(list_sa1b(sa1b, "train"), sa1b, ratio=1.0)
    batch = dataset(root, stills=stills, length=6, sampling=dataclasses.replace(SAMPLING, num_frames=4)).load(range(6))
    assert len(batch) == 6 and all(key.startswith("sa_") for key in batch.keys)
    assert (batch.states[:, 0] == PRESENT).all() and set(batch.states.unique().tolist()) <= {ABSENT, PRESENT}
    for clip, frames in enumerate(batch.frames):
        key = frames[0][0]
        assert frames == [(key, t) for t in range(4)]
        picture = SQUARE.fit(read_image(sa1b / "images/train" / f"{key}.jpg"))[0]
        assert (batch.images[clip, 0].int() - picture.int()).abs().max() <= 1  # the first frame is the picture
        assert not torch.equal(batch.images[clip, 3], batch.images[clip, 0])
    check_prompts(batch)
    mixed = dataset(root, stills=dataclasses.replace(stills, ratio=0.5), length=60).load(range(60))
    share = np.mean([key.startswith("sa_") for key in mixed.keys])
    assert 0.3 < share < 0.7
    assert not any(key.startswith("sa_") for key in dataset(root, stills=stills, training=False).load(range(3)).keys)


def test_large_still_pictures_are_shrunk_and_bad_ones_named(root: Path, tmp_path: Path):
    write_record(tmp_path, "train", "sa_1", np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8))
    images = list_sa1b(tmp_path, "train")
    assert isinstance(images, ImageList)
    batch = dataset(root, stills=Stills(images, tmp_path, 1.0)).load([0, 1])
    # the annotated rectangles, at 1/8 and 1/2 of both sides, a third wide
    first = batch.masks[batch.clip_of_object == 0][0, 0]
    assert first[:, 0:7].sum() == 0 and abs(first.sum().item() / CELLS**2 - 1 / 9) < 0.02
    path = tmp_path / "annotations/train/sa_1.json"
    document = json.loads(path.read_text())
    document["image"]["width"] = 499
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"sa_1"):
        dataset(root, stills=Stills(images, tmp_path, 1.0)).load([0])
    path.write_text(json.dumps({"image": {"width": 500, "height": 300}, "annotations": []}))
    with pytest.raises(ValueError, match=r"1 videos or pictures gave no clip; of the last one, sa_1 has no object"):
        dataset(root, stills=Stills(images, tmp_path, 1.0)).load([0])
