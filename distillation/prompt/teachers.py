"""Teachers: frozen SAM-1 models whose features the student imitates, from our own files or other packages.

Letters: `B` pictures, `S` side of the square they fill, `G` = S / 16, `C` = 256 channels, `C'` channels of the patch
features, `P` prompts, `K` masks of a prompt, `h w` rows and columns of a mask.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillation.prompt.config import LOSSES, DistillationSettings, TeacherSettings
from distillation.prompt.foreign_sams import fetch_transformers, load_segment_anything, load_transformers
from distillation.prompt.hooked import OF_DECODER, Decoded, Encoded, HookedSam
from distillation.prompt.hooks import COMPONENTS
from distillation.prompt.model_file import load_model_file
from distillation.prompt.prompts import Prompts
from distillation.teachers.teacher import place
from sam3.engine.files import sha256
from sam3.engine.weights import load_weights
from sam3.sam.sam1 import infer_type
from sam3.sam1_files import load_sam1

BACKENDS = ("native", "transformers", "segment_anything")
DENSE, IOUS = "dense_mask_logits", "ious"
FETCH = "python scripts/download_sam1.py"
NECKS = ("image_encoder.neck.0", "vision_encoder.neck.conv1")  # the first convolution of a neck, ours and transformers'

logger = logging.getLogger("sam3.distillation")


class Teacher:
    """A frozen model in eval mode that nobody trains: no module, so that no student's parameters can hold it.

    It computes without gradients and outside autocast, in the type of its weights; what it gives is float32.

    name: its label. weight: of its losses, None if the configuration leaves it open. backend: one of BACKENDS. type:
    vit_h, vit_l, vit_b, vit_t, ... image_size: S. components: losses it has features for.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        components: Sequence[str],
        tap: str,
        model: nn.Module,
        files: Sequence[Path],
        device: str | torch.device = "auto",
    ) -> None:
        """components: any of the four losses; hooks are set for these only. tap: of prompt_embed. files: its weights.

        Raises ValueError if the model has no place for a hook.
        """
        self.name, self.weight, self.backend = settings.name, settings.weight, settings.backend
        self.components, self.files = tuple(components), tuple(files)
        self.type, self.image_size = model.type, model.image_size
        self.device, self.dtype = place(settings.dtype, device)
        self.model = model.to(self.device, self.dtype).requires_grad_(False).eval()
        hooks = {component: settings.hooks.get(component) for component in COMPONENTS if component in components}
        self._sam = HookedSam(self.model, hooks, tap, self.name)

    @property
    def hooks(self) -> dict[str, list[str]]:
        """Component -> the hook string that was asked for, and the place that it means in this model."""
        return {component: [hook.asked, str(hook)] for component, hook in self._sam.hooks.items()}

    @property
    def embed_tap(self) -> str | None:
        """Of prompt_embed, by what its hook really does: before (`input_keys`) or after the prompts have met it."""
        hook = self._sam.hooks.get("prompt_embed")
        return None if hook is None else "input_keys" if hook.before_prompts else "output_keys"

    @property
    def needs_decoder(self) -> bool:
        """Whether any of its components comes from the decoder."""
        return any(component in (*OF_DECODER, DENSE) for component in self.components)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Which teacher this is, in plain values: name, type, backend, and of its weights
        base name (of transformers, that of the folder), bytes and sha256.

        Reads the files once to the end, when it is first asked for.
        """
        digests = [sha256(file) for file in self.files]
        joined = hashlib.sha256("".join(digests).encode()).hexdigest()
        return {
            "name": self.name,
            "type": self.type,
            "backend": self.backend,
            "checkpoint": (self.files[0].parent if self.backend == "transformers" else self.files[0]).name,
            "bytes": sum(file.stat().st_size for file in self.files),
            "sha256": digests[0] if len(digests) == 1 else joined,
        }

    def encode(self, images: Tensor) -> Encoded:
        """images: normalised float32 `(B, 3, S, S)` on its device. ValueError for another size."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"teacher {self.name} takes pictures (B, 3, {self.image_size}, {self.image_size}), got "
                f"{tuple(images.shape)}; image_size of model and teacher have to agree"
            )
        with torch.no_grad(), self._no_autocast():
            encoded = self._sam.encode(images.to(self.dtype))
        return Encoded(encoded.embedding.float(), _float32(encoded.features))

    def decode(self, embedding: Tensor, prompts: Prompts, multimask: bool) -> Decoded:
        """embedding: `(1, C, G, G)` of `encode` for all prompts, or `(P, C, G, G)`; prompts on its device."""
        with torch.no_grad(), self._no_autocast():
            decoded = self._sam.decode(embedding.to(self.dtype), prompts, multimask)
        return Decoded(decoded.masks.float(), decoded.ious.float(), _float32(decoded.features))

    def features_of(self, images: Tensor, prompts: Prompts | None, multimask: bool) -> dict[str, Tensor]:
        """All components for pictures with a prompt each (P = B), or for one picture and its P prompts.

        images: as `encode` takes them. prompts: may be None if nothing comes from the decoder.
        encoder_patch `(B, C', G, G)`, prompt_embed `(P, C, G, G)` (or `(1, C, G, G)`, see `Decoded`),
        decoder_mask_token `(P, 4, C)`, dense_mask_logits `(P, K, h, w)` and with them ious `(P, K)`.
        """
        encoded = self.encode(images)
        features = dict(encoded.features)
        if self.needs_decoder:
            assert prompts is not None, "features of the decoder need prompts"
            decoded = self.decode(encoded.embedding, prompts, multimask)
            features |= decoded.features
            if DENSE in self.components:
                features |= {DENSE: decoded.masks, IOUS: decoded.ious}
        return features

    def neck_projection(self) -> Tensor | None:
        """Weight `(C, C', 1, 1)`, float32, of the first convolution of the encoder's neck; None if it has none such."""
        for path in NECKS:
            try:
                return self.model.get_parameter(f"{path}.weight").detach().float()
            except AttributeError:
                continue
        return None

    def _no_autocast(self) -> Any:
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def build_teacher(
    settings: TeacherSettings,
    distillation: DistillationSettings,
    device: str | torch.device = "auto",
    image_size: int | None = None,
) -> Teacher | None:
    """The teacher that the configuration names, with hooks for the losses that are on.

    None, with a warning, if its checkpoint is not there and it is optional.

    image_size: pixels that it has to take; None: what `cfg` or, failing that, the file says.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a file of another type or size than `type` and `cfg` say, that does not fit, or a missing package.
    """
    components = [name for name in LOSSES if getattr(distillation, name).enable]
    try:
        model, files = load_model(settings, image_size)
    except FileNotFoundError as error:
        if not settings.optional:
            raise
        logger.warning("teacher %s is left out, as it is optional: %s", settings.name, error)
        return None
    return Teacher(settings, components, distillation.prompt_embed.tap, model, files, device)


