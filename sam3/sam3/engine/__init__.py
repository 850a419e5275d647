"""Training plumbing shared by all stages; knows nothing of the models."""
