"""The teacher of transformers against `Sam3Model` itself, at small sizes and with random weights."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from open_clip.tokenizer import bytes_to_unicode, default_bpe

from distillation.config import DistillationConfig
from distillation.teachers.build import build_teacher, describe_teacher
from sam3.engine.files import sha256
from sam3.engine.weights import load_weights, save_weights
from sam3.model.config import Sam3Config
from tests.samples import TINY_MAP

transformers = pytest.importorskip("transformers", minversion="5.0")

PROMPTS = torch.tensor([3, 1])
OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
WEIGHTS = "model.safetensors"
NUM_MERGES = 49152 - 256 - 2  # that CLIP took from its list


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Theirs, from the vocabulary that open_clip brings along."""
    with gzip.open(default_bpe()) as file:
        merges = file.read().decode().split("\n")[1 : NUM_MERGES + 1]
    pairs = [tuple(line.split()) for line in merges]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from benchmarks.bench_model import transformers_config

    path = tmp_path_factory.mktemp("hf") / "small_sam3"
    torch.manual_seed(0)
    model = transformers.Sam3Model(transformers_config(Sam3Config.preset("tiny")))
    with torch.no_grad():
        for name, value in model.named_parameters():  # theirs are so small that the outputs would all be alike
            if value.ndim > 1 and "embed" not in name:
                value.normal_(std=(1.5 / value[0].numel()) ** 0.5)
    model.save_pretrained(path)
    clip_tokenizer().save_pretrained(path)
    return path


def make(folder: Path | str, size: int = 224, with_trunk: bool = True):
    return build_teacher(settings(folder, size), "cpu", with_trunk)


def settings(folder: Path | str, size: int = 224) -> DistillationConfig:
    return DistillationConfig(teacher_backend="hf", teacher_model_name=str(folder), image_size=size)


