"""What a picture becomes for teacher and student, which prompt it gets, and that workers change nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from distillation.config import DistillationConfig
from distillation.dataset import SA1BDistillDataset
from distillation.listing import Pictures, scan_sa1b, split_pictures
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import EmbeddingReader, store_meta
from sam3.engine.loader import build_loader
from sam3.engine.sampler import EpochSampler
from sam3.transforms import read_image
from tests.samples import write_sa1b

SIZE = 56
SHAPE = (3, 4, 4)
MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pictures:
    """sa_1 to sa_8, in train and val; to be left as they are."""
    root = tmp_path_factory.mktemp("pictures")
    write_sa1b(root, num_train=6, num_val=2)
    return scan_sa1b(root)


def config(**values) -> DistillationConfig:
    return DistillationConfig(**{"image_size": SIZE, "num_val": 2, "seed": 3, **values})


def dataset(pictures: Pictures, training: bool = True, settings: DistillationConfig | None = None, **options):
    return SA1BDistillDataset(pictures, settings or config(), training=training, **options)


def sampler(count: int, batch_size: int = 2, **options) -> EpochSampler:
    return EpochSampler(count, batch_size, drop_last=False, padding=False, **options)


def teacher_tokens(prompts):
    """ids (n, 32): 10 + the prompt's words, then 0; mask: 1 = token."""
    mask = torch.tensor([[i <= len(text.split()) for i in range(32)] for text in prompts])
    return mask * (10 + torch.arange(len(prompts), dtype=torch.int32)[:, None]), mask.to(torch.int32)


def student_tokens(prompts):
    """ids (n, 77): 500 + the place of the prompt, then 0; mask: True = padding."""
    mask = torch.tensor([[i > len(text.split()) for i in range(77)] for text in prompts])
    return ~mask * (500 + torch.arange(len(prompts))[:, None]), mask


def same(a, b) -> bool:
    assert a.keys == b.keys
    assert a.skipped == b.skipped
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "prompt_index", "sizes"))


# One picture, two models ----------------------------------------------------------------------------------------------


def test_both_tensors_come_from_one_picture(pictures):
    data = dataset(pictures, training=False)
    fitted, _ = data.preprocess.fit(read_image(pictures.path(1)))
    sample = data[1]
    teacher, student = sample["teacher_pixel_values"], sample["student_pixel_values"]
    assert teacher.dtype == student.dtype == torch.float32
    assert teacher.shape == student.shape == (3, SIZE, SIZE)
    assert teacher.min() >= -1 and teacher.max() <= 1 and teacher.std() > 0.1
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose(student, (teacher * 0.5 + 0.5 - mean) / std, rtol=0, atol=1e-5)
    assert torch.allclose(teacher, (fitted / 255 - 0.5) / 0.5, rtol=0, atol=1e-6)


def test_full_size(pictures):
    sample = dataset(pictures, settings=DistillationConfig(num_val=2))[0]
    teacher, student = sample["teacher_pixel_values"], sample["student_pixel_values"]
    assert teacher.shape == student.shape == (3, 1008, 1008)
    assert teacher.dtype == student.dtype == torch.float32
    assert teacher.min() >= -1 and teacher.max() <= 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose(student, (teacher * 0.5 + 0.5 - mean) / std, rtol=0, atol=1e-5)


