"""What one run learns from: pictures of both splits, and where the teacher's embeddings come from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from sam3.engine.embeddings import EmbeddingReader
from sam3.engine.image_list import ImageList
from stage1 import config as stage1_config
from stage1.data.dataset import Stage1Dataset
from stage1.data.listing import list_train_images, list_val_images

logger = logging.getLogger("sam3.stage1")


@dataclass(frozen=True)
class Sources:
    """train, val: pictures with a teacher; val is None without validation. reader: None with an online teacher."""

    train: ImageList
    val: ImageList | None
    reader: EmbeddingReader | None
    teacher_meta: dict[str, Any]

    def dataset(self, images: ImageList, config: CfgNode) -> Stage1Dataset:
        """The dataset over `train` or `val`."""
        return Stage1Dataset(
            images,
            stage1_config.build_preprocess(config),
            store=self.reader,
            augmentation=stage1_config.build_augmentation(config),
            seed=config.SEED,
            skip_bad=config.DATA.SKIP_BAD_IMAGES,
        )

    def describe(self) -> str:
        """One line for the log."""
        name = f"{self.teacher_meta.get('name', 'unknown')} (sha256 {self.teacher_meta.get('sha256', 'unknown')[:12]})"
        if self.reader is None:
            return f"online, {name}"
        layout = self.reader.layout
        return f"stored in {self.reader.folder}: {len(self.reader)} embeddings {layout.shape} {layout.dtype}, {name}"


def store_fields(config: CfgNode) -> dict[str, Any]:
    """What a store must state besides its layout so that a run with this config may read or extend it."""
    augmentation = stage1_config.build_augmentation(config)
    return {
        "preprocess": stage1_config.build_preprocess(config).to_meta(),
        "augmentation": {"enabled": augmentation is not None, **(augmentation.to_meta() if augmentation else {})},
    }


def open_sources(config: CfgNode, online_teacher: dict[str, Any] | None) -> Sources:
    """List the pictures and open the store; `online_teacher` is the meta of a teacher that runs in the step.

    Raises ValueError for a store that was written otherwise than the config says, or that lacks pictures (with
    DATA.SKIP_BAD_IMAGES those are left out).
    """
    train, val = list_train_images(config), list_val_images(config)
    if online_teacher is not None:
        return Sources(train, val, None, online_teacher)
    side = config.DISTILL.EMBED_SIZE
    shape = (config.DISTILL.EMBED_DIM, side, side)
    reader = EmbeddingReader(
        stage1_config.embedding_folder(config),
        shape=shape,
        expect=store_fields(config),
        verify_crc=config.DISTILL.VERIFY_CRC,
    )
    train = _with_embedding(train, reader, config.DATA.SKIP_BAD_IMAGES)
    return Sources(train, _val_with_embedding(val, reader), reader, (reader.meta or {}).get("teacher", {}))


def _with_embedding(images: ImageList, reader: EmbeddingReader, skip: bool) -> ImageList:
    missing = reader.missing(images.keys())
    if not missing:
        return images
    found = (
        f"no teacher embedding for {len(missing)} of {len(images)} pictures in {reader.folder}, such as {missing[0]!r}"
    )
    if not skip or len(missing) == len(images):
        raise ValueError(
            f"{found}; write them with {reader.write_command}, or leave them out with DATA.SKIP_BAD_IMAGES True"
        )
    logger.warning(f"{found}: they are left out")
    return images.select(set(images.keys()) - set(missing))


def _val_with_embedding(images: ImageList | None, reader: EmbeddingReader) -> ImageList | None:
    """The val pictures that are stored; the public code stores none, which is no reason not to train."""
    if images is None:
        return None
    missing = reader.missing(images.keys())
    if missing:
        logger.warning(f"{len(missing)} of {len(images)} val pictures have no embedding in {reader.folder}: left out")
    stored = images.select(set(images.keys()) - set(missing))
    return stored if len(stored) else None
