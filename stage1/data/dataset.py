"""Stage 1's data: a picture, ready to normalise, and what its teacher stored for it.

A worker resizes pictures straight into the batch, in shared memory; embeddings are read straight into memory that the
main process uses again and again. Nothing is copied or cast before it reaches the device, no annotation file is opened.

Letters: `B` images, `S` side of the model's square, `C` channels, `G` side of the embedding grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sam3.engine import batch
from sam3.engine.embeddings import EmbeddingBatch, EmbeddingReader
from sam3.engine.image_list import ImageList
from sam3.engine.pictures import empty_images
from sam3.engine.prefetch import ReusedMemory
from sam3.transforms import Preprocess, read_image
from stage1.data.augmentation import Augmentation, seed_of


@dataclass
class Stage1Batch:
    """images: uint8 `(B, 3, S, S)`, zero-padded, channels last in memory, for `Preprocess.normalise` on the device.
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
    """Pictures and, with a `store`, their stored embeddings; a `sam3.engine.loader.PictureDataset`.

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
        return self.load([index])

    def load(self, indices: Sequence[int], epoch: int = 0) -> Stage1Batch:
        """The batch of pictures `indices`, still without embeddings; the disk is asked for these.

        Every epoch shows the same: the augmentation follows the stored seed, as the teacher saw the picture.
        """
        keys = [self.images.key(index) for index in indices]
        if self.store is not None:
            self.store.announce(keys)
        if self.store is not None and self.augmentation is not None:
            seeds = self.store.read_seeds(keys)
        else:
            seeds = torch.tensor([seed_of(key, self.seed) for key in keys], dtype=torch.int64)
        images = empty_images(len(keys), self.preprocess.img_size)
        batch = Stage1Batch(images, torch.empty(len(keys), 2, dtype=torch.int64), seeds, keys)
        good = [row for row, index in enumerate(indices) if self._load(index, row, batch)]
        if len(good) == len(keys):
            return batch
        good_keys = [keys[row] for row in good]
        return Stage1Batch(batch.images[good], batch.sizes[good], seeds[good], good_keys, skipped=batch.skipped)

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

    def read_embeddings(self, batch: Stage1Batch, memory: ReusedMemory | None = None, pin: bool = False) -> Stage1Batch:
        """`batch` with its stored embeddings and their seeds, if there is a store. memory, pin: where to put them."""
        if self.store is not None:
            room = self.store.allocate(len(batch), memory, pin)
            batch.embeddings = self.store.read_batch(batch.keys, room)
            batch.seeds = batch.embeddings.seeds
        return batch
