"""Counts the parameters of the SAM3 teacher and of the nine students, without weights and without a GPU.

    PYTHONPATH=sam3 python stage1/compare_models.py --student all        # summary
    PYTHONPATH=sam3 python stage1/compare_models.py --student es_rv_m    # one student in detail
    PYTHONPATH=sam3 python stage1/compare_models.py --verify             # run each student once, print its shapes

Everything is counted from the real modules, built on the meta device: shapes without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sam3.backbones.student import BACKBONES, StudentEncoder, build_student
from sam3.engine.cli import make_parser, run_main
from sam3.model.config import Sam3Config
from sam3.model_builder import assemble_image_model

TRUNK = "backbone.vision_backbone.trunk"
VISION = (TRUNK, "backbone.vision_backbone.convs", "backbone.vision_backbone.sam2_convs")
LANGUAGE = "backbone.language_backbone"
DETECTOR_MODULES = (
    *VISION,
    LANGUAGE,
    "geometry_encoder",
    "transformer.encoder",
    "transformer.decoder",
    "dot_prod_scoring",
    "segmentation_head",
)
PATCH_SIZE = 14  # pixels of the teacher's input per cell of its embedding
STUDENTS = {spec.stem: name for name, spec in BACKBONES.items()}


@dataclass(frozen=True)
class Count:
    """Entries of a state dict, and parameters."""

    keys: int
    params: int

    def __add__(self, other: Count) -> Count:
        return Count(self.keys + other.keys, self.params + other.params)

    def __sub__(self, other: Count) -> Count:
        return Count(self.keys - other.keys, self.params - other.params)


# The one number here that no module gives: there is no tracker yet, so it is counted from the layout of sam3.pt
# (the entries below `tracker.`).
TRACKER = Count(309, 11_743_362)


def count(modules: Iterable[nn.Module]) -> Count:
    """Of all `modules` together."""
    modules = list(modules)
    return Count(sum(len(m.state_dict()) for m in modules), sum(p.numel() for m in modules for p in m.parameters()))


def total(counts: Iterable[Count]) -> Count:
    return sum(counts, Count(0, 0))


def count_teacher() -> dict[str, Count]:
    """Of each module of sam3.pt, in the file's order of roots."""
    with torch.device("meta"):
        model = assemble_image_model(Sam3Config.preset("full"), with_sam2_neck=True)
    counts = {name: count([model.get_submodule(name)]) for name in DETECTOR_MODULES}
    missed = count([model]) - total(counts.values())
    assert missed == Count(0, 0), f"{missed} are in none of the modules listed"
    return counts | {"tracker": TRACKER}


def build_on_meta(backbone_name: str) -> StudentEncoder:
    with torch.device("meta"):
        return build_student(backbone_name)


def savings_percent(backbone: Count, teacher: dict[str, Count]) -> float:
    """How much smaller a student's backbone is than the teacher's vision backbone (trunk and both necks)."""
    return 100 * (1 - backbone.params / total(teacher[name] for name in VISION).params)


def summary() -> str:
    """The teacher's parts, then a line for each student."""
    teacher = count_teacher()
    vision, language, everything = total(teacher[n] for n in VISION), teacher[LANGUAGE], total(teacher.values())
    lines = [
        f"SAM3 teacher (total)   {_millions(everything, 2)}",
        f"  vision backbone      {_millions(vision, 2)}  replaced: its trunk, {_millions(teacher[TRUNK], 2).strip()}",
        f"  language backbone    {_millions(language, 2)}  kept",
        f"  decoder, heads, rest {_millions(everything - vision - language, 2)}  kept",
        "",
        f"{'student':9}{'backbone':17}{'params':>9}   against the teacher's vision backbone",
    ]
    for name, spec in BACKBONES.items():
        backbone = count([build_on_meta(name).backbone])
        smaller = f"{savings_percent(backbone, teacher):.2f}% smaller"
        lines.append(f"{spec.display_name:9}{spec.architecture:17}{_millions(backbone, 2)}   {smaller}")
    return "\n".join([*lines, "", "params: the backbone, without the head that brings it to the teacher's embedding"])


