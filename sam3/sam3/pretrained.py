"""Students from files: the weights of a training checkpoint, or those inside a merged SAM3 checkpoint."""

from __future__ import annotations

from pathlib import Path

from sam3.backbones.student import StudentEncoder, check_student, recognise_student
from sam3.engine.merge import STUDENT_PREFIXES
from sam3.engine.weights import load_strict, load_weights, strip_prefix


def load_student_weights(student: StudentEncoder, path: str | Path) -> None:
    """Load backbone and head of `path` into `student`, strictly.

    path: a checkpoint of Stage 1 (or of a later stage that keeps the student's names), or a merged model.
    Raises FileNotFoundError; ValueError naming both students if it holds another one, or what does not fit.
    """
    tensors = load_weights(path).tensors
    for prefix in ("", *STUDENT_PREFIXES):
        if any(key.startswith(f"{prefix}backbone.model.") for key in tensors):
            tensors = strip_prefix(tensors, prefix)
            break
    student_tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(("backbone.model.", "head."))}
    recognise_student(student_tensors)  # says what is wrong with weights of no student at all
    check_student(student_tensors, student.backbone.model.name)
    load_strict(student, student_tensors, source=path)
