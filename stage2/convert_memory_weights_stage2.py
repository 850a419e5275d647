"""Put Stage 2's compressed memory into SAM3, or into a merged Stage-1 model, in the place of the dense one.

    python stage2/convert_memory_weights_stage2.py \
      --stage2_weights output/stage2_memory/ckpt_best.pth \
      --sam3_weights sam3_checkpoints/sam3.pt \
      --output_path output/efficient_sam3_memory.pt

All else of the SAM3 file stays as it is, bit for bit. Files are memory-mapped: RAM stays near the largest tensor. The
output appears once it is proven: every tensor bit-equal to its source, loaded strictly by the video model, and run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import free_bytes, human_bytes
from sam3.engine.merge import (
    MergePlan,
    MergeProof,
    check_output,
    list_modules,
    plan_merge,
    require_space,
    strip_wrappers,
    write_merge,
)
from sam3.engine.weights import (
    WeightFile,
    list_names,
    load_strict,
    load_weights,
    normalise_sam3_keys,
    num_bytes,
    same_bytes,
    strip_prefix,
)
from sam3.merged_model import describe_memory
from sam3.model.tracker_config import MemoryConfig, TrackerConfig
from sam3.model_loading import build_trunk, detector_tensors, read_preprocess
from sam3.tracker_builder import COMPRESSED_MEMORY, DENSE_MEMORY, assemble_tracker, build_video_model
from sam3.transforms import Preprocess
from stage2.data.batch import PRESENT, ClipBatch
from stage2.frozen_parts import SIZES, tracker_meta
from stage2.rollout import Rollout

TRACKER = "tracker."
# What a file is whose keys begin so, and where it goes.
OTHER_FILES = {
    "backbone.model.": "a Stage-1 checkpoint, which stage1/convert_stage1_weights.py merges",
    "student_trunk.": "a geometry fine-tuning checkpoint, which "
    "stage1_geometry_finetune/convert_geometry_finetune.py merges",
    "detector.": "a whole model, which goes to --sam3_weights",
    "backbone.vision_backbone.": "a whole model, which goes to --sam3_weights",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Merge the compressed memory of Stage 2 into SAM3 or a merged Stage-1 model.")
    add = parser.add_argument
    add("--stage2_weights", type=Path, required=True, help="Stage-2 checkpoint, ckpt_best.pth")
    add("--sam3_weights", type=Path, default=Path("sam3_checkpoints/sam3.pt"), help="SAM3, or a merged student")
    add("--output_path", type=Path, default=Path("output/efficient_sam3_memory.pt"), help="merged file")
    add("--keep_dense_attention", action="store_true", help="leave SAM3's own memory attention in the file, unused")
    add("--allow-other-teacher", action="store_true", help="accept a tracker that the memory was not trained with")
    add("--no_verify", action="store_true", help="do not follow an object through two frames with the result")
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Raises FileNotFoundError, ValueError (files that do not fit each other) and OSError (disk)."""
    args = parse_args(argv)
    output = args.output_path
    check_output(output, (args.stage2_weights, args.sam3_weights))
    base = load_weights(args.sam3_weights)
    base.tensors = normalise_sam3_keys(base.tensors, base.path)
    stage2, memory = read_memory(args.stage2_weights, base)
    notes = check_base(stage2, base, allow_other=args.allow_other_teacher)
    plan = plan_conversion(stage2, base, keep_dense=args.keep_dense_attention)
    meta = {**base.meta, "memory": memory.to_meta(), "stage2": origin(stage2)}
    check_fit(plan, base, memory)
    print_plan(plan, base, memory, output)
    for note in notes:
        print(note)
    require_space(output, plan)
    if args.dry_run:
        print(f"Dry run: nothing written; {human_bytes(free_bytes(output.parent))} are free in {output.parent}")
        return 0
    proof = write_merge(
        output,
        plan,
        meta,
        functools.partial(verify, run=not args.no_verify),
        payload=base.payload,
        entry=base.entry or "model",
    )
    report(output, plan, proof, base, run=not args.no_verify)
    return 0


# The two files -------------------------------------------------------------------------------------------------------


