"""Reads what `extract` wrote of a teacher: in training, instead of running it. The files: `store_format`.

Letters: `P` prompts of a picture, `K` masks of a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from distillation.prompt.config import PromptDistillConfig, TeacherSettings
from distillation.prompt.prompts import Prompts
from distillation.prompt.store_format import (
    FAILED_FILE,
    FILES,
    IOUS,
    META_FILE,
    PROMPT_SETTINGS,
    SCRIPT,
    PromptRecord,
    feature_path,
    is_per_prompt,
    open_array,
    prompts_path,
    read_meta,
    read_record,
    shape_of,
)

MAX_OPEN = 64  # memory maps that a reader keeps

Item = TypeVar("Item")


def expected_of(config: PromptDistillConfig, teacher: TeacherSettings) -> dict[str, Any]:
    """What `FeatureStore.check` compares: fields of meta.json, `teacher` as names that will do, `hooks` if set.

    A folder that the configuration names for this teacher (`precomputed_dir`) may have been written under its own name.
    """
    folder = teacher.precomputed_dir
    return {
        "teacher": [teacher.name, *([Path(folder).name] if folder else [])],
        "image_size": config.model.image_size,
        "mode": config.dataset.mode,
        "grid_points": config.dataset.grid_points,
        "multimask": config.model.multimask_output,
        "tap": config.distillation.prompt_embed.tap,
        "components": config.distillation.losses,
        "hooks": teacher.hooks,
        "prompts": {name: getattr(config.dataset, name) for name in PROMPT_SETTINGS},
    }


class FeatureStore:
    """Reads one split of a store; cheap to pickle to workers. Maps files into memory, at most MAX_OPEN at a time.

    meta: of the store, see `extract.describe`.

    Raises FileNotFoundError if nothing was written there, naming the program that does.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.root, self.split = Path(folder), split
        self.folder = self.root / split
        meta = read_meta(self.root)
        if meta is None:
            raise FileNotFoundError(
                f"no teacher features in {self.root} (it lacks {META_FILE}); write them with {SCRIPT} "
                f"--output_base_dir {self.root}, or run the teacher in training: "
                "distillation.use_precomputed_features false"
            )
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.root} has no features of the split {split!r}; write them with {SCRIPT} "
                f"--output_base_dir {self.root} --splits {split}"
            )
        self.meta = meta
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a pickled memory map would be the whole array

    @property
    def encoder_channels(self) -> int:
        """Of the stored encoder_patch."""
        return self.meta["encoder_channels"]

    def check(self, expected: Mapping[str, Any]) -> None:
        """Compare the store with what a training wants: ValueError naming all that differs.

        expected: see `expected_of`; fields may be left out. What belongs to certain prompts counts only if one of the
        components does: the mode, how prompts were drawn, grid_points in everything mode; as tap and multimask do.
        """
        components, hooks = expected.get("components", ()), expected.get("hooks", {})
        if unknown := [name for name in components if name not in FILES]:
            raise ValueError(f"a store holds no {', '.join(unknown)}; choose from {', '.join(FILES)}")
        meta = self.meta
        bound = [name for name in components if self.is_per_prompt(name)]
        grid = expected.get("mode", meta["mode"]) == "everything"
        irrelevant = {
            "mode": not bound,
            "grid_points": not (bound and grid),
            "tap": "prompt_embed" not in components or "prompt_embed" in hooks,
            "multimask": "dense_mask_logits" not in components,
        }
        faults = [
            f"{name}: found {meta[name]!r}, wanted {expected[name]!r}"
            for name in ("image_size", "mode", "grid_points", "multimask", "tap")
            if name in expected and not irrelevant.get(name) and meta[name] != expected[name]
        ]
        if "teacher" in expected and (found := meta["teacher"]["name"]) not in (names := expected["teacher"]):
            faults.append(f"teacher: found {found!r}, wanted {' or '.join(map(repr, names))}")
        for name in components:
            found = meta["hooks"].get(name, ())
            if name in hooks and _plain(hooks[name]) not in map(_plain, found):
                faults.append(f"hook of {name}: found {' = '.join(found) or 'none'}, wanted {hooks[name]}")
        if bound and not grid:
            mode = expected.get("prompts", {}).get("prompt_mode")
            unused = {"box": ("min_points", "max_points"), "point": ("max_bbox_shift",)}.get(mode, ())
            faults += [
                f"{name}: found {meta['prompts'][name]!r}, wanted {value!r}"
                for name, value in expected.get("prompts", {}).items()
                if name not in unused and meta["prompts"].get(name, value) != value
            ]
        if bound and meta["prompts"]["source"] == "none":
            faults.append(f"prompts: found none, wanted those of masks for {', '.join(bound)}")
        if faults:
            raise ValueError(
                f"the features in {self.root} were made for another training ({'; '.join(faults)}); change the "
                f"settings, or write features for it in another folder with {SCRIPT}"
            )
        for component in components:
            self._require(component)

    def is_per_prompt(self, component: str) -> bool:
        """See the function of this name."""
        return is_per_prompt(component, self.meta)

    def failed(self) -> set[str]:
        """Pictures that could not be extracted, as extraction lists them; training cannot use them either."""
        path = self.folder / FAILED_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return {line.partition("\t")[0] for line in lines}

    def missing(self, keys: Sequence[str], components: Collection[str] = ()) -> list[str]:
        """Those of `keys` that lack their prompts or a file of one of `components`: names alone, no file is opened."""
        return [
            key
            for key in keys
            if not prompts_path(self.folder, key).is_file()
            or not all(feature_path(self.folder, key, name).is_file() for name in components)
        ]

    def prompts(self, key: str) -> tuple[Prompts, list[str]]:
        """The prompts a picture was seen with, and the names of their masks; see `PromptRecord`."""
        record = self.record(key)
        return record.prompts, record.mask_names

    def record(self, key: str) -> PromptRecord:
        """All that is stored beside the features. FileNotFoundError, ValueError naming the file if it is damaged."""
        path = prompts_path(self.folder, key)
        return self._cached(path, lambda: read_record(path, self.meta), "")

    def row(self, key: str, mask_name: str) -> int:
        """Place of the prompt of a mask among those of its picture. ValueError if the mask had none."""
        names = self.record(key).mask_names
        if mask_name not in names:
            what = "was seen without a prompt" if names == [""] else f"has prompts of {', '.join(names) or 'a grid'}"
            raise ValueError(
                f"the features of {key!r} in {self.folder} hold no prompt of the mask {mask_name!r} (the picture "
                f"{what}); write them again with {SCRIPT} --prompts masks --overwrite"
            )
        return names.index(mask_name)

    def read(self, key: str, component: str, row: int | str | None = None) -> Tensor:
        """A component of a picture, or `ious`, as float32 that is nobody else's.

        row: of the prompt, or its mask's name: this row alone, without the axis of prompts; None for all of them.
            Components that a picture has once pass over it.

        Raises:
            FileNotFoundError: naming the file and what can be done.
            ValueError: a damaged or misshapen file, values that are not finite, no such component, mask or row.
        """
        if component != IOUS:
            self._require(component)
        record = self.record(key) if component == IOUS or self.is_per_prompt(component) else None
        if isinstance(row, str) and record is not None:
            row = self.row(key, row)
        if record is not None and row is not None and not 0 <= row < len(record):
            raise ValueError(f"{key!r} has {len(record)} prompts in {self.folder}, so no row {row}")
        if component == IOUS:
            return record.ious.clone() if row is None else record.ious[row].clone()
        path = feature_path(self.folder, key, component)
        wanted = shape_of(component, self.meta, len(record) if record is not None else 0)
        array = self._cached(path, lambda: open_array(path, self.meta["dtype"], wanted), component)
        values = torch.from_numpy(np.array(array if record is None or row is None else array[row], dtype=np.float32))
        if not values.isfinite().all():
            raise ValueError(f"{path} holds values that are not finite; write it again with {SCRIPT} --overwrite")
        return values

    def _require(self, component: str) -> None:
        if component not in self.meta["components"]:
            there = ", ".join(self.meta["components"])
            raise ValueError(
                f"the features in {self.root} hold no {component} (but {there}); set distillation.{component}.enable "
                f"false, or write them with it in another folder: {SCRIPT} --components {FILES[component]} ..."
            )

    def _cached(self, path: Path, read: Callable[[], Item], component: str) -> Item:
        """What `read` gives for `path`, from memory if it was among the last MAX_OPEN."""
        if path not in self._open:
            try:
                self._open[path] = read()
            except FileNotFoundError as error:
                off = f", or set distillation.{component}.enable false" if component else ""
                raise FileNotFoundError(
                    f"there is no {path}; write what is missing with {SCRIPT} --output_base_dir {self.root} --splits "
                    f"{self.split}{off}"
                ) from error
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]


def _plain(hook: str) -> str:
    """`blocks[30]` and `blocks.30` are one."""
    return hook.replace("[", ".").replace("]", "")
