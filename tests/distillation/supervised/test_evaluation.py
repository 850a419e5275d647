"""The figures of held-out scenes, from masks and scores made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distillation.supervised.batch import ClickRows, SceneBatch
from distillation.supervised.evaluation import SceneValidator, WordValidator, box_ious, enlarged, ious_of
from sam3.engine.distributed import World

SIDE, CELLS = 8, 4
SURE, UNSURE, HALF_SURE = 10.0, -10.0, 0.85  # sigmoid(0.85) = 0.7, whose square is below one half


def grid(left: int, top: int, right: int, bottom: int) -> Tensor:
    """Mask logits: 10 in some cells of the grid, -10 elsewhere."""
    logits = torch.full((CELLS, CELLS), -10.0)
    logits[top:bottom, left:right] = 10.0
    return logits


UPPER_LEFT, LOWER_RIGHT, UPPER_HALF = grid(0, 0, 2, 2), grid(2, 2, 4, 4), grid(0, 0, 4, 2)
QUERIES = torch.stack((UPPER_LEFT, UPPER_HALF, LOWER_RIGHT))  # of every pair
BOXES = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.5], [0.5, 0.5, 1.0, 1.0]])

# (kind, objects wanted, object shown, logits of the three queries, presence)
PAIRS = [
    (
        "text",
        (0, 1),
        -1,
        (SURE, SURE, UNSURE),
        SURE,
    ),  # finds the first object and, with a mask too much, not the second
    ("text", (0,), -1, (SURE, SURE, SURE), UNSURE),  # misses it, because nothing is said to be there
    ("absent", (), -1, (HALF_SURE, UNSURE, UNSURE), HALF_SURE),  # 0.49: rejected
    ("absent", (), -1, (UNSURE, SURE, UNSURE), SURE),
    ("absent", (), -1, (UNSURE, UNSURE, UNSURE), SURE),
    ("box", (1,), 1, (SURE, SURE, UNSURE), SURE),  # the third query's box fits best, whatever its score
    ("point", (0,), 0, (SURE, UNSURE, UNSURE), SURE),
]


def make_batch() -> SceneBatch:
    """One picture with an object in its upper left quarter and one in its lower right."""
    full = torch.zeros(1, 2, SIDE, SIDE, dtype=torch.bool)
    full[0, 0, :4, :4] = full[0, 1, 4:, 4:] = True
    wanted = torch.zeros(len(PAIRS), 2, dtype=torch.bool)
    for row, (_, objects, *_) in enumerate(PAIRS):
        wanted[row, list(objects)] = True
    nothing = torch.zeros(len(PAIRS), 0)
    one = torch.zeros(1, dtype=torch.long)
    return SceneBatch(
        keys=["0"],
        images=torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8),
        masks=torch.zeros(1, 2, CELLS, CELLS, dtype=torch.uint8),
        boxes=BOXES[[0, 2]][None],
        image=torch.zeros(len(PAIRS), dtype=torch.long),
        kinds=[kind for kind, *_ in PAIRS],
        phrases=["" for _ in PAIRS],
        wanted=wanted,
        doubtful=torch.zeros_like(wanted),
        **dict.fromkeys(
            ("exemplars", "exemplar_labels", "exemplar_mask", "points", "point_labels", "point_mask"), nothing
        ),
        shown=torch.tensor([shown for _, _, shown, *_ in PAIRS]),
        clicks=ClickRows(one, one, torch.zeros(1, 1, 2), torch.ones(1, 1)),
        corners=ClickRows(one, one + 1, torch.zeros(1, 2, 2), torch.ones(1, 2)),
        full_masks=full,
    )


class Answers:
    """In the place of SupervisedSam3."""

    detector = SimpleNamespace(predict_masks=lambda out: {"pred_masks": QUERIES.expand(len(PAIRS), -1, -1, -1)})

    def embed(self, batch: SceneBatch) -> Tensor:
        return torch.zeros(1)

    def predict_boxes(self, embedding: Tensor, batch: SceneBatch) -> dict[str, Tensor]:
        return {
            "pred_logits": torch.tensor([logits for *_, logits, _ in PAIRS])[..., None],
            "presence_logit_dec": torch.tensor([presence for *_, presence in PAIRS])[:, None],
            "pred_boxes_xyxy": BOXES.expand(len(PAIRS), -1, -1),
        }

    def click_features(self, embedding: Tensor, batch: SceneBatch) -> tuple[None, Tensor]:
        return None, torch.zeros(1, dtype=torch.long)

    def decode(self, features: None, slots: Tensor, rows: ClickRows) -> tuple[Tensor, Tensor, Tensor]:
        if rows.points.shape[1] == 1:  # three masks for a click, of which the second is thought the best
            return QUERIES[None], torch.tensor([[0.2, 0.6, 0.1]]), torch.ones(1, 1)
        return QUERIES[None, 2:], torch.ones(1, 1), torch.ones(1, 1)


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    return SceneValidator(Answers(), [make_batch()], World(0, 1, 0, torch.device("cpu")))(0, 0)


def test_of_phrases(results):
    """Three objects were meant, one was found; of two masks drawn for them, one is an object's."""
    assert results["val/text_iou"] == pytest.approx(1 / 3)
    assert results["val/text_precision"] == pytest.approx(1 / 2)
    assert results["val/text_found_iou"] == 1  # of that one
    assert results["val/text_detected"] == pytest.approx(1 / 2)  # of the phrases
    assert results["val/rejected"] == pytest.approx(2 / 3)


