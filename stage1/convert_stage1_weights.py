"""Package a Stage-1 student with SAM3's heads: replaces the image encoder in sam3.pt by the student.

    python stage1/convert_stage1_weights.py \
      --student-ckpt output/stage1/repvit_m1/ckpt_epoch_29.pth \
      --sam3-ckpt sam3_checkpoints/sam3.pt \
      --output output/efficient_sam3_repvit_m.pt

Files are memory-mapped: RAM stays near the largest tensor. The output appears once it is proven: every tensor bit-equal
to its source, no tensor of the teacher's encoder left, loaded strictly by the model. `.safetensors` works everywhere.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sam3.backbones.student import describe, stated_stride
from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import free_bytes, human_bytes, sha256
from sam3.engine.merge import (
    STUDENT_TRUNK,
    TRUNK,
    MergePlan,
    check_merge,
    check_output,
    check_teacher,
    merged_meta,
    plan_merge,
    require_space,
    write_merge,
)
from sam3.engine.weights import WeightFile, load_weights, normalise_sam3_keys, num_bytes
from sam3.merged_model import identify_student, load_into_model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Merge a Stage-1 student into a SAM3 checkpoint.")
    parser.add_argument("--student-ckpt", type=Path, required=True, help="Stage-1 checkpoint, ckpt_epoch_<n>.pth")
    parser.add_argument("--sam3-ckpt", type=Path, default=Path("sam3_checkpoints/sam3.pt"), help="the teacher's file")
    parser.add_argument("--output", type=Path, help="merged file (default: <student without suffix>_sam3.pth)")
    parser.add_argument("--target-prefix", default=f"{STUDENT_TRUNK}.", help="put before every student key")
    parser.add_argument("--replace-prefix", default=TRUNK, help="SAM3 keys below it are dropped")
    parser.add_argument(
        "--skip-teacher-prefix", action="append", default=[], help="further SAM3 keys to leave out (repeatable)"
    )
    parser.add_argument(
        "--allow-other-teacher", action="store_true", help="accept a SAM3 file that the student was not trained from"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Raises FileNotFoundError, ValueError (files that do not fit each other) and OSError (disk)."""
    args = parse_args(argv)
    output = args.output or args.student_ckpt.with_name(f"{args.student_ckpt.stem}_sam3.pth")
    check_output(output, (args.student_ckpt, args.sam3_ckpt))
    student = load_weights(args.student_ckpt)
    sam3 = load_weights(args.sam3_ckpt)
    sam3.tensors = normalise_sam3_keys(sam3.tensors, sam3.path)
    plan = plan_merge(student, sam3, args.target_prefix, [args.replace_prefix], args.skip_teacher_prefix)
    backbone, embed_dim = identify_student(student, plan.tensors, plan.target_prefix)
    print_plan(plan, sam3, backbone, output)
    check_merge(plan)
    teacher_hash = functools.partial(sha256, args.sam3_ckpt)
    notes = check_teacher(student, args.sam3_ckpt, teacher_hash, allow_other=args.allow_other_teacher)
    for note in notes:
        print(note)
    require_space(output, plan)
    if args.dry_run:
        print(f"Dry run: nothing written; {human_bytes(free_bytes(output.parent))} are free in {output.parent}")
        return 0
    named = {"backbone": backbone, "embed_dim": embed_dim, "output_stride": stated_stride(student.meta)}
    meta = merged_meta(student, sam3) | named
    proof = write_merge(output, plan, meta, functools.partial(load_into_model, plan.tensors))
    print(f"Student parameters copied: {plan.copied} -> prefix '{plan.target_prefix}'")
    print(f"Teacher params skipped={plan.skipped}, replaced={plan.replaced}, appended={plan.appended}")
    print(f"Combined checkpoint saved to: {output}")
    print(
        f"Proof: {len(plan.tensors)} tensors read back, 0 missing, 0 unexpected; {proof.from_student} bit-equal to the "
        f"student, {proof.from_base} to SAM3; 0 tensors of the replaced encoder left; the model loads it strictly"
    )
    print(f"Size: {human_bytes(proof.file_bytes)} (SAM3 file: {human_bytes(args.sam3_ckpt.stat().st_size)})")
    return 0


def print_plan(plan: MergePlan, sam3: WeightFile, backbone: str, output: Path) -> None:
    student = {key: plan.tensors[key] for key in plan.student_keys}
    removed = {key: sam3.tensors[key] for key in plan.replaced_keys}
    print(f"Student: {plan.student_path} ({describe(backbone)}; {_amount(student)})")
    print(f"SAM3:    {sam3.path} ({_amount(sam3.tensors)})")
    print(f"Removed: {', '.join(plan.replace_prefixes)} ({_amount(removed)})")
    print(f"Output:  {output} ({_amount(plan.tensors)})")


def _amount(tensors: Mapping[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {human_bytes(num_bytes(tensors))}"


if __name__ == "__main__":
    run_main(main)
