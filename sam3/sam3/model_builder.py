"""Builds SAM3 models: the image model, the same with a student in place of its trunk; the teacher's trunk alone, what
comes after a trunk alone, and the text encoder alone.

All sizes are read from the checkpoint, so that the released file and a tiny one go through the same code. Weights are
memory-mapped and handed to a model that was built without any, so that loading needs no second copy of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3.backbones.student import BACKBONES, build_student, describe, recognise_student
from sam3.engine.distributed import choose_device
from sam3.engine.weights import WeightFile, load_strict, load_weights, normalise_sam3_keys, strip_prefix
from sam3.model.config import NECK, TRUNK, Sam3Config, vit_sizes, without_vit
from sam3.model.decoder import TransformerDecoder
from sam3.model.encoder import TransformerEncoderFusion
from sam3.model.geometry_encoders import SequenceGeometryEncoder
from sam3.model.interactive_predictor import InteractivePredictor
from sam3.model.maskformer_segmentation import UniversalSegmentationHead
from sam3.model.necks import PassThroughTrunk, Sam3DualViTDetNeck
from sam3.model.sam3_image import Sam3Image
from sam3.model.scoring import DotProductScoring
from sam3.model.text_encoder import VETextEncoder
from sam3.model.tokenizer import SimpleTokenizer
from sam3.model.tracker_config import TrackerConfig
from sam3.model.transformer import TransformerWrapper
from sam3.model.vitdet import ViT
from sam3.model.vl_combiner import SAM3VLBackbone
from sam3.model_loading import (
    SAM2_NECK,
    STUDENT,
    build_trunk,
    build_vit,
    detector_tensors,
    has_student,
    read_preprocess,
    released_checkpoint,
    require_second_neck,
    take_over,
)
from sam3.tracker_builder import (
    assemble_tracker,
    build_efficientsam3_video_predictor,
    build_sam3_video_predictor,
    load_tracker,
)
from sam3.transforms import Preprocess

__all__ = [
    "BACKBONES",
    "assemble_image_model",
    "build_efficientsam3_image_model",
    "build_efficientsam3_video_predictor",
    "build_sam3_heads",
    "build_sam3_image_model",
    "build_sam3_video_predictor",
    "build_student",
    "build_teacher_trunk",
    "encode_phrase",
    "encode_phrases",
]

log = logging.getLogger(__name__)

TEXT_ENCODER = "backbone.language_backbone."
SEGMENTATION_HEAD = "segmentation_head."
HEADS = {
    "neck": NECK,
    "geometry encoder": "geometry_encoder.",
    "fusion encoder": "transformer.encoder.",
    "decoder": "transformer.decoder.",
    "scoring": "dot_prod_scoring.",
    "segmentation head": SEGMENTATION_HEAD,
}


def build_sam3_image_model(
    checkpoint_path: str | Path | None = None,
    device: str | torch.device = "auto",
    eval_mode: bool = True,
    *,
    enable_text_encoder: bool = True,
    enable_segmentation: bool = True,
    with_sam2_neck: bool = False,
    enable_inst_interactivity: bool = False,
    load_from_HF: bool = False,
    compile: bool = False,
    dtype: torch.dtype | None = None,
    config: Sam3Config | str | None = None,
    bpe_path: str | Path | None = None,
) -> Sam3Image:
    """The image model with the weights of `sam3.pt`, of a tiny file in its layout, or of a merged student.

    Args:
        checkpoint_path: weights; a student merged into the file is recognised by its keys. Left out (and without
            `load_from_HF`), the weights are random.
        device: `auto` (CUDA, else MPS, else CPU) or any torch device.
        enable_text_encoder, enable_segmentation: False leaves the part out, and its weights in the file.
        with_sam2_neck: also build the neck that clicks and video use.
        enable_inst_interactivity: also build that neck and the tracker, for `predict_inst`; a file without them is
            refused.
        load_from_HF: if no checkpoint is given, take `sam3_checkpoints/sam3.pt`, fetched from the hub if it is not
            there (access is gated).
        compile: compile the trunk and the mask head's pixel decoder at their first use.
        dtype: of the weights, for example `torch.bfloat16`; left out, float32, whatever the file holds.
        config: sizes, or the name of a preset; left out, they are read from the checkpoint (`full` without one).
        bpe_path: another CLIP vocabulary than the packaged one.

    Raises:
        FileNotFoundError, ValueError: no such file, or one whose tensors do not fit; the message names them.
    """
    if isinstance(config, str):
        config = Sam3Config.preset(config)
    if load_from_HF and checkpoint_path is None:
        checkpoint_path = released_checkpoint()
    parts = {
        "enable_text_encoder": enable_text_encoder,
        "enable_segmentation": enable_segmentation,
        "with_sam2_neck": with_sam2_neck or enable_inst_interactivity,
        "bpe_path": bpe_path,
    }
    if checkpoint_path is None:
        if config is None:
            log.warning("no checkpoint: the weights are random; pass checkpoint_path=... or load_from_HF=True")
        config = config or Sam3Config.preset("full")
        model = assemble_image_model(config, **parts)
        if enable_inst_interactivity:
            tracker = assemble_tracker(
                TrackerConfig(img_size=config.img_size, patch_size=config.patch_size, dim=config.dim)
            )
            model.inst_interactive_predictor = InteractivePredictor(tracker, model.preprocess)
    else:
        model = _load_image_model(load_weights(checkpoint_path), config, parts, enable_inst_interactivity)
    model = model.to(device=choose_device(device), dtype=dtype).train(not eval_mode)
    if compile:
        model.backbone.vision_backbone.trunk.compile()
        if model.segmentation_head is not None:
            model.segmentation_head.pixel_decoder.compile()
    return model


def build_efficientsam3_image_model(checkpoint_path: str | Path, **options: Any) -> Sam3Image:
    """`build_sam3_image_model` for a merged checkpoint; one that still has SAM3's own trunk is refused."""
    keys = normalise_sam3_keys(load_weights(checkpoint_path).tensors, checkpoint_path)
    if not any(key.startswith(f"detector.{STUDENT}") for key in keys):
        raise ValueError(
            f"{checkpoint_path} has no student in the place of SAM3's trunk; merge one into it with "
            "python stage1/convert_stage1_weights.py, or open the file with build_sam3_image_model"
        )
    return build_sam3_image_model(checkpoint_path, **options)


