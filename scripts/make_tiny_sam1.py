"""Write two models of the SAM-1 family with random weights, to try prompt distillation without downloads.

    python scripts/make_tiny_sam1.py --output output/sam1

vit_tiny.pt is a small ViT-shaped teacher, mobile_sam.pt has MobileSAM's layout, both for pictures of 256 pixels; the
model files beside them, vit_tiny.yaml and mobile_sam.yaml, are for --teacher_cfg and teachers[].cfg.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import human_bytes, write_text
from sam3.sam.sam1 import build_sam1
from sam3.sam1_files import save_sam1

FILES = {"vit_tiny": "vit_tiny", "vit_t": "mobile_sam"}  # type -> name of the file


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("weights/tiny"), help="folder for the four files")
    parser.add_argument("--image-size", type=int, default=256, help="side of the input, a multiple of 64 pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args(argv)
    if args.image_size < 64 or args.image_size % 64:
        parser.error(f"--image-size must be a multiple of 64, got {args.image_size}")
    args.output.mkdir(parents=True, exist_ok=True)
    for number, (type, name) in enumerate(FILES.items()):
        path = args.output / f"{name}.pt"
        torch.manual_seed(args.seed + number)
        save_sam1(build_sam1(type, args.image_size), path)
        model = {"name": name, "type": type, "image_size": args.image_size, "checkpoint": str(path)}
        write_text(path.with_suffix(".yaml"), yaml.safe_dump({"model": model}, sort_keys=False))
        print(f"{path}: {human_bytes(path.stat().st_size)}, a {type} with random weights")
    return 0


if __name__ == "__main__":
    run_main(main)
