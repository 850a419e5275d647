"""Model files such as configs/sam_vith.yaml: which SAM a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distillation.prompt.config import Sam1Type
from sam3.backbones.sam_vit import PATCH_SIZE
from sam3.engine import settings
from sam3.sam.sam1 import VITS

DECODER_DEPTH = 2


@dataclass(frozen=True)
class ModelFile:
    """The block `model` of a file such as configs/sam_vith.yaml. The sizes may be left out."""

    type: Sam1Type
    name: str = ""
    image_size: int | None = None
    checkpoint: str = ""
    patch_size: int = PATCH_SIZE
    embed_dim: int | None = None
    num_heads: int | None = None
    decoder_depth: int = DECODER_DEPTH

    def __post_init__(self) -> None:
        known = {"patch_size": PATCH_SIZE, "decoder_depth": DECODER_DEPTH}
        if shape := VITS.get(self.type):
            known |= {"embed_dim": shape.dim, "num_heads": shape.heads}
        for name, wanted in known.items():
            if getattr(self, name) not in (None, wanted):
                raise ValueError(f"model.{name} is {getattr(self, name)}, but {self.type} has {wanted}")


def load_model_file(path: str | Path) -> ModelFile:
    """A model file, YAML or JSON. ValueError if it lacks the block `model` or its type."""
    values = settings.read_mapping(path)
    block = values.get("model")
    if set(values) != {"model"} or not isinstance(block, Mapping) or "type" not in block:
        raise ValueError(
            f"{path} is no model file: wanted the one block `model` with a `type`, found "
            f"{', '.join(map(str, values)) or 'nothing'}; see configs/sam_vith.yaml"
        )
    return settings.build(ModelFile, block, str(path), "model.")
