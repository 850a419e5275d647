"""What a configuration says that works, but may not be meant."""

from __future__ import annotations

from distillation.prompt.config import EverythingSettings, PromptDistillConfig


def remarks(config: PromptDistillConfig) -> list[str]:
    """One sentence each, for the log."""
    found = []
    if config.distillation.enable and not config.distillation.losses:
        found.append("distillation.enable is true, but none of its losses is; this is plain fine-tuning")
    everything = config.dataset.mode == "everything"
    if not everything and config.train.loss_weights.cls:
        found.append("train.loss_weights.cls acts in dataset.mode everything only")
    if not everything and config.everything != EverythingSettings():
        found.append("the settings of `everything` act in dataset.mode everything only")
    if not config.distills:
        return found
    if everything and config.distillation.dense_mask_logits.mask_select != "teacher_best":
        found.append("dense_mask_logits.mask_select has no effect in dataset.mode everything: pairs are masks already")
    total = sum(config.teacher_weights.values())
    if abs(total - 1) > 1e-6:
        found.append(f"the teachers' weights add up to {total:g}, not 1; they are used as they are")
    found += [
        f"teacher {name} has weight 0; it is run, or read, for nothing"
        for name, weight in config.teacher_weights.items()
        if weight == 0
    ]
    pairs = {"prompt_embed": ("w_mse", "w_cos"), "dense_mask_logits": ("w_kl", "w_focal")}
    for loss, names in pairs.items():
        first, second = (getattr(getattr(config.distillation, loss), name) for name in names)
        if loss in config.distillation.losses and abs(first + second - 1) > 1e-6:
            said = f"distillation.{loss}: {names[0]} {first:g} and {names[1]} {second:g}"
            found.append(f"{said} do not add up to 1; they are used as they are")
    return found
