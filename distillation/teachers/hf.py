"""SAM3 as transformers builds it: `Sam3Model`, from a folder or from the hub. Needs the extra `hf`.

Letters: `B` pictures, `P` prompts, `L` tokens of a prompt, `Q` queries, `C` channels, `E G` channels and side of the
trunk's grid.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from distillation.config import DistillationConfig
from distillation.teachers.teacher import Teacher, place
from sam3.engine import distributed, hub
from sam3.engine.files import sha256
from sam3.engine.weights import list_names

FILES = ["*.json", "*.txt", "*.safetensors"]  # of a repository: configs, tokenizer, weights that run no code
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/model
NATIVE = "or teach with sam3.pt (--teacher-backend native)"


class HFTeacher(Teacher):
    """`Sam3Model` for a text prompt; its outputs have the common names already.

    Prompts are encoded once, in float32 on the CPU, with the attention mask of the model's own tokenizer; then text
    tower and geometry encoder are dropped, as nothing asks for them again. Raises what `fetch` and `load_model` raise.
    """

    def __init__(self, config: DistillationConfig, device: str | torch.device = "auto", with_trunk: bool = True):
        """with_trunk: False reads of the trunk its first layer only and keeps nothing of it."""
        folder = fetch(config.teacher)
        meta = _describe(config, folder)
        model = load_model(folder, config.image_size, with_trunk)
        heads = model.config.detr_decoder_config
        super().__init__(config.image_size, heads.hidden_size, heads.num_queries, meta)
        device, dtype = place(config.teacher_dtype, device)
        text, mask = encode_prompts(model, folder, config.prompts)
        model.text_encoder = model.text_projection = model.geometry_encoder = None
        if not with_trunk:
            model.vision_encoder.backbone = None
        self.model = model.to(device, dtype)
        self.register_buffer("text", text.to(device, dtype))  # (P, L, C)
        self.register_buffer("text_mask", mask.to(device))  # (P, L), True = token
        self.freeze()

    def run_trunk(self, images: Tensor) -> Tensor:
        assert self.model.vision_encoder.backbone is not None, "this teacher was built without its trunk"
        tokens = self.model.vision_encoder.backbone(images).last_hidden_state  # (B, GG, E)
        return tokens.transpose(1, 2).unflatten(2, self.trunk_shape[1:])

    def run_heads(self, maps: Tensor, prompt_index: Tensor, features: bool) -> dict[str, Any]:
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

        levels, positions = self.model.vision_encoder.neck(maps)
        found = self.model(
            vision_embeds=Sam3VisionEncoderOutput(fpn_hidden_states=levels, fpn_position_encoding=positions),
            text_embeds=BaseModelOutputWithPooling(pooler_output=self.text[prompt_index]),
            attention_mask=self.text_mask[prompt_index],
            output_hidden_states=features,
        )
        names = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
        outputs = {name: found[name] for name in names}
        if features:
            outputs |= {
                "fpn_features": tuple(levels[:-1]),  # the coarsest is used by nobody
                "encoder_output": found.encoder_hidden_states[-1],
                "encoder_hw": tuple(maps.shape[-2:]),
            }
        return outputs


def describe_hf(config: DistillationConfig) -> dict[str, Any]:
    """The meta of the teacher that `config` names; all processes of a run must call it. Raises what `fetch` raises."""
    return _describe(config, fetch(config.teacher))


def fetch(name: str) -> Path:
    """The folder of a model: `name` itself, or where the hub's files of that name lie, fetched if they are not there.

    Without network, or access, what was fetched before serves. Raises OSError, FileNotFoundError or PermissionError.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file() or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"the teacher {name!r} is neither a folder nor the name of a model on the hub, such as facebook/sam3; "
            f"name one (--teacher), {NATIVE}"
        )
    from huggingface_hub import errors, snapshot_download  # for those who ask for it

    with distributed.main_first():
        try:
            with hub.explained(name, "model.safetensors", "main"):
                return Path(snapshot_download(name, allow_patterns=FILES))
        except OSError as failure:
            try:
                return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise failure from None


def read_config(folder: Path, image_size: int) -> Any:
    """Its `Sam3Config`, for pictures of `image_size`. ValueError if it is another model's, or the size does not fit."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} holds no model that transformers can open ({_first_line(error)}); {NATIVE}"
        ) from error
    config = getattr(config, "detector_config", None) or config  # the hub has it inside the model for video
    if not isinstance(config, transformers.Sam3Config):
        raise ValueError(f"{folder} holds a model of type {config.model_type!r}; wanted sam3 (--teacher facebook/sam3)")
    patch = config.vision_config.backbone_config.patch_size
    if image_size % patch:
        raise ValueError(
            f"image_size {image_size} is no multiple of the teacher's patch, {patch} px; "
            f"set image_size {max(1, image_size // patch) * patch} (--image-size)"
        )
    config.image_size = image_size  # rotary tables are made for one size, when the model is built
    return config


def load_model(folder: Path, image_size: int, with_trunk: bool) -> nn.Module:
    """Its `Sam3Model` in float32 on the CPU, in eval mode. ValueError if weights are missing or do not fit."""
    config = read_config(folder, image_size)
    if not with_trunk:
        config.vision_config.backbone_config.num_hidden_layers = 0  # tensors without a place are not read
    transformers = _transformers()
    with _errors_only(transformers):
        try:
            model, report = transformers.Sam3Model.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"cannot load Sam3Model from {folder}: {_first_line(error)}; {NATIVE}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights of Sam3Model: {list_names(missing)}; fetch it again")
    return model.eval()


@torch.no_grad()
def encode_prompts(model: nn.Module, folder: Path, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Text features `(P, L, C)` and mask `(P, L)`, True = token, by the tokenizer in `folder`."""
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no tokenizer ({_first_line(error)}); fetch all files of the model") from error
    if len(tokenizer) != model.vocab_size:  # without its files it is made all the same, with next to no words
        raise ValueError(
            f"the tokenizer in {folder} knows {len(tokenizer)} words, the model {model.vocab_size}; "
            "fetch all files of the model"
        )
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=model.config.text_config.max_position_embeddings,  # 32 in the released model
        truncation=True,
        return_tensors="pt",
    )
    mask = tokens["attention_mask"]
    return model.get_text_features(tokens["input_ids"], attention_mask=mask).pooler_output, mask.bool()


def _describe(config: DistillationConfig, folder: Path) -> dict[str, Any]:
    trunk = read_config(folder, config.image_size).vision_config.backbone_config
    grid = config.image_size // trunk.patch_size
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors; fetch the model's weights, {NATIVE}")
    name = folder.name if Path(config.teacher).is_dir() else config.teacher
    digest = distributed.broadcast_object(_digest(files) if distributed.is_main() else None)
    return {"backend": "hf", "name": name, "sha256": digest, "trunk_shape": [trunk.hidden_size, grid, grid]}


def _digest(files: Sequence[Path]) -> str:
    """The checksum of a file, or of the checksums of several."""
    digests = [sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f'teacher_backend hf needs transformers; pip install -e ".[hf]", {NATIVE}') from error
    if not hasattr(transformers, "Sam3Model"):
        version = transformers.__version__
        raise ValueError(f"transformers {version} is too old for Sam3Model; pip install -U transformers, {NATIVE}")
    return transformers


@contextmanager
def _errors_only(transformers: ModuleType) -> Iterator[None]:
    """Not a page on the tensors of the tracker that stand in the same file."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
