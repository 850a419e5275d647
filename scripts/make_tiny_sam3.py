"""Writes a SAM3 with random weights in the layout of sam3.pt: for tests, and to try the pipeline without the real one.

    python scripts/make_tiny_sam3.py --output sam3_checkpoints/sam3_tiny.pt

The weights are scaled so that signals keep their size from layer to layer: embeddings vary with the picture and from
place to place, scores spread around one half, and masks follow edges and colours; the tracker finds every object
visible. They mean nothing. The same preset, seed and version of torch give the same file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import human_bytes
from sam3.engine.weights import save_weights
from sam3.model.config import PRESETS, TRUNK, Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model.tracker import Sam3Tracker
from sam3.model.tracker_config import TrackerConfig
from sam3.model_builder import assemble_image_model
from sam3.tracker_builder import assemble_tracker

RELU_MEAN = (2 * math.pi) ** -0.5  # of a standard normal's positive part
RANDOM_AS_THEY_ARE = (
    *("embed.weight", "embedding.weight", "reference_points.weight", "token.weight", "mask_tokens.weight"),
    *(f"point_embeddings.{i}.weight" for i in range(4)),
    "positional_encoding_gaussian_matrix",
)
ADDED = ("maskmem_tpos_enc", "no_mem_embed", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial")  # to features
UPSCALING = ("sam_mask_decoder.output_upscaling.0.weight", "sam_mask_decoder.output_upscaling.3.weight")
SMOOTH = ("conv_3x3.weight", *(f"pixel_decoder.conv_layers.{i}.weight" for i in range(3)))
# The presence score starts near 1, so that the queries' own scores decide; so does the tracker's score of an object.
PRESENCE_BIAS = 4.0
ALMOST_SURE = ("presence_token_head.layers.2.bias", "pred_obj_score_head.layers.2.bias")


def make_model(config: Sam3Config, seed: int) -> Sam3Image:
    """A SAM3 with the second neck, as in the released file, on the CPU."""
    with torch.device("meta"):
        model = assemble_image_model(config, with_sam2_neck=True)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():  # not the rotary tables, which have their one right value
                tensor.copy_(initial_values(key, tuple(tensor.shape), generator))
        # What the pixel decoder gives is ReLU of unit normals; without its mean, masks follow the picture instead of
        # covering all of it or nothing.
        head = model.segmentation_head.instance_seg_head
        head.bias.copy_(-head.weight.sum((1, 2, 3)) * RELU_MEAN)
    return model.eval()


def make_tracker(config: TrackerConfig, seed: int) -> Sam3Tracker:
    """A tracker on the CPU."""
    with torch.device("meta"):
        tracker = assemble_tracker(config)
    tracker = tracker.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in tracker.state_dict().items():
            tensor.copy_(initial_values(key, tuple(tensor.shape), generator))
    return tracker.eval()


@torch.no_grad()
def centre_masks(model: Sam3Image, tracker: Sam3Tracker) -> None:
    """Shifts the maps that masks are drawn with, so that a mask covers a part of the picture: neither all nor nothing.

    What is much the same in every picture is taken from a run on noise.
    """
    side = tracker.config.img_size
    noise = torch.randn(1, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    picture = F.interpolate(noise, size=(side, side), mode="bilinear")
    levels = model.backbone.forward_image(picture)["sam2_backbone_out"]["backbone_fpn"]
    features = tracker.prepare_features(levels)
    seen: list[Tensor] = []
    handle = tracker.sam_mask_decoder.output_upscaling[4].register_forward_pre_hook(
        lambda _, inputs: seen.extend(inputs)
    )
    click = (torch.full((1, 1, 2), side / 2), torch.ones(1, 1, dtype=torch.long))
    tracker.predict_masks(tracker.condition(features.top, None), features.high_res, 1, click)
    handle.remove()
    # Rounded, so that the file does not depend on the machine and its threads.
    tracker.sam_mask_decoder.conv_s0.bias -= seen[0].mean((0, 2, 3)).round(decimals=2)


def initial_values(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values for the weight `key`, named as in sam3.pt without `detector.`."""
    if len(shape) == 1:
        value = torch.ones(shape) if key.endswith(".weight") else torch.zeros(shape)
        if key.endswith("gamma"):
            return torch.full(shape, 0.1)
        return value + PRESENCE_BIAS if key.endswith(ALMOST_SURE) else value
    if key == f"{TRUNK}patch_embed.proj.weight":
        # Smooth filters: what they see is the colour and the coarse pattern of a patch, not its noise.
        coarse = torch.randn(shape[0], 3, 4, 4, generator=generator)
        coarse -= 0.8 * coarse.mean(dim=(2, 3), keepdim=True)  # else brightness would drown everything
        smooth = F.interpolate(coarse, size=shape[2:], mode="bicubic", align_corners=True)
        return smooth / smooth[0].numel() ** 0.5
    values = torch.randn(shape, generator=generator)
    if key.endswith(("pos_embed", "positional_embedding")):
        return 0.1 * values
    if key.endswith(RANDOM_AS_THEY_ARE):
        return values
    if key in ADDED:
        return 0.2 * values
    fan_in = values[0].numel()
    if (
        "dconv_2x2" in key or key in UPSCALING
    ):  # transposed convolutions (in, out, 2, 2): four equal taps, or masks would be chequered
        values = torch.randn(*shape[:2], 1, 1, generator=generator).expand(shape)
        fan_in = shape[0]
    if key.endswith(SMOOTH):
        values = values.mean((2, 3), keepdim=True).expand(shape)  # a box filter, for the same reason
        fan_in = shape[1]
    if key.startswith("sam_mask_decoder.output_hypernetworks_mlps.") and key.endswith("layers.2.weight"):
        values = values - values.mean(dim=0)  # what it is multiplied with is positive by and large
    return gain(key) * values / fan_in**0.5


def gain(key: str) -> float:
    """Strength of a layer; 1 keeps the size of its input."""
    if key.startswith("transformer.decoder.layers.") and key.endswith(("out_proj.weight", "linear2.weight")):
        return 0.3  # the queries stay different from each other
    if key.endswith("bbox_embed.layers.2.weight"):
        return 0.3  # the boxes stay near the queries' own reference points
    if key == "dot_prod_scoring.hs_proj.weight":
        return 2.0  # some scores above one half, some below
    return 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("sam3_checkpoints/sam3_tiny.pt"), help="file to write")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="sizes; full takes 3.4 GB")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the weights; how many objects are found depends on it"
    )
    args = parser.parse_args(argv)
    model = make_model(Sam3Config.preset(args.preset), args.seed)
    tracker = make_tracker(TrackerConfig.preset(args.preset), args.seed)
    centre_masks(model, tracker)
    tensors = {f"detector.{key}": tensor for key, tensor in model.state_dict().items()}
    tensors |= {f"tracker.{key}": tensor for key, tensor in tracker.state_dict().items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(args.output, tensors, {"random_weights": {"preset": args.preset, "seed": args.seed}})
    parameters = sum(p.numel() for part in (model, tracker) for p in part.parameters())
    size = human_bytes(args.output.stat().st_size)
    print(f"{args.output}: {len(tensors)} entries, {parameters / 1e6:.2f}M parameters, {size}, random weights")
    return 0


if __name__ == "__main__":
    run_main(main)