def test_normalised_colours_by_hand(tmp_path):
    """Black, white and a grey of 51 = 0.2 * 255, in a picture of the square's size: no resize in between."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[:, 1], pixels[:, 2] = 255, 51
    Image.fromarray(pixels).save(tmp_path / "sa_1.jpg", format="PNG")  # PNG named .jpg: exact, and read all the same
    sample = dataset(scan_sa1b(tmp_path, require_json=False), training=False)[0]
    assert sample["teacher_pixel_values"][0, 0, :3].tolist() == pytest.approx([-1, 1, -0.6], abs=1e-6)
    wanted = [(0 - 0.456) / 0.224, (1 - 0.456) / 0.224, (0.2 - 0.456) / 0.224]
    assert sample["student_pixel_values"][1, 5, :3].tolist() == pytest.approx(wanted, abs=1e-5)


def test_preprocess_of_the_config():
    settings = config(teacher_mean=(0.1, 0.2, 0.3), student_std=(0.5, 0.25, 1.0))
    teacher = SA1BDistillDataset.teacher_preprocess(settings)
    student = SA1BDistillDataset.student_preprocess(settings)
    assert (teacher.img_size, teacher.resize, student.img_size, student.resize) == (SIZE, "square", SIZE, "square")
    assert teacher.mean == pytest.approx((25.5, 51.0, 76.5))
    assert teacher.std == (127.5, 127.5, 127.5)
    assert student.mean == pytest.approx((123.675, 116.28, 103.53))
    assert student.std == (127.5, 63.75, 255.0)


def test_a_sample_has_what_the_plan_lists(pictures):
    data = dataset(
        pictures,
        training=False,
        tokenizers={"teacher": teacher_tokens, "student": student_tokens},
        load_annotations=True,
    )
    sample = data[2]
    assert set(sample) == {
        *("teacher_pixel_values", "student_pixel_values", "teacher_input_ids", "teacher_attention_mask"),
        *("student_input_ids", "student_padding_mask", "prompt", "prompt_index", "image_id", "original_size"),
        "annotations",
    }
    assert (sample["image_id"], sample["prompt"], sample["prompt_index"]) == ("sa_3", "objects in the image", 0)
    assert sample["original_size"] == tuple(read_image(pictures.path(2)).shape[1:]) == (94, 130)
    assert (sample["annotations"].height, sample["annotations"].width, len(sample["annotations"])) == (94, 130, 2)
    assert set(dataset(pictures, training=False)[2]) == {
        *("teacher_pixel_values", "student_pixel_values", "prompt", "prompt_index", "image_id", "original_size")
    }


def test_samples_are_a_sequence(pictures):
    data = dataset(pictures)
    assert [sample["image_id"] for sample in data] == pictures.keys()
    assert data[-1]["image_id"] == "sa_8"
    with pytest.raises(IndexError):
        data[8]


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_each_prompt_has_its_tokens_computed_once(pictures):
    calls = Counter()

    def counted(who, tokenize):
        def call(prompts):
            calls[who] += 1
            assert tuple(prompts) == config().prompts
            return tokenize(prompts)

        return call

    tokenizers = {"teacher": counted("teacher", teacher_tokens), "student": counted("student", student_tokens)}
    data = dataset(pictures, tokenizers=tokenizers)
    samples = [data.sample(i, epoch) for i in range(8) for epoch in range(3)]
    assert {sample["prompt_index"] for sample in samples} == {0, 1, 2, 3}
    for sample in samples:
        number, words = sample["prompt_index"], len(sample["prompt"].split())
        assert sample["prompt"] == data.prompts[number]
        assert sample["teacher_input_ids"].tolist() == [10 + number] * (words + 1) + [0] * (31 - words)
        assert sample["teacher_attention_mask"].tolist() == [1] * (words + 1) + [0] * (31 - words)
        assert sample["student_input_ids"].tolist() == [500 + number] * (words + 1) + [0] * (76 - words)
        assert sample["student_padding_mask"].tolist() == [False] * (words + 1) + [True] * (76 - words)
        assert sample["teacher_input_ids"].dtype == sample["teacher_attention_mask"].dtype == torch.int64
    assert calls == {"teacher": 1, "student": 1}


def test_the_student_s_own_tokenizer_fits(pictures):
    tokenizer = pytest.importorskip("distillation.models.tokenizer")
    data = dataset(pictures, training=False, tokenizers={"student": lambda texts: tokenizer.tokenize(texts, 77)})
    sample = data[0]
    assert sample["student_input_ids"].shape == sample["student_padding_mask"].shape == (77,)
    # CLIP: start, "objects in the image", end, then padding.
    assert sample["student_input_ids"][[0, 5]].tolist() == [49406, 49407]
    assert sample["student_padding_mask"].tolist() == [False] * 6 + [True] * 71


@pytest.mark.parametrize("tokenizers", [{"teacher": student_tokens}, {"student": teacher_tokens}])
def test_swapped_tokenizers(pictures, tokenizers):
    with pytest.raises(ValueError, match=r"mask must be [01] where a prompt begins.* seem to be swapped"):
        dataset(pictures, tokenizers=tokenizers)


@pytest.mark.parametrize(
    "change",
    [
        lambda ids, mask: (ids[:3], mask[:3]),
        lambda ids, mask: (ids, mask[:, :31]),
        lambda ids, mask: (ids.float(), mask),
        lambda ids, mask: (ids[0], mask[0]),
    ],
)
def test_tokens_of_a_wrong_shape_or_type(pictures, change):
    with pytest.raises(ValueError, match=r"the teacher's tokenizer gives .* wanted integers \(4, L\)"):
        dataset(pictures, tokenizers={"teacher": lambda prompts: change(*teacher_tokens(prompts))})


# Prompts and mirroring ------------------------------------------------------------------------------------------------


def prompts_of(data: SA1BDistillDataset, epoch: int) -> list[int]:
    return data.load(range(len(data)), epoch).prompt_index.tolist()


def test_epochs_and_seeds_give_other_prompts(pictures):
    data = dataset(pictures)
    epochs = [prompts_of(data, epoch) for epoch in range(20)]
    assert epochs == [prompts_of(dataset(pictures), epoch) for epoch in range(20)]
    assert len({tuple(prompts) for prompts in epochs}) == 20
    assert prompts_of(dataset(pictures, seed=3), 0) == epochs[0]  # the config's seed
    assert prompts_of(dataset(pictures, seed=4), 0) != epochs[0]
    counts = Counter(prompt for prompts in epochs for prompt in prompts)
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 20  # of 160; 40 each are expected, 3.6 sigma below is 20


def test_a_prompt_depends_on_the_picture_only(pictures):
    data = dataset(pictures)
    whole = data.load(range(8), epoch=2)
    for index in (5, 0, 3):
        alone = data.load([index], epoch=2)
        assert alone.prompt_index[0] == whole.prompt_index[index]
        assert data.sample(index, epoch=2)["prompt_index"] == whole.prompt_index[index]
        assert torch.equal(alone.images[0], whole.images[index])


def test_validation_always_asks_the_first_prompt(pictures):
    data = dataset(pictures, training=False, settings=config(horizontal_flip=True))
    assert all(prompts_of(data, epoch) == [0] * 8 for epoch in range(5))
    first, later = data.load(range(8), 0), data.load(range(8), 4)
    assert same(first, later)


def test_mirroring_comes_before_the_resize_and_changes_no_prompt(pictures):
    plain, mirroring = dataset(pictures), dataset(pictures, settings=config(horizontal_flip=True))
    turned = []
    for epoch in range(4):
        a, b = plain.load(range(8), epoch), mirroring.load(range(8), epoch)
        assert torch.equal(a.prompt_index, b.prompt_index)
        for index in range(8):
            whole = read_image(pictures.path(index))
            mirrored = not torch.equal(a.images[index], b.images[index])
            fitted, _ = plain.preprocess.fit(whole.flip(2) if mirrored else whole)
            assert torch.equal(b.images[index], fitted)
            turned.append(mirrored)
    assert 6 <= sum(turned) <= 26  # of 32
    index = turned.index(True)
    sample = mirroring.sample(index % 8, index // 8)
    fitted, _ = plain.preprocess.fit(read_image(pictures.path(index % 8)).flip(2))
    assert torch.allclose(sample["teacher_pixel_values"], fitted / 127.5 - 1, atol=1e-6)


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_batch_holds_what_the_parts_give(pictures):
    train, val = split_pictures(pictures, num_val=2)
    batches = list(build_loader(dataset(train), sampler(6, batch_size=4, shuffle=False), 0))
    assert [batch.keys for batch in batches] == [["sa_1", "sa_2", "sa_3", "sa_4"], ["sa_5", "sa_6"]]
    batch = batches[0]
    assert len(batch) == 4
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 3, SIZE, SIZE))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.prompt_index.dtype == batch.sizes.dtype == torch.int64
    assert batch.sizes.tolist() == [[90, 130], [130, 92], [94, 130], [130, 96]]
    assert (batch.embeddings, batch.outputs, batch.skipped) == (None, None, [])
    (last,) = build_loader(dataset(val, training=False), sampler(2, shuffle=False), 0)
    assert (last.keys, last.prompt_index.tolist()) == (["sa_7", "sa_8"], [0, 0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_workers_give_what_one_process_gives(pictures, method):
    data = dataset(pictures, settings=config(horizontal_flip=True))

    def epochs(num_workers, start_method=None):
        batches = sampler(8, batch_size=3, seed=1)
        loader = build_loader(data, batches, num_workers, start_method=start_method)
        for epoch in range(2):  # workers stay for the second
            batches.set_position(epoch)
            yield list(loader)

    state = torch.get_rng_state()
    for alone, together in zip(epochs(0), epochs(2, method), strict=True):
        assert len(alone) == 3
        assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# Caches ---------------------------------------------------------------------------------------------------------------


class StoredOutputs:
    """Outputs whose logits are the picture's number; `lacking` has none, `odd` has fewer queries."""

    def __init__(self, prompt_index: int = 2, lacking: str = "", odd: str = "") -> None:
        self.prompt_index, self.lacking, self.odd = prompt_index, lacking, odd

    def read(self, key):
        if key == self.lacking:
            raise ValueError(f"no outputs for {key!r}")
        queries = 4 if key == self.odd else 5
        number = float(key.removeprefix("sa_"))
        return {
            "pred_logits": torch.full((queries,), number),
            "pred_masks": torch.full((queries, 7, 7), number, dtype=torch.float16),
        }


