"""Segment-everything: a grid of prompts, matched with all masks of a picture; what is compared then.

The prompts pass the decoder in chunks whose activations are computed again in the backward pass, so that the memory is
that of one chunk, and the encoder runs once, forward and backward, however many prompts there are.

Letters: `B` pictures, `P` prompts of a picture, `K` masks of a prompt, `M` masks in the ground truth of a picture, `n`
matched pairs, `C` channels, `G` side of the embedding's grid, `h w` rows and columns of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillation.prompt.hooked import Decoded
from distillation.prompt.prompts import Prompts

Decode = Callable[[Tensor, Prompts, bool], Decoded]  # (embedding (1, C, G, G), prompts, multimask)


@dataclass(frozen=True)
class Pairs:
    """Candidates that meet a mask: int64 `(n,)` on the CPU, where they are found. See `NO_PAIRS`."""

    prompts: Tensor
    slots: Tensor
    objects: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


NO_PAIRS = Pairs(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))


@dataclass(frozen=True)
class GridFeatures:
    """What a model says of one picture's grid.

    masks: `(n, 1, h, w)` logits, those of the pairs. pair_ious: `(n, 1)`, predicted. ious: `(P, K)`, predicted, of the
    prompts that were decoded. features: `decoder_mask_token` `(P, 4, C)` and `prompt_embed` `(1, C, G, G)`, if hooked.
    """

    masks: Tensor
    pair_ious: Tensor
    ious: Tensor
    features: dict[str, Tensor]


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
        with torch.autocast(found.device.type, enabled=False):  # half precision cannot count so many pixels
            both = found @ wanted.T  # (p, K, M)
        rows.append(both / (found.sum(2, keepdim=True) + areas - both).clamp(min=1))
    return torch.cat(rows)


def assign(ious: Tensor, threshold: float) -> Pairs:
    """The assignment of candidates to masks with the greatest sum of IoUs; pairs below `threshold` are left out.

    ious: `(P, K, M)`. This waits for the device, as nothing else here does.
    """
    values = ious.flatten(0, 1).cpu()
    candidates, objects = map(torch.from_numpy, linear_sum_assignment(values.numpy(), maximize=True))
    kept = values[candidates, objects] >= threshold
    candidates, objects = candidates[kept], objects[kept]
    return Pairs(candidates // ious.shape[1], candidates % ious.shape[1], objects)


def decode_grid(
    decode: Decode, embedding: Tensor, prompts: Prompts, pairs: Pairs, multimask: bool, chunk: int, whole: bool
) -> GridFeatures:
    """The masks of the pairs, and what prompts give besides, chunk by chunk.

    whole: whether tokens and predicted IoUs of all prompts are wanted, or those of the pairs' prompts alone.
    """
    device = embedding.device
    rows = torch.arange(len(prompts))
    if not whole:  # without any pair still one prompt, so that there is a graph and what a picture has once
        rows = pairs.prompts.unique() if len(pairs) else rows[:1]
    places = torch.searchsorted(rows, pairs.prompts)  # of the pairs' prompts among those decoded
    order, outputs = [], []
    for part in chunks(len(rows), chunk):
        inside = (places >= part.start) & (places < part.stop)
        order.append(inside.nonzero()[:, 0])
        asked = prompts[rows[part].to(device)]
        local, slots = (places[inside] - part.start).to(device), pairs.slots[inside].to(device)

        def run(embedding: Tensor, asked: Prompts = asked, local: Tensor = local, slots: Tensor = slots):
            decoded = decode(embedding, asked, multimask)
            return decoded.masks[local, slots], decoded.ious, decoded.features

        if torch.is_grad_enabled():
            outputs.append(checkpoint(run, embedding, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(run(embedding))
    back = torch.cat(order).argsort().to(device)
    masks, ious = (torch.cat([output[i] for output in outputs]) for i in range(2))
    pair_ious = ious[places.to(device), pairs.slots.to(device)]
    return GridFeatures(masks[back][:, None], pair_ious[:, None], ious, _joined([output[2] for output in outputs]))


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The chunks' features as one; ValueError if each prompt has an embedding of its own."""
    features = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "prompt_embed"}
    if "prompt_embed" in parts[0]:
        if len(parts[0]["prompt_embed"]) > 1:
            raise ValueError(
                "the hook of prompt_embed gives a map for each prompt of the grid; in dataset.mode everything take it "
                "where the prompts have not met the picture yet, as mask_decoder.transformer.layers[0]@in.keys"
            )
        features["prompt_embed"] = parts[0]["prompt_embed"]
    return features


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover 0 .. count - 1 in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
