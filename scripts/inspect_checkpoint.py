"""Say what a weight file is: kind, meta, modules, parameters, types, bytes; or how two files differ.

    python scripts/inspect_checkpoint.py output/efficient_sam3_repvit_m.pt
    python scripts/inspect_checkpoint.py sam3_checkpoints/sam3.pt --diff output/efficient_sam3_repvit_m.pt

Reads `.pt`, `.pth` and `.safetensors`, never runs what is in them. Exit code 0, also when two files differ.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from distillation.export import KIND
from distillation.models.efficient_sam3 import EfficientSAM3Config
from sam3.backbones.student import describe, recognise_student
from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import human_bytes
from sam3.engine.merge import LANGUAGE, STUDENT_TRUNK, TRUNK, VISION
from sam3.engine.weights import WeightFile, load_weights, normalise_sam3_keys, same_bytes, strip_prefix
from sam3.merged_model import describe_memory
from sam3.model.config import ShapeReader
from sam3.model.tracker_config import MemoryConfig
from sam3.tracker_builder import COMPRESSED_MEMORY, DENSE_MEMORY

# Longest first: a key is counted under the first module that it lies below.
MODULES = (
    f"{STUDENT_TRUNK}.backbone",
    f"{STUDENT_TRUNK}.head",
    TRUNK,
    f"{VISION}.convs",
    f"{VISION}.sam2_convs",
    LANGUAGE,
    "detector.transformer.encoder",
    "detector.transformer.decoder",
    *(f"tracker.{part}".rstrip(".") for part in (DENSE_MEMORY, *COMPRESSED_MEMORY)),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("Say what a weight file is, or how two files differ.")
    parser.add_argument("file", type=Path, help="weight file: .pt, .pth or .safetensors")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare keys, shapes, types and values with OTHER")
    parser.add_argument("--names", type=int, default=10, help="keys to name per kind of difference")
    args = parser.parse_args(argv)
    found = load_weights(args.file)
    if args.diff is None:
        print_summary(found)
    else:
        print_difference(found, load_weights(args.diff), args.names)
    return 0


def kind(found: WeightFile) -> str:
    """One phrase for what the file is, from its keys and shapes; the sizes of a distilled student, from its meta."""
    if any(key.startswith("vision.adapters.") for key in found.tensors):
        form = "exported file" if found.meta.get("kind") == KIND else "training checkpoint"
        return f"{form} of a distilled student, {distilled_sizes(found)}"
    if any(key.startswith("backbone.model.") for key in found.tensors):
        return f"checkpoint of a student, {student_name(found.tensors, '')}"
    if any(key.startswith(COMPRESSED_MEMORY) for key in found.tensors):
        return f"checkpoint of a compressed memory, {stated_memory(found)}"
    try:
        tensors = normalise_sam3_keys(found.tensors, found.path)
    except ValueError:
        return "neither a SAM3 nor a student checkpoint"
    own = sum(key.startswith(f"{TRUNK}.") and not key.startswith(f"{STUDENT_TRUNK}.") for key in tensors)
    if any(key.startswith(f"{STUDENT_TRUNK}.") for key in tensors):
        leftover = f"; WARNING: {own} tensors of the teacher's trunk are still in it" if own else ""
        return f"SAM3 merged with a student, {student_name(tensors, f'{STUDENT_TRUNK}.')}{leftover}"
    return "SAM3 with its own image encoder" if own else "SAM3 without an image encoder"


def distilled_sizes(found: WeightFile) -> str:
    try:
        config = EfficientSAM3Config.from_meta(found.meta.get("student"))
    except ValueError as error:
        return f"which cannot be used ({error})"
    return f"{config.num_queries} queries at {config.image_size} px, for phrases only"


def student_name(tensors: Mapping[str, Tensor], prefix: str) -> str:
    try:
        backbone, embed_dim = recognise_student(tensors, prefix)
    except ValueError as error:
        return f"which is none of the known ones ({error})"
    return f"{describe(backbone)} with {embed_dim} output channels"


def stated_memory(found: WeightFile) -> str:
    """A compressed memory as the file's meta states it; its tensors do not tell all."""
    try:
        return describe_memory(MemoryConfig.from_meta(found.meta["memory"]))
    except KeyError:
        return "of sizes that the file does not state (no meta.memory), so that it cannot be used"
    except (TypeError, ValueError) as error:
        return f"stated in another way ({error})"


