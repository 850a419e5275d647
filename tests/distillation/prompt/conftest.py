"""Models and data that trainings begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distillation.prompt.folders import write_picture
from tests.distillation.prompt.runs import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `runs.write_models`."""
    folder = tmp_path_factory.mktemp("sam1")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder layout: 2 pictures with 2 masks each to train on (4 samples), 1 with 2 to validate on."""
    root = tmp_path_factory.mktemp("photos")
    boxes = [(10, 12, 60, 50), (70, 30, 120, 80)]
    for split, keys in (("train", ("a", "bb")), ("val", ("ccc",))):
        for i, key in enumerate(keys):
            write_picture(root / split, key, (90, 130) if i == 0 else (140, 100), boxes if i == 0 else boxes[:1] * 2)
    return root
