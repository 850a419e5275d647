"""The data of geometry fine-tuning: pictures, prompts from their annotations, and what the teacher stored for them.

Letters: `B` images, `N` objects of an image (right-padded), `S` side of the model's square, `G` side of the embedding
grid, `M` side of the mask grid, `C` channels, `I` decode iterations, `K` refine points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam3.engine import batch
from sam3.engine.embeddings import EmbeddingBatch, EmbeddingReader
from sam3.engine.image_list import ImageList
from sam3.engine.pictures import empty_images
from sam3.engine.prefetch import ReusedMemory
from sam3.engine.sa1b import ImageAnnotations, annotation_path, read_annotations, sample_runs
from sam3.transforms import Preprocess, read_image
from stage1_geometry_finetune.prompts import Prompts, PromptSampling, choose_prompts, sample_generator

LEAVE_OUT = "remove such pictures, or leave them out with DATA.SKIP_BAD_IMAGES True"


@dataclass
class GeometryBatch:
    """images: uint8 `(B, 3, S, S)`, zero-padded, channels last in memory. sizes: int64 `(B, 2)`, rows and columns of
    each picture inside its square. keys: B strings.
    boxes: float32 `(B, N, 4)` xyxy in 0..1 of the square, jittered in training. targets: the same, as annotated.
    points: float32 `(B, N, 2)`, 0..1 of the square. point_labels: int64 `(B, N)`, 1 = on the object.
    prompt_mask: bool `(B, N)`, True = padding, where all of these are zero.
    kinds: per image and object "box", "point" or "both"; on the host, so that no device has to be asked. Where it is
    "box", the object may have no point (zeros).
    refine_uniforms: float32 `(B, N, I-1, K)` in [0, 1); refine_counts: int64 `(B, N, I-1)`; None if nothing is refined.
    gt_masks: bool `(B, N, M, M)`, annotated masks at the cell centres of the mask grid; None if not loaded.
    embeddings: as stored, `(B, C, G, G)`; None without a store.
    skipped: (key, reason) of pictures that were asked for but cannot be used; they count in no other field.
    """

    images: Tensor
    sizes: Tensor
    keys: list[str]
    boxes: Tensor
    targets: Tensor
    points: Tensor
    point_labels: Tensor
    prompt_mask: Tensor
    kinds: list[list[str]]
    refine_uniforms: Tensor | None = None
    refine_counts: Tensor | None = None
    gt_masks: Tensor | None = None
    embeddings: EmbeddingBatch | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> GeometryBatch:
        """A copy in page-locked memory; a DataLoader calls this."""
        return batch.pin(self)


class GeometryDataset:
    """Pictures of SA-1B with prompts; a `sam3.engine.loader.PictureDataset`.

    images: those of `split` below `root`. store: the teacher's embeddings. seed: of all that is drawn.
    training: False gives every object its box as annotated and its point, the same in every epoch, and loads masks.
    load_masks: load masks in training too, and apply `sampling.mask_nms`. mask_size: side `M` of their grid.
    no_rand: training draws the same in every epoch.
    skip_bad: leave pictures that cannot be used out of their batch and list them in `skipped`, which may leave a batch
    empty. Otherwise they raise ValueError or FileNotFoundError naming the file; a missing embedding always raises.
    """

    def __init__(
        self,
        images: ImageList,
        root: str | Path,
        split: str,
        preprocess: Preprocess,
        sampling: PromptSampling,
        store: EmbeddingReader | None = None,
        seed: int = 0,
        training: bool = True,
        load_masks: bool = False,
        mask_size: int | None = None,
        no_rand: bool = False,
        skip_bad: bool = False,
    ) -> None:
        if mask_size is None and (load_masks or not training):
            raise ValueError(
                "masks are loaded in validation and with load_masks: state mask_size, the side of their grid"
            )
        if not load_masks:
            sampling = replace(sampling, mask_nms=None)
        self.images, self.root, self.split, self.preprocess, self.store = images, Path(root), split, preprocess, store
        self.sampling = sampling if training else sampling.for_validation()
        self.seed, self.skip_bad = seed, skip_bad
        self.mask_size = mask_size if load_masks or not training else None
        self.same_every_epoch = no_rand or not training

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Sequence[int], epoch: int = 0) -> GeometryBatch:
        """The pictures `indices` as `epoch` shows them, still without embeddings; the disk is asked for these."""
        keys = [self.images.key(index) for index in indices]
        if self.store is not None:
            self.store.announce(keys)
        pictures = empty_images(len(keys), self.preprocess.img_size)
        sizes = torch.zeros(len(keys), 2, dtype=torch.int64)
        loaded: dict[int, tuple[Prompts, Tensor | None]] = {}
        skipped = []
        for row, index in enumerate(indices):
            try:
                loaded[row], size = self._load(index, epoch, pictures[row])
            except (ValueError, OSError) as error:
                if not self.skip_bad:
                    raise
                skipped.append((keys[row], str(error)))
            else:
                sizes[row] = torch.tensor(size)
        rows = list(loaded)
        if skipped:
            pictures, sizes = pictures[rows], sizes[rows]
        prompts, masks = [prompts for prompts, _ in loaded.values()], [masks for _, masks in loaded.values()]
        return GeometryBatch(
            pictures,
            sizes,
            [keys[row] for row in rows],
            **collate(prompts, self.sampling),
            gt_masks=None if self.mask_size is None else _pad(masks, (self.mask_size,) * 2, torch.bool),
            skipped=skipped,
        )

    def _load(self, index: int, epoch: int, out: Tensor) -> tuple[tuple[Prompts, Tensor | None], tuple[int, int]]:
        """The prompts and masks of a picture, and its size in the square; its pixels go to `out`, `(3, S, S)` zeros."""
        key = self.images.key(index)
        path = annotation_path(self.root, self.split, key)
        annotations = read_annotations(path)
        generator = sample_generator(self.seed, None if self.same_every_epoch else epoch, key)
        prompts = choose_prompts(annotations, self.sampling, self.preprocess, generator)
        if not prompts.kinds:
            raise ValueError(self._no_prompts(annotations))
        masks = None
        if self.mask_size is not None:
            masks = grid_masks(annotations, prompts.indices, self.preprocess, self.mask_size)
        image = read_image(self.images.path(index))
        found, wanted = tuple(image.shape[1:]), (annotations.height, annotations.width)
        if found != wanted:
            raise ValueError(
                f"picture {self.images.path(index)} has {found} rows and columns, but {path} is about one of {wanted}; "
                f"fetch both again"
            )
        return (prompts, masks), self.preprocess.fit_into(image, out)

    def _no_prompts(self, annotations: ImageAnnotations) -> str:
        advice = "" if self.skip_bad else f"; {LEAVE_OUT}"
        if not len(annotations):
            return f"annotation file {annotations.source} lists no objects{advice}"
        point = "" if self.sampling.use_boxes else ", and a point"
        return (
            f"none of the {len(annotations)} objects in {annotations.source} can be a prompt (wanted: a box inside the "
            f"picture with sides of at least 1 pixel{point}){advice}"
        )

    def read_embeddings(
        self, batch: GeometryBatch, memory: ReusedMemory | None = None, pin: bool = False
    ) -> GeometryBatch:
        """`batch` with its stored embeddings, if there is a store. memory, pin: where to put them."""
        if self.store is not None:
            batch.embeddings = self.store.read_batch(batch.keys, self.store.allocate(len(batch), memory, pin))
        return batch


def grid_masks(annotations: ImageAnnotations, indices: Sequence[int], preprocess: Preprocess, mask_size: int) -> Tensor:
    """Masks of the objects `indices` at the cell centres of an M x M grid over the model's square: bool `(N, M, M)`.

    A predicted logit belongs to the centre of its cell (bilinear resizing keeps its value there), so that is where the
    annotation is looked up; cells whose centre lies in the padding are False. The full mask is never decoded.
    """
    height, width = annotations.height, annotations.width
    h, w = preprocess.fitted_size(height, width)
    centres = (np.arange(mask_size) + 0.5) * (preprocess.img_size / mask_size)
    rows = (centres[centres < h] * (height / h)).astype(np.int64)
    columns = (centres[centres < w] * (width / w)).astype(np.int64)
    masks = torch.zeros(len(indices), mask_size, mask_size, dtype=torch.bool)
    for mask, index in zip(masks, indices, strict=True):
        mask[: len(rows), : len(columns)] = torch.from_numpy(
            sample_runs(annotations.runs(index), height, rows, columns)
        )
    return masks


def collate(prompts: Sequence[Prompts], sampling: PromptSampling) -> dict[str, object]:
    """The prompts of several pictures as fields of a `GeometryBatch`, each picture's followed by zeros."""
    lengths = torch.tensor([len(each.kinds) for each in prompts], dtype=torch.int64)
    longest = max((len(each.kinds) for each in prompts), default=0)
    prompt_mask = torch.arange(longest) >= lengths[:, None]
    refined = all(sampling.refine_shape)
    return {
        "boxes": _pad([each.boxes for each in prompts], (4,)),
        "targets": _pad([each.targets for each in prompts], (4,)),
        "points": _pad([each.points for each in prompts], (2,)),
        "point_labels": (~prompt_mask).long(),
        "prompt_mask": prompt_mask,
        "kinds": [each.kinds for each in prompts],
        "refine_uniforms": _pad([each.refine_uniforms for each in prompts], sampling.refine_shape) if refined else None,
        "refine_counts": (
            _pad([each.refine_counts for each in prompts], sampling.refine_shape[:1], torch.int64) if refined else None
        ),
    }


def _pad(parts: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Tensors `(N_i, *shape)` as one `(B, N, *shape)`, filled up with zeros."""
    padded = torch.zeros(len(parts), max(map(len, parts), default=0), *shape, dtype=dtype)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded
