"""Builds SAM3's video model: trunk, second neck and tracker, from `sam3.pt` or a file merged from it.

All sizes are read from the checkpoint; a student in the trunk's place is recognised by its keys, a compressed memory by
the file's meta.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3.engine.distributed import choose_device
from sam3.engine.weights import WeightFile, load_weights, normalise_sam3_keys
from sam3.model.config import TRUNK
from sam3.model.efficient_memory_attention import EfficientMemoryAttention, TokenGroup
from sam3.model.memory_attention import MemoryAttention
from sam3.model.memory_encoder import MemoryEncoder
from sam3.model.necks import PassThroughTrunk, TrackerNeck
from sam3.model.perceiver import EfficientSpatialPerceiver
from sam3.model.sam3_video import Sam3VideoModel
from sam3.model.sam3_video_predictor import Sam3VideoPredictor
from sam3.model.tracker import Sam3Tracker
from sam3.model.tracker_config import MemoryConfig, TrackerConfig
from sam3.model.tracker_memory import CompressedMemory
from sam3.model.transformer import TransformerWrapper
from sam3.model_loading import (
    SAM2_NECK,
    STUDENT,
    build_trunk,
    detector_tensors,
    read_preprocess,
    released_checkpoint,
    require_second_neck,
    take_over,
    tracker_tensors,
)
from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder
from sam3.sam.transformer import TwoWayTransformer
from sam3.transforms import Preprocess

DENSE_MEMORY = "transformer."  # of the tracker's keys: the memory attention that a compressed memory replaces
COMPRESSED_MEMORY = ("memory_attention.", "spatial_perceiver.")


def build_video_model(
    checkpoint_path: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    with_trunk: bool = True,
) -> Sam3VideoModel:
    """The video model with a checkpoint's weights, in eval mode.

    Args:
        checkpoint_path: `sam3.pt`, a tiny file in its layout, or one with a student or a compressed memory in it; left
            out, `sam3_checkpoints/sam3.pt`, fetched from the hub if it is not there (access is gated).
        device: `auto` (CUDA, else MPS, else CPU) or any torch device.
        dtype: of the weights, for example `torch.bfloat16`; left out, float32, whatever the file holds.
        with_trunk: False leaves the trunk out and in the file: `encode` then takes what a trunk gives.

    Raises:
        FileNotFoundError, ValueError: no such file, or one whose tensors do not fit; the message names them.
    """
    file = load_weights(checkpoint_path or released_checkpoint())
    tensors = detector_tensors(file.tensors, file.path)
    trunk, img_size, patch_size = build_trunk(file, tensors)
    if not with_trunk:
        trunk = PassThroughTrunk(trunk.channel_list[-1])
    tracker = load_tracker(file, img_size, patch_size)
    require_second_neck(tensors, file.path)
    neck_tensors = {
        key.removeprefix("backbone.vision_backbone."): tensor
        for key, tensor in tensors.items()
        if key.startswith((TRUNK, SAM2_NECK) if with_trunk else SAM2_NECK)
    }
    with torch.device("meta"):
        neck = TrackerNeck(trunk, tracker.config.dim)
    take_over(neck, neck_tensors, file.path)
    preprocess = read_preprocess(file) or Preprocess(img_size=img_size, resize="square")
    model = Sam3VideoModel(neck, tracker, preprocess)
    return model.to(device=choose_device(device), dtype=dtype or torch.float32).eval()


def build_sam3_video_predictor(
    checkpoint_path: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Sam3VideoPredictor:
    """The video predictor with a checkpoint's weights; arguments and errors are those of `build_video_model`.

    options: those of `Sam3VideoPredictor`, such as `autocast_dtype=torch.bfloat16` or `memory_selection=True`.
    """
    return Sam3VideoPredictor(build_video_model(checkpoint_path, device, dtype), **options)


def build_efficientsam3_video_predictor(checkpoint_path: str | Path, **options: Any) -> Sam3VideoPredictor:
    """`build_sam3_video_predictor` for a light model; a file with SAM3's own trunk and its own memory is refused."""
    keys = normalise_sam3_keys(load_weights(checkpoint_path).tensors, checkpoint_path)
    light = (f"detector.{STUDENT}", *(f"tracker.{prefix}" for prefix in COMPRESSED_MEMORY))
    if not any(key.startswith(light) for key in keys):
        raise ValueError(
            f"{checkpoint_path} has neither a student in the place of SAM3's trunk nor a compressed memory; merge one "
            "into it with python stage1/convert_stage1_weights.py or stage2/convert_memory_weights_stage2.py, or open "
            "the file with build_sam3_video_predictor"
        )
    return build_sam3_video_predictor(checkpoint_path, **options)


