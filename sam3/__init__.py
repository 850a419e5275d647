"""Lets `sam3` mean the package in `sam3/sam3` when the repository root comes first on the path."""

from pathlib import Path

__path__ = [str(Path(__file__).parent / "sam3")]
