"""Command-line programs on models and checkpoints."""
