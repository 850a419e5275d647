"""What one run learns from: annotated videos of both splits, the embeddings of their frames, and still pictures."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from sam3.engine import distributed
from sam3.engine.recipe import samples_per_epoch
from sam3.engine.sa1b import list_sa1b
from sam3.engine.sav import ANNOTATION_STEP, VideoFolder, list_videos, masklet_path
from sam3.engine.video_embedding_format import WRITE_COMMAND
from sam3.engine.video_embeddings import VideoEmbeddings
from sam3.engine.weights import list_names
from sam3.transforms import Preprocess
from stage2.data.augmentation import Augmentation, Jitter
from stage2.data.clips import ClipSampling
from stage2.data.prompts import PromptSampling
from stage2.data.sav_dataset import SavDataset
from stage2.data.stills import Stills

MASK_CELLS = 4  # side of SAM3's mask grid per cell of the embedding grid
DEBUG_VIDEOS = 8
NUM_NAMED = 10  # videos that a message names
LOOKERS = 16  # threads that look for annotation files: on network disks each look takes a while
logger = logging.getLogger("sam3.stage2")


@dataclass(frozen=True)
class Sources:
    """train, val: names of videos, val maybe empty. mask_size: M. store: embeddings of all of them, or None.

    skip_bad: see `SavDataset`. left_out: reason -> names of the videos that take no part.
    """

    train: list[str]
    val: list[str]
    preprocess: Preprocess
    mask_size: int
    store: VideoEmbeddings | None
    stills: Stills | None
    skip_bad: bool
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def train_dataset(self, config: CfgNode) -> SavDataset:
        """Clips of the train videos: as many as there are videos, or a multiple where that makes no optimizer step."""
        return self._dataset(self.train, config, length=samples_per_epoch(config, len(self.train)))

    def val_dataset(self, config: CfgNode) -> SavDataset | None:
        """One fixed clip of each val video; None without validation."""
        return self._dataset(self.val, config, training=False) if self.val else None

    def _dataset(
        self, names: list[str], config: CfgNode, length: int | None = None, training: bool = True
    ) -> SavDataset:
        return SavDataset(
            config.DATA.SAV_ROOT,
            names,
            self.preprocess,
            self.mask_size,
            build_clip_sampling(config, self.store),
            build_prompt_sampling(config),
            kinds=config.DATA.KINDS,
            store=self.store,
            augmentation=build_augmentation(config),
            stills=self.stills,
            length=length,
            seed=config.SEED,
            training=training,
            skip_bad=self.skip_bad,
        )

    def describe(self) -> str:
        """One line for the log."""
        if self.store is None:
            line = f"frames through the trunk in each step, {self.preprocess}"
            if self.stills is None:
                return line
            return f"{line}; {self.stills.ratio:.0%} of the clips of {len(self.stills.images)} still pictures"
        form, teacher = self.store.format, self.store.meta["teacher"]
        return (
            f"stored in {self.store.folder}: {form.shape} {form.dtype} of {len(self.store.videos)} videos, "
            f"{teacher.get('name', 'unknown')} (sha256 {teacher.get('sha256', 'unknown')[:12]})"
        )


def open_sources(
    config: CfgNode,
    preprocess: Preprocess,
    shape: Sequence[int],
    teacher: Mapping[str, Any],
    skip_bad: bool = False,
) -> Sources:
    """List the videos, open the embeddings, and deal the videos to the splits; all processes of the run must call it.

    preprocess, shape: of the model that is trained behind: how frames become input, and (E, G, G) of what its trunk
    gives. teacher: its file, `{"sha256": ...}`. skip_bad: DATA.SKIP_BAD_VIDEOS.

    Raises FileNotFoundError if there are no videos or no embeddings; ValueError for videos without annotations or
    embeddings (with skip_bad those are left out), for embeddings of another model, and if the processes do
    not see the same videos.
    """
    names = [video.name for video in list_videos(config.DATA.SAV_ROOT)]
    store = open_store(config, preprocess, shape, teacher) if config.DATA.USE_PRECOMPUTED else None
    build_clip_sampling(config, store)  # for its checks
    require_same_everywhere(names, config.DATA.SAV_ROOT)
    left_out: dict[str, list[str]] = {}
    lacking = {f"no annotations ({', '.join(config.DATA.KINDS)}) in {config.DATA.SAV_ROOT}": unannotated(config, names)}
    if store is not None:
        lacking[f"no embeddings in {store.folder} (add them with {WRITE_COMMAND})"] = _missing(store, names)
    for reason, without in lacking.items():
        names = leave_out(names, without, reason, skip_bad, left_out)
    train, val = split_videos(names, config)
    require_same_everywhere([*train, "", *val], f"{config.DATA.SAV_ROOT} with annotations and embeddings")
    if not val:
        logger.info("no videos to validate on: there will be no validation")
    mask_size = MASK_CELLS * shape[-1]
    return Sources(train, val, preprocess, mask_size, store, open_stills(config), skip_bad, left_out)


def open_store(
    config: CfgNode, preprocess: Preprocess, shape: Sequence[int], teacher: Mapping[str, Any]
) -> VideoEmbeddings:
    """The embeddings, which must be those of the model that is trained behind."""
    expect = {"teacher": {"sha256": teacher["sha256"]}, "preprocess": preprocess.to_meta()}
    return VideoEmbeddings(config.DATA.EMBEDDING_DIR, shape, expect)


def open_stills(config: CfgNode) -> Stills | None:
    """The train pictures of SA-1B that have annotations; None if no clip is made of them."""
    if not config.DATA.SA1B_RATIO:
        return None
    root = Path(config.DATA.SA1B_ROOT)
    if not (root / "annotations" / "train").is_dir():
        raise ValueError(
            f"no folder {root / 'annotations' / 'train'}, but clips of still pictures need their masks; set "
            "DATA.SA1B_ROOT to SA-1B as data/reorg_sa1b.py arranges it, or DATA.SA1B_RATIO 0"
        )
    images = list_sa1b(root, "train")
    require_same_everywhere([images.digest()], root)
    return Stills(images, root, config.DATA.SA1B_RATIO)


def split_videos(names: Sequence[str], config: CfgNode) -> tuple[list[str], list[str]]:
    """Train and val videos, each sorted.

    A hash of seed and name orders the videos, so that most keep their side when others come or go. There is at least
    one train video and, of two videos, one to validate on if DATA.VAL_SPLIT is not 0.
    """
    data = config.DATA
    order = sorted(names, key=lambda name: hashlib.sha256(f"{config.SEED} {name}".encode()).digest())
    order = order[: max(1, round(len(order) * data.SUBSET))]
    if data.DEBUG:
        order = order[:DEBUG_VIDEOS]
    num_val = max(1, round(len(order) * data.VAL_SPLIT)) if data.VAL_SPLIT and len(order) > 1 else 0
    num_train = min(max(1, round(len(order) * data.TRAIN_SPLIT)), len(order) - num_val)
    val = order[len(order) - num_val :]
    if data.NUM_VAL_SAMPLES >= 0:
        val = val[: data.NUM_VAL_SAMPLES]
    return sorted(order[:num_train]), sorted(val)


def unannotated(config: CfgNode, names: Sequence[str]) -> list[str]:
    """The videos that have no file of any of DATA.KINDS. Files are not opened."""
    root = Path(config.DATA.SAV_ROOT)

    def lacks(name: str) -> bool:
        video = VideoFolder(name, root / name)
        return not any(masklet_path(video, kind).is_file() for kind in config.DATA.KINDS)

    with ThreadPoolExecutor(LOOKERS) as pool:
        return [name for name, lacking in zip(names, pool.map(lacks, names), strict=True) if lacking]


def _missing(store: VideoEmbeddings, names: Sequence[str]) -> list[str]:
    stored = set(store.videos)
    return [name for name in names if name not in stored]


def leave_out(
    names: list[str], without: Sequence[str], reason: str, skip_bad: bool, left_out: dict[str, list[str]]
) -> list[str]:
    """`names` less those in `without`, which are noted in `left_out`; ValueError unless they may be left out, or if
    nothing is left."""
    gone = set(without) & set(names)
    if not gone:
        return names
    found = f"{len(gone)} of {len(names)} videos have {reason}: {list_names(sorted(gone), NUM_NAMED)}"
    if not skip_bad or len(gone) == len(names):
        raise ValueError(f"{found}; give them what they lack, or leave them out with DATA.SKIP_BAD_VIDEOS True")
    logger.warning(f"{found}; they are left out")
    left_out[reason] = sorted(gone)
    return [name for name in names if name not in gone]


def require_same_everywhere(names: Sequence[str], where: str | Path) -> None:
    """ValueError if another process of the run has other `names` than this one; all must call it."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if len(set(distributed.gather_objects(digest))) > 1:
        raise ValueError(
            f"the processes of this run see different data in {where}; every machine must see the same data set"
        )


