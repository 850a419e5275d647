"""The tiny preset against stored outputs of code that passed the full-size comparison; seconds instead of minutes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.model.make_golden_tiny import GOLDEN, tiny_outputs
from tests.parity.compare import distance

with np.load(GOLDEN) as file:
    EXPECTED = dict(file)


@pytest.fixture(scope="module")
def found():
    return tiny_outputs()


def test_nothing_is_left_out(found):
    assert found.keys() == EXPECTED.keys()


@pytest.mark.parametrize("entry", EXPECTED)
def test_same_outputs(found, entry: str):
    assert distance(found[entry], EXPECTED[entry]) <= (1e-3 if entry.endswith(("pred_logits", "scores")) else 1e-4)
