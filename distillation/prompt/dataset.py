"""The data of prompt distillation: pictures, a prompt or a picture's masks, and what the teachers' stores hold of them.

A worker decodes a picture and resizes it straight into the batch, in shared memory. Masks stay runs, of which only the
pixels that the low-resolution ground truth shows are decoded.

Letters: `B` pictures, `P` prompts, `M` masks, `S` side of the model's square, `h w` = S/4 x S/4, `H W` rows and columns
of the original picture.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distillation.prompt.batch import PromptBatch
from distillation.prompt.config import DatasetSettings
from distillation.prompt.layouts import MAKE_SAMPLE, PromptSource, open_split
from distillation.prompt.object_mask import ObjectMask
from distillation.prompt.prompts import Prompts, draw, generator, no_prompts, stack
from sam3.engine.pictures import empty_images
from sam3.engine.prefetch import ReusedMemory
from sam3.transforms import Preprocess, read_image

MAX_SKIPPED = 10  # pictures in a row of which nothing can be used, for which the next one is taken
MIN_BOX_AREA = 16  # pixels of the original picture: a smaller object is no sensible prompt
LISTING_THREADS = 16  # that count masks; the disk is what they wait for
SINGLE, EVERYTHING = "single", "everything"

logger = logging.getLogger("sam3.distillation")


class Features(Protocol):
    """What a teacher made of each picture; see `distillation.prompt.store.FeatureStore`."""

    def is_per_prompt(self, component: str) -> bool: ...

    def prompts(self, key: str) -> tuple[Prompts, list[str]]: ...

    def row(self, key: str, mask_name: str) -> int: ...

    def read(self, key: str, component: str, row: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Shown:
    """What a batch shows at one place: a picture, the masks that are used of it, and the prompt, if it is drawn.

    name: of the mask, None in everything mode. size: of the picture in the square. masks: bool, each `(h, w)`.
    """

    key: str
    name: str | None
    size: tuple[int, int]
    masks: list[np.ndarray]
    prompt: Prompts | None


class PromptDataset:
    """Pictures with masks, in batches; a `sam3.engine.loader.PictureDataset`.

    In single mode a sample is an object of a picture with one prompt, in everything mode a picture with all its masks.
    Samples are in the order of the source's keys and mask names. Pictures without masks are left out.

    preprocess: how the models see pictures. seed: of all that is drawn. training: draw for each epoch; otherwise as in
    epoch 0. stores: by teacher's name; components: the losses that read from them. If one of these belongs to certain
    prompts, single mode takes the stores' prompts, which must be the same in all of them, instead of drawing any. What
    a store lacks raises ValueError or OSError.

    Pictures that cannot be read, masks that are damaged or of another size than their picture, and objects whose box
    is smaller than MIN_BOX_AREA or which the low resolution does not show, are named in the batch's `skipped`. In
    single mode the next object is taken, in either mode the next picture if one has nothing to show; after MAX_SKIPPED
    pictures in a row another one is a ValueError.

    Raises ValueError if no picture has a mask.
    """

    store = None  # embeddings of another kind, for the loader

    def __init__(
        self,
        source: PromptSource,
        settings: DatasetSettings,
        preprocess: Preprocess,
        *,
        training: bool,
        seed: int = 0,
        stores: Mapping[str, Features] | None = None,
        components: Sequence[str] = (),
    ) -> None:
        self.source, self.settings, self.preprocess = source, settings, preprocess
        self.training, self.seed = training, seed
        self.stores, self.components = stores, tuple(components)
        keys = source.keys()
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            counts = np.array(list(pool.map(source.count, keys)), dtype=np.int64)
        if settings.max_masks is not None:
            counts = counts.clip(max=settings.max_masks)
        if not counts.any():
            raise ValueError(
                f"none of the {len(keys)} pictures has a mask (such as {source.image_path(keys[0])}); put masks where "
                f"the layout wants them, or {MAKE_SAMPLE}"
            )
        # Arrays, because worker processes share their memory; object i is of the first picture with more than i before
        # its end.
        self._keys = np.array([key.encode() for key, count in zip(keys, counts, strict=True) if count])
        self._ends = np.cumsum(counts[counts > 0])
        logger.info(
            "%d pictures with %d masks; %d pictures without any are left out",
            len(self._keys), self._ends[-1], len(keys) - len(self._keys),
        )  # fmt: skip

    @property
    def num_pictures(self) -> int:
        return len(self._keys)

    @property
    def picture_keys(self) -> list[str]:
        """Of the pictures with masks, in order."""
        return [key.decode() for key in self._keys]

    @property
    def num_masks(self) -> int:
        """As counted, usable or not."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return self.num_masks if self.settings.mode == SINGLE else self.num_pictures

    def load(self, indices: Sequence[int], epoch: int = 0) -> PromptBatch:
        """The batch of samples `indices`, with prompts as `epoch` draws them."""
        epoch = epoch if self.training else 0
        images, skipped = empty_images(len(indices), self.preprocess.img_size), []
        shown = [self._show(index, epoch, image, skipped) for index, image in zip(indices, images, strict=True)]
        masks = torch.from_numpy(np.stack([mask for each in shown for mask in each.masks]).view(np.uint8))
        return PromptBatch(
            images,
            torch.tensor([each.size for each in shown]),
            stack([each.prompt for each in shown]) if self.settings.mode == SINGLE else None,
            masks[:, None],
            [len(each.masks) for each in shown],
            [each.key if each.name is None else f"{each.key}/{each.name}" for each in shown],
            epoch,
            self._read_features(shown),
            skipped=skipped,
        )

    def read_embeddings(self, batch: PromptBatch, memory: ReusedMemory | None = None, pin: bool = False) -> PromptBatch:
        """`batch` as it is: the loader asks for this."""
        return batch

    # Finding something to show ----------------------------------------------------------------------------------------

    def _show(self, index: int, epoch: int, into: Tensor, skipped: list[tuple[str, str]]) -> Shown:
        """The first usable sample from `index` on; its picture goes into `into`, zeros, uint8 `(3, S, S)`."""
        picture, number = self._locate(index)
        # The first one may come again, with the masks before the one that was asked for.
        tries = min(MAX_SKIPPED + 1, self.num_pictures + (number > 0))
        for place in range(picture, picture + tries):
            key = self._keys[place % self.num_pictures].decode()
            try:
                image = read_image(self.source.image_path(key))
                names = self.source.objects(key)
            except (ValueError, OSError) as error:
                skipped.append((key, str(error)))
            else:
                size = (image.shape[1], image.shape[2])
                found = usable(
                    self.source, key, names[number : self.settings.max_masks], size, self.preprocess, skipped
                )
                if (shown := self._choose(key, found, epoch)) is not None:
                    self.preprocess.fit_into(image, into)
                    return shown
                skipped.append((key, f"picture {self.source.image_path(key)} shows no usable mask"))
            number = 0
        raise ValueError(f"{tries} pictures in a row cannot be used, the last because: {skipped[-1][1]}")

    def _locate(self, index: int) -> tuple[int, int]:
        """The picture of sample `index`, and its first mask that may be used."""
        if self.settings.mode == EVERYTHING:
            return index, 0
        picture = int(np.searchsorted(self._ends, index, side="right"))
        return picture, index - int(self._ends[picture - 1] if picture else 0)

    def _choose(self, key: str, found: Iterator[tuple[str, ObjectMask, np.ndarray]], epoch: int) -> Shown | None:
        """The first of the usable masks with its prompt, or all; None if there are none."""
        if self.settings.mode == EVERYTHING:
            every = list(found)
            return Shown(key, None, self._fitted(every[0][1]), [low for _, _, low in every], None) if every else None
        for name, mask, low in found:
            return Shown(key, name, self._fitted(mask), [low], self._prompt(key, name, mask, epoch))
        return None

    def _fitted(self, mask: ObjectMask) -> tuple[int, int]:
        return self.preprocess.fitted_size(*mask.size)

    # Prompts and features ---------------------------------------------------------------------------------------------

    def _prompt(self, key: str, name: str, mask: ObjectMask, epoch: int) -> Prompts:
        """That of the stores if their features belong to it, else one that is drawn."""
        rows = [self._stored_prompt(store, key, name) for store in self._prompted_stores()]
        if not rows:
            return draw(mask, generator(self.seed, epoch, key, name), self.settings, self.preprocess)
        if any(not _same(row, rows[0]) for row in rows[1:]):
            raise ValueError(
                f"the stores of {', '.join(self.stores)} hold different prompts for the mask {name!r} of {key!r}; "
                "write them with the same settings of prompts (scripts/extract_teacher_features.py)"
            )
        return rows[0]

    def _prompted_stores(self) -> list[Features]:
        stores = (self.stores or {}).values()
        return [store for store in stores if any(map(store.is_per_prompt, self.components))]

    @staticmethod
    def _stored_prompt(store: Features, key: str, name: str) -> Prompts:
        return store.prompts(key)[0][store.row(key, name)]

    def _read_features(self, shown: Sequence[Shown]) -> dict[str, dict[str, Tensor]] | None:
        if self.stores is None:
            return None
        features: dict[str, dict[str, Tensor]] = {}
        for teacher, store in self.stores.items():
            features[teacher] = {name: self._read(store, name, shown) for name in self.components}
            if "dense_mask_logits" in self.components:  # they say which of several masks is the best
                features[teacher]["ious"] = self._read(store, "ious", shown)
        return features

    def _read(self, store: Features, component: str, shown: Sequence[Shown]) -> Tensor:
        """One component of the whole batch."""
        if not store.is_per_prompt(component):
            return torch.stack([store.read(each.key, component) for each in shown])
        if self.settings.mode == EVERYTHING:
            return torch.cat([store.read(each.key, component) for each in shown])
        return torch.stack([store.read(each.key, component, store.row(each.key, each.name)) for each in shown])


