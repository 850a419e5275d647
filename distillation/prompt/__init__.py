"""Prompt-based fine-tuning of light SAM-1 models with four distillation losses from one or several teachers."""