def build_teacher_trunk(
    checkpoint_path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> ViT:
    """SAM3's ViT alone, frozen and in eval mode: (B, 3, S, S) normalised -> [(B, C, G, G)].

    Of the file, only `detector.backbone.vision_backbone.trunk.*` is read.
    """
    tensors = detector_tensors(load_weights(checkpoint_path).tensors, checkpoint_path)
    trunk_tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(TRUNK)}
    if has_student(trunk_tensors):
        name, _ = recognise_student(trunk_tensors, STUDENT)
        raise ValueError(f"{checkpoint_path} holds the student {describe(name)}, not SAM3's trunk; wanted sam3.pt")
    sizes = vit_sizes(trunk_tensors)
    with torch.device("meta"):
        trunk = build_vit(sizes)
    load_strict(trunk, strip_prefix(trunk_tensors, TRUNK), source=checkpoint_path)
    trunk = trunk.to(device=choose_device(device), dtype=dtype or torch.float32).eval().requires_grad_(False)
    if compile:
        trunk.compile()
    return trunk


def build_sam3_heads(checkpoint_path: str | Path, device: str | torch.device = "auto") -> Sam3Image:
    """Everything after the trunk, frozen, in eval mode and float32.

    In the trunk's place stands one that passes maps through, so that `model.backbone.forward_image(grid)` takes what a
    trunk gives, `(B, C, G, G)`, and all that follows is the code that inference runs. Trunk, text encoder and second
    neck are neither built nor read; prompts need `language_features` from elsewhere, such as `encode_phrase`.

    Raises:
        FileNotFoundError, ValueError: no such file, or one whose heads are missing or do not fit; the message names
            them.
    """
    file = load_weights(checkpoint_path)
    tensors = detector_tensors(file.tensors, file.path)
    missing = [name for name, prefix in HEADS.items() if not any(key.startswith(prefix) for key in tensors)]
    if missing:
        raise ValueError(
            f"{file.path} lacks SAM3's {', '.join(missing)}; wanted the full sam3.pt, or a student merged into it"
        )
    config = without_vit(Sam3Config.from_tensors(tensors))
    unused = (TRUNK, TEXT_ENCODER, SAM2_NECK)
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(unused)}
    trunk = PassThroughTrunk(_neck_width(kept, file.path))
    preprocess = read_preprocess(file)
    with torch.device("meta"):
        model = assemble_image_model(config, trunk, enable_text_encoder=False, preprocess=preprocess)
    take_over(model, kept, file.path)
    return model.to(device=choose_device(device), dtype=torch.float32).eval().requires_grad_(False)


