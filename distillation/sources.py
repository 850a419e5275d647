"""What a run reads: pictures in two parts, and the teacher's cache if there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distillation.cache import OutputCache, open_output_cache, open_trunk_cache, require_cached
from distillation.config import DistillationConfig, Phase
from distillation.dataset import SA1BDistillDataset
from distillation.listing import Pictures, scan_sa1b, split_pictures
from distillation.models.tokenizer import tokenize
from distillation.teachers.build import describe_teacher
from sam3.engine.embeddings import EmbeddingReader


@dataclass(frozen=True)
class Sources:
    """train, val: pictures. store: the trunk's maps; outputs: all the teacher says; None without such a cache.

    teacher_meta: plain values that say which teacher it is.
    """

    config: DistillationConfig
    train: Pictures
    val: Pictures
    store: EmbeddingReader | None
    outputs: OutputCache | None
    teacher_meta: dict[str, Any]

    def dataset(self, training: bool) -> SA1BDistillDataset:
        """Of either part."""
        return SA1BDistillDataset(
            self.train if training else self.val,
            self.config,
            training=training,
            tokenizers={"student": tokenize},
            store=self.store,
            outputs=self.outputs,
        )


def open_sources(config: DistillationConfig, phase: Phase, num_queries: int) -> Sources:
    """List the pictures and open the cache; num_queries: of the student.

    Raises FileNotFoundError or ValueError for missing pictures or cache entries, and for a cache that cannot serve.
    """
    if phase.with_features and config.teacher_mode == "output_cache":
        raise ValueError(
            "phase 1 aligns features, which an output cache does not hold; use teacher_mode online or trunk_cache, or "
            "--phase 2"
        )
    train, val = split_pictures(scan_sa1b(config.sa1b_dir, config.require_json), config.num_val, config.num_train)
    val = val.part(0, config.val_max_images)
    teacher_meta = describe_teacher(config)
    store = outputs = None
    if config.teacher_mode == "trunk_cache":
        store = open_trunk_cache(config, teacher_meta)
    elif config.teacher_mode == "output_cache":
        outputs = open_output_cache(config, teacher_meta, num_queries)
    for cache in (store, outputs):
        if cache is not None:
            require_cached(cache, [*train.keys(), *val.keys()])
    return Sources(config, train, val, store, outputs, teacher_meta)
