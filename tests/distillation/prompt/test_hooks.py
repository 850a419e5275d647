"""Hook strings: their grammar, what they mean in each kind of model, and what is said of those that mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distillation.prompt.hooks import COMPONENTS, Hook, parse, resolve
from sam3.sam.sam1 import build_sam1


@pytest.fixture(scope="module")
def mobile() -> nn.Module:
    with torch.device("meta"):
        return build_sam1("vit_t", 256)


@pytest.fixture(scope="module")
def huge() -> nn.Module:
    with torch.device("meta"):
        return build_sam1("vit_h")


@pytest.mark.parametrize(
    ("text", "path", "tap"),
    [
        ("image_encoder.blocks[30]", "image_encoder.blocks[30]", None),
        (" image_encoder.blocks.30 ", "image_encoder.blocks.30", None),
        ("a[-2].b[0][1]@out", "a[-2].b[0][1]", "out"),
        ("a@out.1", "a", "out.1"),
        ("a@in.0", "a", "in.0"),
        ("a@in.keys", "a", "in.keys"),
    ],
)
def test_grammar(text: str, path: str, tap: str | None) -> None:
    assert parse(text) == (path, tap)


@pytest.mark.parametrize("text", ["", "a.", ".a", "a[x]", "a[1", "a b", "a@", "a@keys", "a@in", "a@out.x", "a@out@out"])
def test_what_is_no_hook_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no hook; wanted path"):
        parse(text)


@pytest.mark.parametrize(
    ("component", "tap", "place"),
    [
        ("encoder_patch", "input_keys", "image_encoder.neck"),
        ("prompt_embed", "input_keys", "mask_decoder.transformer.layers.0@in.keys"),
        ("prompt_embed", "output_keys", "mask_decoder.transformer.layers.0@out.1"),
        ("decoder_mask_token", "output_keys", "mask_decoder.transformer@out.0"),
    ],
)
def test_usual_places_of_mobile_sam(mobile: nn.Module, component: str, tap: str, place: str) -> None:
    hook = resolve(mobile, component, None, "vit_t", tap)
    assert str(hook) == place
    assert hook.module is mobile.get_submodule(hook.path)


@pytest.mark.parametrize(("type", "block"), [("vit_h", 30), ("vit_l", 22), ("vit_b", 10), ("vit_tiny", 2)])
def test_a_vit_gives_its_last_block_but_one(type: str, block: int) -> None:
    with torch.device("meta"):
        model = build_sam1(type)
    for hook in (None, "image_encoder.blocks[30]", "image_encoder.blocks[-2]"):
        assert str(resolve(model, "encoder_patch", hook, type)) == f"image_encoder.blocks.{block}"


@pytest.mark.parametrize(
    ("component", "name", "place"),
    [
        ("encoder_patch", "image_encoder.mv2_blocks[-2]", "image_encoder.neck"),
        ("encoder_patch", "image_encoder.mv2_blocks[-2]@out", "image_encoder.neck"),
        ("prompt_embed", "mask_decoder.twa_blocks[0]", "mask_decoder.transformer.layers.0@in.keys"),
        ("prompt_embed", "mask_decoder.twa_blocks[0]@out.1", "mask_decoder.transformer.layers.0@out.1"),
        ("decoder_mask_token", "mask_decoder.mask_tokens", "mask_decoder.transformer@out.0"),
    ],
)
def test_established_names_stand_for_places(mobile: nn.Module, component: str, name: str, place: str) -> None:
    assert str(resolve(mobile, component, name, "vit_t")) == place


def test_an_established_name_that_exists_and_can_fire_is_taken_literally(mobile: nn.Module) -> None:
    model = nn.Module()
    model.image_encoder = nn.Module()
    model.image_encoder.mv2_blocks = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    assert resolve(model, "encoder_patch", None, "vit_t").path == "image_encoder.mv2_blocks.1"


def test_own_hooks_go_before_the_usual_place(mobile: nn.Module) -> None:
    hook = resolve(mobile, "encoder_patch", "image_encoder.layers[3].blocks[0]", "vit_t")
    assert hook.path == "image_encoder.layers.3.blocks.0"
    assert hook.module is mobile.image_encoder.layers[3].blocks[0]
    assert resolve(mobile, "encoder_patch", "image_encoder.neck[-1]", "vit_t").path == "image_encoder.neck.3"


def test_near_matches_are_named(mobile: nn.Module, huge: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'image_encoder.necks' cannot be found.*Near matches: image_encoder.neck"):
        resolve(mobile, "encoder_patch", "image_encoder.necks", "vit_t")
    with pytest.raises(ValueError, match=r"no 'image_encoder.blocks\[40\]', as 'image_encoder.blocks' holds 0, 1, 2"):
        resolve(huge, "encoder_patch", "image_encoder.blocks[40]", "vit_h")
    with pytest.raises(ValueError, match="cannot be found in this vit_h model"):  # the name of another model's place
        resolve(huge, "encoder_patch", "image_encoder.mv2_blocks[-2]", "vit_h")


def test_a_list_of_modules_is_refused(huge: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'image_encoder.blocks' is a list of modules, which cannot be called"):
        resolve(huge, "encoder_patch", "image_encoder.blocks", "vit_h")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_model_without_the_usual_place(component: str) -> None:
    with pytest.raises(ValueError, match=f"the usual place of {component} cannot be found"):
        resolve(nn.Linear(1, 1), component, None)


def test_an_embedding_without_what_it_stands_for() -> None:
    model = nn.Module()
    model.mask_decoder = nn.Module()
    model.mask_decoder.mask_tokens = nn.Embedding(4, 8)
    with pytest.raises(
        ValueError, match=r"'mask_decoder.mask_tokens' is an embedding, which is read and not called; no"
    ):
        resolve(model, "decoder_mask_token", "mask_decoder.mask_tokens")


def test_unknown_components_and_taps(mobile: nn.Module) -> None:
    with pytest.raises(ValueError, match="no component 'dense_mask_logits' has a hook; there are encoder_patch"):
        resolve(mobile, "dense_mask_logits", None)
    with pytest.raises(ValueError, match="tap 'keys' is unknown; choose one of input_keys, output_keys"):
        resolve(mobile, "prompt_embed", None, tap="keys")


class Pair(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor, flag: bool = True) -> tuple:
        return left + right, left - right, flag


LEFT, RIGHT = torch.tensor([3.0]), torch.tensor([1.0])


def heard(tap: str, *args: object, **kwargs: object) -> list[torch.Tensor]:
    module, kept = Pair(), []
    handle = Hook("prompt_embed", "", "pair", tap, module).attach(lambda: kept)
    module(*args, **kwargs)
    handle.remove()
    module(*args, **kwargs)
    return kept


@pytest.mark.parametrize(("tap", "value"), [("out.0", 4.0), ("out.1", 2.0), ("in.0", 3.0), ("in.right", 1.0)])
def test_taps(tap: str, value: float) -> None:
    assert heard(tap, LEFT, RIGHT) == [torch.tensor([value])]


def test_inputs_are_found_by_name_however_they_are_passed() -> None:
    (by_name,), (by_place,) = heard("in.right", left=LEFT, right=RIGHT), heard("in.right", LEFT, RIGHT)
    assert by_name is RIGHT
    assert by_place is RIGHT


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("out", "it gives a tuple, wanted a tensor; take one of them with @out.0 to @out.2"),
        ("out.2", "it gives a bool, wanted a tensor"),
        ("out.3", "the module returns 3 values"),
        ("in.2", "the module was called with 2 inputs by place"),
        ("in.middle", "the module was called with the inputs left, right"),
    ],
)
def test_a_tap_without_a_tensor(tap: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heard(tap, LEFT, RIGHT)
