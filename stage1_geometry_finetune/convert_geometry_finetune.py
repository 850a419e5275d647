"""Package a geometry-finetuned student: replaces the image encoder of a merged model by the fine-tuned one.

    python stage1_geometry_finetune/convert_geometry_finetune.py \
      --finetune-ckpt output_geometry_finetune/es_rv_m/ckpt_epoch_29.pth \
      --pretrained output/efficient_sam3_repvit_m.pt \
      --output output/efficient_sam3_repvit_m_geometry.pt

The two encoders must have the same tensors, name by name and shape by shape; all else of the merged model stays as it
is, bit for bit. Files are memory-mapped. The output appears once it is proven and the model has loaded it strictly.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3.backbones.student import OUTPUT_STRIDE, describe, stated_stride
from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import free_bytes, human_bytes
from sam3.engine.merge import (
    STUDENT_TRUNK,
    MergePlan,
    MergeProof,
    check_merge,
    check_output,
    check_teacher,
    dotted,
    list_modules,
    merged_meta,
    plan_update,
    require_space,
    stated_teacher,
    strip_wrappers,
    write_merge,
)
from sam3.engine.weights import (
    SAFETENSORS_SUFFIX,
    WeightFile,
    list_names,
    load_weights,
    same_bytes,
    strip_prefix,
)
from sam3.merged_model import identify_student, load_into_model

# Keys with these words belong to the frozen model that public checkpoints carry beside the student.
FROZEN_WORDS = ("sam3", "teacher")
NUM_VERIFIED = 3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Put a geometry-finetuned student into the merged model that it came from.")
    parser.add_argument("--finetune-ckpt", type=Path, required=True, help="fine-tuning checkpoint, ckpt_epoch_<n>.pth")
    parser.add_argument("--pretrained", type=Path, required=True, help="merged model with the same student")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"(default: <pretrained without suffix>_geometry.pt, or {SAFETENSORS_SUFFIX} if the input is that)",
    )
    parser.add_argument("--student-prefix", default="student_trunk.", help="checkpoint keys below it are the student's")
    parser.add_argument("--target-prefix", default=f"{STUDENT_TRUNK}.", help="merged keys below it are replaced")
    parser.add_argument(
        "--allow-other-teacher", action="store_true", help="accept a merged model with the heads of another SAM3 file"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Raises FileNotFoundError, ValueError (files that do not fit each other) and OSError (disk)."""
    args = parse_args(argv)
    output = args.output or default_output(args.pretrained)
    check_output(output, (args.finetune_ckpt, args.pretrained))
    print(f"Loading finetuned checkpoint: {args.finetune_ckpt}")
    finetuned = load_weights(args.finetune_ckpt)
    print(f"Loading pretrained model: {args.pretrained}")
    pretrained = load_weights(args.pretrained)
    base_teacher = functools.partial(stated_teacher, pretrained)
    for note in check_teacher(finetuned, pretrained.path, base_teacher, allow_other=args.allow_other_teacher):
        print(note)
    student = extract_student(finetuned, args.student_prefix)
    plan, named = plan_conversion(student, pretrained, args.target_prefix)
    bare = pretrained.entry is None and output.suffix != SAFETENSORS_SUFFIX
    if bare and (stride := stated_stride(student.meta)) != OUTPUT_STRIDE:
        raise ValueError(
            f"{args.pretrained} is a bare state dict, which cannot say that the student's output stride is {stride}; "
            f"give an --output that ends in {SAFETENSORS_SUFFIX}"
        )
    require_space(output, plan)
    if args.dry_run:
        print(f"Dry run: nothing written; {human_bytes(free_bytes(output.parent))} are free in {output.parent}")
        return 0
    proof = write_merge(
        output,
        plan,
        {} if bare else merged_meta(student, pretrained) | named,
        functools.partial(load_into_model, plan.tensors),
        payload=pretrained.payload,
        entry=pretrained.entry,
    )
    print(f"Replaced {plan.replaced} weights in pretrained model")
    print()
    report(output, plan, proof, args.pretrained)
    if bare:
        print(f"Note: {args.pretrained} is a bare state dict, so {output} cannot say where its encoder came from")
    return 0