def tracker_kind(found: WeightFile) -> str:
    """One phrase for the tracker in a SAM3 file and the memory that it uses; empty for other files."""
    try:
        tensors = strip_prefix(normalise_sam3_keys(found.tensors, found.path), "tracker.")
    except ValueError:
        return ""
    if not tensors:
        return "none: no video, no clicks"
    layers = ShapeReader(tensors).count(f"{DENSE_MEMORY}encoder.layers.")
    dense = f"SAM3's dense one, read by {layers} layers of attention" if layers else ""
    if any(key.startswith(COMPRESSED_MEMORY) for key in tensors):
        beside = f"; beside it, unused: {dense}" if dense else ""
        return f"{len(tensors)} tensors; memory compressed: {stated_memory(found)}{beside}"
    return f"{len(tensors)} tensors; memory: {dense or 'none, WARNING: the tracker cannot follow objects'}"


def module_of(key: str) -> str:
    for module in MODULES:
        if key.startswith(f"{module}."):
            return module
    return ".".join(key.split(".")[: 2 if key.startswith("detector.") else 1])


def print_summary(found: WeightFile) -> None:
    print(f"{found.path}: {kind(found)}, {human_bytes(found.path.stat().st_size)}")
    for key, value in found.payload.items():
        if isinstance(value, (int, float, str)):
            print(f"  {key}: {value}")
    if found.meta:
        print(f"  meta: {json.dumps(found.meta, default=str)}")
    if tracker := tracker_kind(found):
        print(f"  tracker: {tracker}")
    rows = defaultdict(list)
    for key, tensor in found.tensors.items():
        rows[module_of(key)].append(tensor)
    width = max(len(name) for name in rows)
    print(f"  {'module':{width}}  tensors     elements  {'bytes':>10}  types")
    for name, tensors in [*rows.items(), ("total", list(found.tensors.values()))]:
        elements = sum(tensor.numel() for tensor in tensors)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        types = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        print(f"  {name:{width}}  {len(tensors):7d} {elements:12,d}  {human_bytes(num_bytes):>10}  {types}")


def print_difference(a: WeightFile, b: WeightFile, shown: int) -> None:
    groups: dict[str, list[str]] = {
        f"only in {a.path}": [key for key in a.tensors if key not in b.tensors],
        f"only in {b.path}": [key for key in b.tensors if key not in a.tensors],
        "other shape or type": [],
        "other values": [],
        "equal in every bit": [],
    }
    for key, tensor in a.tensors.items():
        other = b.tensors.get(key)
        if other is None:
            continue
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            change = f"{tuple(tensor.shape)} {tensor.dtype} / {tuple(other.shape)} {other.dtype}"
            groups["other shape or type"].append(f"{key}: {change}")
        elif same_bytes(tensor, other):
            groups["equal in every bit"].append(key)
        else:
            groups["other values"].append(f"{key}: largest difference {_largest_difference(tensor, other):.3g}")
    for name, keys in groups.items():
        print(f"{len(keys):6d} {name}")
        if name != "equal in every bit":
            for key in keys[:shown]:
                print(f"         {key}")
            if len(keys) > shown:
                print(f"         ... and {len(keys) - shown} more")


def _largest_difference(a: Tensor, b: Tensor) -> float:
    if not a.is_complex():
        a, b = a.double(), b.double()
    return (a - b).abs().max().item()


if __name__ == "__main__":
    run_main(main)
