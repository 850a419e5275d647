"""What a teacher is shown when its features are written: pictures one at a time, each with all its prompts.

Letters: `S` side of the square that a picture fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distillation.prompt.config import LOSSES, DatasetSettings
from distillation.prompt.dataset import draw_all
from distillation.prompt.layouts import PromptSource
from distillation.prompt.prompts import Prompts, grid
from sam3.engine import batch
from sam3.sam.sam1 import MEAN, STD
from sam3.transforms import Preprocess, read_image

PROMPT_SOURCES = ("auto", "masks", "none")
ENC_PROJECTIONS = ("neck", "none")


@dataclass(frozen=True)
class ExtractSettings:
    """What is extracted, apart from the teacher.

    dataset: its mode, how prompts are drawn, and num_workers. components: losses whose features are kept. prompts: in
    single mode `masks`: of masks, pictures without are left out; `none`: an empty one; `auto`: an empty one where there
    are no masks. seed: of the prompts. enc_projection: `neck` brings a ViT's patch features to C channels by its own
    neck, `none` leaves them. tap: of prompt_embed. half: float16 files. points_per_batch: prompts decoded together.
    overwrite: what is there, too. limit: pictures of a split, the first ones. hooks: the teacher's own, by component.
    """

    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    components: tuple[str, ...] = LOSSES
    prompts: str = "auto"
    seed: int = 0
    enc_projection: str = "neck"
    tap: str = "input_keys"
    multimask: bool = False
    half: bool = False
    points_per_batch: int = 64
    overwrite: bool = False
    limit: int | None = None
    hooks: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Picture:
    """One picture and its prompts, or none: then `skipped` says why. A `sam3.engine.loader.PictureBatch`.

    images: uint8 `(1, 3, S, S)`. sizes: `(1, 2)`, rows and columns of the picture in the square; original_size: in its
    file. mask_names: see `PromptRecord`.
    """

    images: Tensor
    sizes: Tensor
    original_size: tuple[int, int]
    prompts: Prompts
    mask_names: list[str]
    keys: list[str]
    embeddings: None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Picture:
        return batch.pin(self)


class PicturesWithPrompts(Dataset[Picture]):
    """Reads the pictures `keys` of a split and makes their prompts. A `sam3.engine.loader.PictureDataset`."""

    store = None

    def __init__(self, source: PromptSource, keys: Sequence[str], settings: ExtractSettings, image_size: int) -> None:
        self.source, self.keys, self.settings = source, keys, settings
        self.preprocess = sam_preprocess(image_size)

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, indices: Sequence[int], epoch: int = 0) -> Picture:
        (index,) = indices
        key = self.keys[index]
        try:
            return self._load(key)
        except (ValueError, OSError) as error:
            nothing = torch.zeros(0)
            return Picture(nothing, nothing, (0, 0), Prompts(), [], [], skipped=[(key, str(error))])

    def read_embeddings(self, batch: Picture, memory: Any = None, pin: bool = False) -> Picture:
        return batch

    def _load(self, key: str) -> Picture:
        image = read_image(self.source.image_path(key))
        square, size = self.preprocess.fit(image)
        prompts, names = self._prompts(key, size)
        return Picture(square[None], torch.tensor([size]), (image.shape[1], image.shape[2]), prompts, names, [key])

    def _prompts(self, key: str, size: tuple[int, int]) -> tuple[Prompts, list[str]]:
        """Prompts, and names of their masks. ValueError if masks are wanted and none is fit for use."""
        data = self.settings.dataset
        if data.mode == "everything":
            return grid(data.grid_points, size), []
        if self.settings.prompts != "none":
            prompts, names = draw_all(self.source, key, data, self.preprocess, self.settings.seed)
            if names:
                return prompts, names
            if self.settings.prompts == "masks":
                raise ValueError(f"none of the masks of {key} can be used; mend them, or choose --prompts auto")
        return Prompts(), [""]


def sam_preprocess(image_size: int) -> Preprocess:
    """How all SAMs want their pictures."""
    return Preprocess(image_size, "pad", MEAN, STD)
