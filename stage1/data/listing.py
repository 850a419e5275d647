"""Which pictures a run uses, by the config's DATA keys."""

from __future__ import annotations

from functools import partial

from yacs.config import CfgNode

from sam3.engine import coverage
from sam3.engine.coco import list_coco
from sam3.engine.image_list import ImageList, list_folder
from sam3.engine.sa1b import list_sa1b


def list_train_images(config: CfgNode) -> ImageList:
    """The pictures of the train split. Raises FileNotFoundError if there are none; see `coverage.train_images`."""
    return coverage.train_images(config, partial(_list_split, config))


def list_val_images(config: CfgNode) -> ImageList | None:
    """The pictures of the val split; None if there are none or NUM_VAL_SAMPLES is 0; see `coverage.val_images`."""
    return coverage.val_images(config, partial(_list_split, config))


def _list_split(config: CfgNode, split: str) -> ImageList:
    root, dataset = config.DATA.DATA_PATH, config.DATA.DATASET
    if dataset == "sa1b":
        return list_sa1b(root, split)
    if dataset == "folder":
        return list_folder(root, split, config.DATA.VAL_FRACTION)
    return list_coco(root, split, dataset)