@pytest.fixture
def store(pictures, tmp_path) -> EmbeddingReader:
    """A trunk cache in which all of `sa_<i>`'s map is i."""
    with EmbeddingWriter(tmp_path / "store", store_meta(SHAPE)) as writer:
        for key in pictures.keys():  # noqa: SIM118
            writer.add(key, 0, torch.full(SHAPE, float(key.removeprefix("sa_"))))
    return EmbeddingReader(tmp_path / "store")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_trunk_cache(pictures, store, num_workers):
    seen = []
    for batch in build_loader(dataset(pictures, store=store), sampler(8, batch_size=3, seed=1), num_workers):
        numbers = [float(key.removeprefix("sa_")) for key in batch.keys]
        assert batch.embeddings.data.dtype == torch.float16
        assert batch.embeddings.values()[:, 0, 0, 0].tolist() == numbers
        seen += batch.keys
    assert sorted(seen) == pictures.keys()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_output_cache_asks_its_own_prompt(pictures, num_workers, training):
    data = dataset(pictures, training=training, outputs=StoredOutputs(prompt_index=2))
    for batch in build_loader(data, sampler(8, batch_size=3), num_workers):
        assert batch.prompt_index.tolist() == [2] * len(batch)
        assert batch.outputs["pred_masks"].shape == (len(batch), 5, 7, 7)
        assert batch.outputs["pred_masks"].dtype == torch.float16
        assert batch.outputs["pred_logits"][:, 0].tolist() == [float(key.removeprefix("sa_")) for key in batch.keys]
    assert data.sample(1)["prompt"] == "segment everything"


