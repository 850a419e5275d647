"""Stage 1's data: a picture, ready to normalise, and what its teacher stored for it.

A worker builds the whole batch in shared memory: pictures are resized into it, embeddings are read from the disk into
it, and nothing of it is copied or cast before it reaches the device. No annotation file is opened.

Letters: `B` images, `S` side of the model's square, `C` channels, `G` side of the embedding grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from sam3.engine import batch
from sam3.engine.embeddings import EmbeddingBatch, EmbeddingReader, empty_shared
from sam3.engine.image_list import ImageList
from sam3.transforms import Preprocess, read_image
from stage1.data.augmentation import Augmentation, seed_of


@dataclass
class Stage1Batch:
    """images: uint8 `(B, 3, S, S)`, zero-padded, for `Preprocess.normalise` on the device.
    sizes: int64 `(B, 2)`, rows and columns of each picture inside its square.
    seeds: int64 `(B,)` augmentation seeds. keys: B strings.
    embeddings: as stored, `(B, C, G, G)`; None when exporting and with an online teacher.
    skipped: (key, reason) of pictures that were asked for but could not be read; they count in no other field.
    """

    images: Tensor
    sizes: Tensor
    seeds: Tensor
    keys: list[str]
    embeddings: EmbeddingBatch | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Stage1Batch:
        """A copy in page-locked memory; a DataLoader calls this."""
        return batch.pin(self)


class Stage1Dataset(Dataset[Stage1Batch]):
    """Pictures and, with a `store`, their stored embeddings.

    augmentation: None shows pictures as they are (`DISTILL.NO_RAND: True`); otherwise it replays the seed that the
    store holds or, without a store, the one that `seed_of(key, seed)` gives.
    skip_bad: leave pictures that cannot be read out of their batch and list them in `skipped`, which may leave a batch
    empty. Otherwise they raise ValueError or FileNotFoundError naming the file; a missing embedding always raises.
    """

    def __init__(
        self,
        images: ImageList,
        preprocess: Preprocess,
        store: EmbeddingReader | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.images, self.preprocess, self.store = images, preprocess, store
        self.augmentation, self.seed, self.skip_bad = augmentation, seed, skip_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Stage1Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Stage1Batch:
        """The batch of pictures `indices`."""
        size = self.preprocess.img_size
        # In a worker the batch is built where the main process will find it. Both kinds of memory come zeroed.
        shared = get_worker_info() is not None
        make = empty_shared if shared else torch.zeros
        result = Stage1Batch(
            images=make((len(indices), 3, size, size), dtype=torch.uint8),
            sizes=torch.empty(len(indices), 2, dtype=torch.int64),
            seeds=torch.empty(len(indices), dtype=torch.int64),
            keys=[self.images.key(index) for index in indices],
        )
        if self.store is None:
            result.seeds[:] = torch.tensor([seed_of(key, self.seed) for key in result.keys])
        else:
            result.embeddings = self.store.read_batch(result.keys, self.store.allocate(len(indices), shared=shared))
            result.seeds = result.embeddings.seeds
        good = [row for row, index in enumerate(indices) if self._load(index, row, result)]
        return result if len(good) == len(indices) else _keep(result, good)

    def _load(self, index: int, row: int, into: Stage1Batch) -> bool:
        """Put the picture `index` into row `row`; False if it was skipped."""
        try:
            image = read_image(self.images.path(index))
        except (ValueError, OSError) as error:
            if not self.skip_bad:
                raise
            into.skipped.append((into.keys[row], str(error)))
            return False
        rows, columns = self.preprocess.fit_into(image, into.images[row])
        into.sizes[row, 0], into.sizes[row, 1] = rows, columns
        if self.augmentation is not None:
            inside = into.images[row, :, :rows, :columns]
            inside[:] = self.augmentation(inside, int(into.seeds[row]))
        return True


def _keep(full: Stage1Batch, rows: list[int]) -> Stage1Batch:
    """Only `rows` of the batch: a copy, for the rare batch with a bad picture."""
    embeddings = full.embeddings
    if embeddings is not None:
        scales = None if embeddings.scales is None else embeddings.scales[rows]
        embeddings = EmbeddingBatch(embeddings.data[rows], embeddings.seeds[rows], scales)
    keys = [full.keys[row] for row in rows]
    return Stage1Batch(full.images[rows], full.sizes[rows], full.seeds[rows], keys, embeddings, full.skipped)