# From the config's keys -----------------------------------------------------------------------------------------------


def build_clip_sampling(config: CfgNode, store: VideoEmbeddings | None) -> ClipSampling:
    """How clips are drawn; ValueError if DATA.FRAME_SKIP does not fit the frames that are stored."""
    data = config.DATA
    grid = ANNOTATION_STEP if store is None else math.lcm(ANNOTATION_STEP, int(store.meta.get("frame_stride", 1)))
    return ClipSampling(data.NUM_FRAMES, data.FRAME_SKIP, grid, data.MAX_OBJECTS, data.TIME_REVERSAL)


def build_prompt_sampling(config: CfgNode) -> PromptSampling:
    """How objects are given."""
    shares = config.DISTILL.PROMPTS
    return PromptSampling(shares.MASK, shares.BOX, shares.CLICK)


def build_augmentation(config: CfgNode) -> Augmentation | None:
    """How pictures are changed; None if they are not."""
    aug = config.AUG
    if not aug.ENABLED:
        return None
    clip_jitter, frame_jitter = (
        Jitter(keys.BRIGHTNESS, keys.CONTRAST, keys.SATURATION) for keys in (aug.COLOR_JITTER, aug.FRAME_JITTER)
    )
    return Augmentation(aug.HFLIP, aug.AFFINE.DEGREES, aug.AFFINE.SHEAR, clip_jitter, frame_jitter, aug.GRAYSCALE)