def read_memory(path: Path, base: WeightFile) -> tuple[WeightFile, MemoryConfig]:
    """A Stage-2 checkpoint with its memory's tensors only, and the memory's sizes.

    Raises ValueError if it has no memory, does not state its sizes, or holds other trained tensors.
    """
    file = load_weights(path)
    tensors = strip_wrappers(file.tensors, ("module.",))
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(COMPRESSED_MEMORY)}
    if not own:
        found = next((what for start, what in OTHER_FILES.items() if any(key.startswith(start) for key in tensors)), "")
        is_what = f"it is {found}" if found else f"it has keys below {list_names(list_modules(tensors, depth=1))}"
        raise ValueError(
            f"{path} has no compressed memory ({COMPRESSED_MEMORY[0]}*): {is_what}; give a checkpoint of "
            "stage2/train_memory_stage2.py as --stage2_weights"
        )
    # Copies of frozen parts may lie beside it. What has other values was trained, and is not to be lost silently.
    frozen = {key: base.tensors.get(TRACKER + key) for key in tensors if key not in own}
    trained = [key for key, place in frozen.items() if place is None or not same_bytes(tensors[key], place)]
    if trained:
        raise ValueError(
            f"{path} holds {len(trained)} tensors that are neither of the memory nor those of {base.path}: "
            f"{list_names(trained)}; Stage 2 trains {' and '.join(part.rstrip('.') for part in COMPRESSED_MEMORY)} only"
        )
    if "memory" not in file.meta:
        raise ValueError(
            f"{path} does not state the sizes of its memory (meta.memory), which its tensors do not tell; take the "
            "checkpoint as stage2/train_memory_stage2.py wrote it"
        )
    try:
        memory = MemoryConfig.from_meta(file.meta["memory"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; train it again with this version") from error
    return dataclasses.replace(file, tensors=own), memory


def check_base(stage2: WeightFile, base: WeightFile, *, allow_other: bool) -> list[str]:
    """What to tell the user about the base. Raises ValueError for one that the memory was not trained with.

    A student in the trunk's place makes no difference: its neck and tracker are the teacher's.
    """
    notes = []
    found, wanted = tracker_meta(base), stage2.meta.get("tracker")
    if not isinstance(wanted, Mapping):
        notes.append(f"Note: {stage2.path} does not say which tracker it was trained with, so that is not checked")
        wanted = found
    sizes = [f"{name} {wanted.get(name)}, not {found[name]}" for name in SIZES if wanted.get(name) != found[name]]
    if sizes:
        raise ValueError(
            f"{stage2.path} was trained for a tracker of other sizes than that of {base.path}: {'; '.join(sizes)}; "
            f"give {teacher_name(stage2)}, which it was trained with, or a student merged into that"
        )
    if wanted.get("sha256") != found["sha256"]:
        difference = f"neck and tracker in {base.path} are not those that {stage2.path} was trained with"
        if not allow_other:
            raise ValueError(
                f"{difference}; give {teacher_name(stage2)}, which it was trained with, or a student merged into that, "
                "or add --allow-other-teacher"
            )
        notes.append(f"Warning: {difference}")
    if "preprocess" in stage2.meta:
        trained, own = read_preprocess(stage2), read_preprocess(base)
        if own is None:
            own = Preprocess(img_size=trained.img_size, resize="square")
        if trained != own:
            notes.append(f"Note: the memory was trained on frames made by {trained}; {base.path} takes {own}")
    return notes


def teacher_name(stage2: WeightFile) -> str:
    teacher = stage2.meta.get("teacher")
    return str(teacher["name"]) if isinstance(teacher, Mapping) and "name" in teacher else "the SAM3 file"


def origin(stage2: WeightFile) -> dict[str, Any]:
    """Where the memory came from, for the merged file's meta."""
    numbers = {key: stage2.payload[key] for key in ("epoch", "step") if key in stage2.payload}
    return {"file": stage2.path.name, **numbers, "teacher": stage2.meta.get("teacher", {})}


# The plan ------------------------------------------------------------------------------------------------------------


def plan_conversion(stage2: WeightFile, base: WeightFile, *, keep_dense: bool) -> MergePlan:
    """The memory's tensors go to `tracker.*`, in the place of any memory the base has; nothing else changes.

    keep_dense: SAM3's own memory attention stays beside them. Raises ValueError if there is none to keep, or for values
    that are not finite.
    """
    dense = TRACKER + DENSE_MEMORY
    if keep_dense and not any(key.startswith(dense) for key in base.tensors):
        raise ValueError(f"{base.path} has no dense attention ({dense}*) to keep; leave out --keep_dense_attention")
    broken = [key for key, tensor in stage2.tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{stage2.path} has NaN or infinite values in {list_names(broken)}; take an earlier checkpoint"
        )
    replaced = [TRACKER + part for part in COMPRESSED_MEMORY] + ([] if keep_dense else [dense])
    return plan_merge(stage2, base, TRACKER, replaced, strip=())


def check_fit(plan: MergePlan, base: WeightFile, memory: MemoryConfig) -> None:
    """Raise ValueError, naming the tensors, if those of the tracker would not be what its sizes ask for."""
    what = f"{plan.student_path} merged into {plan.base_path}"
    _, img_size, patch_size = build_trunk(base, detector_tensors(base.tensors, base.path))
    tensors = strip_prefix(plan.tensors, TRACKER)
    try:
        config = TrackerConfig.from_tensors(tensors, img_size, patch_size, memory)
        with torch.device("meta"):
            tracker = assemble_tracker(config)
    except (TypeError, ValueError) as error:  # for example a number of latents that is a text
        raise ValueError(f"{what}: {error}") from error
    kept = any(key.startswith(DENSE_MEMORY) for key in tensors)
    load_strict(tracker, tensors, source=what, allowed_unexpected=[DENSE_MEMORY] if kept else [])


# The proof -----------------------------------------------------------------------------------------------------------


def verify(path: Path, *, run: bool) -> None:
    """Build the video model from `path`, strictly; `run`: and follow an object. Raises ValueError if it cannot."""
    build_video_model(path, device="cpu")  # its tensors are mapped, so that the trunk costs no RAM
    if run:
        follow_noise(path)


def follow_noise(path: Path) -> None:
    """Follow an object through two frames of noise, put in behind the trunk, which would take long.

    Raises ValueError if what comes out is not finite.
    """
    model = build_video_model(path, device="cpu", dtype=torch.float32, with_trunk=False)
    tracker, side = model.tracker, model.tracker.config.img_size
    grid, low = tracker.config.grid, tracker.low_side
    channels = model.neck.trunk.channel_list[-1]
    batch = ClipBatch(
        keys=["noise"],
        images=None,
        sizes=torch.tensor([[side, side]]),
        embeddings=torch.randn(1, 2, channels, grid, grid, generator=torch.Generator().manual_seed(0)),
        clip_of_object=torch.tensor([0]),
        masks=torch.zeros(1, 2, low, low, dtype=torch.bool),
        states=torch.full((1, 2), PRESENT),
        kinds=["click"],
        points=torch.full((1, 1, 2), side / 2),
        labels=torch.ones(1, 1, dtype=torch.long),
    )
    seen: list[Tensor] = []
    with torch.no_grad():
        rollout = Rollout(model, recompute=False)
        rollout.follow(rollout.start(batch), lambda t, conditioned, heads: seen.extend((conditioned, heads.candidates)))
    if not all(torch.isfinite(values).all() for values in seen):
        raise ValueError(f"{path} gives NaN or infinite values in the second of two frames; take another checkpoint")


# What is printed -----------------------------------------------------------------------------------------------------


def print_plan(plan: MergePlan, base: WeightFile, memory: MemoryConfig, output: Path) -> None:
    removed = {key: base.tensors[key] for key in plan.replaced_keys}
    kept = sum(key.startswith(TRACKER + DENSE_MEMORY) for key in plan.tensors)
    own = {key: plan.tensors[key] for key in plan.student_keys}
    print(f"Memory:  {plan.student_path} ({describe_memory(memory)}; {_amount(own)})")
    print(f"SAM3:    {base.path} ({_amount(base.tensors)})")
    print(f"Removed: {_amount(removed)}" + (f"; {kept} tensors of the dense attention stay, unused" if kept else ""))
    print(f"Output:  {output} ({_amount(plan.tensors)})")


def report(output: Path, plan: MergePlan, proof: MergeProof, base: WeightFile, *, run: bool) -> None:
    replaced = sum(key in base.tensors for key in plan.student_keys)
    dense = sum(key.startswith(TRACKER + DENSE_MEMORY) for key in plan.replaced_keys)
    print(f"Memory parameters copied: {plan.copied} -> prefix '{TRACKER}'")
    print(
        f"SAM3 params replaced={replaced}, dropped={plan.replaced - replaced} ({dense} of the dense attention), "
        f"kept={plan.appended}"
    )
    print(f"Merged checkpoint saved to: {output}")
    print(
        f"Proof: {len(plan.tensors)} tensors read back, 0 missing, 0 unexpected; {proof.from_student} bit-equal to the "
        f"memory, {proof.from_base} to SAM3; the video model loads it strictly"
        + (" and followed an object through two frames" if run else "")
    )
    print(f"Size: {human_bytes(proof.file_bytes)} (SAM3 file: {human_bytes(base.path.stat().st_size)})")
    if base.entry is None:
        print(f"Note: {base.path} is a bare state dict; {output} holds it below 'model', beside the memory's sizes")


def _amount(tensors: Mapping[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {human_bytes(num_bytes(tensors))}"


if __name__ == "__main__":
    run_main(main)