def load_tracker(file: WeightFile, img_size: int, patch_size: int) -> Sam3Tracker:
    """The tracker alone, in eval mode on the CPU, for a model that has trunk and second neck of its own.

    Raises ValueError where the file has none, or tensors that do not fit; the message names them.
    """
    tensors = tracker_tensors(file.tensors, file.path)
    if not tensors:
        raise ValueError(
            f"{file.path} has no tracker (tracker.*), which video and clicks need; wanted the full sam3.pt"
        )
    try:
        memory = MemoryConfig.from_meta(file.meta["memory"]) if "memory" in file.meta else None
        config = TrackerConfig.from_tensors(tensors, img_size, patch_size, memory)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    with torch.device("meta"):
        tracker = assemble_tracker(config)
    take_over(tracker, tensors, file.path, [] if memory is None or not _has_dense(tensors) else [DENSE_MEMORY])
    return tracker.eval()


def _has_dense(tensors) -> bool:
    return any(key.startswith(DENSE_MEMORY) for key in tensors)


def assemble_tracker(config: TrackerConfig) -> Sam3Tracker:
    """The tracker with random weights on the current torch device."""
    grid, dim = config.grid, config.dim
    two_way = TwoWayTransformer(config.decoder_depth, dim, config.heads, config.decoder_mlp_dim)
    return Sam3Tracker(
        config,
        prompt_encoder=PromptEncoder(dim, (grid, grid), (config.img_size, config.img_size), config.mask_in_chans),
        mask_decoder=MaskDecoder(
            dim,
            two_way,
            iou_head_hidden_dim=config.iou_head_dim,
            high_res_features=True,
            iou_sigmoid=True,
            object_scores=True,
        ),
        memory_encoder=MemoryEncoder(dim, config.mem_dim, config.fuser_layers),
        **_memory_modules(config),
    )


def _memory_modules(config: TrackerConfig) -> dict[str, nn.Module | None]:
    if config.memory is None:
        sizes = (config.dim, config.mem_dim, config.attention_ffn_dim, config.attention_layers, config.grid)
        return {"transformer": TransformerWrapper(MemoryAttention(*sizes), None)}
    memory = build_memory(config, config.memory)
    return {"memory_attention": memory.attention, "spatial_perceiver": memory.perceiver}


def build_memory(config: TrackerConfig, memory: MemoryConfig) -> CompressedMemory:
    """A compressed memory with random weights for a tracker of these sizes, on the current torch device."""
    perceiver, layout = None, (TokenGroup(config.grid**2, config.grid),)
    if memory.perceiver:
        perceiver = EfficientSpatialPerceiver(
            config.mem_dim,
            memory.perceiver_dim,
            memory.perceiver_depth,
            memory.perceiver_heads,
            memory.perceiver_dim_head,
            memory.num_latents,
            memory.num_latents_2d,
            use_self_attn=memory.perceiver_self_attention,
        )
        layout = perceiver.layout
    attention = EfficientMemoryAttention(
        config.dim,
        config.mem_dim,
        memory.ffn_dim,
        memory.num_layers,
        config.grid,
        layout,
        memory.pool_size,
        memory.dropout,
    )
    return CompressedMemory(attention, perceiver, config.mem_dim, config.grid)
