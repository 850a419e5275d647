"""The data of the distillation: one picture, to be normalised for the teacher and for the student, and a prompt.

A worker decodes each picture once and resizes it straight into the batch, in shared memory; what a teacher's cache
holds for it is read beside it.

Letters: `B` pictures, `S` side of the model's square, `L` tokens of a prompt (32 for SAM3, 77 for the student),
`H W` rows and columns of the original picture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distillation.batch import DistillBatch
from distillation.config import DistillationConfig
from distillation.listing import Pictures
from sam3.engine.embeddings import EmbeddingReader
from sam3.engine.pictures import empty_images
from sam3.engine.prefetch import ReusedMemory
from sam3.engine.sa1b import read_annotations
from sam3.transforms import Preprocess, read_image

MAX_SKIPPED = 10  # unreadable pictures in a row, for which the next one is taken
# Whose tokens -> names in a sample of the ids and of the mask, and what the mask says of a real token.
TOKEN_NAMES = {
    "teacher": ("teacher_input_ids", "teacher_attention_mask", True),
    "student": ("student_input_ids", "student_padding_mask", False),
}

# Prompts -> ids, integer (n, L), and the mask (n, L): for the teacher 1 = token, for the student True = padding.
Tokenizer = Callable[[Sequence[str]], tuple[Tensor, Tensor]]

logger = logging.getLogger("sam3.distillation")


class Outputs(Protocol):
    """What a teacher said of each picture to the prompt number `prompt_index`."""

    prompt_index: int

    def read(self, key: str) -> dict[str, Tensor]:
        """The common outputs of one picture, without a batch dimension. ValueError or OSError if there are none."""


class SA1BDistillDataset(Dataset[dict[str, Any]]):
    """Pictures with a prompt each: `load` gives batches, as a `sam3.engine.loader.PictureDataset`; `dataset[i]` gives
    one finished sample, see `sample`.

    training: draw the prompt, and whether to mirror the picture (`config.horizontal_flip`), by (seed, epoch, index);
    otherwise every picture is shown as it is, with the first prompt.
    tokenizers: those of "teacher" and "student", for `sample`; ValueError if they seem to be swapped.
    store: the cache of the teacher's trunk. outputs: the cache of its outputs; its prompt is used instead of a drawn
    one. An entry that either lacks raises ValueError or OSError. seed: None is `config.seed`.
    load_annotations: samples hold what the picture's JSON file says, too.

    For a picture that cannot be read, the next one is taken (after the last, the first), and the batch's `skipped`
    names it; after MAX_SKIPPED in a row another one is a ValueError.
    """

    def __init__(
        self,
        pictures: Pictures,
        config: DistillationConfig,
        *,
        training: bool,
        tokenizers: Mapping[str, Tokenizer] | None = None,
        store: EmbeddingReader | None = None,
        outputs: Outputs | None = None,
        seed: int | None = None,
        load_annotations: bool = False,
    ) -> None:
        self.mirrors = training and config.horizontal_flip
        as_they_are = store is not None or outputs is not None or load_annotations
        assert not (self.mirrors and as_they_are), "caches and annotations know pictures as they are"
        self.pictures, self.prompts, self.training = pictures, config.prompts, training
        self.store, self.outputs, self.load_annotations = store, outputs, load_annotations
        self.seed = config.seed if seed is None else seed
        self.preprocess = self.teacher_preprocess(config)
        self.student = self.student_preprocess(config)
        self.tokens = {who: _tokenize(who, tokenize, self.prompts) for who, tokenize in (tokenizers or {}).items()}

    @staticmethod
    def teacher_preprocess(config: DistillationConfig) -> Preprocess:
        """How the teacher sees pictures: squashed to the square, mean and std on 0..255."""
        return _square(config.image_size, config.teacher_mean, config.teacher_std)

    @staticmethod
    def student_preprocess(config: DistillationConfig) -> Preprocess:
        """How the student sees them: the same square, its own mean and std."""
        return _square(config.image_size, config.student_mean, config.student_std)

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, indices: Sequence[int], epoch: int = 0) -> DistillBatch:
        """The batch of pictures `indices` as epoch `epoch` shows them, still without the trunk's maps; the disk is
        asked for these."""
        count = len(indices)
        prompts, sizes = torch.empty(count, dtype=torch.int64), torch.empty(count, 2, dtype=torch.int64)
        batch = DistillBatch(empty_images(count, self.preprocess.img_size), prompts, sizes, keys=[])
        for row, index in enumerate(indices):
            shown, prompts[row], size = self._show(index, epoch, batch.images[row], batch.skipped)
            sizes[row] = torch.tensor(size)
            batch.keys.append(self.pictures.key(shown))
        if self.store is not None:
            self.store.announce(batch.keys)
        if self.outputs is not None:
            batch.outputs = _stack(batch.keys, [self.outputs.read(key) for key in batch.keys])
        return batch

    def read_embeddings(
        self, batch: DistillBatch, memory: ReusedMemory | None = None, pin: bool = False
    ) -> DistillBatch:
        """`batch` with the trunk's maps, if there is a store. memory, pin: where to put them."""
        if self.store is not None:
            batch.embeddings = self.store.read_batch(batch.keys, self.store.allocate(len(batch), memory, pin))
        return batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(range(len(self))[index])  # IndexError beyond the end

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """One picture as epoch `epoch` shows it, ready for both models, without what caches hold.

        teacher_pixel_values, student_pixel_values: float32 `(3, S, S)`. prompt: its text; prompt_index: its place among
        the prompts. image_id: the key. original_size: `(H, W)`.
        With the teacher's tokenizer, teacher_input_ids and teacher_attention_mask, int64 `(L,)`; with the student's,
        student_input_ids, int64 `(L,)`, and student_padding_mask, bool `(L,)`, True = padding.
        annotations: `sam3.engine.sa1b.ImageAnnotations`, if they are loaded.
        """
        images, skipped = empty_images(1, self.preprocess.img_size), []
        shown, prompt, size = self._show(index, epoch, images[0], skipped)
        for _, reason in skipped:
            logger.warning("the next picture is taken: %s", reason)
        sizes = torch.tensor([images.shape[2:]])
        sample = {
            "teacher_pixel_values": self.preprocess.normalise(images, sizes)[0],
            "student_pixel_values": self.student.normalise(images, sizes)[0],
            "prompt": self.prompts[prompt],
            "prompt_index": prompt,
            "image_id": self.pictures.key(shown),
            "original_size": size,
        }
        for table in self.tokens.values():
            sample |= {name: rows[prompt] for name, rows in table.items()}
        if self.load_annotations:
            sample["annotations"] = read_annotations(self.pictures.annotation_path(shown))
        return sample

    def _show(
        self, index: int, epoch: int, into: Tensor, skipped: list[tuple[str, str]]
    ) -> tuple[int, int, tuple[int, int]]:
        """Put a picture into `into`, zeros, uint8 `(3, S, S)`: (its index, that of its prompt, its original size)."""
        prompt, mirrored = self._draw(index, epoch)
        shown, picture = self._read(index, skipped)
        self.preprocess.fit_into(picture.flip(2) if mirrored else picture, into)
        return shown, prompt, (picture.shape[1], picture.shape[2])

    def _draw(self, index: int, epoch: int) -> tuple[int, bool]:
        """The index of the prompt, and whether the picture is mirrored."""
        if not self.training:
            prompt, mirrored = 0, False
        else:
            generator = np.random.default_rng((self.seed, epoch, index))
            prompt = int(generator.integers(len(self.prompts)))
            mirrored = self.mirrors and bool(generator.random() < 0.5)
        return (prompt if self.outputs is None else self.outputs.prompt_index), mirrored

    def _read(self, index: int, skipped: list[tuple[str, str]]) -> tuple[int, Tensor]:
        """The first readable picture from `index` on: (its index, its pixels, uint8 `(3, H, W)`)."""
        tries = min(MAX_SKIPPED + 1, len(self))
        for place in range(index, index + tries):
            place %= len(self)
            try:
                return place, read_image(self.pictures.path(place))
            except (ValueError, OSError) as error:
                skipped.append((self.pictures.key(place), str(error)))
        raise ValueError(f"{tries} pictures in a row cannot be used, the last because: {skipped[-1][1]}")


