"""How a phase is optimised, in the terms of the shared engine: its keys, learning rate, and names of numbers."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from distillation.config import DistillationConfig, Phase
from distillation.model import MAX_BAD_OUTPUTS
from sam3.engine import optim
from sam3.engine.config import shared_defaults
from sam3.engine.log import Tags
from sam3.engine.loop_settings import LoopSettings
from sam3.engine.recipe import MakeRecipe, Recipe
from sam3.engine.sampler import EpochSampler

GIB_IN_GB = 2**30 / 1e9
logger = logging.getLogger("sam3.distillation")


def run_keys(
    config: DistillationConfig,
    phase: Phase,
    output: Path,
    device: torch.device,
    *,
    init: str = "",
    resume: str = "",
    max_steps: int = 0,
) -> CfgNode:
    """The shared keys of the engine that these settings mean.

    init: weights to start from. resume: checkpoint to go on from. max_steps: the run's last step; 0: its epochs' last.
    """
    c = shared_defaults()
    c.DATA.BATCH_SIZE = config.batch_size
    c.DATA.DATA_PATH = config.sa1b_dir
    c.DATA.IMG_SIZE, c.DATA.RESIZE = config.image_size, "square"
    c.DATA.NUM_WORKERS = loader_workers(config, device)
    c.DATA.PIN_MEMORY = config.pin_memory
    c.MODEL.NAME = f"efficient_sam3-{config.student}-phase{phase.number}"
    c.MODEL.PRETRAINED, c.MODEL.RESUME = init, resume
    c.TRAIN.EPOCHS, c.TRAIN.MAX_STEPS = phase.epochs, max_steps
    c.TRAIN.BASE_LR, c.TRAIN.MIN_LR, c.TRAIN.SCALE_LR = phase.lr, 0.0, False
    c.TRAIN.WEIGHT_DECAY, c.TRAIN.CLIP_GRAD = config.weight_decay, config.max_grad_norm
    c.TRAIN.ACCUMULATION_STEPS = config.grad_accum_steps
    c.TRAIN.AUTO_RESUME = False
    c.TRAIN.MAX_BAD_STEPS = MAX_BAD_OUTPUTS
    c.TRAIN.FIND_UNUSED_PARAMETERS = not all(config.loss_weights.values())  # a term left out may have a head of its own
    c.AMP_ENABLE = config.student_precision != "fp32" and device.type != "cpu"
    c.AMP_DTYPE = "bf16" if config.student_precision == "amp_bf16" else "fp16"
    c.DEVICE, c.OUTPUT, c.SEED = config.device, str(output), config.seed
    c.SAVE_STEPS, c.KEEP_LAST, c.PRINT_FREQ = config.save_every_steps, config.keep_last, config.log_every_steps
    c.TENSORBOARD = config.tensorboard
    c.freeze()
    return c


def loader_workers(config: DistillationConfig, device: torch.device) -> int:
    """Processes that decode pictures: as set, else 4 beside a CUDA device and none elsewhere."""
    if config.num_workers is None:
        return 4 if device.type == "cuda" else 0
    return config.num_workers


def by_phase(phase: Phase) -> MakeRecipe:
    """The recipe of a phase: an epoch's last pictures make a step of their own, however few they are."""

    def make(keys: CfgNode, sampler: EpochSampler, device: torch.device) -> Recipe:
        settings = LoopSettings.from_config(keys, device, step_remainder=True)
        total = phase.epochs * settings.steps_in(sampler.batches_per_epoch())
        if phase.warmup >= total:
            logger.warning(
                f"the warm-up of {phase.warmup} steps fills the run of {total}; "
                f"set phase{phase.number}_warmup (--warmup) lower"
            )

        def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return optim.optimizer_from_config(keys, model, phase.lr)

        return Recipe(settings, make_optimizer, lambda step: learning_rate(step, total, phase), phase.lr)

    return make


def learning_rate(step: int, total: int, phase: Phase) -> float:
    """Of optimizer step 0, 1, ..., total - 1.

    step < W, the warm-up: lr (step + 1) / W. From there: lr (1 + cos(pi (step - W) / (total - W))) / 2.
    """
    if step < phase.warmup:
        return phase.lr * (step + 1) / phase.warmup
    progress = min((step - phase.warmup) / max(total - phase.warmup, 1), 1.0)
    return 0.5 * phase.lr * (1 + math.cos(math.pi * progress))


def tags(config: DistillationConfig) -> Tags:
    """Names in TensorBoard and metrics.jsonl; the raw terms are the weighted ones over their weights."""
    names: dict[str, list[tuple[str, float]]] = {
        "train/loss_total": [("train/total_loss", 1)],
        "train/step_ms": [("sys/sec_per_step", 1e-3)],
        "train/max_mem_gib": [("sys/peak_mem_gb", GIB_IN_GB)],
    }
    for name in ("matched_pairs", "match_iou", "skipped"):
        names[f"train/loss_{name}"] = [(f"train/{name}", 1)]
    for name, weight in config.loss_weights.items():
        raw = [(f"train_raw/{name}", 1 / weight)] if weight else []
        names[f"train/loss_{name}"] = [(f"train/{name}", 1), *raw]
    return names
