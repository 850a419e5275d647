"""How a run is optimised: its length, learning rate and optimizer, by the keys of a stage that counts epochs or steps.

Stages on pictures count epochs, by the shared keys. A stage that counts steps replaces those by `step_keys`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from yacs.config import CfgNode

from sam3.engine import amp, distributed, optim
from sam3.engine.config import remove
from sam3.engine.loop_settings import LoopSettings
from sam3.engine.sampler import EpochSampler
from sam3.engine.stage_config import CONDITIONS, MINIMA, Conditions

log = logging.getLogger("sam3.recipe")


@dataclass(frozen=True)
class Recipe:
    """settings: of the loop. lr_at: learning rate of each optimizer step; peak_lr: the highest of them."""

    settings: LoopSettings
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    lr_at: optim.LrAt
    peak_lr: float


MakeRecipe = Callable[[CfgNode, EpochSampler, torch.device], Recipe]


def by_epochs(config: CfgNode, sampler: EpochSampler, device: torch.device) -> Recipe:
    """The recipe of the shared keys. TRAIN.MAX_STEPS, if set, ends the run sooner."""
    settings = LoopSettings.from_config(config, device)
    scale = 1.0
    if config.TRAIN.SCALE_LR:
        scale = optim.lr_scale(sampler.batch_size, distributed.planned_world_size(), settings.accumulation)
    return Recipe(
        settings,
        lambda model: optim.optimizer_from_config(config, model, config.TRAIN.BASE_LR),
        optim.schedule_from_config(config, settings.steps_in(sampler.batches_per_epoch()), scale),
        config.TRAIN.BASE_LR * scale,
    )


# Counting steps -------------------------------------------------------------------------------------------------------

STEP_CONDITIONS: Conditions = {
    **{key: condition for key, condition in CONDITIONS.items() if not key.startswith("TRAIN.LR_SCHEDULER.")},
    "TRAIN.EFFECTIVE_BATCH": (lambda c: c.TRAIN.ACCUMULATION_STEPS == 0, "with TRAIN.ACCUMULATION_STEPS 0"),
    "TRAIN.MIN_LR": (lambda c: c.TRAIN.LR_SCHEDULER.NAME == "cosine", "with TRAIN.LR_SCHEDULER.NAME cosine"),
}
STEP_CHOICES = {"TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear")}
STEP_MINIMA = {
    **{key: least for key, least in MINIMA.items() if key not in ("TRAIN.BASE_LR", "TRAIN.WARMUP_EPOCHS")},
    "TRAIN.ACCUMULATION_STEPS": 0,
    "TRAIN.EFFECTIVE_BATCH": 1,
    "TRAIN.LR": 0,
    "TRAIN.MAX_STEPS": 1,
    "TRAIN.WARMUP_STEPS": 0,
    "TRAIN.LOG_INTERVAL": 1,
    "TRAIN.VAL_INTERVAL": 0,
    "TRAIN.SAVE_INTERVAL": 0,
    "TRAIN.LATEST_INTERVAL": 0,
    "TRAIN.MAX_BAD_STEPS": 1,
    "TRAIN.CLIP_GRAD": 0,
    "KEEP_LAST": 0,
}
# Keys that are gone from such a stage -> what to set instead.
STEP_RETIRED = {
    "TRAIN.EPOCHS": "the run's length is TRAIN.MAX_STEPS",
    "TRAIN.START_EPOCH": "it follows from the checkpoint that is resumed",
    "TRAIN.WARMUP_EPOCHS": "the warm-up's length is TRAIN.WARMUP_STEPS",
    "TRAIN.BASE_LR": "the learning rate is TRAIN.LR",
    "TRAIN.SCALE_LR": "TRAIN.LR is taken as it is; the effective batch is TRAIN.EFFECTIVE_BATCH",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "the schedule is cosine or linear",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "the schedule is cosine or linear",
    "AMP_ENABLE": "mixed precision is TRAIN.AMP",
    "SAVE_FREQ": "checkpoints are saved by steps, set TRAIN.SAVE_INTERVAL",
    "SAVE_STEPS": "checkpoints are saved by steps, set TRAIN.SAVE_INTERVAL",
    "PRINT_FREQ": "log lines come every TRAIN.LOG_INTERVAL steps",
}


def step_keys(c: CfgNode) -> None:
    """Replace, in a copy of the shared defaults, the keys of a run that counts epochs by those of one that does not."""
    for key in STEP_RETIRED:
        remove(c, key)
    c.TRAIN.MAX_STEPS = 100_000  # length of the run in optimizer steps
    c.TRAIN.WARMUP_STEPS = 0  # the learning rate rises linearly over these
    c.TRAIN.LR = 1e-4  # after the warm-up, for an optimizer step of the whole effective batch
    c.TRAIN.WARMUP_LR = 0.0  # at step 0
    c.TRAIN.MIN_LR = 0.0  # at the end (cosine)
    c.TRAIN.ACCUMULATION_STEPS = 0  # micro-batches per optimizer step; 0: as many as EFFECTIVE_BATCH needs
    c.TRAIN.EFFECTIVE_BATCH = 256  # samples per optimizer step, over all processes
    c.TRAIN.AMP = True  # mixed precision, of AMP_DTYPE
    c.TRAIN.LOG_INTERVAL = 100  # optimizer steps between log lines
    c.TRAIN.LATEST_INTERVAL = 500  # steps between saves of ckpt_latest.pth; 0 saves it at validations and the end only
    c.TRAIN.SAVE_INTERVAL = 10_000  # steps between ckpt_step_<n>.pth, which are kept (see KEEP_LAST); 0 keeps none
    c.TRAIN.VAL_INTERVAL = 5_000  # steps between validations; 0 validates at the end only


def by_steps(config: CfgNode, sampler: EpochSampler, device: torch.device) -> Recipe:
    """The recipe of `step_keys`: warm-up, then the decay from there to the last step."""
    train, processes = config.TRAIN, distributed.planned_world_size()
    accumulation = accumulation_steps(config, sampler.batch_size, processes)
    effective = sampler.batch_size * processes * accumulation
    if effective != train.EFFECTIVE_BATCH and not train.ACCUMULATION_STEPS:
        log.warning(
            f"the effective batch is {effective} = {sampler.batch_size} x {processes} processes x {accumulation} "
            f"accumulated, because {sampler.batch_size * processes} does not divide {train.EFFECTIVE_BATCH}"
        )
    settings = LoopSettings(
        epochs=0,
        max_steps=train.MAX_STEPS,
        accumulation=accumulation,
        clip_grad=train.CLIP_GRAD,
        amp_dtype=amp.resolve_amp_dtype(train.AMP, config.AMP_DTYPE, device),
        max_bad_steps=train.MAX_BAD_STEPS,
        print_freq=train.LOG_INTERVAL,
        save_steps=train.SAVE_INTERVAL,
        latest_steps=train.LATEST_INTERVAL,
        validate_steps=train.VAL_INTERVAL,
        keep_last=config.KEEP_LAST,
        find_unused_parameters=train.FIND_UNUSED_PARAMETERS,
    )
    lr_at = optim.build_schedule(
        train.LR_SCHEDULER.NAME,
        base_lr=train.LR,
        total_steps=train.MAX_STEPS,
        warmup_steps=train.WARMUP_STEPS,
        warmup_lr=train.WARMUP_LR,
        min_lr=train.MIN_LR,
        cosine_from_warmup=True,
    )
    return Recipe(settings, lambda model: optim.optimizer_from_config(config, model, train.LR), lr_at, train.LR)


def accumulation_steps(config: CfgNode, batch_size: int, processes: int) -> int:
    """Micro-batches per optimizer step: TRAIN.ACCUMULATION_STEPS or, if that is 0, what TRAIN.EFFECTIVE_BATCH needs.

    Where `batch_size` x `processes` does not divide the effective batch, it is rounded up.
    """
    return config.TRAIN.ACCUMULATION_STEPS or -(-config.TRAIN.EFFECTIVE_BATCH // (batch_size * processes))


def samples_per_epoch(config: CfgNode, num_samples: int) -> int:
    """Samples of an epoch: each once or, where all do not make one optimizer step, so many times that they do.

    An epoch's last samples that do not fill a step are left out, so that a shorter one would never make any.
    """
    batch_size, processes = config.DATA.BATCH_SIZE, distributed.planned_world_size()
    step = batch_size * processes * accumulation_steps(config, batch_size, processes)
    return num_samples * -(-step // num_samples) if num_samples else 0


def check_steps(config: CfgNode) -> None:
    """ValueError for a warm-up that is longer than the run."""
    warmup, total = config.TRAIN.WARMUP_STEPS, config.TRAIN.MAX_STEPS
    if warmup > total:
        raise ValueError(
            f"TRAIN.WARMUP_STEPS (={warmup}) must not be above TRAIN.MAX_STEPS (={total}); set the one or the other"
        )
