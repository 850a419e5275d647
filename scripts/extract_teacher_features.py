r"""Write what a teacher makes of a data set's pictures, so that training can read it instead of running the teacher.

    python scripts/extract_teacher_features.py \
        --teacher_name SAM_vitH \
        --teacher_cfg  ./configs/sam_vith.yaml \
        --teacher_ckpt ./weights/sam_vit_h_4b8939.pth \
        --dataset_base_dir ./datasets \
        --output_base_dir ./precomputed/SAM_vitH \
        --splits train val \
        --fp16

Training reads it with distillation.use_precomputed_features true. With one prompt, a picture takes 4.3 MB as float16.
What is there is not done again: the same command goes on after an interruption. The exit code is 1 if pictures failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distillation.prompt.config import DatasetSettings, TeacherSettings
from distillation.prompt.extract import extract
from distillation.prompt.extract_data import ENC_PROJECTIONS, PROMPT_SOURCES, ExtractSettings
from distillation.prompt.hooks import COMPONENTS as HOOKED
from distillation.prompt.hooks import TAPS
from distillation.prompt.layouts import LAYOUTS, open_split
from distillation.prompt.store_format import FILES
from distillation.prompt.teachers import BACKENDS, DENSE, Teacher, load_model
from sam3.engine import cli, log

COMPONENTS = {file: component for component, file in FILES.items()}  # name on the command line -> loss
MODES = ("single", "everything")
PROMPT_MODES = ("point", "box", "mixed")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher_name", required=True, help="a label, which training compares with teachers[].name")
    teacher.add_argument("--teacher_cfg", required=True, help="model file, such as configs/sam_vith.yaml")
    teacher.add_argument("--teacher_ckpt", required=True, help="its weights; with another backend maybe a folder")
    teacher.add_argument("--teacher_backend", choices=BACKENDS, default="native", help="whose code runs it")
    teacher.add_argument("--hooks", nargs="+", default=[], metavar="COMPONENT=PATH", help="as teachers[].hooks")
    teacher.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    teacher.add_argument("--fp16", action="store_true", help="float16 files, and on a GPU a float16 teacher")
    teacher.add_argument("--points_per_batch", type=int, default=64, help="prompts that pass the decoder together")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_base_dir", type=Path, required=True, help="folder that holds the splits")
    data.add_argument("--splits", nargs="+", default=["train", "val"], help="its parts")
    data.add_argument("--layout", choices=LAYOUTS, default="auto", help="how it is laid out")
    data.add_argument("--image_subdir_name", default="image", help="pictures of a split, in the layout folder")
    data.add_argument("--mask_subdir_name", default="mask", help="masks of a split, in the layout folder")
    data.add_argument("--num_workers", type=int, default=4, help="processes that read pictures ahead; 0: none")
    data.add_argument("--limit", type=int, help="only so many pictures of each split, the first ones")
    output = parser.add_argument_group("output")
    output.add_argument("--output_base_dir", type=Path, required=True, help="used as it is: no folder is added")
    output.add_argument("--components", nargs="+", choices=list(COMPONENTS), help="default: all, in everything mode "
                        "all but dense_logits")  # fmt: skip
    output.add_argument("--no_dense_logits", action="store_true", help="leave dense_logits out")
    output.add_argument("--enc_projection", choices=ENC_PROJECTIONS, default="neck", help="neck: 256 channels by the "
                        "teacher's own frozen 1x1 convolution; none: as they are")  # fmt: skip
    output.add_argument("--prompt_embed_tap", choices=list(TAPS), default="input_keys", help="as in training")
    output.add_argument("--multimask", action="store_true", help="three masks of a prompt: model.multimask_output")
    output.add_argument("--overwrite", action="store_true", help="write what is there, too")
    output.add_argument("--dry-run", "--dry_run", action="store_true", help="only say what would be written")
    prompts = parser.add_argument_group("prompts")
    drawn = DatasetSettings()
    prompts.add_argument("--mode", choices=MODES, default=drawn.mode, help="everything: a grid of points")
    prompts.add_argument("--grid_points", type=int, default=drawn.grid_points, help="points per side of the grid")
    prompts.add_argument("--prompts", choices=PROMPT_SOURCES, default="auto", help="single mode: auto: of the masks, "
                         "an empty one without; masks: leave pictures without out; none: an empty one")  # fmt: skip
    prompts.add_argument("--prompt_mode", choices=PROMPT_MODES, default=drawn.prompt_mode, help="as in training")
    prompts.add_argument("--prompt_seed", type=int, default=0, help="as train.seed")
    prompts.add_argument("--min_points", type=int, default=drawn.min_points, help="of a prompt")
    prompts.add_argument("--max_points", type=int, default=drawn.max_points, help="of a prompt")
    prompts.add_argument("--max_bbox_shift", type=int, default=drawn.max_bbox_shift, help="of a box's sides, in pixels")
    args = parser.parse_args(argv)
    if args.points_per_batch < 1 or args.prompt_seed < 0 or (args.limit is not None and args.limit < 1):
        parser.error("--points_per_batch and --limit must be at least 1, --prompt_seed at least 0")
    if args.mode == "everything" and args.prompts != "auto":
        parser.error(f"--prompts {args.prompts} is for --mode single; everything mode has a grid")
    if len(set(args.splits)) < len(args.splits):
        parser.error(f"--splits names a split twice: {' '.join(args.splits)}")
    if bad := [hook for hook in args.hooks if hook.partition("=")[0] not in HOOKED or not hook.partition("=")[2]]:
        parser.error(f"--hooks takes COMPONENT=PATH with a component of {', '.join(HOOKED)}, got {bad[0]}")
    if not chosen_components(args):
        parser.error("--no_dense_logits leaves no component")
    return args


def chosen_components(args: argparse.Namespace) -> tuple[str, ...]:
    """The losses whose features are written, in the order of `FILES`."""
    asked = args.components or [name for name in COMPONENTS if args.mode == "single" or name != FILES[DENSE]]
    return tuple(
        component
        for name, component in COMPONENTS.items()
        if name in asked and not (component == DENSE and args.no_dense_logits)
    )


def extract_settings(args: argparse.Namespace) -> ExtractSettings:
    """What the arguments say of data, prompts and output."""
    same = ("layout", "image_subdir_name", "mask_subdir_name", "mode", "prompt_mode", "grid_points", "min_points",
            "max_points", "max_bbox_shift", "num_workers")  # fmt: skip
    return ExtractSettings(
        dataset=DatasetSettings(**{name: getattr(args, name) for name in same}),
        components=chosen_components(args),
        prompts=args.prompts,
        seed=args.prompt_seed,
        enc_projection=args.enc_projection,
        tap=args.prompt_embed_tap,
        multimask=args.multimask,
        half=args.fp16,
        points_per_batch=args.points_per_batch,
        overwrite=args.overwrite,
        limit=args.limit,
        hooks=dict(hook.split("=", 1) for hook in args.hooks),
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    log.setup()
    settings = extract_settings(args)
    sources = {
        split: open_split(args.dataset_base_dir / split, args.layout, args.image_subdir_name, args.mask_subdir_name)
        for split in args.splits
    }
    named = TeacherSettings(
        name=args.teacher_name,
        checkpoint=args.teacher_ckpt,
        cfg=args.teacher_cfg,
        backend=args.teacher_backend,
        hooks=settings.hooks,
        dtype="auto" if args.fp16 else "fp32",
    )
    model, files = load_model(named)
    teacher = Teacher(named, settings.components, settings.tap, model, files, args.device)
    return extract(teacher, sources, args.output_base_dir, settings, args.dry_run)


if __name__ == "__main__":
    cli.run_main(main)
