"""Put a student's tensors into a SAM3 checkpoint or a merged model: plan, check, write, prove.

A plan only refers to the tensors of two (memory-mapped) weight files, so it costs no RAM. Nothing appears at the output
path before the written file was opened again and found equal to the plan, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.engine.files import fsync, require_free_space
from sam3.engine.weights import (
    WeightFile,
    list_names,
    load_weights,
    num_bytes,
    same_bytes,
    save_weights,
    strip_prefix,
)

VISION = "detector.backbone.vision_backbone"
TRUNK = f"{VISION}.trunk"
STUDENT_TRUNK = f"{TRUNK}.model"
LANGUAGE = "detector.backbone.language_backbone"

# Whatever wrapper a student was saved in, taken off in this order, each once.
STUDENT_PREFIXES = (
    "module.",
    "student_trunk.",
    f"{STUDENT_TRUNK}.",
    f"{TRUNK}.",
    "backbone.vision_backbone.trunk.model.",
    "backbone.vision_backbone.trunk.",
)

# Modules that a student takes over as a whole: next to it no tensor of the teacher may stay behind.
EXCLUSIVE_MODULES = (TRUNK, LANGUAGE)

# Neck layers that read the trunk's output, with the dimension of their weight that counts its channels.
NECK_INPUTS = {
    "0.dconv_2x2_0.weight": 0,
    "1.dconv_2x2.weight": 0,
    "2.conv_1x1.weight": 1,
    "3.conv_1x1.weight": 1,
}


@dataclass(frozen=True)
class MergePlan:
    """`tensors` is the merged state dict in the order of the file to be written."""

    tensors: dict[str, Tensor]
    student_path: Path
    base_path: Path
    target_prefix: str  # "" or with a trailing dot
    replace_prefixes: tuple[str, ...]  # without trailing dots
    student_keys: tuple[str, ...]  # as they stand in the merged file
    replaced_keys: tuple[str, ...]  # base keys that make room
    skipped_keys: tuple[str, ...]  # base keys left out on request, or because the student has the same key
    appended_keys: tuple[str, ...]  # base keys that stay
    collisions: tuple[str, ...]  # skipped keys that the student has too

    @property
    def copied(self) -> int:
        return len(self.student_keys)

    @property
    def replaced(self) -> int:
        return len(self.replaced_keys)

    @property
    def skipped(self) -> int:
        return len(self.skipped_keys)

    @property
    def appended(self) -> int:
        return len(self.appended_keys)


@dataclass(frozen=True)
class MergeProof:
    """What `prove_merge` compared: tensors from the student, tensors from the base, bytes of the file."""

    from_student: int
    from_base: int
    file_bytes: int


def plan_merge(
    student: WeightFile,
    base: WeightFile,
    target_prefix: str,
    replace_prefixes: Sequence[str],
    skip_prefixes: Sequence[str] = (),
    strip: Sequence[str] = STUDENT_PREFIXES,
) -> MergePlan:
    """Student keys go below `target_prefix`; base keys below `replace_prefixes` make room; `skip_prefixes` stay out.
    In the merged file the student's keys come first.

    A prefix is a module's path (a dot at either end does not matter) or a whole key. Before that, each prefix of
    `strip` that all student keys share is taken off. Only names are looked at: `check_merge` does the rest.
    """
    target = dotted(target_prefix)
    replace = tuple(prefix.strip(".") for prefix in replace_prefixes)
    skip = tuple(prefix.strip(".") for prefix in skip_prefixes)
    merged = {target + key: tensor for key, tensor in strip_wrappers(student.tensors, strip).items()}
    student_keys = tuple(merged)
    replaced, skipped, appended, collisions = [], [], [], []
    for key, tensor in base.tensors.items():
        if _below_any(key, replace):
            replaced.append(key)
        elif key in merged or _below_any(key, skip):
            skipped.append(key)
            if key in merged:
                collisions.append(key)
        else:
            merged[key] = tensor
            appended.append(key)
    return MergePlan(
        tensors=merged,
        student_path=student.path,
        base_path=base.path,
        target_prefix=target,
        replace_prefixes=replace,
        student_keys=student_keys,
        replaced_keys=tuple(replaced),
        skipped_keys=tuple(skipped),
        appended_keys=tuple(appended),
        collisions=tuple(collisions),
    )


def plan_update(student: WeightFile, base: WeightFile, target_prefix: str) -> MergePlan:
    """Give the base's tensors below `target_prefix` the student's values, in the base's order and types.

    The base's keys below the prefix must be exactly the student's, with the same shapes.
    Raises ValueError naming each key that is missing on either side, has another shape or cannot be cast.
    """
    target = dotted(target_prefix)
    new = {target + key: tensor for key, tensor in student.tensors.items()}
    old = {key: tensor for key, tensor in base.tensors.items() if key.startswith(target)}
    shared = {key: (tensor, old[key]) for key, tensor in new.items() if key in old}
    faults = {
        f"not in {base.path}": [key for key in new if key not in old],
        f"not in {student.path}": [key for key in old if key not in new],
        "of another shape": [
            f"{key} {tuple(tensor.shape)} instead of {tuple(place.shape)}"
            for key, (tensor, place) in shared.items()
            if tensor.shape != place.shape
        ],
        "of another type": [
            f"{key} {tensor.dtype} instead of {place.dtype}"
            for key, (tensor, place) in shared.items()
            if not torch.can_cast(tensor.dtype, place.dtype)
        ],
    }
    found = [f"{len(keys)} {kind}: {list_names(keys)}" for kind, keys in faults.items() if keys]
    if found:
        raise ValueError(
            f"{student.path} does not fit {base.path}: {'; '.join(found)}; give the model that the student came from"
        )
    merged = {key: _cast(new[key], tensor, key) if key in new else tensor for key, tensor in base.tensors.items()}
    return MergePlan(
        tensors=merged,
        student_path=student.path,
        base_path=base.path,
        target_prefix=target,
        replace_prefixes=(target.rstrip("."),),
        student_keys=tuple(new),
        replaced_keys=tuple(new),
        skipped_keys=(),
        appended_keys=tuple(key for key in merged if key not in new),
        collisions=(),
    )


def _cast(tensor: Tensor, place: Tensor, key: str) -> Tensor:
    cast = tensor.to(place.dtype)
    if cast is not tensor and _is_finite(tensor) and not _is_finite(cast):
        raise ValueError(f"{key} has values that {place.dtype} cannot hold; give a pretrained file in float32")
    return cast


def check_merge(plan: MergePlan) -> None:
    """Raise ValueError if the plan would give a file that no model can use or that still carries the teacher's part."""
    where = f"merging {plan.student_path} into {plan.base_path}"
    if not plan.student_keys:
        raise ValueError(f"{where}: the student has no tensors")
    if not plan.replaced_keys:
        raise ValueError(
            f"{where}: no key of the base is below the replace prefix '{list_names(plan.replace_prefixes)}', so "
            f"nothing would be replaced; the base has keys below {list_names(list_modules(plan.appended_keys))}"
        )
    for module in EXCLUSIVE_MODULES:
        left = [key for key in plan.appended_keys if _below_any(key, (module,))]
        if left and any(_below_any(key, (module,)) for key in plan.student_keys):
            raise ValueError(
                f"{where}: {len(left)} of the teacher's tensors below '{module}' would stay beside the student: "
                f"{list_names(left)}; pass the whole module as replace prefix"
            )
    if not any(_below_any(key, plan.replace_prefixes) for key in plan.student_keys):
        raise ValueError(
            f"{where}: {list_names(plan.replace_prefixes)} would be removed, but the student goes to "
            f"'{plan.target_prefix}'; the target prefix must lie below the replaced one"
        )
    if plan.collisions:
        raise ValueError(
            f"{where}: {len(plan.collisions)} keys are in both and not below a replaced prefix: "
            f"{list_names(plan.collisions)}"
        )
    if _below_any(plan.target_prefix, (TRUNK,)):
        _check_neck(plan, where)
    broken = [key for key in plan.student_keys if not _is_finite(plan.tensors[key])]
    if broken:
        raise ValueError(
            f"{where}: the student has NaN or infinite values in {list_names(broken)}; take an earlier checkpoint"
        )


