"""What the tests of the video predictor share."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.video_session import FrameMasks
from tests.parity.fill import image

HEIGHT, WIDTH = 90, 160
BOX = [30, 20, 90, 70]  # pixels
POINT = [100, 40]


def pictures(count: int) -> list[Image.Image]:
    """A picture that moves by 3 pixels a frame."""
    still = image(HEIGHT, WIDTH)
    return [Image.fromarray(np.roll(still, 3 * i, axis=1)) for i in range(count)]


def rectangle(top: int = 20, bottom: int = 60, left: int = 40, right: int = 100) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def add_box(predictor: Sam3VideoPredictor, session, frame: int, obj_id: int, box=BOX) -> FrameMasks:
    return predictor.add_new_points_or_box(session, frame, obj_id, box=box, rel_coordinates=False)


def click(predictor: Sam3VideoPredictor, session, frame: int, obj_id: int, points=(POINT,), labels=(1,), **options):
    return predictor.add_new_points_or_box(
        session, frame, obj_id, points, labels, rel_coordinates=options.pop("relative", False), **options
    )


def run(predictor: Sam3VideoPredictor, session, *args, **options) -> dict[int, FrameMasks]:
    return {masks.frame_idx: masks for masks in predictor.propagate_in_video(session, *args, **options)}


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 2e-3) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


def same(
    found: dict[int, FrameMasks], wanted: dict[int, FrameMasks], row: int, other_row: int, atol: float = 2e-3
) -> None:
    """Whether an object of one run has in all frames the masks that an object has in another one."""
    assert list(found) == list(wanted)
    for t in wanted:
        close(found[t].low_masks[row], wanted[t].low_masks[other_row], atol)
        close(found[t].object_logits[row], wanted[t].object_logits[other_row], atol)