def _square(size: int, mean: Sequence[float], std: Sequence[float]) -> Preprocess:
    return Preprocess(size, "square", tuple(255 * value for value in mean), tuple(255 * value for value in std))


def _tokenize(who: str, tokenize: Tokenizer, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Tokens of all prompts, by the names they have in a sample. Every prompt begins with a token that is none of the
    padding: that tells the two kinds of masks apart."""
    ids_name, mask_name, marks_tokens = TOKEN_NAMES[who]
    ids, mask = tokenize(prompts)
    if ids.ndim != 2 or len(ids) != len(prompts) or ids.shape != mask.shape or ids.is_floating_point():
        raise ValueError(
            f"the {who}'s tokenizer gives {ids.dtype} ids {tuple(ids.shape)} and a mask {tuple(mask.shape)}; wanted "
            f"integers ({len(prompts)}, L) and a mask of the same shape"
        )
    if not (mask[:, 0].bool() == marks_tokens).all():
        raise ValueError(
            f"{mask_name} must be {int(marks_tokens)} where a prompt begins, and is not: the tokenizers of teacher "
            "(1 = token) and student (True = padding) seem to be swapped"
        )
    return {ids_name: ids.long(), mask_name: mask.long() if marks_tokens else mask.bool()}


def _stack(keys: Sequence[str], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of each picture as one batch. ValueError if they do not have the same shapes."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in parts]
    for key, found in zip(keys, shapes, strict=True):
        if found != shapes[0]:
            raise ValueError(
                f"the cached outputs of {key!r} have the shapes {found}, those of {keys[0]!r} {shapes[0]}; "
                "write the cache again in another folder (--write-cache outputs --cache-dir)"
            )
    return {name: torch.stack([part[name] for part in parts]) for name in shapes[0]}
