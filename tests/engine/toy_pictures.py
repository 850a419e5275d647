"""A set of grey pictures and their embeddings, the least that a loader takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sam3.engine import batch
from sam3.engine.embedding_writer import EmbeddingWriter
from sam3.engine.embeddings import EmbeddingBatch, EmbeddingReader, store_meta
from sam3.engine.pictures import empty_images
from sam3.engine.prefetch import ReusedMemory
from sam3.transforms import Preprocess

SHAPE = (3, 4, 4)


@dataclass
class ToyBatch:
    """images: uint8 `(B, 3, S, S)`, all of a picture its number. epochs: int64 `(B,)`, what the worker was told."""

    images: Tensor
    epochs: Tensor
    keys: list[str]
    embeddings: EmbeddingBatch | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> ToyBatch:
        return batch.pin(self)


class ToyPictures:
    """Pictures `toy_0`, `toy_1`, ...; number `bad` cannot be read, number `broken` has a fault in its file."""

    def __init__(self, count: int, store: EmbeddingReader | None = None, bad: int = -1, broken: int = -1) -> None:
        self.count, self.store, self.bad, self.broken = count, store, bad, broken
        self.preprocess = Preprocess(img_size=8)

    def __len__(self) -> int:
        return self.count

    def load(self, indices: Sequence[int], epoch: int) -> ToyBatch:
        if self.broken in indices:
            raise ValueError(f"picture toy_{self.broken} is broken")
        good = [index for index in indices if index != self.bad]
        images = empty_images(len(good), self.preprocess.img_size)
        for row, index in enumerate(good):
            images[row] = index
        skipped = [(f"toy_{self.bad}", f"toy_{self.bad} is empty")] if self.bad in indices else []
        return ToyBatch(images, torch.full((len(good),), epoch), [f"toy_{i}" for i in good], skipped=skipped)

    def read_embeddings(self, batch: ToyBatch, memory: ReusedMemory | None, pin: bool) -> ToyBatch:
        if self.store is not None:
            batch.embeddings = self.store.read_batch(batch.keys, self.store.allocate(len(batch), memory, pin))
        return batch


def write_toy_store(folder: Path, count: int) -> EmbeddingReader:
    """A store in which all of `toy_<i>`'s embedding is i."""
    with EmbeddingWriter(folder, store_meta(SHAPE)) as writer:
        for number in range(count):
            writer.add(f"toy_{number}", number, torch.full(SHAPE, float(number)))
    return EmbeddingReader(folder)
