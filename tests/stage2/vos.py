"""What the tests of the video evaluation share: small annotated videos, a predictor that answers as it is told,
and runs of the program with it."""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sam3.engine.weights import load_weights, save_weights
from sam3.model.tracker_config import TINY_MEMORY, TrackerConfig
from sam3.model.video_session import FrameMasks
from sam3.tracker_builder import build_memory
from stage2 import evaluate_vos

HEIGHT, WIDTH = 40, 60
SURE = 10.0  # logit

# video's name, frame, object -> bool (H, W)
Answer = Callable[[str, int, int], np.ndarray]


def rectangle(top: int, left: int, height: int = 10, width: int = 20) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


NOTHING = rectangle(0, 0, 0, 0)
UPPER, LOWER = rectangle(5, 5), rectangle(25, 30)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_frames(folder: Path, numbers: range, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    for number in numbers:
        save(folder / f"{number:05d}.jpg", np.full((*size, 3), 7 * number % 256, dtype=np.uint8))


def write_sav(root: Path, videos: Mapping[str, list[Mapping[int, np.ndarray]]], num_frames: int = 17) -> Path:
    """SA-V's layout; videos: name -> the masks of each object by frame."""
    base = root / "sav_val"
    for name, objects in videos.items():
        write_frames(base / "JPEGImages_24fps" / name, range(num_frames))
        (base / "Annotations_6fps" / name).mkdir(parents=True)
        for row, masks in enumerate(objects):
            for number, mask in masks.items():
                save(base / "Annotations_6fps" / name / f"{row:03d}" / f"{number:05d}.png", mask)
    (base / "sav_val.txt").write_text("".join(f"{name}\n" for name in videos))
    return base


def write_davis(root: Path, videos: Mapping[str, list[np.ndarray]], num_frames: int = 5) -> Path:
    """DAVIS' layout; videos: name -> a mask of each object, which stays where it is. Objects are numbered from 1."""
    for name, masks in videos.items():
        write_frames(root / "JPEGImages/480p" / name, range(num_frames))
        labels = sum(mask.astype(np.uint8) * number for number, mask in enumerate(masks, start=1))
        for number in range(num_frames):
            save(root / "Annotations/480p" / name / f"{number:05d}.png", labels)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("".join(f"{name}\n" for name in videos))
    return root


def write_light(folder: Path, teacher_file: Path) -> Path:
    """The tiny SAM3 with a compressed memory, of random values."""
    torch.manual_seed(0)
    memory = build_memory(TrackerConfig.preset("tiny"), TINY_MEMORY)
    tensors = {k: v for k, v in load_weights(teacher_file).tensors.items() if not k.startswith("tracker.transformer.")}
    for name, module in (("memory_attention", memory.attention), ("spatial_perceiver", memory.perceiver)):
        tensors |= {f"tracker.{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    save_weights(folder / "light.pt", tensors, {"memory": TINY_MEMORY.to_meta()})
    return folder / "light.pt"


def nothing(name: str, number: int, row: int) -> np.ndarray:
    return NOTHING


class Session(contextlib.AbstractContextManager):
    """prompts: (frame, object) -> what was given."""

    def __init__(self, frames) -> None:
        self.frames, self.name = frames, Path(frames.title).name
        self.features: OrderedDict = OrderedDict()
        self.prompts: dict[tuple[int, int], object] = {}

    def __exit__(self, *error: object) -> None:
        self.frames.close()


class Predictor:
    """The interface of `Sam3VideoPredictor`, with known answers. tick: called before each frame."""

    def __init__(self, answer: Answer, tick: Callable[[], None] = lambda: None) -> None:
        self.answer, self.tick = answer, tick
        self.sessions: list[Session] = []

    def start_session(self, frames) -> Session:
        self.sessions.append(Session(frames))
        return self.sessions[-1]

    def add_new_mask(self, session: Session, frame: int, obj_id: int, mask: np.ndarray) -> None:
        session.prompts[frame, obj_id] = mask

    def add_new_points_or_box(self, session, frame, obj_id, points=None, labels=None, *, box=None, rel_coordinates):
        assert not rel_coordinates
        session.prompts[frame, obj_id] = (points, labels) if box is None else box

    def propagate_in_video(self, session: Session, start: int):
        for t in range(start, len(session.frames)):
            self.tick()
            assert session.frames[t].shape == (3, HEIGHT, WIDTH)
            objects = [row for _, row in session.prompts]
            masks = torch.stack([torch.from_numpy(self.answer(session.name, t, row)) for row in objects])[:, None]
            logits = (2.0 * masks - 1) * SURE
            yield FrameMasks(t, objects, logits, logits, torch.full((len(objects), 1), SURE))


def tell(monkeypatch: pytest.MonkeyPatch, **answers: Answer) -> list[Predictor]:
    """Makes the models of all checkpoints answer as they are told; gives the predictors that were made since."""
    made: list[Predictor] = []

    def load(entry, device, amp_dtype) -> Predictor:
        made.append(Predictor(answers[entry.name]))
        return made[-1]

    monkeypatch.setattr(evaluate_vos, "load_predictor", load)
    return made


def run(checkpoints: Path | list[Path], data: Path, output: Path, *flags: Any) -> tuple[int, dict[str, Any]]:
    """Exit code, and what is in results.json."""
    paths = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    own = ["--checkpoints", *paths, "--data", data, "--output", output, "--device", "cpu", "--dtype", "fp32"]
    code = evaluate_vos.main(list(map(str, [*own, "--overlays", 0, *flags])))
    return code, json.loads((output / "results.json").read_text())
