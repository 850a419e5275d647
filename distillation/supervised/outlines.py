"""What the trunk's tokens tell of the object they lie on beside its name: how it is turned, where it is and where it
ends. A scene says all this for nothing, and it is what a shape is made of: names alone, which must be the same for all
turns, sizes and paints, are learnt several times as slowly.

Letters: `I` images, `N` objects of an image, `T = G G` tokens of an image, `C` channels, `S` side of the input.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.supervised.batch import SceneBatch
from sam3.engine.scene_drawing import SYMMETRY
from sam3.engine.scene_names import SHAPES, combinations
from sam3.engine.scenes import Scene

# Into how many classes the turns of a shape are cut: eight of a whole turn, at least two of any that can be seen.
CUTS = tuple({0: 1, 1: 8, 2: 4, 3: 3}.get(SYMMETRY[shape], 2) for shape in SHAPES)
SHAPE_OF = tuple(place for place, cuts in enumerate(CUTS) for _ in range(cuts))  # of each class
FIRST = tuple(sum(CUTS[:place]) for place in range(len(SHAPES)))
NUM_TURNS = sum(CUTS)
CELLS = 7  # per side of a token, in which its object is told from others
ON, NEAR = 0.5, 0.1  # share of a token that its object covers, for its place and its outline to be asked for
REACH = 3.0  # distances in tokens are in this unit
WEIGHTS = {"turn": 2.0, "place": 1.0, "outline": 3.0}


class OutlineLoss(nn.Module):
    """Linear heads on the map in which words are told, and their losses. channels: C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.turn = nn.Linear(channels, NUM_TURNS)
        self.place = nn.Linear(channels, 3)
        self.outline = nn.Linear(channels, CELLS * CELLS)

    def forward(self, seen: Tensor, batch: SceneBatch) -> Tensor:
        """seen: `(I, C, G, G)` -> the weighted sum of

        turn: cross-entropy over the turns of all shapes that `rivals` gives, from the mean over each object. place:
        |error| of the way from a token to the middle of its object, in REACH tokens, and of the logarithm of the
        object's size in tokens.
        outline: BCE of which of CELLS x CELLS parts of a token show its object.
        """
        side, tokens = seen.shape[-1], seen.flatten(2).mT  # (I, T, C)
        shares = F.adaptive_avg_pool2d(batch.masks.float() / 255, side).flatten(2)  # (I, N, T)
        areas = shares.sum(2).clamp(min=1e-3)
        there = batch.words[..., 0] >= 0
        objects = (shares @ tokens / areas[..., None])[there]
        most, owner = shares.max(1)  # (I, T)
        terms = {
            "turn": F.cross_entropy(
                self.turn(objects).masked_fill(~rivals(batch.words[there])["shape"][:, SHAPE_OF], -torch.inf),
                batch.turns[there],
            ),
            "place": _mean((self.place(tokens) - places(shares, areas, owner)).abs(), most > ON),
            "outline": _mean(
                F.binary_cross_entropy_with_logits(
                    self.outline(tokens), parts_shown(batch.instances, owner, side), reduction="none"
                ),
                most > NEAR,
            ),
        }
        return sum(WEIGHTS[name] * term for name, term in terms.items())


def rivals(words: Tensor) -> dict[str, Tensor]:
    """Of each of PARTS the words that training shows with the other two of an object, and its own: bool `(n, words)`.

    Only these compete with the right word in training. Were all to compete, it would pay to learn that no red thing
    is a square where red squares are kept for val, and the model would deny them there.

    words: long `(n, 3)`, as in SceneBatch.
    """
    shown = _shown(words.device)  # (shapes, colours, textures)
    shape, colour, texture = words.unbind(1)
    found = {
        "shape": shown[:, colour, texture + 1].T,
        "colour": shown[shape, :, texture + 1],
        "texture": shown[shape, colour, 1:],
    }
    own = words.clamp(min=0)
    return {part: allowed.scatter(1, own[:, place, None], True) for place, (part, allowed) in enumerate(found.items())}


@cache
def _shown(device: torch.device) -> Tensor:
    return torch.from_numpy(combinations("train")).to(device)


def places(shares: Tensor, areas: Tensor, owner: Tensor) -> Tensor:
    """`(I, T, 3)`: from each token to the middle of its owner, x and y in REACH tokens, and the log of its size, the
    root of its area in tokens. shares: `(I, N, T)`; areas: their sums `(I, N)`; owner: long `(I, T)`."""
    side = math.isqrt(shares.shape[-1])
    step = torch.arange(side, device=shares.device) + 0.5
    grid = torch.stack(torch.meshgrid(step, step, indexing="xy"), dim=-1).view(-1, 2)  # (T, 2), x y
    middles = shares @ grid / areas[..., None]  # (I, N, 2)
    way = middles.gather(1, owner[..., None].expand(-1, -1, 2)) - grid
    return torch.cat((way / REACH, areas.sqrt().log().gather(1, owner)[..., None]), dim=-1)


def parts_shown(instances: Tensor, owner: Tensor, side: int) -> Tensor:
    """`(I, T, CELLS CELLS)` in 0..1, how much of each part of a token shows its owner. instances: `(I, S, S)`;
    owner: long `(I, T)`; side: tokens per side."""
    count, size = len(instances), instances.shape[-1] // side  # pixels per token
    pixels = instances.view(count, side, size, side, size).transpose(2, 3).reshape(count, side * side, size, size)
    shown = (pixels == owner[..., None, None]).float()
    return F.adaptive_avg_pool2d(shown, CELLS).flatten(2)


def turns_of(scene: Scene) -> np.ndarray:
    """Class of each object's shape and turn, long `(N,)` below NUM_TURNS."""
    found = []
    for kind, angle in zip(scene.objects, scene.angles, strict=True):
        place = SHAPES.index(kind.shape)
        period = 2 * math.pi / max(SYMMETRY[kind.shape], 1)
        found.append(FIRST[place] + min(int(angle % period / period * CUTS[place]), CUTS[place] - 1))
    return np.array(found, np.int64)


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    """Of values `(I, T, n)` in the `rows` `(I, T)`; 0 without any."""
    return (values.mean(-1) * rows).sum() / rows.sum().clamp(min=1)
