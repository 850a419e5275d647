"""The same model in `transformers`: its config for our sizes, and our weights under its names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Sam3Config as TransformersConfig
from transformers import Sam3Model

from sam3.model.config import Sam3Config

# Names after `detector.`, tried in order; every match is applied, so that later rules see what earlier ones wrote.
RENAMES = (
    (r"^backbone\.vision_backbone\.trunk\.", "vision_encoder.backbone."),
    (r"\.patch_embed\.proj\.", ".embeddings.patch_embeddings.projection."),
    (r"backbone\.pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"\.ln_pre\.", ".layer_norm."),
    (r"\.blocks\.(\d+)\.norm", r".layers.\1.layer_norm"),
    (r"\.blocks\.(\d+)\.attn\.qkv\.", r".layers.\1.attention.qkv_proj."),
    (r"\.blocks\.(\d+)\.attn\.proj\.", r".layers.\1.attention.o_proj."),
    (r"\.blocks\.", ".layers."),
    (r"^backbone\.vision_backbone\.convs\.", "vision_encoder.neck.fpn_layers."),
    (r"\.dconv_2x2_1\.", ".scale_layers.2."),
    (r"\.dconv_2x2(_0)?\.", ".scale_layers.0."),
    (r"\.conv_1x1\.", ".proj1."),
    (r"\.conv_3x3\.", ".proj2."),
    (r"^backbone\.language_backbone\.resizer\.", "text_projection."),
    (r"^backbone\.language_backbone\.encoder\.text_projection$", "text_encoder.text_projection.weight"),
    (r"^backbone\.language_backbone\.encoder\.", "text_encoder.text_model."),
    (r"\.token_embedding\.", ".embeddings.token_embedding."),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"(text_model\..*)\.attn\.in_proj_", r"\1.self_attn.qkv_proj."),
    (r"(text_model\..*)\.attn\.out_proj\.", r"\1.self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^transformer\.encoder\.", "detr_encoder."),
    (r"^transformer\.decoder\.", "detr_decoder."),
    (r"^geometry_encoder\.encode\.", "geometry_encoder.layers."),
    (r"^geometry_encoder\.img_pre_norm\.", "geometry_encoder.vision_layer_norm."),
    (r"^geometry_encoder\.norm\.", "geometry_encoder.prompt_layer_norm."),
    (r"^geometry_encoder\.encode_norm\.", "geometry_encoder.output_layer_norm."),
    (r"\.cross_attn_image\.", ".cross_attn."),
    (r"^(detr_encoder|geometry_encoder)(\.layers\.\d+)\.norm", r"\1\2.layer_norm"),
    (r"^(detr_decoder\.layers\.\d+)\.cross_attn\.", r"\1.vision_cross_attn."),
    (r"^(detr_decoder\.layers\.\d+)\.norm1\.", r"\1.vision_cross_attn_layer_norm."),
    (r"^(detr_decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"^(detr_decoder\.layers\.\d+)\.norm3\.", r"\1.mlp_layer_norm."),
    (r"\.ca_text\.", ".text_cross_attn."),
    (r"\.catext_norm\.", ".text_cross_attn_layer_norm."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"^detr_decoder\.norm\.", "detr_decoder.output_layer_norm."),
    (r"\.bbox_embed\.", ".box_head."),
    (r"\.boxRPB_embed_", ".box_rpb_embed_"),
    (r"\.presence_token_head\.", ".presence_head."),
    (r"\.presence_token_out_norm\.", ".presence_layer_norm."),
    (r"^dot_prod_scoring\.prompt_mlp\.out_norm\.", "dot_product_scoring.text_mlp_out_norm."),
    (r"^dot_prod_scoring\.prompt_", "dot_product_scoring.text_"),
    (r"^dot_prod_scoring\.hs_", "dot_product_scoring.query_"),
    (r"^segmentation_head\.", "mask_decoder."),
    (r"\.mask_predictor\.mask_embed\.", ".mask_embedder."),
    (r"\.instance_seg_head\.", ".instance_projection."),
    (r"\.semantic_seg_head\.", ".semantic_projection."),
    (r"\.cross_attend_prompt\.", ".prompt_cross_attn."),
    (r"\.cross_attn_norm\.", ".prompt_cross_attn_norm."),
    (r"\.in_proj_", ".qkv_proj."),
    (r"\.out_proj\.", ".o_proj."),
)
# Weights that transformers leaves out: the second neck, rotary tables (computed there), point prompts.
DROPPED = ("sam2_convs", "freqs_cis", "geometry_encoder.points_")
NUMBERED_MLPS = r"(box_head|box_rpb_embed_[xy]|presence_head|ref_point_head|text_mlp)\.layers\.(\d)\."


def renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our tensor `name` -> none, one, or (packed projections) three of theirs."""
    if any(part in name for part in DROPPED):
        return
    is_text = ".language_backbone." in name
    for pattern, replacement in RENAMES[:-1] if is_text else RENAMES:
        name = re.sub(pattern, replacement, name)
    name = re.sub(NUMBERED_MLPS, lambda m: f"{m[1]}.layer{int(m[2]) + 1}.", name)
    if name.endswith("position_embeddings"):
        tensor = tensor[:, 1:]  # entry 0 belongs to a class token that is not used
    elif name == "text_encoder.text_projection.weight":
        tensor = tensor.T
    if ".qkv_proj." in name:
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield name.replace(".qkv_proj.", f".{letter}_proj."), part
    else:
        yield name, tensor


def transformers_config(config: Sam3Config) -> TransformersConfig:
    """Their config for our sizes, with our LayerNorm epsilon of 1e-5 (they default to 1e-6)."""
    eps = {"layer_norm_eps": 1e-5}
    heads = {
        "hidden_size": config.dim,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        **eps,
    }
    trunk = {
        "model_type": "sam3_vit_model",
        "hidden_size": config.vit_dim,
        "intermediate_size": config.vit_mlp_dim,
        "num_hidden_layers": config.vit_depth,
        "num_attention_heads": config.vit_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "pretrain_image_size": config.pretrain_img_size,
        "window_size": config.window_size,
        "global_attn_indexes": list(config.global_blocks),
        **eps,
    }
    vision = {
        "backbone_config": trunk,
        "fpn_hidden_size": config.dim,
        "backbone_feature_sizes": [[scale * config.grid] * 2 for scale in (4, 2, 1)],
        **eps,
    }
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": config.text_mlp_dim,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "projection_dim": config.text_projection_dim,
        "hidden_act": "gelu",
    }
    return TransformersConfig(
        vision_config=vision,
        text_config=text,
        geometry_encoder_config={**heads, "num_layers": config.geometry_layers},
        detr_encoder_config={**heads, "num_layers": config.fusion_layers},
        detr_decoder_config={**heads, "num_layers": config.decoder_layers, "num_queries": config.num_queries},
        mask_decoder_config={"hidden_size": config.dim, "num_attention_heads": config.heads, **eps},
    )


@torch.no_grad()
def build_transformers_model(config: Sam3Config, tensors: Iterator[tuple[str, Tensor]]) -> Sam3Model:
    """Their model in eval mode with our weights; ValueError if one of theirs gets none, or one of ours has no place."""
    model = Sam3Model(transformers_config(config)).eval()
    left = dict(model.state_dict())
    for name, tensor in tensors:
        for their_name, part in renamed(name, tensor):
            if their_name not in left:
                raise ValueError(f"our {name} has no place in transformers: no tensor {their_name}")
            left.pop(their_name).copy_(part)
    if left:
        raise ValueError(f"{len(left)} tensors of transformers' model got no value, first {next(iter(left))}")
    return model