def build_teachers(
    teachers: Sequence[TeacherSettings],
    distillation: DistillationSettings,
    device: str | torch.device = "auto",
    image_size: int | None = None,
) -> list[Teacher]:
    """All teachers whose checkpoints are there. Raises what `build_teacher` raises; ValueError if none is left."""
    built = [build_teacher(each, distillation, device, image_size) for each in teachers]
    built = [teacher for teacher in built if teacher is not None]
    if not built:
        raise ValueError(
            "distillation is on, but none of the optional teachers has its checkpoint: fetch one with "
            f"{FETCH}, or set distillation.enable false"
        )
    return built


def load_model(settings: TeacherSettings, image_size: int | None = None) -> tuple[nn.Module, list[Path]]:
    """A teacher's model, float32 on the CPU, and the files of its weights. Raises what `build_teacher` raises."""
    named = load_model_file(settings.cfg) if settings.cfg else None
    checkpoint = settings.checkpoint or (named.checkpoint if named else "")
    if not checkpoint:
        raise ValueError(f"teacher {settings.name} has no checkpoint; set it in teachers[].checkpoint or in its cfg")
    said = [("teachers[].type", settings.type), (settings.cfg, named.type if named else None)]
    types = {source: type for source, type in said if type}
    said = [("model.image_size", image_size), (settings.cfg, named.image_size if named else None)]
    sizes = {source: size for source, size in said if size}
    for what, values in (("type", types), ("image size", sizes)):
        if len(set(values.values())) > 1:
            both = ", but ".join(f"{source} says {value}" for source, value in values.items())
            raise ValueError(f"teacher {settings.name} has no clear {what}: {both}; make them agree")
    size = next(iter(sizes.values()), None)
    if settings.backend == "transformers":
        model, files = _from_transformers(checkpoint, settings.name)
    else:
        model, files = _from_file(Path(checkpoint), settings, types, size)
    _compare(settings.name, checkpoint, "type", types, model.type)
    _compare(settings.name, checkpoint, "image size", sizes, model.image_size)
    return model, files


def _from_file(
    path: Path, settings: TeacherSettings, types: Mapping[str, str], size: int | None
) -> tuple[nn.Module, list[Path]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"teacher {settings.name} has no checkpoint {path}; fetch it with {FETCH}, name another "
            "(teachers[].checkpoint), or let training go on without it (optional: true)"
        )
    try:
        found = infer_type(load_weights(path).tensors)
    except ValueError as error:
        raise ValueError(f"teacher {settings.name}: {path} is no file of a SAM-1 model: {error}") from error
    _compare(settings.name, str(path), "type", types, found)  # before anything is built
    if settings.backend == "segment_anything":
        return load_segment_anything(path, found), [path]
    return load_sam1(path, found, size), [path]


def _from_transformers(checkpoint: str, name: str) -> tuple[nn.Module, list[Path]]:
    try:
        folder = fetch_transformers(checkpoint)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"teacher {name}: {error}") from error
    return load_transformers(folder), sorted(folder.glob("*.safetensors"))


def _compare(name: str, checkpoint: str, what: str, wanted: Mapping[str, Any], found: Any) -> None:
    for source, value in wanted.items():
        if value != found:
            raise ValueError(
                f"teacher {name}: {source} says {what} {value}, but {checkpoint} holds {what} {found}; name the file "
                "that is meant, or make them agree"
            )


def _float32(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {component: feature.float() for component, feature in features.items()}