def test_of_exemplars(results):
    assert (results["val/box_iou"], results["val/box_found"]) == (1, 0)
    assert (results["val/point_iou"], results["val/point_found"]) == (1, 1)


def test_of_the_click_head(results):
    """The upper half is twice the object clicked on."""
    assert results["val/click_iou"] == pytest.approx(1 / 2)
    assert results["val/corner_iou"] == pytest.approx(1)


def test_the_least_counts(results):
    assert results["val/target"] == pytest.approx(1 / 3)
    rejecting = Answers()
    logits = [(UNSURE,) * 3 if kind == "absent" else (SURE, UNSURE, SURE) for kind, *_ in PAIRS]
    rejecting.predict_boxes = lambda *_: {
        "pred_logits": torch.tensor(logits)[..., None],
        "presence_logit_dec": torch.full((len(PAIRS), 1), SURE),
        "pred_boxes_xyxy": BOXES.expand(len(PAIRS), -1, -1),
    }
    found = SceneValidator(rejecting, [make_batch()], World(0, 1, 0, torch.device("cpu")))(0, 0)
    assert found["val/text_iou"] == pytest.approx(1) and found["val/rejected"] == 1
    assert found["val/text_precision"] == pytest.approx((1 + 1 / 2) / 2)  # the second phrase means one of two masks
    assert found["val/target"] == pytest.approx(0.5)  # the clicks'


def test_rejection_that_falls_short_counts():
    """All phrases found, clicks right, and every absent phrase taken for present: 0.9 short of what is wanted."""
    bold = Answers()
    bold.predict_boxes = lambda *_: {
        "pred_logits": torch.full((len(PAIRS), 3, 1), SURE),
        "presence_logit_dec": torch.full((len(PAIRS), 1), SURE),
        "pred_boxes_xyxy": BOXES.expand(len(PAIRS), -1, -1),
    }
    found = SceneValidator(bold, [make_batch()], World(0, 1, 0, torch.device("cpu")))(0, 0)
    assert found["val/rejected"] == 0 and found["val/target"] == pytest.approx(0.75 - 0.9)


class Words:
    """In the place of SupervisedSam3: gives what batches say of themselves."""

    def embed(self, batch):
        return None

    def name_map(self, grid):
        return None

    def word_term(self, seen, batch):
        return torch.zeros(()), {part: torch.tensor(share) for part, share in batch.shares.items()}


def named(words, **shares: float) -> SimpleNamespace:
    """A batch; words: of each image its objects' places in WORDS."""
    return SimpleNamespace(words=torch.tensor(words), shares=shares)


def test_single_words_are_counted_whatever_the_batches():
    """Three plain objects and padding, of which 2 shapes and 3 colours are named; one textured, named but for its
    shape: 2 of 4, 4 of 4, 1 of 1. Means of the batches' shares would be 1/3, 1 and 1/2."""
    padding = [-1, -1, -1]
    plain = named([[[0, 1, -1], [1, 1, -1]], [[2, 0, -1], padding]], shape=2 / 3, colour=1.0, texture=0.0)
    textured = named([[[0, 1, 2]]], shape=0.0, colour=1.0, texture=1.0)
    found = WordValidator(Words(), [plain, textured], World(0, 1, 0, torch.device("cpu")))(0, 0)
    wanted = {"val/shape_named": 0.5, "val/colour_named": 1, "val/texture_named": 1, "val/target": 0.5}
    assert found == pytest.approx(wanted)


def test_words_that_nothing_is_called_by_are_left_out():
    plain = named([[[0, 1, -1], [1, 1, -1]]], shape=0.5, colour=1.0, texture=0.0)
    found = WordValidator(Words(), [plain], World(0, 1, 0, torch.device("cpu")))(0, 0)
    assert found == pytest.approx({"val/shape_named": 0.5, "val/colour_named": 1, "val/target": 0.5})


def test_masks_are_enlarged_by_their_logits():
    found = enlarged(torch.stack((UPPER_LEFT, UPPER_HALF)), SIDE)
    assert found.dtype == torch.bool and found.shape == (2, SIDE, SIDE)
    assert found[0, :4, :4].all() and found[0].sum() == 16 and found[1, :4].all() and found[1].sum() == 32


def test_iou_of_every_two_masks():
    masks = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]], [[0, 0], [0, 0]]]).bool()
    torch.testing.assert_close(ious_of(masks, masks[:2]), torch.tensor([[1, 1 / 3], [1 / 3, 1], [0, 0]]))


def test_iou_of_boxes():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 0.5], [0.6, 0.6, 0.9, 0.9], [0.4, 0.4, 0.1, 0.1]])
    torch.testing.assert_close(box_ious(boxes, boxes[0]), torch.tensor([1, 1 / 3, 0, 0]))
