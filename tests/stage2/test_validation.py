"""Scores of tracked masks, and the pictures of a validation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sam3.engine.distributed import World
from sam3.engine.log import MetricLog
from stage2.data.batch import UNKNOWN
from stage2.model import ClipEvaluation
from stage2.validation import Validator, draw_clip, score
from tests.stage2.clips import SIDE, distiller, make_batch

WORLD = World(0, 1, 0, torch.device("cpu"))


def test_scores_are_means_over_the_known_frames_of_an_object():
    truth = np.zeros((3, 4, 8, 8), dtype=bool)
    truth[:, :, :4, :4] = True
    masks = truth.copy()
    masks[0, 1, :, :4] = True  # 16 of 32 cells
    masks[0, 3] = False  # where nothing is known
    masks[1, 1:] = False
    known = np.ones((3, 4), dtype=bool)
    known[0, 3] = known[2] = False
    scores = score(masks, truth, known)
    assert scores["j"] == pytest.approx([(1 + 0.5 + 1) / 3, 1 / 4])  # nothing of the third object
    assert scores["f"][1] == pytest.approx(1 / 4)
    assert scores["jf"] == pytest.approx([(j + f) / 2 for j, f in zip(scores["j"], scores["f"], strict=True)])


def validator(batches: list) -> Validator:
    return Validator(distiller(), batches, WORLD, None, MetricLog(None))


def test_values_do_not_depend_on_how_clips_are_batched():
    model = validator([make_batch([["mask", "box"]], seed=0), make_batch([], seed=1), make_batch([["click"]], seed=2)])
    values, parts = model(0, 0), [validator([batch])(0, 0) for batch in (model.loader[0], model.loader[2])]
    assert set(values) == {"val/agreement", *(f"val/{n}{of}" for n in ("j", "f", "jf") for of in ("", "_teacher"))}
    for name, value in values.items():
        assert value == pytest.approx((2 * parts[0][name] + parts[1][name]) / 3)


def test_without_a_known_mask_there_is_nothing_to_say():
    batch = make_batch([["mask"]])
    batch.states[:, 1:] = UNKNOWN
    for batches in ([batch], [make_batch([])], []):
        with pytest.raises(ValueError, match=r"no clip of the val split could be used"):
            validator(batches)(0, 0)


def test_pictures_show_one_clip_in_three_rows():
    batch = make_batch([["box"], ["mask"]], num_frames=3)
    shape = (2, 2, SIDE, SIDE)
    teacher, student = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    picture = draw_clip(batch, ClipEvaluation(teacher, student, torch.zeros(2, 2)), clip=1)
    assert picture.shape == (3, 3 * SIDE, 2 * SIDE)
    rows = picture.unflatten(1, (3, SIDE)).unflatten(3, (2, SIDE)).permute(1, 3, 0, 2, 4)  # (3, 2, 3, M, M)
    changed = (rows != 96).any(2)  # (3, 2, M, M); grey where nothing is drawn
    inside = batch.masks[1, 1:]
    assert changed[0][inside].all()
    assert not changed[1].any()
    assert changed[2].float().mean() > 0.99
    batch.images = torch.full((2, 3, 3, 4 * SIDE, 4 * SIDE), 200, dtype=torch.uint8)
    assert (
        draw_clip(batch, ClipEvaluation(teacher, teacher, torch.zeros(2, 2)), clip=1)[:, SIDE : 2 * SIDE] == 200
    ).all()


def test_pictures_are_recorded_by_the_main_process():
    seen = []
    model = validator([make_batch([["mask"], ["box"]]), make_batch([["box"], ["click"], ["mask"]])])
    model.metrics = SimpleNamespace(image=lambda step, name, picture: seen.append((step, name)))
    model(0, 7)
    wanted = ["clip0", "clip1", "clip0", "clip1"]  # four in all
    assert seen == [(7, f"val/truth_teacher_student/{key}") for key in wanted]
