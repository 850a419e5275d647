"""A run of the tracker's training on generated clips, for `sam3.engine.training_run.run_stage`:

run_stage(argv, config.make_parser(__doc__), config.load, run.build_run)
"""

from __future__ import annotations

from pathlib import Path

from yacs.config import CfgNode

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
from stage2.supervised.config import clip_draws, defaults, prompt_sampling, track_weights
from stage2.supervised.dataset import SceneClips, ValidationClips
from stage2.supervised.model import SupervisedTracker
from stage2.supervised.validation import ClipValidator

# How clips are loaded and validated on, not which are trained on.
HOW = ("DATA.BATCH_SIZE", "DATA.NUM_WORKERS", "DATA.PREFETCH_FACTOR", "DATA.PIN_MEMORY", "DATA.NUM_VAL_")
# Going on with another value of one of these would mean something else. As in the other stages, a run's length, batch
# and learning rates may be changed on the way.
RESUME_KEYS = (
    *("PHASE", "SEED", "MODEL.PRESET", "MODEL.TRAIN_NECK", "TRAIN.OPTIMIZER.NAME"),
    *(key for key in leaf_keys(defaults()) if key.startswith(("DATA.", "LOSS.")) and not key.startswith(HOW)),
)


def build_run(config: CfgNode, world: World, output: Path, dry_run: bool) -> TrainingRun:
    """Checkpoints hold the whole model, so that each can be exported and tracked with."""
    model = build_model(config).to(world.device)
    preprocess, side = model.detector.preprocess, model.tracker.low_side
    train_dataset = SceneClips(
        config.DATA.NUM_CLIPS,
        preprocess,
        side,
        clip_draws(config),
        prompt_sampling(config),
        config.SEED,
        grounds_of(config.DATA.PHOTOS, "train", preprocess.img_size),
    )
    pretrained = config.MODEL.PRETRAINED
    missing_in_plan = dry_run and not Path(pretrained).is_file()  # the phases before may still be to come
    counts = ", then ".join(map(str, config.DATA.NUM_FRAMES))
    sampler = train_sampler(config, len(train_dataset), world)

    def make_validator(metrics: MetricLog) -> ClipValidator:
        data = config.DATA
        grounds = grounds_of(data.PHOTOS, "val", preprocess.img_size)
        dataset = ValidationClips(data.NUM_VAL_CLIPS, preprocess, side, data.NUM_VAL_FRAMES, grounds)
        batches = once_sampler(len(dataset), data.BATCH_SIZE, world)
        return ClipValidator(model, loader_from_config(config, dataset, batches, world.device), world)

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
        start_from=None if missing_in_plan else lambda: take_image_model(model, pretrained),
        meta={"phase": config.PHASE, "preset": config.MODEL.PRESET},
        resume_keys=RESUME_KEYS,
        lines={"clips": f"made on the fly, of {counts} frames of {preprocess.img_size} px"},
        unit="clips",
        data="generated clips",
        **RUN,
    )


def build_model(config: CfgNode) -> SupervisedTracker:
    """With random weights."""
    detector = assemble_image_model(Sam3Config.preset(config.MODEL.PRESET), with_sam2_neck=True)
    tracker = assemble_tracker(TrackerConfig.preset(config.MODEL.PRESET))
    return SupervisedTracker(detector, tracker, track_weights(config), config.MODEL.TRAIN_NECK)


def take_image_model(model: SupervisedTracker, path: str | Path) -> None:
    """Its weights are those of a checkpoint or of an exported file. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no image model {path}; train it with python scripts/train_tiny_sam3.py --phase image, or set "
            "MODEL.PRETRAINED (--pretrained)"
        )
    load_for_any_size(model, path, OUTSIDE)