def _check_neck(plan: MergePlan, where: str) -> None:
    output = plan.tensors.get(f"{STUDENT_TRUNK}.head.3.weight")
    if output is None:
        raise ValueError(
            f"{where}: wanted the student's last layer at {STUDENT_TRUNK}.head.3.weight, found "
            f"{list_names(plan.student_keys, shown=3)}; give a student's checkpoint and '{STUDENT_TRUNK}' as target"
        )
    channels = output.shape[0]
    for neck in ("convs", "sam2_convs"):
        for name, dim in NECK_INPUTS.items():
            key = f"{VISION}.{neck}.{name}"
            if key in plan.tensors and plan.tensors[key].shape[dim] != channels:
                raise ValueError(
                    f"{where}: the student gives {channels} channels, but {key} reads {plan.tensors[key].shape[dim]}; "
                    "train the student with DISTILL.EMBED_DIM equal to the teacher's width"
                )


def stated_teacher(weights: WeightFile) -> str | None:
    """SHA-256 of the SAM3 file that a student was trained from, None if the file with its weights does not say."""
    teacher = weights.meta.get("teacher")
    return teacher.get("sha256") if isinstance(teacher, Mapping) else None


def check_teacher(
    student: WeightFile, base_path: Path, base_teacher: Callable[[], str | None], *, allow_other: bool
) -> list[str]:
    """What to tell the user about the teachers; nothing if the base has the parts of the one the student knows.

    base_teacher: gives the SHA-256 of the SAM3 file in the base, or None; called only where there is one to compare.
    Raises ValueError for another one unless `allow_other`: its heads would read embeddings they were not trained on.
    """
    wanted = stated_teacher(student)
    found = base_teacher() if wanted else None
    if not (wanted and found):
        silent = base_path if wanted else student.path
        return [f"Note: {silent} does not say which SAM3 file it was trained from, so that is not checked"]
    if found == wanted:
        return []
    difference = f"{student.path} was trained from the SAM3 file with SHA-256 {wanted}, {base_path} has {found}"
    if not allow_other:
        raise ValueError(f"{difference}; give a file of that teacher or add --allow-other-teacher")
    return [f"Warning: {difference}"]


