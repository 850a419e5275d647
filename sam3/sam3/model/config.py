"""Every size of a SAM3 image model, by preset or read from the shapes of a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

TRUNK = "backbone.vision_backbone.trunk."
NECK = "backbone.vision_backbone.convs."
TEXT = "backbone.language_backbone.encoder."


@dataclass(frozen=True)
class Sam3Config:
    """Sizes of the image model; the defaults are those of the released `sam3.pt`.

    The ViT's own fields (`vit_*`, `pretrain_img_size`, `window_size`, `global_blocks`) are None when a student takes
    its place.
    """

    img_size: int = 1008  # side of the square input, pixels
    patch_size: int = 14  # pixels of the input per cell of the token grid
    # ViT trunk
    pretrain_img_size: int | None = 336  # side the absolute positions were learnt at; they are tiled from there
    vit_dim: int | None = 1024
    vit_depth: int | None = 32
    vit_heads: int | None = 16
    vit_mlp_dim: int | None = 4736
    window_size: int | None = 24  # tokens per side of an attention window
    global_blocks: tuple[int, ...] | None = (7, 15, 23, 31)  # blocks that attend over the whole grid
    # everything after the neck
    dim: int = 256
    heads: int = 8
    ffn_dim: int = 2048  # hidden width of the transformers and of the scoring MLP
    geometry_layers: int = 3
    fusion_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 200
    # text encoder
    text_width: int = 1024
    text_heads: int = 16
    text_layers: int = 24
    text_mlp_dim: int = 4096
    text_projection_dim: int = 512  # of a weight that is in the file and has no effect
    context_length: int = 32
    vocab_size: int = 49408

    @property
    def grid(self) -> int:
        """Tokens per side of the embedding."""
        return self.img_size // self.patch_size

    @classmethod
    def preset(cls, name: str) -> Sam3Config:
        """`full` (the released model) or `tiny` (the same code at small widths, for tests and the quickstart)."""
        if name not in PRESETS:
            raise ValueError(f"unknown SAM3 preset '{name}'; known: {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], img_size: int | None = None, patch_size: int | None = None
    ) -> Sam3Config:
        """Reads the sizes off a state dict whose keys are those of `sam3.pt` after `detector.`.

        Args:
            tensors: name -> anything with a `.shape`.
            img_size, patch_size: needed only where a student replaces the ViT (its weights fit any size);
                the released numbers if left out.

        Raises:
            ValueError: a tensor that fixes a size is missing or has an impossible shape.
        """
        shape = ShapeReader(tensors)
        sizes = vit_sizes(tensors) if f"{TRUNK}patch_embed.proj.weight" in tensors else dict(_NO_VIT)
        if img_size is not None:
            if sizes["vit_dim"] is not None and img_size != sizes["img_size"]:
                raise ValueError(f"the ViT's rotary tables are for {sizes['img_size']} px, not {img_size} px")
            sizes["img_size"] = img_size
        if patch_size is not None and sizes["vit_dim"] is None:
            sizes["patch_size"] = patch_size
        return cls(**sizes, **_text_sizes(shape), **_head_sizes(shape))


PRESETS = {
    "full": Sam3Config(),
    "tiny": Sam3Config(
        img_size=224,
        pretrain_img_size=112,
        vit_dim=96,
        vit_depth=4,
        vit_heads=4,
        vit_mlp_dim=384,
        window_size=8,
        global_blocks=(1, 3),
        dim=64,
        ffn_dim=128,
        geometry_layers=1,
        fusion_layers=2,
        decoder_layers=3,
        num_queries=20,
        text_width=12,
        text_heads=1,
        text_layers=2,
        text_mlp_dim=48,
    ),
}

_VIT_FIELDS = (
    "pretrain_img_size", "vit_dim", "vit_depth", "vit_heads", "vit_mlp_dim", "window_size", "global_blocks",
)  # fmt: skip
_NO_VIT = {"img_size": Sam3Config.img_size, "patch_size": Sam3Config.patch_size, **dict.fromkeys(_VIT_FIELDS)}


def without_vit(config: Sam3Config) -> Sam3Config:
    """The same sizes for a model whose trunk is a student."""
    return replace(config, **dict.fromkeys(_VIT_FIELDS))


class ShapeReader:
    """Shapes by name, with an error that says what is missing."""

    def __init__(self, tensors: Mapping[str, Any]):
        self.tensors = tensors

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"not a SAM3 checkpoint: no tensor '{name}' among {len(self.tensors)}")
        return tuple(self.tensors[name].shape)

    def count(self, prefix: str) -> int:
        """Length of the module list at `prefix`."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, self.tensors) if m), default=-1)


def _side(count: int, what: str) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{what} has {count} entries, which is not a square grid")
    return side


def vit_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `Sam3Config` that the trunk fixes, from its tensors alone (see `Sam3Config.from_tensors`)."""
    shape = ShapeReader(tensors)
    dim, _, patch, _ = shape(f"{TRUNK}patch_embed.proj.weight")
    depth = shape.count(f"{TRUNK}blocks.")
    tables = [shape(f"{TRUNK}blocks.{i}.attn.freqs_cis") for i in range(depth)]  # each (tokens, head width / 2)
    grid, window = (_side(pick(t[0] for t in tables), "a rotary table of the ViT") for pick in (max, min))
    return {
        "img_size": grid * patch,
        "patch_size": patch,
        "pretrain_img_size": _side(shape(f"{TRUNK}pos_embed")[1] - 1, "the ViT's position table") * patch,
        "vit_dim": dim,
        "vit_depth": depth,
        "vit_heads": dim // (2 * tables[0][1]),
        "vit_mlp_dim": shape(f"{TRUNK}blocks.0.mlp.fc1.weight")[0],
        "window_size": window,
        "global_blocks": tuple(i for i, t in enumerate(tables) if t[0] == grid * grid),
    }


def _text_sizes(shape: ShapeReader) -> dict[str, Any]:
    if not shape.count(f"{TEXT}transformer.resblocks."):
        return {}  # a file without the text encoder
    vocab_size, width = shape(f"{TEXT}token_embedding.weight")
    return {
        "text_width": width,
        "text_heads": max(1, width // 64),  # CLIP's rule; the count leaves no trace in the shapes
        "text_layers": shape.count(f"{TEXT}transformer.resblocks."),
        "text_mlp_dim": shape(f"{TEXT}transformer.resblocks.0.mlp.c_fc.weight")[0],
        "text_projection_dim": shape(f"{TEXT}text_projection")[1],
        "context_length": shape(f"{TEXT}positional_embedding")[0],
        "vocab_size": vocab_size,
    }


def _head_sizes(shape: ShapeReader) -> dict[str, Any]:
    num_queries, dim = shape("transformer.decoder.query_embed.weight")
    return {
        "dim": dim,
        "heads": shape("transformer.decoder.boxRPB_embed_x.layers.1.weight")[0],
        "ffn_dim": shape("transformer.encoder.layers.0.linear1.weight")[0],
        "geometry_layers": shape.count("geometry_encoder.encode."),
        "fusion_layers": shape.count("transformer.encoder.layers."),
        "decoder_layers": shape.count("transformer.decoder.layers."),
        "num_queries": num_queries,
    }
