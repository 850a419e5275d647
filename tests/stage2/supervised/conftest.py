"""A tiny SAM3 to start from, beside a config for batches as small as those of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that find every object visible."""
    from scripts import make_tiny_sam3

    path = tmp_path_factory.mktemp("image_model") / "sam3_tiny.safetensors"
    assert make_tiny_sam3.main(["--output", str(path)]) == 0
    (path.parent / "c.yaml").write_text("PHASE: tracker\nTRAIN: {ACCUMULATION_STEPS: 1}\n")
    return path
