"""A teacher for tests: a small random network with SAM3's outputs, in milliseconds and without any file.

Letters: `B` pictures, `S` side of the square, `P` prompts, `Q` queries, `C` channels, `E G` channels and side of the
trunk's grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.config import DistillationConfig
from distillation.teachers.teacher import Teacher, place
from sam3.engine.weights import digest
from sam3.model.box_ops import box_cxcywh_to_xyxy

PATCH = 14  # pixels per cell of the grid, as in SAM3
TRUNK_CHANNELS = 32
DIM, NUM_QUERIES = 64, 20  # those of the tiny SAM3, whose student fits here too
LEVELS = (4, 2, 1)  # sides of the pyramid's maps in grids
LOGIT_RANGE = (-6.0, 4.0)  # of the queries' scores, before the picture moves them: some are confident, most are not


class FakeTeacher(Teacher):
    """Each query looks at the picture around a place of its own: where it finds what, decides its box, score and mask.

    Everything follows from `seed`, the prompts' number and the picture. ValueError if `image_size` has no whole grid.
    """

    def __init__(
        self,
        config: DistillationConfig,
        device: str | torch.device = "auto",
        with_trunk: bool = True,
        seed: int = 0,
    ):
        if config.image_size % PATCH:
            raise ValueError(
                f"image_size {config.image_size} is no multiple of the fake teacher's patch, {PATCH} px; "
                f"set image_size {max(1, config.image_size // PATCH) * PATCH} (--image-size)"
            )
        grid = config.image_size // PATCH
        meta = {"backend": "fake", "name": "fake", "trunk_shape": [TRUNK_CHANNELS, grid, grid]}
        super().__init__(config.image_size, DIM, NUM_QUERIES, meta)
        device, dtype = place(config.teacher_dtype, device)
        with torch.random.fork_rng(devices=[]):  # else tests that count on the global generator would notice
            torch.manual_seed(seed)
            self._build(len(config.prompts))
        self.meta["sha256"] = digest(self.state_dict())
        if not with_trunk:
            self.trunk = None
        self.to(device, dtype)
        self.freeze()

    def _build(self, num_prompts: int) -> None:
        self.trunk = nn.Sequential(
            nn.Conv2d(3, TRUNK_CHANNELS, PATCH, stride=PATCH),
            nn.GELU(),
            nn.Conv2d(TRUNK_CHANNELS, TRUNK_CHANNELS, 3, padding=1),
        )
        self.levels = nn.ModuleList(nn.Conv2d(TRUNK_CHANNELS, DIM, 1) for _ in LEVELS)
        self.prompts = nn.Embedding(num_prompts, DIM)
        self.encoder = nn.Conv2d(DIM, DIM, 3, padding=1)
        self.queries = nn.Embedding(NUM_QUERIES, DIM)
        self.places = nn.Parameter(torch.rand(NUM_QUERIES, 2) * 0.6 + 0.2)  # xy in 0..1
        self.box_head, self.score_head = nn.Linear(DIM, 4), nn.Linear(DIM, 1)
        self.scores = nn.Parameter(torch.linspace(*LOGIT_RANGE, NUM_QUERIES)[torch.randperm(NUM_QUERIES)])
        self.presence_head = nn.Linear(DIM, 1)
        self.semantic_head = nn.Conv2d(DIM, 1, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):  # keep the size of signals: outputs shall follow the picture
                nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
                nn.init.zeros_(layer.bias)

    def run_trunk(self, images: Tensor) -> Tensor:
        assert self.trunk is not None, "this teacher was built without its trunk"
        return self.trunk(images)

    def run_heads(self, maps: Tensor, prompt_index: Tensor, features: bool) -> dict[str, Any]:
        size = maps.shape[-1]
        fpn = tuple(
            F.interpolate(level(maps), (scale * size,) * 2, mode="bilinear", align_corners=False)
            for scale, level in zip(LEVELS, self.levels, strict=True)
        )
        prompts = self.prompts(prompt_index)  # (B, C)
        tokens = self.encoder(fpn[-1] + prompts[:, :, None, None]).flatten(2).transpose(1, 2)  # (B, GG, C)
        found = self._look(tokens, size)  # (B, Q, C)
        moved = self.box_head(found).tanh()  # (B, Q, 4)
        boxes = torch.cat((self.places + 0.1 * moved[..., :2], 0.25 + 0.15 * moved[..., 2:]), dim=-1)
        outputs = {
            "pred_masks": self._masks(fpn[0], found, boxes),
            "pred_boxes": box_cxcywh_to_xyxy(boxes),
            "pred_logits": self.scores + self.score_head(found).squeeze(-1),
            "presence_logits": 3 + self.presence_head(tokens.mean(1)).tanh(),
            "semantic_seg": 4 * self.semantic_head(fpn[0]),
        }
        if features:
            outputs |= {"fpn_features": fpn, "encoder_output": tokens, "encoder_hw": (size, size)}
        return outputs

    def _look(self, tokens: Tensor, size: int) -> Tensor:
        """What each query gathers from the tokens `(B, GG, C)` near its place, more of what is like itself."""
        centres = self._centres(size)
        far = (self.places[:, None, None, 0] - centres) ** 2 + (self.places[:, None, None, 1] - centres[:, None]) ** 2
        likeness = self.queries.weight @ tokens.transpose(1, 2) / math.sqrt(DIM)  # (B, Q, GG)
        return (likeness - 20 * far.flatten(1)).softmax(-1) @ tokens

    def _masks(self, pixels: Tensor, found: Tensor, boxes: Tensor) -> Tensor:
        """Logits `(B, Q, h, w)`: an ellipse in the box, its edge moved by how much the pixels are like the query."""
        centres = self._centres(pixels.shape[-1])
        cx, cy, width, height = boxes[..., None, None].unbind(2)  # (B, Q, 1, 1) each
        ellipse = ((centres - cx) / (width / 2)) ** 2 + ((centres[:, None] - cy) / (height / 2)) ** 2
        likeness = torch.einsum("bqc,bchw->bqhw", found, pixels) / math.sqrt(DIM)
        return 4 * (1 - ellipse).clamp(min=-2) + 2 * likeness.tanh()

    def _centres(self, size: int) -> Tensor:
        """Of the cells of a row, in 0..1."""
        return (torch.arange(size, device=self.places.device, dtype=self.places.dtype) + 0.5) / size
