"""What video needs of SAM3: trunk, second neck and tracker."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam3.model.necks import TrackerNeck
from sam3.model.tracker import FrameFeatures, Sam3Tracker
from sam3.transforms import Preprocess


class Sam3VideoModel(nn.Module):
    """`neck` (with its `trunk`) makes features of frames, `tracker` makes masks of features.

    preprocess: how frames become input.
    """

    def __init__(self, neck: TrackerNeck, tracker: Sam3Tracker, preprocess: Preprocess):
        super().__init__()
        self.neck = neck
        self.tracker = tracker
        self.preprocess = preprocess

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.tracker.no_mem_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the frames that go in."""
        return self.tracker.no_mem_embed.dtype

    def encode(self, images: Tensor) -> FrameFeatures:
        """Normalised frames (n, 3, S, S), or, where the trunk passes maps through, its maps (n, E, G, G)."""
        return self.tracker.prepare_features(self.neck(images))