def details(backbone_name: str) -> str:
    """Stages and head of one student, the teacher's modules, and what the merged checkpoint has."""
    spec, teacher, student = BACKBONES[backbone_name], count_teacher(), build_on_meta(backbone_name)
    backbone, head = count([student.backbone]), count([student.head])
    everything = total(teacher.values())
    vision = total(teacher[name] for name in VISION)
    replaced = backbone + head - teacher[TRUNK]
    lines = [f"{spec.display_name}: {spec.architecture} ({backbone_name})", "", _header("student encoder")]
    lines += [_row(f"  {part}", count(modules)) for part, modules in student.backbone.model.parts().items()]
    lines += [
        _row("backbone", backbone, f"{savings_percent(backbone, teacher):.2f}% smaller than the vision backbone"),
        _row("head", head, f"{student.head[0].in_channels} -> {student.embed_dim} channels"),
        _row("total", backbone + head),
        "",
        _header("teacher (sam3.pt)"),
    ]
    names = {name: name if name == "tracker" else f"detector.{name}" for name in teacher}
    lines += [
        _row(f"  {names[name]}", counted, "replaced" if name == TRUNK else "kept") for name, counted in teacher.items()
    ]
    lines += [
        _row("total", everything),
        "",
        _header("merged checkpoint"),
        _row("  vision backbone", vision + replaced, f"was {_millions(vision).strip()}"),
        _row("total", everything + replaced, f"was {_millions(everything).strip()}"),
    ]
    return "\n".join(lines)


@torch.inference_mode()
def verify(backbone_name: str, img_size: int) -> str:
    """Run a student with random weights on one picture on the CPU; a line with the shapes of its map and its output.

    Raises ValueError if the output is not (1, 1024, G, G) with the teacher's grid G = img_size / 14.
    """
    if img_size <= 0 or img_size % PATCH_SIZE:
        raise ValueError(f"--img-size is {img_size}; the teacher takes multiples of {PATCH_SIZE}, such as 1008")
    grid = img_size // PATCH_SIZE
    student = build_student(backbone_name, embed_size=grid).eval()
    shapes: list[tuple[int, ...]] = []
    student.backbone.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    shapes.append(tuple(student(torch.zeros(1, 3, img_size, img_size)).shape))
    wanted = (1, student.embed_dim, grid, grid)
    if shapes[1] != wanted:
        raise ValueError(f"{backbone_name} gives {shapes[1]} at {img_size} px; the teacher's embedding is {wanted}")
    return f"{BACKBONES[backbone_name].display_name:9}backbone {shapes[0]!s:20} output {shapes[1]}"


def _header(title: str) -> str:
    return f"{title:49}{'keys':>5}{'params':>12}"


def _row(name: str, counted: Count, note: str = "") -> str:
    return f"{name:49}{counted.keys:5}{_millions(counted, 3):>12}   {note}".rstrip()


def _millions(counted: Count, digits: int = 3) -> str:
    return f"{counted.params / 1e6:8.{digits}f}M"


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--student", default="all", choices=["all", *STUDENTS], help="which student")
    parser.add_argument("--verify", action="store_true", help="run the student(s) once on the CPU and print the shapes")
    parser.add_argument("--img-size", type=int, metavar="PX", help="side of the input of --verify (default: 1008)")
    args = parser.parse_args(argv)
    if args.img_size is not None and not args.verify:
        parser.error("--img-size acts only with --verify; the counts are the same at every size")
    if args.verify:
        for name in STUDENTS.values() if args.student == "all" else [STUDENTS[args.student]]:
            print(verify(name, 1008 if args.img_size is None else args.img_size), flush=True)
    else:
        print(summary() if args.student == "all" else details(STUDENTS[args.student]))
    return 0


if __name__ == "__main__":
    run_main(main)
