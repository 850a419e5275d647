"""A SAM-1 model whose features come out beside its results.

Letters: `B` pictures, `P` prompts, `n` images given to the decoder (1 for all prompts, or P), `C` channels, `G` side of
the embedding's grid, `S` side of the input, `N` cells or tokens, `T` tokens of a prompt, `K` masks of a prompt, `H W`
rows and columns of a feature, `h w` of a mask.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt

import torch
from torch import Tensor, nn

from distillation.prompt.hooks import Hook, resolve
from distillation.prompt.prompts import Prompts
from sam3.sam.sam1 import Sam1, build_sam1

OF_ENCODER = ("encoder_patch",)
OF_DECODER = ("prompt_embed", "decoder_mask_token")
MASK_TOKENS = slice(1, 5)  # of the decoder's tokens; before them the IoU token, after them the prompt
NUM_MASK_TOKENS = 4

logger = logging.getLogger("sam3.distillation")


@dataclass(frozen=True)
class Encoded:
    """embedding: `(B, C, G, G)`. features: `encoder_patch` `(B, C', H, W)`, if it is hooked."""

    embedding: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """masks: `(P, K, h, w)` logits. ious: `(P, K)`, as predicted.

    features, of those that are hooked: `prompt_embed` `(P, C, G, G)`, or `(1, C, G, G)` where the prompts share one
    embedding and it is taken before they reach it; `decoder_mask_token` `(P, 4, C)`.
    """

    masks: Tensor
    ious: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


class HookedSam:
    """Calls a model and hands out what its hooks saw of that very call.

    The features are the model's own tensors, with their graph; nothing is kept between calls, and calls that are not
    made through here (such as those that recompute a block in the backward pass) leave no trace. So `encode` and
    `decode` may themselves be run inside `torch.utils.checkpoint`, and their order does not matter.

    model: has `encode(images) -> (B, C, G, G)`, `decode(embedding, points, boxes, multimask) -> masks and ious`, and
    `type`; see `sam3.sam.sam1.Sam1`. hooks: component -> hook string, None for the usual place; only these are
    registered. tap: of prompt_embed, see `distillation.prompt.hooks.resolve`, which raises for hooks that the model
    does not have. name: of the model, for messages. announce: log where the features are taken from.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: Mapping[str, str | None],
        tap: str = "input_keys",
        name: str = "model",
        announce: bool = True,
    ) -> None:
        self.model, self.name = model, name
        kind = getattr(model, "type", None)
        self.hooks = {component: resolve(model, component, hook, kind, tap) for component, hook in hooks.items()}
        self._kept: dict[str, list[Tensor]] = {}
        self._handles = [hook.attach(lambda c=component: self._kept.get(c)) for component, hook in self.hooks.items()]
        for hook in self.hooks.values() if announce else ():
            logger.info("%s: %s is taken from %s (%s)", name, hook.component, hook, hook.asked)

    def encode(self, images: Tensor) -> Encoded:
        """images: normalised `(B, 3, S, S)`. ValueError if a hook does not fire or gives something unfit."""
        with self._listening(OF_ENCODER) as kept:
            embedding = self.model.encode(images)
        features = {}
        for component, captures in kept.items():
            hook = self.hooks[component]
            features[component] = self._rows(hook, as_maps(self._joined(hook, captures, "encode"), hook), len(images))
        return Encoded(embedding, features)

    def decode(self, embedding: Tensor, prompts: Prompts, multimask: bool) -> Decoded:
        """embedding: `(1|P, C, G, G)`. multimask: three masks of a prompt rather than one. ValueError as `encode`."""
        with self._listening(OF_DECODER) as kept:
            result = self.model.decode(embedding, *prompts.arguments(), multimask)
        features = {}
        for component, captures in kept.items():
            hook = self.hooks[component]
            value = self._joined(hook, captures, "decode")
            if component == "decoder_mask_token":
                features[component] = self._rows(hook, mask_tokens(value, hook), len(result.masks))
            else:
                features[component] = self._prompt_embed(hook, value, embedding, len(result.masks))
        return Decoded(result.masks, result.ious, features)

    def remove(self) -> None:
        """Take the hooks off the model; from then on calls give no features."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.hooks = [], {}

    @contextlib.contextmanager
    def _listening(self, components: tuple[str, ...]) -> Iterator[dict[str, list[Tensor]]]:
        """Gives the lists that fill up until the end of the block, also where an error (or early stop) ends it."""
        before, self._kept = self._kept, {component: [] for component in components if component in self.hooks}
        try:
            yield self._kept
        finally:
            self._kept = before

    def _joined(self, hook: Hook, captures: list[Tensor], call: str) -> Tensor:
        if not captures:
            raise ValueError(
                f"{self.name}: the {hook.component} hook '{hook}' ({hook.asked}) never fired while the model ran its "
                f"{call}; the {type(hook.module).__name__} there is not called. Name another place in hooks."
            )
        return captures[0] if len(captures) == 1 else torch.cat(captures)

    def _prompt_embed(self, hook: Hook, value: Tensor, embedding: Tensor, num_prompts: int) -> Tensor:
        channels, grid = embedding.shape[1], embedding.shape[-1]
        if value.ndim == 4 and value.shape[2:] == (grid * grid, channels):
            value = value.flatten(0, 1)  # transformers: (B, P, N, C)
        maps = as_maps(value, hook)
        if len(embedding) == 1 and hook.before_prompts:
            return maps[:1]  # all rows, if the model has repeated them, are equal
        return maps if len(maps) == len(embedding) else self._rows(hook, maps, num_prompts)

    def _rows(self, hook: Hook, value: Tensor, wanted: int) -> Tensor:
        if len(value) != wanted:
            raise ValueError(
                f"{self.name}: the {hook.component} hook '{hook}' gives {len(value)} rows for {wanted} "
                f"{'pictures' if hook.component in OF_ENCODER else 'prompts'}; is it inside windowed attention?"
            )
        return value


@torch.no_grad()
def patch_width(model: nn.Module, hook: str | None, name: str) -> int:
    """Channels of a model's patch features, taken at `hook` (None: the usual place). name: for messages.

    A `Sam1` is asked without computing anything; other models see an empty picture.
    """
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    if isinstance(model, Sam1):
        device, dtype = torch.device("meta"), torch.float32
        with device:
            model = build_sam1(model.type, model.image_size)
    hooked = HookedSam(model, {"encoder_patch": hook}, name=name, announce=False)
    patch = hooked.encode(torch.zeros(1, 3, model.image_size, model.image_size, device=device, dtype=dtype))
    hooked.remove()
    return patch.features["encoder_patch"].shape[1]


def as_maps(value: Tensor, hook: Hook) -> Tensor:
    """A view `(B, C, H, W)` of maps `(B, C, H, W)` or `(B, H, W, C)` or of cells `(B, N, C)`; H = W, as of all inputs.

    ValueError if the shape is none of these, or more than one.
    """
    shape = tuple(value.shape)
    if value.ndim == 3 and isqrt(shape[1]) ** 2 == shape[1]:
        return value.transpose(1, 2).unflatten(2, (isqrt(shape[1]), -1))
    first, last = value.ndim == 4 and shape[2] == shape[3], value.ndim == 4 and shape[1] == shape[2]
    if first == last:
        wanted = "square maps (B, C, H, W) or (B, H, W, C), or (B, N, C) with a square N"
        what = "may have its channels first or last" if first else f"is not {wanted}"
        raise ValueError(f"the {hook.component} hook '{hook}' gives a tensor of shape {shape}, which {what}")
    return value if first else value.permute(0, 3, 1, 2)


def mask_tokens(value: Tensor, hook: Hook) -> Tensor:
    """The four mask tokens, a view `(P, 4, C)`, of all tokens `(P, T, C)` or `(B, P, T, C)`, or of just these four."""
    if value.ndim < 3 or value.shape[-2] < NUM_MASK_TOKENS:
        wanted = f"(P, T, C) with T = {NUM_MASK_TOKENS} mask tokens, or all tokens with the masks' in 1 to 4"
        raise ValueError(
            f"the {hook.component} hook '{hook}' gives a tensor of shape {tuple(value.shape)}, not {wanted}"
        )
    rows = value.flatten(0, -3)
    return rows if rows.shape[1] == NUM_MASK_TOKENS else rows[:, MASK_TOKENS]
