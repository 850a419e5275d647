"""Times the image model against `Sam3Model` of transformers: same weights, same inputs, same machine.

    python benchmarks/bench_model.py                     # full size: about 8 GB and some minutes on two cores
    python benchmarks/bench_model.py --preset tiny

Parts: trunk (image encoder and neck), text (one phrase), grounding (everything after those: geometry, fusion, decoder,
all masks) and end to end. Each side runs in a process of its own, so that its peak memory is its own. No table is
printed unless the outputs agree. What would make them differ is set alike: LayerNorm epsilon 1e-5 (transformers' ViT
has 1e-6), a box beside the phrase (without one transformers leaves out the CLS token of the geometry encoder).
Presence logits, which transformers clamps to +-10, stay within that here.
"""

from __future__ import annotations

import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3.engine.cli import make_parser, run_main
from sam3.engine.distributed import choose_device
from sam3.engine.files import write_json
from sam3.model.config import PRESETS, Sam3Config
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.tokenizer import SimpleTokenizer
from sam3.model_builder import assemble_image_model

SIDES = ("ours", "transformers")
PARTS = ("trunk", "text", "grounding", "end to end")
PHRASE = "a red car"
BOX = (0.5, 0.5, 0.4, 0.3)  # cx, cy, w, h
TOLERANCE = 1e-3  # relative distance of every output

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="size of the model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="timed runs of each part, of which the fastest counts (the first warms up)",
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--side", choices=SIDES, help="measure one side only, into --outputs (used for the processes)")
    parser.add_argument("--outputs", type=Path, help="where --side puts its figures and outputs")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    if args.side:
        if args.outputs is None:
            parser.error("--side needs --outputs")
        torch.set_num_threads(args.threads)
        torch.save(measure(args), args.outputs)
        return 0
    results = {side: run_side(side, args) for side in SIDES}
    distances = compare(*(results[side]["outputs"] for side in SIDES))
    print_table(args, results, distances)
    if args.json:
        figures = {side: {k: v for k, v in result.items() if k != "outputs"} for side, result in results.items()}
        write_json(args.json, {"preset": args.preset, **figures, "distance": distances})
    return 0


def run_side(side: str, args: Namespace) -> dict[str, Any]:
    """Measures `side` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "outputs.pt"
        command = [sys.executable, __file__, "--side", side, "--outputs", str(outputs)]
        for name in ("preset", "threads", "repeats", "device"):
            command += [f"--{name}", str(getattr(args, name))]
        print(f"measuring {side} ...", file=sys.stderr, flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise ValueError(f"measuring {side} failed; its message is above")
        return torch.load(outputs, weights_only=True)


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of every output; ValueError where one is too far."""
    distances = {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs}
    far = {name: value for name, value in distances.items() if not value <= TOLERANCE}
    if far:
        raise ValueError(f"the two models disagree, so their times mean nothing; relative distances {far}")
    return distances


def print_table(args: Namespace, results: dict[str, dict[str, Any]], distances: dict[str, float]) -> None:
    print(
        f"preset {args.preset}, batch 1, float32, {args.device}, {args.threads} threads, torch {torch.__version__}, "
        f"fastest of {args.repeats}; ratio = ours / transformers, below 1 is better"
    )
    print(f"{'part':<12}{'ours s':>10}{'theirs s':>10}{'ratio':>8}{'ours CPU s':>13}{'theirs CPU s':>14}{'ratio':>8}")
    for part in PARTS:
        (wall, cpu), (their_wall, their_cpu) = (results[side]["seconds"][part] for side in SIDES)
        print(
            f"{part:<12}{wall:>10.3f}{their_wall:>10.3f}{wall / their_wall:>8.2f}"
            f"{cpu:>13.3f}{their_cpu:>14.3f}{cpu / max(their_cpu, 1e-9):>8.2f}"
        )
    peak, their_peak = (results[side]["peak_gb"] for side in SIDES)
    print(f"{'peak GB':<12}{peak:>10.2f}{their_peak:>10.2f}{peak / their_peak:>8.2f}")
    print(f"largest relative distance of an output: {max(distances.values()):.1e}")


@torch.inference_mode()
def measure(args: Namespace) -> dict[str, Any]:
    """Builds one side, runs its parts: `seconds` {part: (wall, CPU)}, `peak_gb`, `outputs` {name: tensor}."""
    config, device = Sam3Config.preset(args.preset), choose_device(args.device)
    prepare = prepare_ours if args.side == "ours" else prepare_transformers
    parts, pick = prepare(config, device)
    seconds, outputs = {}, {}
    for part in PARTS:
        *seconds[part], result = fastest(parts[part], args.repeats, device)
        outputs.update({name: tensor.float().cpu().clone() for name, tensor in pick(part, result).items()})
        del result
    return {"seconds": seconds, "peak_gb": peak_gb(device), "outputs": outputs}