def open_dataset(
    path: str, settings: DatasetSettings, preprocess: Preprocess, *, training: bool, **options: Any
) -> PromptDataset:
    """The data set at `path` in the layout that `settings` name; options: the others of `PromptDataset`."""
    source = open_split(path, settings.layout, settings.image_subdir_name, settings.mask_subdir_name)
    return PromptDataset(source, settings, preprocess, training=training, **options)


def usable(
    source: PromptSource,
    key: str,
    names: Sequence[str],
    size: tuple[int, int],
    preprocess: Preprocess,
    skipped: list[tuple[str, str]],
) -> Iterator[tuple[str, ObjectMask, np.ndarray]]:
    """(name, mask, the mask at low resolution) of the masks `names` of a picture that can be used, one at a time.

    size: `(H, W)` of the picture. The others are appended to `skipped` as (`<key>/<name>`, reason).
    """
    for name in names:
        try:
            mask = source.mask(key, name, size)
            low = mask.low_res(preprocess)
            _require_visible(mask, low, f"mask {name} of {source.image_path(key)}")
        except (ValueError, OSError) as error:
            skipped.append((f"{key}/{name}", str(error)))
        else:
            yield name, mask, low


def _require_visible(mask: ObjectMask, low: np.ndarray, what: str) -> None:
    left, top, right, bottom = mask.box().tolist()
    if (right - left) * (bottom - top) < MIN_BOX_AREA:
        raise ValueError(f"{what}: its box of {right - left} x {bottom - top} pixels is below {MIN_BOX_AREA} pixels")
    if not low.any():
        raise ValueError(f"{what}: at {low.shape[1]} x {low.shape[0]}, nothing is left of its {mask.area} pixels")


def draw_all(
    source: PromptSource, key: str, settings: DatasetSettings, preprocess: Preprocess, seed: int
) -> tuple[Prompts, list[str]]:
    """The prompts of all usable masks of a picture and the masks' names, in order: those of epoch 0 under this seed.

    None of either for a picture without usable masks. ValueError or OSError if the picture or its annotations are
    damaged; only the picture's header is read.
    """
    prompts, names, skipped = [no_prompts(settings)], [], []
    every = source.objects(key)
    size = _stated_size(source, key) if every else (0, 0)
    for name, mask, _ in usable(source, key, every, size, preprocess, skipped):
        prompts.append(draw(mask, generator(seed, 0, key, name), settings, preprocess))
        names.append(name)
    for _, reason in skipped:
        logger.warning("no prompt is made: %s", reason)
    return stack(prompts), names


def _stated_size(source: PromptSource, key: str) -> tuple[int, int]:
    path = source.image_path(key)
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no picture {path}; it was there when the folder was listed") from error
    except Exception as error:  # Pillow raises many types; each of them means that this file is damaged
        raise ValueError(f"cannot read picture {path}: {error}; fetch it again or remove it") from error


def _same(one: Prompts, other: Prompts) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
