"""Image encoders of the students, one file per family."""
