"""Every size of the video tracker, by preset or read from the shapes of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from sam3.model.config import ShapeReader


@dataclass(frozen=True)
class MemoryConfig:
    """A compressed memory in the place of SAM3's dense one.

    Heads leave no trace in the shapes of weights, so that files which hold such a memory state this as `meta.memory`.
    """

    perceiver: bool = True  # turn a frame's map into latents; without it, the map itself is pooled
    num_latents: int = 256  # each attends to the whole map
    num_latents_2d: int = 256  # each attends to its own window; a square number
    perceiver_depth: int = 2
    perceiver_dim: int = 256
    perceiver_heads: int = 4
    perceiver_dim_head: int = 64
    perceiver_self_attention: bool = True
    num_layers: int = 2  # of the memory attention
    ffn_dim: int = 2048
    pool_size: int = 2  # side of the squares of memory tokens that are averaged; 1 averages none
    dropout: float = 0.0

    def to_meta(self) -> dict[str, Any]:
        """Plain numbers, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> MemoryConfig:
        """The inverse of `to_meta`; ValueError if a field is missing or unknown."""
        wanted = {field.name for field in fields(cls)}
        if set(meta) != wanted:
            raise ValueError(f"memory meta has the fields {sorted(meta)}, wanted {sorted(wanted)}")
        return cls(**meta)


@dataclass(frozen=True)
class TrackerConfig:
    """Sizes of the tracker; the defaults are those of the released `sam3.pt`."""

    img_size: int = 1008  # side of the square input, pixels
    patch_size: int = 14  # pixels of the input per cell of the feature map
    dim: int = 256
    mem_dim: int = 64  # channels of a memory token
    heads: int = 8  # of the mask decoder; they leave no trace in the shapes
    decoder_mlp_dim: int = 2048
    decoder_depth: int = 2
    iou_head_dim: int = 256
    mask_in_chans: int = 16
    attention_layers: int = 4
    attention_ffn_dim: int = 2048
    fuser_layers: int = 2
    num_maskmem: int = 7  # temporal codes: that of prompted frames, and those of the frames before
    max_cond_frames: int = 4  # prompted frames attended to
    max_obj_ptrs: int = 16  # object pointers attended to
    memory: MemoryConfig | None = None  # None: SAM3's dense memory

    @property
    def grid(self) -> int:
        """Cells per side of the feature map."""
        return self.img_size // self.patch_size

    @classmethod
    def preset(cls, name: str) -> TrackerConfig:
        """`full` (the released model) or `tiny`; they go with the presets of `Sam3Config`."""
        if name not in TRACKER_PRESETS:
            raise ValueError(f"unknown tracker preset '{name}'; known: {', '.join(TRACKER_PRESETS)}")
        return TRACKER_PRESETS[name]

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], img_size: int, patch_size: int, memory: MemoryConfig | None = None
    ) -> TrackerConfig:
        """Reads the sizes off a state dict whose keys are those of `sam3.pt` after `tracker.`.

        Raises ValueError if a tensor that fixes a size is missing, or the tensors are of a dense memory and `memory`
        is given, or the other way round.
        """
        shape = ShapeReader(tensors)
        dense = shape.count("transformer.encoder.layers.")
        if dense and memory is not None and not shape.count("memory_attention.layers."):
            raise ValueError("the file states a compressed memory, but holds the weights of SAM3's dense one only")
        if memory is None and not dense:
            raise ValueError("no memory attention below 'tracker.transformer.', and no 'memory' in the file's meta")
        prefix = "transformer.encoder.layers." if memory is None else "memory_attention.layers."
        num_maskmem, _, _, mem_dim = shape("maskmem_tpos_enc")
        return cls(
            img_size=img_size,
            patch_size=patch_size,
            dim=shape("no_mem_embed")[-1],
            mem_dim=mem_dim,
            decoder_mlp_dim=shape("sam_mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
            decoder_depth=shape.count("sam_mask_decoder.transformer.layers."),
            iou_head_dim=shape("sam_mask_decoder.iou_prediction_head.layers.0.weight")[0],
            mask_in_chans=shape("sam_prompt_encoder.mask_downscaling.3.weight")[0],
            attention_layers=shape.count(prefix),
            attention_ffn_dim=shape(f"{prefix}0.linear1.weight")[0],
            fuser_layers=shape.count("maskmem_backbone.fuser.layers."),
            num_maskmem=num_maskmem,
            memory=memory,
        )


TRACKER_PRESETS = {
    "full": TrackerConfig(),
    "tiny": TrackerConfig(
        img_size=224, dim=64, mem_dim=16, decoder_mlp_dim=128, iou_head_dim=64, attention_layers=4,
        attention_ffn_dim=128,
    ),
}  # fmt: skip
TINY_MEMORY = MemoryConfig(
    num_latents=16, num_latents_2d=16, perceiver_dim=32, perceiver_heads=2, perceiver_dim_head=16, ffn_dim=128
)
