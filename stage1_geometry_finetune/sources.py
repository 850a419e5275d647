"""What one run learns from: annotated pictures of both splits, and the teacher's embeddings that Stage 1 stored."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from sam3.engine import coverage, stage_config
from sam3.engine.embeddings import EmbeddingReader, read_meta
from sam3.engine.image_list import ImageList
from sam3.engine.sa1b import list_sa1b, list_unannotated
from sam3.engine.weights import list_names
from stage1_geometry_finetune.data import GeometryDataset
from stage1_geometry_finetune.prompts import build_sampling

MASK_CELLS = 4  # side of SAM3's mask grid per cell of the embedding grid
logger = logging.getLogger("sam3.geometry")


@dataclass(frozen=True)
class Sources:
    """train, val: annotated pictures with an embedding; val is None without validation.

    teacher_meta: the store's description of the teacher, empty if it has none. left_out: reason -> keys of the pictures
    that DATA.SKIP_BAD_IMAGES keeps out, or val pictures that lack annotations or embedding.
    """

    train: ImageList
    val: ImageList | None
    reader: EmbeddingReader
    teacher_meta: dict[str, Any]
    left_out: dict[str, list[str]]

    def train_dataset(self, config: CfgNode) -> GeometryDataset:
        """The dataset over `train`."""
        return self._dataset(self.train, "train", config)

    def val_dataset(self, config: CfgNode) -> GeometryDataset | None:
        """The dataset over `val`, with annotated masks and without jitter; None without validation."""
        return None if self.val is None else self._dataset(self.val, "val", config)

    def _dataset(self, images: ImageList, split: str, config: CfgNode) -> GeometryDataset:
        return GeometryDataset(
            images,
            config.DATA.DATA_PATH,
            split,
            stage_config.build_preprocess(config),
            build_sampling(config),
            store=self.reader,
            seed=config.SEED,
            training=split == "train",
            load_masks=config.DATA.LOAD_GT_MASK,
            mask_size=MASK_CELLS * config.DISTILL.EMBED_SIZE,
            no_rand=config.DISTILL.NO_RAND,
            skip_bad=config.DATA.SKIP_BAD_IMAGES,
        )

    def describe(self) -> str:
        """One line for the log."""
        name = f"{self.teacher_meta.get('name', 'unknown')} (sha256 {self.teacher_meta.get('sha256', 'unknown')[:12]})"
        layout = self.reader.layout
        return f"stored in {self.reader.folder}: {len(self.reader)} embeddings {layout.shape} {layout.dtype}, {name}"


def open_sources(config: CfgNode) -> Sources:
    """List the pictures and open the store.

    Raises FileNotFoundError if there are no pictures or no store; ValueError for train pictures without an annotation
    file or an embedding (with DATA.SKIP_BAD_IMAGES, and in the val split, those are left out), for a store that was
    written otherwise than the config says or with augmentation, and if the processes of the run do not see the same.
    """
    left_out: dict[str, list[str]] = {}

    def list_split(split: str) -> ImageList:
        return _list_annotated(config, split, left_out)

    train, val = coverage.train_images(config, list_split), coverage.val_images(config, list_split)
    reader = _open_store(config)
    train, missing = coverage.with_embedding(train, reader, config.DATA.SKIP_BAD_IMAGES)
    val, missing_val = coverage.val_with_embedding(val, reader)
    coverage.require_same_everywhere(train, f"{reader.folder} (train)")
    coverage.require_same_everywhere(val, f"{reader.folder} (val)")
    left_out |= {
        f"{split}: no teacher embedding in {reader.folder}": keys
        for split, keys in (("train", missing), ("val", missing_val))
        if keys
    }
    return Sources(train, val, reader, (reader.meta or {}).get("teacher", {}), left_out)


def _list_annotated(config: CfgNode, split: str, left_out: dict[str, list[str]]) -> ImageList:
    """The pictures of `split` that have an annotation file; the others are refused or noted in `left_out`.

    As with embeddings, what the val split lacks costs a warning only.
    """
    root, training = config.DATA.DATA_PATH, split == "train"
    pictures, annotations = (Path(root) / name / split for name in ("images", "annotations"))
    images = list_sa1b(root, split)
    if not annotations.is_dir():
        found = f"no folder {annotations}: prompts come from SA-1B's annotation files"
        if training:
            raise ValueError(f"{found}; put <key>.json of every picture there with data/reorg_sa1b.py")
        logger.warning(f"{found}, so there will be no validation")
        return images.select(())
    if images.skipped:
        lacking = list_unannotated(root, split)
        found = (
            f"{len(lacking)} pictures in {pictures} have no JSON file in {annotations}: "
            f"{list_names(lacking, coverage.NUM_NAMED)}"
        )
        if training and not config.DATA.SKIP_BAD_IMAGES:
            raise ValueError(f"{found}; add the files, or leave them out with DATA.SKIP_BAD_IMAGES True")
        logger.warning(f"{found}; they are left out")
        left_out[f"{split}: no annotation file in {annotations}"] = lacking
    return images


def _open_store(config: CfgNode) -> EmbeddingReader:
    """The store, which must be of the pictures as they are."""
    if not config.DISTILL.TEACHER_EMBED_PATH:
        raise ValueError(
            "no teacher embeddings: set DISTILL.TEACHER_EMBED_PATH in the config file or pass --teacher-embed-path"
        )
    folder, side = Path(config.DISTILL.TEACHER_EMBED_PATH), config.DISTILL.EMBED_SIZE
    augmentation = (read_meta(folder) or {}).get("augmentation", {})
    if augmentation.get("enabled"):
        raise ValueError(
            f"the embeddings in {folder} are of flipped and recoloured pictures, which annotated boxes and points "
            "do not fit; export again, into another folder, with DISTILL.NO_RAND True in the teacher's config"
        )
    return EmbeddingReader(
        folder,
        shape=(config.DISTILL.EMBED_DIM, side, side),
        expect={"preprocess": stage_config.build_preprocess(config).to_meta(), "augmentation": {"enabled": False}},
        verify_crc=config.DISTILL.VERIFY_CRC,
    )
