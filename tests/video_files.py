"""Video files for tests."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from sam3.video_writer import write_video


def moving_square(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames, uint8 (H, W, 3) RGB: a red square that moves over green that grows lighter."""
    frames = []
    for i in range(count):
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        frame[:, :, 1] = 20 + i % 100
        left = i % (width - 16)
        frame[16:32, left : left + 16] = (230, 10, 20)
        frames.append(frame)
    return frames


def write_sample(path: Path, count: int, **size: int) -> Path:
    write_video(path, moving_square(count, **size), fps=24)
    return path


def decode_in_order(path: Path) -> list[Tensor]:
    """All frames, uint8 (3, H, W) RGB, as OpenCV gives them from first to last."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(torch.from_numpy(read[1][:, :, ::-1].copy()).permute(2, 0, 1))
    return frames