def merged_meta(student: WeightFile, base: WeightFile) -> dict[str, Any]:
    """The student's meta (backbone, embedding size, pre-processing, teacher) over the base's, and its origin."""
    origin = {"file": student.path.name}
    origin.update({key: student.payload[key] for key in ("epoch", "step") if key in student.payload})
    return {**base.meta, **student.meta, "student": origin}


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError if the output is one of the inputs, which are mapped while it is written."""
    for source in inputs:
        if output.exists() and source.exists() and output.samefile(source):
            raise ValueError(f"--output {output} is one of the inputs; choose another name")


def require_space(output: Path, plan: MergePlan) -> None:
    """Raise OSError if the disk has no room for the merged file beside an older one."""
    require_free_space(output.parent, num_bytes(plan.tensors), f"writing {output.name}")


def write_merge(
    output: str | Path,
    plan: MergePlan,
    meta: Mapping[str, Any],
    verify: Callable[[Path], None] | None = None,
    *,
    payload: Mapping[str, Any] | None = None,
    entry: str | None = "model",
) -> MergeProof:
    """Write the plan, prove the result, call `verify` with its path, and only then let it appear at `output`.

    meta, payload, entry: see `save_weights`. An older file at `output` is replaced in one step or, if anything fails,
    left as it was.
    """
    output = Path(output)
    unproven = output.with_name(f".unproven.{output.name}")
    try:
        save_weights(unproven, plan.tensors, meta, payload=payload, entry=entry)
        proof = prove_merge(unproven, plan)
        if verify is not None:
            verify(unproven)
        unproven.replace(output)
        fsync(output.parent)  # or a power loss could bring the older file back
    finally:
        unproven.unlink(missing_ok=True)
    return proof


def prove_merge(output_path: str | Path, plan: MergePlan) -> MergeProof:
    """Open the result again: the plan's keys and no others, every tensor bit-equal to its source, no replaced key left.

    Raises ValueError that names what differs.
    """
    written = load_weights(output_path).tensors
    replaced = set(plan.replaced_keys) - set(plan.student_keys)
    faults = {
        "missing": [key for key in plan.tensors if key not in written],
        "unexpected": [key for key in written if key not in plan.tensors],
        "of the replaced part": [key for key in written if key in replaced],
        "different from their source": [
            key for key, tensor in plan.tensors.items() if key in written and not same_bytes(written[key], tensor)
        ],
    }
    found = [f"{len(keys)} {kind}: {list_names(keys)}" for kind, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{output_path} is not what was to be written: {'; '.join(found)}")
    return MergeProof(plan.copied, plan.appended, Path(output_path).stat().st_size)


def dotted(prefix: str) -> str:
    """A module's path with exactly one dot behind it; "" stays empty."""
    name = prefix.strip(".")
    return f"{name}." if name else ""


def strip_wrappers(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> Mapping[str, Tensor]:
    """Take off each of the prefixes, in their order, that all keys share."""
    for prefix in prefixes:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = strip_prefix(tensors, prefix)
    return tensors


def _below_any(key: str, prefixes: Iterable[str]) -> bool:
    """True if `key` is one of the prefixes or lies below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes if prefix)


def list_modules(keys: Iterable[str], depth: int = 3) -> list[str]:
    """The first parts of the keys, each once, in order: what to name when a prefix was wrong."""
    return list(dict.fromkeys(".".join(key.split(".")[:depth]) for key in keys))


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
