"""How a run is optimised, in the terms of the shared engine: its keys, groups of parameters, and names of numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from yacs.config import CfgNode

from distillation.prompt.config import PromptDistillConfig
from distillation.prompt.losses import TASK_TERMS
from distillation.prompt.model import PromptDistiller
from sam3.engine import optim
from sam3.engine.config import shared_defaults
from sam3.engine.log import Tags
from sam3.engine.loop_settings import LoopSettings
from sam3.engine.recipe import MakeRecipe, Recipe
from sam3.engine.sampler import EpochSampler

BEST_METRIC = "val/iou"
# What the progress line calls the losses.
SHOWN = {
    "distill/encoder_patch": "enc",
    "distill/prompt_embed": "pe",
    "distill/decoder_mask_token": "tok",
    "distill/dense_mask_logits": "dense",
    "dist_loss": "dist",
    "task_loss": "task",
    **{f"task/{name}": name for name in (*TASK_TERMS, "cls")},
    "total": "total",
}


def run_keys(config: PromptDistillConfig, max_steps: int = 0) -> CfgNode:
    """The shared keys of the engine that these settings mean. max_steps: the run's last step; 0: its epochs' last."""
    train, dataset, model = config.train, config.dataset, config.model
    c = shared_defaults()
    c.DATA.BATCH_SIZE, c.DATA.NUM_WORKERS = train.batch_size, dataset.num_workers
    c.DATA.DATA_PATH, c.DATA.IMG_SIZE = dataset.train_dataset, model.image_size
    c.MODEL.NAME, c.MODEL.PRETRAINED = model.type, model.checkpoint_path
    c.MODEL.RESUME = train.resume if isinstance(train.resume, str) else ""
    c.TRAIN.EPOCHS, c.TRAIN.MAX_STEPS = train.epochs, max_steps
    c.TRAIN.BASE_LR, c.TRAIN.MIN_LR, c.TRAIN.SCALE_LR = train.lr, train.lr * train.min_lr_ratio, False
    c.TRAIN.WEIGHT_DECAY, c.TRAIN.CLIP_GRAD = train.weight_decay, train.clip_grad
    c.TRAIN.ACCUMULATION_STEPS = train.gradient_accumulation
    c.TRAIN.AUTO_RESUME = train.resume is True
    c.TRAIN.EVAL_BN_WHEN_TRAINING = train.freeze_bn
    c.TRAIN.FIND_UNUSED_PARAMETERS = True  # which are used depends on the prompts, the pairs and the stage
    c.AMP_ENABLE, c.AMP_DTYPE = train.bf16, "bf16"
    c.DEVICE, c.OUTPUT, c.SEED = train.device, model.save_path, train.seed
    c.SAVE_STEPS, c.KEEP_LAST, c.PRINT_FREQ = train.save_every, train.keep_last, train.log_every
    c.TENSORBOARD = train.tensorboard
    c.freeze()
    return c


def make_recipe(config: PromptDistillConfig) -> MakeRecipe:
    """Warm-up by steps and a cosine behind it; the image encoder's rate is a part of the others'."""

    def make(keys: CfgNode, sampler: EpochSampler, device: torch.device) -> Recipe:
        train = config.train
        settings = replace(
            LoopSettings.from_config(keys, device, step_remainder=True),
            validate_freq=train.val_freq,
            patience=train.early_stop_patience,
            shown=SHOWN,
        )
        if device.type == "cpu":
            settings = replace(settings, amp_dtype=None)
        total = train.epochs * settings.steps_in(sampler.batches_per_epoch())  # whatever max_steps: it only breaks off
        warmup = min(train.warmup_step, total)
        rate = optim.build_schedule(
            "cosine",
            base_lr=train.lr,
            total_steps=total,
            warmup_steps=warmup,
            warmup_lr=train.lr / max(warmup, 1),
            min_lr=keys.TRAIN.MIN_LR,
            cosine_from_warmup=True,
        )

        def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return optim.build_optimizer("adamw", parameter_groups(model, config), lr=train.lr)

        return Recipe(settings, make_optimizer, rate, train.lr)

    return make


def parameter_groups(distiller: PromptDistiller, config: PromptDistillConfig) -> list[dict]:
    """Optimizer groups with and without weight decay: the image encoder's, with its `lr_scale`, those of the
    other two parts, and the projections'.

    ValueError if everything is frozen.
    """
    student, decay = distiller.student, config.train.weight_decay
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("all parts of the student are frozen; set one of freeze.* false, or freeze.unfreeze_epoch")
    decoders = nn.ModuleList([student.prompt_encoder, student.mask_decoder])
    scales = (config.train.encoder_lr_scale, 1.0, 1.0)
    groups: list[dict] = []
    for part, scale in zip((student.image_encoder, decoders, distiller.objective), scales, strict=True):
        if any(p.requires_grad for p in part.parameters()):
            groups += [{**group, "lr_scale": scale} for group in optim.parameter_groups(part, decay)]
    return groups


def tags(config: PromptDistillConfig, distiller: PromptDistiller) -> Tags:
    """Names in TensorBoard and metrics.jsonl, such as `train/distill/prompt_embed`, `train/total_loss`, `lr/group0`."""
    names = [*(f"task/{name}" for name in (*TASK_TERMS, "cls")), "task_loss"]
    if config.distills:
        names += [*distiller.objective.log_names(list(config.teacher_weights))]
        names += ["dist_loss", "dist_loss_scaled", "lambda_coef"]
    found: dict[str, list[tuple[str, float]]] = {f"train/loss_{name}": [(f"train/{name}", 1)] for name in names}
    found["train/loss_total"] = [("train/total_loss", 1)]
    scales = [group["lr_scale"] for group in parameter_groups(distiller, config)]
    found["train/lr"] = [("train/lr", 1), *((f"lr/group{i}", scale) for i, scale in enumerate(scales))]
    return found