def encode_phrase(checkpoint_path: str | Path, phrase: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """`encode_phrases` for one phrase."""
    return encode_phrases(checkpoint_path, [phrase], device)


@torch.no_grad()
def encode_phrases(
    checkpoint_path: str | Path, phrases: Sequence[str], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """What the text encoder of a checkpoint makes of T phrases; nothing else of the file is read.

    Returns, on `device`: language_features (L, T, C) float32 and language_mask (T, L) bool, True = padding, as
    `Sam3Image.predict_boxes` takes them.

    Raises:
        FileNotFoundError, ValueError: no such file, one without its text encoder, no phrase, or an empty one.
    """
    if isinstance(phrases, str) or not phrases:
        raise ValueError(f"wanted a non-empty list of phrases, got {phrases!r}")
    for phrase in phrases:
        if not phrase.strip():
            raise ValueError(f"a text prompt is a phrase, got {phrase!r}")
    file = load_weights(checkpoint_path)
    tensors = detector_tensors(file.tensors, file.path)
    own = strip_prefix(tensors, TEXT_ENCODER)
    if not own:
        raise ValueError(f"{file.path} has no text encoder ({TEXT_ENCODER}*); wanted the full sam3.pt")
    with torch.device("meta"):
        encoder = _build_text_encoder(Sam3Config.from_tensors(tensors))
    take_over(encoder, own, file.path)
    encoder = encoder.to(device=choose_device(device), dtype=torch.float32).eval()
    mask, features, _ = encoder(list(phrases))
    return {"language_features": features, "language_mask": mask}


def assemble_image_model(
    config: Sam3Config,
    trunk: nn.Module | None = None,
    *,
    enable_text_encoder: bool = True,
    enable_segmentation: bool = True,
    with_sam2_neck: bool = False,
    bpe_path: str | Path | None = None,
    preprocess: Preprocess | None = None,
) -> Sam3Image:
    """The image model with random weights on the current torch device; `trunk` takes the place of the ViT."""
    sizes = config
    text_encoder = _build_text_encoder(sizes, bpe_path) if enable_text_encoder else None
    neck = Sam3DualViTDetNeck(trunk or build_vit(vars(config)), sizes.dim, with_sam2_neck)
    widths = (sizes.dim, sizes.heads, sizes.ffn_dim)
    return Sam3Image(
        backbone=SAM3VLBackbone(neck, text_encoder),
        geometry_encoder=SequenceGeometryEncoder(*widths, sizes.geometry_layers),
        transformer=TransformerWrapper(
            TransformerEncoderFusion(*widths, sizes.fusion_layers),
            TransformerDecoder(*widths, sizes.decoder_layers, sizes.num_queries),
        ),
        dot_prod_scoring=DotProductScoring(sizes.dim, sizes.ffn_dim),
        segmentation_head=UniversalSegmentationHead(sizes.dim, sizes.heads) if enable_segmentation else None,
        preprocess=preprocess or Preprocess(img_size=sizes.img_size, resize="square"),
    )


def _load_image_model(
    file: WeightFile, config: Sam3Config | None, parts: dict[str, Any], with_tracker: bool
) -> Sam3Image:
    """Builds what the file's tensors ask for, and lets it take them over."""
    tensors = detector_tensors(file.tensors, file.path)
    preprocess = read_preprocess(file)
    trunk = None
    if has_student(tensors):
        trunk, img_size, patch_size = build_trunk(file, tensors)
        config = config or Sam3Config.from_tensors(tensors, img_size, patch_size)
        config = replace(without_vit(config), img_size=img_size)
    config = config or Sam3Config.from_tensors(tensors)
    if with_tracker:
        require_second_neck(tensors, file.path)
    with torch.device("meta"):
        model = assemble_image_model(config, trunk, **parts, preprocess=preprocess)
    switched_off = {
        TEXT_ENCODER: not parts["enable_text_encoder"],
        SEGMENTATION_HEAD: not parts["enable_segmentation"],
        SAM2_NECK: not parts["with_sam2_neck"],
    }
    unused = [prefix for prefix, off in switched_off.items() if off and any(key.startswith(prefix) for key in tensors)]
    take_over(model, tensors, file.path, unused)
    if with_tracker:
        tracker = load_tracker(file, config.img_size, config.patch_size)
        model.inst_interactive_predictor = InteractivePredictor(tracker, model.preprocess)
    return model.float()  # files may hold half precision, all over or in parts; no copy of what is float32


def _neck_width(tensors: Mapping[str, Tensor], source: Path) -> int:
    """Channels of the trunk that the neck was trained on."""
    name = f"{NECK}2.conv_1x1.weight"  # (dim, C, 1, 1), of the level that has the trunk's own grid
    if name not in tensors:
        raise ValueError(f"{source} has no tensor '{name}', which tells the trunk's width; wanted the full sam3.pt")
    return tensors[name].shape[1]


def _build_text_encoder(sizes: Sam3Config, bpe_path: str | Path | None = None) -> VETextEncoder:
    return VETextEncoder(
        SimpleTokenizer(bpe_path, sizes.context_length),
        sizes.dim,
        width=sizes.text_width,
        heads=sizes.text_heads,
        layers=sizes.text_layers,
        mlp_dim=sizes.text_mlp_dim,
        projection_dim=sizes.text_projection_dim,
        context_length=sizes.context_length,
        vocab_size=sizes.vocab_size,
    )
