"""The slim student."""
