"""Students from files: the weights of a training checkpoint, or those inside a merged SAM3 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3.backbones.student import StudentEncoder, check_student, recognise_student, stated_stride
from sam3.engine.merge import STUDENT_PREFIXES, list_modules
from sam3.engine.weights import list_names, load_strict, load_weights, strip_prefix
from sam3.transforms import Preprocess


def load_student_weights(
    student: StudentEncoder, path: str | Path, preprocess: Preprocess | None = None
) -> dict[str, Any]:
    """Load backbone and head of `path` into `student`, strictly, and return the meta that the file states.

    path: a checkpoint of Stage 1 (or of a later stage that keeps the student's names), or a merged model.
    preprocess: what the student is going to see; a file that states another is refused, one that states none is not.
    Raises FileNotFoundError; ValueError naming both students if it holds another one, or what does not fit.
    """
    file = load_weights(path)
    tensors = file.tensors
    for prefix in ("", *STUDENT_PREFIXES):
        if any(key.startswith(f"{prefix}backbone.model.") for key in tensors):
            tensors = strip_prefix(tensors, prefix)
            break
    student_tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(("backbone.model.", "head."))}
    if not any(key.startswith("backbone.model.") for key in student_tensors):
        raise ValueError(
            f"{path} holds no student, but keys below {list_names(list_modules(file.tensors, depth=2))}; wanted a "
            "training's ckpt_epoch_<n>.pth, or a model that a student is merged into"
        )
    try:
        recognise_student(student_tensors)  # says what is wrong with weights of no one student
        check_student(student_tensors, student.backbone.model.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    stride = stated_stride(file.meta)
    if file.meta and stride != student.output_stride:  # a bare state dict states nothing
        raise ValueError(
            f"{path} is of a student with an output stride of {stride}, wanted {student.output_stride}; "
            f"set MODEL.OUTPUT_STRIDE {stride}, or take another student"
        )
    if preprocess is not None and "preprocess" in file.meta:
        _check_preprocess(file.meta["preprocess"], preprocess, path)
    load_strict(student, student_tensors, source=path)
    return file.meta


def _check_preprocess(stated: Any, preprocess: Preprocess, path: str | Path) -> None:
    try:
        found = Preprocess.from_meta(stated)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; merge or train the student again with this version") from error
    if found != preprocess:
        raise ValueError(
            f"{path} was trained on pictures prepared otherwise: found {found}, wanted {preprocess}; "
            f"set DATA.IMG_SIZE, RESIZE, MEAN and STD as in that file, or take a student trained on these"
        )
