"""Which pictures a run goes over: the same on all its processes, and those that the teacher has seen."""

from __future__ import annotations

import logging
from collections.abc import Callable

from yacs.config import CfgNode

from sam3.engine import distributed
from sam3.engine.embeddings import EmbeddingReader
from sam3.engine.image_list import ImageList
from sam3.engine.weights import list_names

DEBUG_SAMPLES = 100
NUM_NAMED = 10  # missing pictures that a message names
logger = logging.getLogger("sam3.coverage")

ListSplit = Callable[[str], ImageList]


def train_images(config: CfgNode, list_split: ListSplit) -> ImageList:
    """The pictures of the train split, at most DATA.NUM_SAMPLES.

    list_split: `train` or `val` -> all pictures of the split. Raises what it raises if there are none, ValueError if
    the processes of the run do not see the same files.
    """
    images = _capped(config, list_split, "train", config.DATA.NUM_SAMPLES)
    require_same_everywhere(images, f"{config.DATA.DATA_PATH} (train)")
    return images


def val_images(config: CfgNode, list_split: ListSplit) -> ImageList | None:
    """The pictures of the val split, at most DATA.NUM_VAL_SAMPLES; None, with a line in the log, if there are none.

    Raises ValueError if the processes of the run do not see the same files.
    """
    if config.DATA.NUM_VAL_SAMPLES == 0:
        return None
    try:
        images = _capped(config, list_split, "val", config.DATA.NUM_VAL_SAMPLES)
    except FileNotFoundError as error:
        logger.info(f"no val split ({error}): there will be no validation")
        images = None
    require_same_everywhere(images, f"{config.DATA.DATA_PATH} (val)")  # also without one: another machine may have it
    return images or None


def _capped(config: CfgNode, list_split: ListSplit, split: str, cap: int) -> ImageList:
    """The first `cap` pictures of a split (all if negative), with DATA.DEBUG at most DEBUG_SAMPLES."""
    if not config.DATA.DATA_PATH:
        raise ValueError("no data set: set DATA.DATA_PATH in the config file or pass --data-path")
    if config.DATA.DEBUG:
        cap = DEBUG_SAMPLES if cap < 0 else min(cap, DEBUG_SAMPLES)
    images = list_split(split).head(cap)
    if images.skipped:
        logger.info(f"{split}: {images.skipped} pictures without annotations are left out")
    return images


def require_same_everywhere(images: ImageList | None, what: str) -> None:
    """ValueError if another process of the run has other pictures than this one; all must call it. what: names them."""
    if len(set(distributed.gather_objects("" if images is None else images.digest()))) > 1:
        raise ValueError(
            f"the processes of this run see different pictures in {what}; every machine must see the same data set"
        )


def with_embedding(images: ImageList, reader: EmbeddingReader, skip: bool) -> tuple[ImageList, list[str]]:
    """The pictures to train on, which have an embedding in the store, and the keys of those that have none.

    Raises ValueError naming up to NUM_NAMED of the latter; with `skip` (DATA.SKIP_BAD_IMAGES) they are left out with a
    warning, unless that leaves nothing.
    """
    missing = reader.missing(images.keys())
    if not missing:
        return images, []
    found = (
        f"no teacher embedding for {len(missing)} of {len(images)} pictures in {reader.folder}: "
        f"{list_names(missing, NUM_NAMED)}"
    )
    if not skip or len(missing) == len(images):
        raise ValueError(
            f"{found}; write them with {reader.write_command}, or leave them out with DATA.SKIP_BAD_IMAGES True"
        )
    logger.warning(f"{found}; they are left out")
    return images.select(set(images.keys()) - set(missing)), missing


def val_with_embedding(images: ImageList | None, reader: EmbeddingReader) -> tuple[ImageList | None, list[str]]:
    """The val pictures that have an embedding (None if none has), and the keys of the others.

    The public code stores no embeddings of the val split, which is no reason not to train: it costs a warning only.
    """
    if images is None:
        return None, []
    missing = reader.missing(images.keys())
    if missing:
        logger.warning(
            f"no teacher embedding for {len(missing)} of {len(images)} val pictures in {reader.folder}: "
            f"{list_names(missing, NUM_NAMED)}; they are left out"
        )
    stored = images.select(set(images.keys()) - set(missing))
    return stored if len(stored) else None, missing
