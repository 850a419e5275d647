"""Stage 1's dataset, augmentation and loader."""
