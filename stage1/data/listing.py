"""Which pictures a run uses, by the config's DATA keys."""

from __future__ import annotations

import logging

from yacs.config import CfgNode

from sam3.engine import distributed
from sam3.engine.coco import list_coco
from sam3.engine.image_list import ImageList, list_folder
from sam3.engine.sa1b import list_sa1b

DEBUG_SAMPLES = 100
logger = logging.getLogger("sam3.stage1")


def list_train_images(config: CfgNode) -> ImageList:
    """The pictures of the train split. Raises FileNotFoundError if there are none, ValueError if the processes of the
    run do not see the same files.
    """
    images = _list_split(config, "train")
    _require_same_everywhere(config, "train", images)
    return images


def list_val_images(config: CfgNode) -> ImageList | None:
    """The pictures of the val split; None, with a line in the log, if there are none or NUM_VAL_SAMPLES is 0.

    Raises ValueError if the processes of the run do not see the same files.
    """
    if config.DATA.NUM_VAL_SAMPLES == 0:
        return None
    try:
        images = _list_split(config, "val")
    except FileNotFoundError as error:
        logger.info(f"no val split ({error}): there will be no validation")
        images = None
    _require_same_everywhere(config, "val", images)  # also without one: another machine may have it
    return images or None


def _list_split(config: CfgNode, split: str) -> ImageList:
    """The pictures of `split`, capped by NUM_SAMPLES (train), NUM_VAL_SAMPLES (val) and DEBUG."""
    if not config.DATA.DATA_PATH:
        raise ValueError("no data set: set DATA.DATA_PATH in the config file or pass --data-path")
    cap = config.DATA.NUM_SAMPLES if split == "train" else config.DATA.NUM_VAL_SAMPLES
    if config.DATA.DEBUG:
        cap = DEBUG_SAMPLES if cap < 0 else min(cap, DEBUG_SAMPLES)
    images = _list_all(config, split).head(cap)
    if images.skipped:
        logger.info(f"{split}: {images.skipped} pictures without annotations are left out")
    return images


def _require_same_everywhere(config: CfgNode, split: str, images: ImageList | None) -> None:
    if len(set(distributed.gather_objects("" if images is None else images.digest()))) > 1:
        raise ValueError(
            f"the processes of this run see different pictures in {config.DATA.DATA_PATH} ({split}); "
            f"every machine must see the same data set"
        )


def _list_all(config: CfgNode, split: str) -> ImageList:
    root, dataset = config.DATA.DATA_PATH, config.DATA.DATASET
    if dataset == "sa1b":
        return list_sa1b(root, split)
    if dataset == "folder":
        return list_folder(root, split, config.DATA.VAL_FRACTION)
    return list_coco(root, split, dataset)
