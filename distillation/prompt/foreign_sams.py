"""SAM as other packages build it, behind the same `encode` and `decode` as ours: teachers whose weights come that way.

Image encoder and mask decoder are theirs, under their names, which hooks may name. Prompts are encoded by our own
encoder with their weights: it knows points that are corners of a box, as mixed prompts have them.

Letters: `B` pictures, `S` side of the square they fill, `C` channels, `G` side of the embedding's grid, `P` prompts,
`n` embeddings (1 for all prompts, or P), `k` points and `K` masks of a prompt, `h w` rows and columns of a mask.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from sam3.engine import distributed, hub
from sam3.engine.weights import list_names, load_strict, load_weights
from sam3.sam.prompt_encoder import PromptEncoder

PATCH = 16  # pixels of a cell
WIDTHS = {1280: "vit_h", 1024: "vit_l", 768: "vit_b"}  # of the encoder
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/model
FILES = ["*.json", "*.safetensors"]  # of a repository: no weights that could run code
NATIVE = "or take the original checkpoint (backend: native, scripts/download_sam1.py)"


class Masks(NamedTuple):
    """masks: `(P, K, h, w)` logits. ious: `(P, K)`, as predicted."""

    masks: Tensor
    ious: Tensor


class TransformersSam(nn.Module):
    """`SamModel` of transformers. type: vit_h, vit_l, vit_b, or `vit_<width>` for any other. image_size: S."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vision = model.config.vision_config
        self.type = WIDTHS.get(vision.hidden_size, f"vit_{vision.hidden_size}")
        self.image_size = vision.image_size
        self.vision_encoder, self.mask_decoder = model.vision_encoder, model.mask_decoder
        tensors = {_our_name(key): tensor for key, tensor in model.prompt_encoder.state_dict().items()}
        tensors["pe_layer.positional_encoding_gaussian_matrix"] = model.shared_image_embedding.positional_embedding
        self.prompt_encoder = _prompt_encoder(self.image_size, tensors, "SamModel")

    def encode(self, images: Tensor) -> Tensor:
        """Normalised `(B, 3, S, S)` -> `(B, C, G, G)`."""
        return self.vision_encoder(images).last_hidden_state

    def decode(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, multimask: bool
    ) -> Masks:
        """embedding `(n, C, G, G)`; points `(P, k, 2)` with labels `(P, k)`, boxes `(P, 4)`: pixels of the square."""
        sparse, dense = self.prompt_encoder(points, boxes)
        rows = (len(sparse), -1, -1, -1)
        masks, ious = self.mask_decoder(
            image_embeddings=embedding.expand(rows),
            image_positional_embeddings=self.prompt_encoder.get_dense_pe().expand(rows),
            sparse_prompt_embeddings=sparse[:, None],  # each prompt as a picture with one prompt
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return Masks(masks[:, 0], ious[:, 0])


class SegmentAnythingSam(nn.Module):
    """The model of the package `segment_anything`; its names are ours. type: vit_h, vit_l or vit_b. image_size: S."""

    def __init__(self, model: nn.Module, type: str) -> None:
        super().__init__()
        self.type, self.image_size = type, model.image_encoder.img_size
        self.image_encoder, self.mask_decoder = model.image_encoder, model.mask_decoder
        self.prompt_encoder = _prompt_encoder(self.image_size, model.prompt_encoder.state_dict(), "segment_anything")

    def encode(self, images: Tensor) -> Tensor:
        """Normalised `(B, 3, S, S)` -> `(B, C, G, G)`."""
        return self.image_encoder(images)

    def decode(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, multimask: bool
    ) -> Masks:
        """embedding `(n, C, G, G)`; points `(P, k, 2)` with labels `(P, k)`, boxes `(P, 4)`: pixels of the square."""
        sparse, dense = self.prompt_encoder(points, boxes)
        # This decoder repeats an embedding for all its prompts, so prompts of several pictures go one after the other.
        parts = [slice(None)] if len(embedding) == 1 else [slice(row, row + 1) for row in range(len(embedding))]
        results = [
            self.mask_decoder(
                image_embeddings=embedding[part],
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[part],
                dense_prompt_embeddings=dense[part],
                multimask_output=multimask,
            )
            for part in parts
        ]
        return Masks(*(torch.cat(column) for column in zip(*results, strict=True)))


def load_transformers(folder: Path) -> TransformersSam:
    """The model in a folder, in float32 on the CPU.

    Raises ValueError if transformers is not installed, or the folder holds another model or not all of its weights.
    """
    transformers = _import("transformers", "transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "sam":
            raise ValueError(f"it is a model of type {kind!r}, not sam")
        model, report = transformers.SamModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise ValueError(f"cannot load a SamModel from {folder}: {reason}; name another, {NATIVE}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights of SamModel: {list_names(missing)}; fetch it again")
    return TransformersSam(model)


def load_segment_anything(path: Path, type: str) -> SegmentAnythingSam:
    """An original checkpoint in the model of that package, strictly. ValueError if it is not installed or knows no
    such type, or the file does not fit."""
    package = _import("segment_anything", "segment-anything")
    if type not in package.sam_model_registry:
        raise ValueError(
            f"segment_anything knows no {type}, only {', '.join(sorted(package.sam_model_registry))}; "
            "set backend: native"
        )
    model = package.sam_model_registry[type](checkpoint=None)
    load_strict(model, load_weights(path).tensors, source=path)
    return SegmentAnythingSam(model, type)


def _prompt_encoder(image_size: int, tensors: Mapping[str, Tensor], source: str) -> PromptEncoder:
    grid = (image_size // PATCH,) * 2
    encoder = PromptEncoder(tensors["no_mask_embed.weight"].shape[1], grid, (image_size,) * 2)
    load_strict(encoder, tensors, source=f"the prompt encoder of {source}")
    return encoder


def _our_name(key: str) -> str:
    """Of an entry of transformers' prompt encoder."""
    layers = {"conv1": 0, "layer_norm1": 1, "conv2": 3, "layer_norm2": 4, "conv3": 6}
    if key.startswith("mask_embed."):
        _, layer, kind = key.split(".")
        return f"mask_downscaling.{layers[layer]}.{kind}"
    if key.startswith("shared_embedding."):
        return "pe_layer.positional_encoding_gaussian_matrix"
    return re.sub(r"^point_embed\.", "point_embeddings.", key)


def fetch_transformers(name: str) -> Path:
    """The folder of a model: `name` itself, or where the hub's files of that name lie, fetched if they are not there.

    Raises FileNotFoundError if `name` is neither; what `hub.explained` raises if the hub refuses.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r} is neither a folder of transformers nor a name at the hub such as facebook/sam-vit-huge; "
            f"set the teacher's checkpoint to one, {NATIVE}"
        )
    from huggingface_hub import errors, snapshot_download  # for those who ask for it

    with distributed.main_first():
        try:
            return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            with hub.explained(name, "model.safetensors", "main"):
                return Path(snapshot_download(name, allow_patterns=FILES))


def _import(backend: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(backend)
    except ImportError as error:
        raise ValueError(
            f"the teacher's backend {backend!r} needs {package}; pip install {package}, {NATIVE}"
        ) from error
