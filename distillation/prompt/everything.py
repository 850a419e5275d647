"""Segment-everything: a grid of prompts, matched with all masks of a picture; what is compared then.

The prompts pass the decoder in chunks whose activations are computed again in the backward pass, so that the memory is
that of one chunk, and the encoder runs once, forward and backward, however many prompts there are.

Letters: `B` pictures, `P` prompts of a picture, `K` masks of a prompt, `M` masks in the ground truth of a picture, `n`
matched pairs, `C` channels, `G` side of the embedding's grid, `h w` rows and columns of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillation.prompt.hooked import Decoded
from distillation.prompt.prompts import Prompts

Decode = Callable[[Tensor, Prompts, bool], Decoded]  # (embedding (1, C, G, G), prompts, multimask)


@dataclass(frozen=True)
class Pairs:
    """Candidates that meet a mask. prompts, slots, objects: int64 `(n,)` on the device; ious: float32 `(n,)`."""

    prompts: Tensor
    slots: Tensor
    objects: Tensor
    ious: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class GridFeatures:
    """What a model says of one picture's grid.

    masks, logits: `(n, 1, h, w)`, those of the pairs. pair_ious: `(n, 1)`, predicted. ious: `(P, K)`, predicted, of the
    prompts that were decoded. features: `decoder_mask_token` `(P, 4, C)` and `prompt_embed` `(1, C, G, G)`, if hooked.
    """

    masks: Tensor
    pair_ious: Tensor
    ious: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def match(decode: Decode, embedding: Tensor, prompts: Prompts, masks: Tensor, multimask: bool, chunk: int) -> Tensor:
    """IoU of every candidate with every mask: float32 `(P, K, M)`.

    embedding: `(1, C, G, G)`. masks: `(M, 1, h, w)` of zeros and ones. Candidates are thresholded at logit 0.
    """
    wanted = masks.flatten(1).float()  # (M, h*w)
    areas = wanted.sum(1)
    rows = []
    for part in chunks(len(prompts), chunk):
        found = (decode(embedding, prompts[part], multimask).masks > 0).flatten(2).float()  # (p, K, h*w)
        both = found @ wanted.T  # (p, K, M)
        rows.append(both / (found.sum(2, keepdim=True) + areas - both).clamp(min=1))
    return torch.cat(rows)


def assign(ious: Tensor, threshold: float) -> Pairs:
    """The assignment of candidates to masks with the greatest sum of IoUs; pairs below `threshold` are left out.

    ious: `(P, K, M)`. This waits for the device.
    """
    slots = ious.shape[1]
    candidates, objects = linear_sum_assignment(ious.flatten(0, 1).cpu().numpy(), maximize=True)
    candidates, objects = (torch.from_numpy(index).to(ious.device) for index in (candidates, objects))
    reached = ious.flatten(0, 1)[candidates, objects]
    kept = reached >= threshold
    candidates, objects = candidates[kept], objects[kept]
    return Pairs(candidates // slots, candidates % slots, objects, reached[kept])


def decode_grid(
    decode: Decode, embedding: Tensor, prompts: Prompts, pairs: Pairs, multimask: bool, chunk: int, everything: bool
) -> GridFeatures:
    """The masks of the pairs, and what all prompts give besides, chunk by chunk.

    everything: whether tokens and predicted IoUs of all prompts are wanted, or those of the pairs' prompts alone.
    """
    rows = torch.arange(len(prompts), device=embedding.device)
    if not everything:  # without any pair still one prompt, so that there is a graph and what a picture has once
        rows = pairs.prompts.unique() if len(pairs) else rows[:1]
    places = torch.searchsorted(rows, pairs.prompts)  # of the pairs' prompts among those decoded
    outputs = []
    for part in chunks(len(rows), chunk):
        inside = (places >= part.start) & (places < part.stop)
        asked, local, slots = prompts[rows[part]], places[inside] - part.start, pairs.slots[inside]
        order = inside.nonzero()[:, 0]

        def run(embedding: Tensor, asked: Prompts = asked, local: Tensor = local, slots: Tensor = slots):
            decoded = decode(embedding, asked, multimask)
            return decoded.masks[local, slots], decoded.ious, decoded.features

        if torch.is_grad_enabled():
            outputs.append((order, *checkpoint(run, embedding, use_reentrant=False)))
        else:
            outputs.append((order, *run(embedding)))
    return _joined(outputs, places, pairs)


def _joined(outputs: list, places: Tensor, pairs: Pairs) -> GridFeatures:
    """The chunks' (places of pairs, masks, IoUs, features) as one, the pairs in their own order."""
    order, masks, ious = (torch.cat([output[i] for output in outputs]) for i in range(3))
    back = order.argsort()
    features = {}
    for name in outputs[0][3]:
        parts = [output[3][name] for output in outputs]
        features[name] = parts[0][:1] if name == "prompt_embed" else torch.cat(parts)
    return GridFeatures(masks[back][:, None], ious[places, pairs.slots][:, None], ious, features)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover 0 .. count - 1 in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