def pictures(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


@torch.no_grad()
def ask(folder: Path, size: int, **changes: torch.Tensor | None):
    """Their model's outputs when it is called as its documentation says."""
    config = transformers.Sam3Config.from_pretrained(folder)
    config.image_size = size
    model = transformers.Sam3Model.from_pretrained(folder, config=config).eval()
    texts = [DistillationConfig().prompts[index] for index in PROMPTS]
    tokens = clip_tokenizer()(texts, padding="max_length", max_length=32, return_tensors="pt")
    inputs = {"pixel_values": pictures(size), **tokens, "output_hidden_states": True, **changes}
    return model.get_vision_features(pictures(size)).fpn_hidden_states, model(**inputs)


@pytest.mark.parametrize("size", [224, 112])
def test_outputs_are_those_of_sam3model(folder: Path, size: int):
    levels, wanted = ask(folder, size)
    teacher = make(folder, size)
    found = teacher(pictures(size), PROMPTS, features=True)
    for name in OUTPUTS:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)
    grid = size // 14
    assert found["encoder_output"].shape == (2, grid * grid, 64) and found["encoder_hw"] == (grid, grid)
    torch.testing.assert_close(found["encoder_output"], wanted.encoder_hidden_states[-1], atol=1e-5, rtol=1e-4)
    assert [level.shape[-1] for level in found["fpn_features"]] == [4 * grid, 2 * grid, grid]
    for mine, theirs in zip(found["fpn_features"], levels[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert set(teacher(pictures(size), PROMPTS, features=False)) == set(OUTPUTS)
    assert (teacher.image_size, teacher.dim, teacher.num_queries, teacher.trunk_shape) == (
        size,
        64,
        20,
        (TINY_MAP[0], grid, grid),
    )


def test_padding_takes_no_part(folder: Path):
    """The equality above would not show it if the mask had no effect."""
    _, wanted = ask(folder, 112)
    _, unmasked = ask(folder, 112, attention_mask=None)
    assert (unmasked["pred_logits"] - wanted["pred_logits"]).abs().max() > 1e-3


def test_it_is_frozen_and_goes_on_from_its_trunk(folder: Path):
    teacher, heads = make(folder, 112), make(folder, 112, with_trunk=False)
    before = teacher(pictures(112).requires_grad_(), PROMPTS, features=True)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    maps = teacher.embed(pictures(112))
    assert tuple(maps.shape) == (2, TINY_MAP[0], 8, 8)
    for part in (teacher, heads):
        with torch.autocast("cpu", torch.bfloat16):
            found = part.forward_from_trunk(maps.clone(), PROMPTS, features=True)
        for name in (*OUTPUTS, "encoder_output"):
            assert torch.equal(found[name], before[name]) and not found[name].requires_grad
    names = [name for name, _ in teacher.named_parameters()]
    assert not any("text_encoder" in name or "geometry_encoder" in name for name in names)
    assert any(".backbone." in name for name in names)
    assert not any(".backbone." in name for name, _ in heads.named_parameters())


def test_it_says_who_it_is(folder: Path):
    digest = sha256(folder / WEIGHTS)
    meta = {"backend": "hf", "name": "small_sam3", "sha256": digest, "trunk_shape": [TINY_MAP[0], 8, 8]}
    assert describe_teacher(settings(folder, 112)) == make(folder, 112, with_trunk=False).meta == meta


def test_files_of_the_video_model_serve_too(folder: Path, tmp_path: Path):
    """As on the hub: the detector inside a video model, beside a tracker."""
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    detector = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3_video", "detector_config": detector}))
    tensors = {f"detector_model.{key}": value for key, value in load_weights(folder / WEIGHTS).tensors.items()}
    save_weights(tmp_path / WEIGHTS, {**tensors, "tracker_model.no_memory_embedding": torch.zeros(1, 1, 4)})
    found, wanted = (make(path, 112)(pictures(112), PROMPTS, features=False) for path in (tmp_path, folder))
    assert all(torch.equal(found[name], wanted[name]) for name in OUTPUTS)


def test_folders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"image_size 100 is no multiple .* 14 px; set image_size 98"):
        make(folder, 100)
    with pytest.raises(ValueError, match=r"holds no model that transformers can open .*; or teach with sam3\.pt"):
        make(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'no such folder' is neither a folder nor the name of a model"):
        make("no such folder")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"holds a model of type 'bert'; wanted sam3"):
        make(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors"):
        make(tmp_path)
    tensors = load_weights(folder / WEIGHTS).tensors
    missing = [key for key in tensors if key.startswith("mask_decoder.")]
    save_weights(tmp_path / WEIGHTS, {key: value for key, value in tensors.items() if key not in missing})
    with pytest.raises(ValueError, match=rf"lacks {len(missing)} weights of Sam3Model: mask_decoder\."):
        make(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot load Sam3Model from"):
        make(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"the tokenizer in .* knows \d words, the model 49408; fetch all files"):
        make(tmp_path)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'needs transformers; pip install -e "\.\[hf\]"'):
        make(folder)


def test_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path):
    """Fetched if access is granted; else what is there serves, or the message says what to do."""
    asked = []

    def serve(failure: Exception | None, there: bool) -> None:
        def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
            assert "*.safetensors" in allow_patterns and name == "facebook/sam3"
            asked.append(local_files_only)
            if local_files_only and not there:
                raise errors.LocalEntryNotFoundError("not there")
            if failure and not local_files_only:
                raise failure
            return str(folder)

        asked.clear()
        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    serve(None, there=False)
    assert make("facebook/sam3", 112, with_trunk=False).meta["name"] == "facebook/sam3" and asked == [False]
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    gated = errors.GatedRepoError("gated", response=response)
    serve(gated, there=True)
    assert describe_teacher(settings("facebook/sam3", 112))["trunk_shape"] == [TINY_MAP[0], 8, 8]
    assert asked == [False, True]
    serve(gated, there=False)
    with pytest.raises(PermissionError, match=r"facebook/sam3 is gated and you have no access yet"):
        make("facebook/sam3")
    serve(errors.LocalEntryNotFoundError("offline"), there=False)
    with pytest.raises(ConnectionError, match=r"no connection to the hub for facebook/sam3"):
        make("facebook/sam3")
