"""The first phases of SAM3's training from scratch, as runs of the shared engine: words, close-ups, whole scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from yacs.config import CfgNode

from distillation.supervised import config as supervised_config
from distillation.supervised.dataset import SceneDataset
from distillation.supervised.evaluation import SceneValidator, WordValidator
from distillation.supervised.model import SupervisedSam3
from distillation.supervised.set_loss import SetLoss
from sam3.engine.config import leaf_keys
from sam3.engine.distributed import World
from sam3.engine.from_scratch import OUTSIDE, RUN
from sam3.engine.loader import loader_from_config, once_sampler, train_sampler
from sam3.engine.log import MetricLog
from sam3.engine.scene_grounds import grounds_of
from sam3.engine.training_run import TrainingRun
from sam3.engine.weights import load_for_any_size
from sam3.model.config import Sam3Config
from sam3.model.tracker_config import TrackerConfig
from sam3.model_builder import assemble_image_model
from sam3.tracker_builder import assemble_tracker

SCENES_PER_EPOCH = 1_000_000  # more than a run sees
# Going on with another value of one of these would mean something else. As in the other stages, a run's length, batch
# and learning rates may be changed on the way.
RESUME_KEYS = (
    *("PHASE", "SEED", "MODEL.PRESET", "TRAIN.OPTIMIZER.NAME"),
    *("DATA.IMG_SIZE", "DATA.NUM_SCENES", "DATA.PHOTOS", "DATA.PROMPTS", "DATA.CLICKS", "DATA.CLICK_EVERY"),
    *(key for key in leaf_keys(supervised_config.defaults()) if key.startswith(("LOSS.", "DATA.MIX."))),
)


def build_run(config: CfgNode, world: World, output: Path, dry_run: bool) -> TrainingRun:
    """Data and model of a phase; see `sam3.engine.training_run.run_stage`."""
    model = build_model(config)
    model.to(world.device)
    if config.TRAIN.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    train_dataset = scenes(config, model, "train", SCENES_PER_EPOCH)
    sampler = train_sampler(config, len(train_dataset), world)

    def make_validator(metrics: MetricLog) -> SceneValidator | WordValidator:
        dataset = scenes(config, model, "val", config.DATA.NUM_VAL_SCENES)
        batches = once_sampler(len(dataset), config.DATA.BATCH_SIZE, world)
        validator = WordValidator if model.only_words else SceneValidator
        return validator(model, loader_from_config(config, dataset, batches, world.device), world)

    pretrained = config.MODEL.PRETRAINED
    return TrainingRun(
        config,
        world,
        output,
        model,
        saved=model,
        sampler=sampler,
        make_loader=lambda: loader_from_config(config, train_dataset, sampler, world.device),
        make_validator=make_validator,
        load_weights=lambda path: load_for_any_size(model, path, OUTSIDE),
        start_from=(lambda: load_for_any_size(model, pretrained, OUTSIDE)) if pretrained else None,
        meta={"phase": config.PHASE, "preset": config.MODEL.PRESET},
        resume_keys=RESUME_KEYS,
        lines={"scenes": f"made on the fly, {config.DATA.IMG_SIZE} px, {config.DATA.PROMPTS} prompts each"},
        unit="scenes",
        data="generated scenes",
        **RUN,
    )


def build_model(config: CfgNode) -> SupervisedSam3:
    """With random weights, for pictures of DATA.IMG_SIZE."""
    usual = Sam3Config.preset(config.MODEL.PRESET)
    sizes = replace(usual, img_size=config.DATA.IMG_SIZE)
    detector = assemble_image_model(sizes, with_sam2_neck=True)
    for block in detector.backbone.vision_backbone.trunk.blocks:
        if block.whole_image:  # what attention learns of distances in a part of a picture holds in a whole one
            block.attn.rescale(usual.window_size / usual.grid)
    tracker = assemble_tracker(replace(TrackerConfig.preset(config.MODEL.PRESET), img_size=config.DATA.IMG_SIZE))
    loss = config.LOSS
    set_loss = SetLoss(supervised_config.set_weights(config), loss.COPIES, loss.FOCAL_ALPHA, loss.ABSENT_SCORE)
    shares = (loss.CLICK_WEIGHT, loss.MASK_SHARE, loss.WORD_WEIGHT, loss.OUTLINE_WEIGHT)
    return SupervisedSam3(
        detector, tracker, set_loss, *shares, only_words=config.PHASE == "words", named_lr=config.TRAIN.NAMED_LR
    )


def scenes(config: CfgNode, model: SupervisedSam3, split: str, count: int) -> SceneDataset:
    """`count` scenes of a split, with objects as large as in scenes of the preset's size."""
    sizes = Sam3Config.preset(config.MODEL.PRESET)
    return SceneDataset(
        count,
        sizes.img_size,
        model.detector.preprocess,
        sizes.patch_size,
        split,
        config.SEED if split == "train" else 0,
        config.DATA.PROMPTS,
        config.DATA.CLICKS,
        config.DATA.CLICK_EVERY,
        grounds_of(config.DATA.PHOTOS, split, sizes.img_size),
        dict(config.DATA.MIX),
        config.DATA.NUM_SCENES if split == "train" else 0,
    )