def default_output(pretrained: Path) -> Path:
    suffix = SAFETENSORS_SUFFIX if pretrained.suffix == SAFETENSORS_SUFFIX else ".pt"
    return pretrained.with_name(f"{pretrained.stem}_geometry{suffix}")


def extract_student(finetuned: WeightFile, prefix: str) -> WeightFile:
    """The checkpoint with only the student's tensors, named as in `StudentEncoder`.

    Takes our checkpoints (nothing but the student) and public ones, which hold SAM3's parts too, some of them twice.
    Raises ValueError if no key is below the prefix.
    """
    tensors = strip_wrappers(finetuned.tensors, ("module.",))
    found = {
        key: tensor
        for key, tensor in strip_prefix(tensors, dotted(prefix)).items()
        if not any(word in key for word in FROZEN_WORDS)
    }
    print(f"Student encoder keys extracted: {len(found)}")
    if not found:
        raise ValueError(
            f"{finetuned.path} has no student below '{dotted(prefix)}'; it has keys below "
            f"{list_names(list_modules(tensors, depth=2))}; give a checkpoint of train_geometry_finetune.py, or the "
            "prefix as --student-prefix"
        )
    return dataclasses.replace(finetuned, tensors=found)


def plan_conversion(
    student: WeightFile, pretrained: WeightFile, target_prefix: str
) -> tuple[MergePlan, dict[str, Any]]:
    """What to write, and the entries of its meta that name the student. Raises ValueError for files that do not fit."""
    target = dotted(target_prefix)
    matched = sum(target + key in pretrained.tensors for key in student.tensors)
    print(f"Keys matched in pretrained: {matched}")
    if not matched:
        raise ValueError(
            f"{pretrained.path} has none of the student's keys below '{target}'; give a merged model, as "
            "stage1/convert_stage1_weights.py writes it, or the prefix as --target-prefix"
        )
    new, embed_dim = identify_student(student, student.tensors)
    old, _ = identify_student(pretrained, pretrained.tensors, target)
    if new != old:
        raise ValueError(
            f"{student.path} holds {describe(new)}, but {pretrained.path} holds {describe(old)}; "
            "give the merged model that the fine-tuning started from"
        )
    strides = [stated_stride(file.meta) for file in (student, pretrained)]
    if student.meta and pretrained.meta and strides[0] != strides[1]:
        raise ValueError(
            f"{student.path} holds a student with an output stride of {strides[0]}, {pretrained.path} one with "
            f"{strides[1]}; give the merged model that the fine-tuning started from"
        )
    plan = plan_update(student, pretrained, target)
    check_merge(plan)
    return plan, {"backbone": new, "embed_dim": embed_dim}


def report(output: Path, plan: MergePlan, proof: MergeProof, pretrained: Path) -> None:
    """Read the first replaced tensors once more, from the file's final place, and sum up.

    Raises ValueError if one is not what was written there.
    """
    written = load_weights(output).tensors
    print("=== Verification ===")
    different = []
    for key in plan.student_keys[:NUM_VERIFIED]:
        equal = key in written and same_bytes(written[key], plan.tensors[key])
        print(f"  {'✓' if equal else '✗'} {'.'.join(key.split('.')[-2:])}")
        different += [] if equal else [key]
    if different:
        raise ValueError(f"{output} changed while it was read back: {list_names(different)}; run the command again")
    print()
    print("=" * 60)
    print(f"Output saved to: {output}")
    print(f"Total keys in output: {len(written)}")
    print(f"Image encoder weights replaced: {plan.replaced}")
    print("✓ All weights successfully replaced!")
    print("=" * 60)
    print(
        f"Proof: {len(plan.tensors)} tensors read back, 0 missing, 0 unexpected; {proof.from_student} bit-equal to the "
        f"student, {proof.from_base} to the pretrained model; the model loads it strictly"
    )
    print(f"Size: {human_bytes(proof.file_bytes)} (pretrained model: {human_bytes(pretrained.stat().st_size)})")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without the tick must not fail what is written already
    run_main(main)
