"""Data set tools: download, reorganise, make samples."""
