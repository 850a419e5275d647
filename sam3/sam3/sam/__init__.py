"""Prompts and masks in the manner of SAM: prompt encoder, two-way transformer and mask decoder."""
