"""SAM3 and its light students: models, pre-processing and the training engine shared by all stages."""