def fastest(function: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, float, Any]:
    """Smallest wall time and smallest CPU time of `repeats` runs, in seconds, and the result of the last one."""
    times, result = [], None
    for _ in range(repeats):
        del result  # before the next run, so that the peak memory is that of one
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(t[0] for t in times), min(t[1] for t in times), result


def peak_gb(device: torch.device) -> float:
    """Most memory this process ever held: resident, or allocated on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes of `ru_maxrss`
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def make_inputs(config: Sam3Config, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A normalised picture (1, 3, S, S), token ids (1, 32) of the phrase, a box (1, 1, 4)."""
    picture = torch.randn(1, 3, config.img_size, config.img_size, generator=torch.Generator().manual_seed(0))
    return picture.to(device), SimpleTokenizer()([PHRASE]).to(device), torch.tensor([[BOX]], device=device)


def synthetic_weights(config: Sam3Config) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight; a function of name and shape, so that both sides get the same."""
    with torch.device("meta"):
        shapes = assemble_image_model(config).state_dict()
    for name, shape in shapes.items():
        if not shape.is_floating_point():
            continue  # rotary tables are computed by both
        value = torch.randn(shape.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if value.ndim < 2:
            value = 0.02 * value + (1 if name.endswith(".weight") else 0)
        else:
            value /= (value.numel() / len(value)) ** 0.5
        yield name, value


def prepare_ours(config: Sam3Config, device: torch.device) -> tuple[dict[str, Callable], Callable]:
    """{part: function that runs it}, and `pick(part, result)`, which names the tensors to compare."""
    with torch.device("meta"):
        model = assemble_image_model(config)
    model = model.to_empty(device=device).eval()
    own = model.state_dict()
    for name, value in synthetic_weights(config):
        own[name].copy_(value)
    picture, _, box = make_inputs(config, device)
    prompt, find_input = Prompt(box.transpose(0, 1)), FindStage.single(device)

    def text() -> dict[str, Tensor]:
        mask, features, _ = model.backbone.language_backbone([PHRASE])  # past the cache of phrases
        return {"language_mask": mask, "language_features": features}

    kept = {}  # what trunk and text returned, for grounding
    parts = {
        "trunk": lambda: kept.setdefault("image", model.backbone.forward_image(picture)),
        "text": lambda: kept.setdefault("text", text()),
        "grounding": lambda: model.forward_grounding({**kept["image"], **kept["text"]}, find_input, None, prompt),
        "end to end": lambda: model.forward_grounding(
            {**model.backbone.forward_image(picture), **text()}, find_input, None, prompt
        ),
    }

    def pick(part: str, result: dict[str, Any]) -> dict[str, Tensor]:
        if part == "trunk":
            return {f"fpn{i}": level for i, level in enumerate(result["backbone_fpn"])}
        if part == "text":
            return {"text": result["language_features"][~result["language_mask"][0], 0]}
        names = ("pred_logits", "pred_boxes_xyxy", "pred_masks", "semantic_seg", "presence_logit_dec")
        return {f"{part} {name}": result[name].flatten() for name in names}

    return parts, pick


def prepare_transformers(config: Sam3Config, device: torch.device) -> tuple[dict[str, Callable], Callable]:
    """As `prepare_ours`."""
    model = build_transformers_model(config, synthetic_weights(config)).to(device)
    picture, ids, box = make_inputs(config, device)
    words = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    boxes = {"input_boxes": box, "input_boxes_labels": torch.ones(1, 1, dtype=torch.long, device=device)}
    kept = {}  # what trunk and text returned, for grounding
    parts = {
        "trunk": lambda: kept.setdefault("vision_embeds", model.get_vision_features(picture)),
        "text": lambda: kept.setdefault("text_embeds", model.get_text_features(**words)),
        "grounding": lambda: model(**kept, attention_mask=words["attention_mask"], **boxes),
        "end to end": lambda: model(pixel_values=picture, **words, **boxes),
    }

    def pick(part: str, result: Any) -> dict[str, Tensor]:
        if part == "trunk":
            return {f"fpn{i}": level for i, level in enumerate(result.fpn_hidden_states[:3])}
        if part == "text":
            return {"text": result.pooler_output[0, ids[0] != 0]}
        names = {
            "pred_logits": result.pred_logits,
            "pred_boxes_xyxy": result.pred_boxes,
            "pred_masks": result.pred_masks,
            "semantic_seg": result.semantic_seg,
            "presence_logit_dec": result.presence_logits,
        }
        return {f"{part} {name}": tensor.flatten() for name, tensor in names.items()}

    return parts, pick


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


def transformers_config(config: Sam3Config) -> Any:
    """Their config for our sizes, with our LayerNorm epsilon of 1e-5 (they default to 1e-6)."""
    from transformers import Sam3Config as TransformersConfig

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
def build_transformers_model(config: Sam3Config, tensors: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """Their model in eval mode with our weights; ValueError if one of theirs gets none, or one of ours has no place."""
    from transformers import Sam3Model  # the process that measures ours does not load it

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


if __name__ == "__main__":
    run_main(main)
