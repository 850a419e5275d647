"""What all tests of the distillation begin with."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages reach `caplog`, also after another test's program has set up its log."""
    monkeypatch.setattr(logging.getLogger("sam3"), "propagate", True)
