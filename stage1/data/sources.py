"""What one run learns from: pictures of both splits, and where the teacher's embeddings come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from sam3.engine.coverage import val_with_embedding, with_embedding
from sam3.engine.embeddings import EmbeddingReader
from sam3.engine.image_list import ImageList
from sam3.engine.stage_config import build_preprocess
from stage1 import config as stage1_config
from stage1.data.dataset import Stage1Dataset
from stage1.data.listing import list_train_images, list_val_images


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
            build_preprocess(config),
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
        "preprocess": build_preprocess(config).to_meta(),
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
    train, _ = with_embedding(train, reader, config.DATA.SKIP_BAD_IMAGES)
    val, _ = val_with_embedding(val, reader)
    return Sources(train, val, reader, (reader.meta or {}).get("teacher", {}))