def test_a_missing_cache_entry_is_an_error(pictures, tmp_path):
    with EmbeddingWriter(tmp_path / "store", store_meta(SHAPE)) as writer:
        writer.add("sa_1", 0, torch.zeros(SHAPE))
    data = dataset(pictures, store=EmbeddingReader(tmp_path / "store"))
    assert data.load([0]).keys == ["sa_1"]
    with pytest.raises(ValueError, match="no teacher embedding for 'sa_2'"):
        data.load([0, 1])
    with pytest.raises(ValueError, match="no outputs for 'sa_2'"):
        dataset(pictures, outputs=StoredOutputs(lacking="sa_2")).load([0, 1])


def test_cached_outputs_of_several_shapes(pictures):
    data = dataset(pictures, outputs=StoredOutputs(odd="sa_3"))
    assert data.load([2]).outputs["pred_logits"].shape == (1, 4)
    with pytest.raises(ValueError, match=r"'sa_3' have the shapes .*those of 'sa_1' .*--write-cache outputs"):
        data.load([0, 1, 2])


# Pictures that are not as they should be ------------------------------------------------------------------------------


def test_grey_cmyk_and_misnamed_pictures(tmp_path):
    down, across = np.mgrid[:40, :50]
    pixels = np.stack([6 * down, 5 * across, np.full((40, 50), 90)], axis=2).astype(np.uint8)  # smooth: JPEG keeps it
    for number, mode in enumerate(("RGB", "L", "CMYK")):
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"sa_{number}.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "sa_3.jpg", format="PNG")
    data = dataset(scan_sa1b(tmp_path, require_json=False), training=False)
    batch = data.load(range(4))
    assert (batch.skipped, batch.sizes.tolist()) == ([], [[40, 50]] * 4)
    true, _ = data.preprocess.fit(torch.from_numpy(pixels).permute(2, 0, 1))
    rgb, grey, cmyk, png = batch.images.float()
    assert torch.equal(png, true.float())
    assert (rgb - true).abs().mean() < 3
    assert (cmyk - true).abs().mean() < 3
    assert (grey - (true * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)).abs().mean() < 3
