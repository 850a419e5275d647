"""What a teacher gave once, read from disk; `cache_writer` writes it. Two kinds:

trunk: a store of embeddings (`sam3.engine.embedding_format`), one map of the trunk per picture; a store of Stage 1
serves too if its teacher saw the pictures as this one does.

outputs: all that the teacher says of a picture to one prompt, its best queries only:

    <key>.safetensors   pred_masks (K, s, s) and semantic_seg (1, h, w) float16, pred_boxes (K, 4) xyxy,
                        pred_logits (K,) and presence_logits (1,) float32
    meta.json           whose outputs, of pictures in which form, to which prompt, and K and s

Letters: `K` queries kept, `s` side of their masks, `h w` rows and columns of the teacher's maps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distillation.config import DistillationConfig
from distillation.dataset import SA1BDistillDataset
from sam3.engine.embeddings import EmbeddingReader, meta_differences, read_meta, store_meta
from sam3.engine.weights import SAFETENSORS_SUFFIX, list_names, load_weights

KIND = "teacher outputs"
OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
PROMPT_INDEX = 0  # outputs are those for the first prompt, the one that validation asks too
NUM_NAMED = 10  # missing pictures that a message names
SKIPPED_FILE = "skipped.txt"  # beside a cache: a line for each picture that could not be read, its key first


class OutputCache:
    """Reads a cache of outputs; cheap to pickle to workers.

    meta: as written. prompt_index: place of the prompt that was asked, for the student to be asked the same.
    expect: fields that the meta must have, see `output_meta`. min_queries: of the student, which needs as many.

    Raises:
        FileNotFoundError: nothing was written there.
        ValueError: it was written for another run, naming what differs, or holds too few queries.
    """

    def __init__(self, folder: str | Path, expect: Mapping[str, Any], min_queries: int = 1) -> None:
        self.folder = Path(folder)
        self.write_command = write_command("outputs", folder)
        meta = read_meta(self.folder)
        if meta is None:
            raise FileNotFoundError(f"no teacher outputs in {self.folder}; write them with {self.write_command}")
        if differences := meta_differences(meta, {"kind": KIND, **expect}):
            raise ValueError(
                f"what {self.folder} holds was written for another run ({'; '.join(differences)}); change the "
                "settings, or write a cache in another folder (--write-cache outputs --cache-dir)"
            )
        self.meta = meta
        self.num_queries, self.mask_size = int(meta["queries"]), int(meta["mask_size"])
        self.prompt_index = int(meta["prompt_index"])
        require_queries(self.num_queries, min_queries)

    def path(self, key: str) -> Path:
        return output_path(self.folder, key)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that have no file."""
        there = set(os.listdir(self.folder))  # noqa: PTH208 - a hundred thousand Path objects would be slow
        return [key for key in keys if f"{key}{SAFETENSORS_SUFFIX}" not in there]

    def read(self, key: str) -> dict[str, Tensor]:
        """The outputs of one picture as stored, in the shapes above. ValueError if they are not there or damaged."""
        path = self.path(key)
        if not path.is_file():
            raise ValueError(f"no teacher outputs for {key!r} in {self.folder}; write them with {self.write_command}")
        try:
            tensors = load_weights(path).tensors
        except ValueError as error:
            raise ValueError(f"{error}; write it again with {self.write_command}") from error
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        count, side = self.num_queries, self.mask_size
        wanted = {
            "pred_masks": (count, side, side),
            "pred_boxes": (count, 4),
            "pred_logits": (count,),
            "presence_logits": (1,),
            "semantic_seg": (1, *found.get("semantic_seg", ())[1:]),
        }
        if found != wanted:
            raise ValueError(f"{path} holds {found}, wanted {wanted}; remove it and run {self.write_command}")
        return {name: tensors[name] for name in OUTPUTS}


def open_trunk_cache(config: DistillationConfig, teacher_meta: Mapping[str, Any]) -> EmbeddingReader:
    """The store in `cache_dir`, written by this program or by Stage 1, float16 or int8.

    Raises:
        FileNotFoundError: no store there.
        ValueError: of another teacher, of pictures that were resized, normalised or changed otherwise, or one that
            does not say.
    """
    expect = trunk_meta(config, teacher_meta)
    expect["teacher"] = {"sha256": teacher_meta["sha256"]}  # a file may have been renamed
    del expect["dtype"]
    reader = EmbeddingReader(
        config.cache_dir, shape=expect["shape"], expect=expect, write_command=write_command("trunk", config.cache_dir)
    )
    if reader.meta is None:
        raise ValueError(
            f"the store {reader.folder} has no meta.json, so nobody knows its teacher, nor how it saw the pictures; "
            "write a cache in another folder (--write-cache trunk --cache-dir)"
        )
    return reader


def open_output_cache(config: DistillationConfig, teacher_meta: Mapping[str, Any], min_queries: int) -> OutputCache:
    """The cache of outputs in `cache_dir`; see `OutputCache`."""
    expect = output_meta(config, teacher_meta)
    expect["teacher"] = {"sha256": teacher_meta["sha256"]}
    return OutputCache(config.cache_dir, expect, min_queries)


def require_cached(cache: EmbeddingReader | OutputCache, keys: Sequence[str]) -> None:
    """ValueError naming pictures that the cache lacks, their number, and the command that writes them.

    Those that its writer could not read may be missing: a run cannot read them either, and shows the next ones.
    """
    path = Path(cache.folder, SKIPPED_FILE)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    unreadable = {line.partition("\t")[0] for line in lines}
    if missing := [key for key in cache.missing(keys) if key not in unreadable]:
        raise ValueError(
            f"the cache {cache.folder} lacks {len(missing)} of {len(keys)} pictures: {list_names(missing, NUM_NAMED)}; "
            f"write them with {cache.write_command}"
        )


def require_queries(count: int, wanted: int) -> None:
    """ValueError if a cache of `count` queries is too small for a student with `wanted`."""
    if count < wanted:
        raise ValueError(
            f"the output cache keeps {count} queries of a picture, but the student has {wanted}, each of which is "
            f"compared with one; write a cache in another folder with cache_queries {wanted} or more"
        )


def trunk_meta(config: DistillationConfig, teacher_meta: Mapping[str, Any]) -> dict[str, Any]:
    """Of a trunk cache: the very fields of a Stage-1 export without augmentation, so that each can extend the other."""
    return store_meta(teacher_meta["trunk_shape"], "float16", **_circumstances(config, teacher_meta))


def output_meta(config: DistillationConfig, teacher_meta: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cache of outputs, as JSON values."""
    return {
        "kind": KIND,
        "queries": config.cache_queries,
        "mask_size": config.cache_mask_size,
        "dtype": "float16",
        "prompts": list(config.prompts),
        "prompt_index": PROMPT_INDEX,
        **_circumstances(config, teacher_meta),
    }


def _circumstances(config: DistillationConfig, teacher_meta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "teacher": {name: teacher_meta[name] for name in ("name", "sha256")},
        "preprocess": SA1BDistillDataset.teacher_preprocess(config).to_meta(),
        "augmentation": {"enabled": False},
    }


def output_path(folder: Path, key: str) -> Path:
    """Where the outputs of a picture lie."""
    return folder / f"{key}{SAFETENSORS_SUFFIX}"


def write_command(kind: str, folder: str | Path) -> str:
    return f"python train_distill.py --write-cache {kind} --cache-dir {folder}"
