"""What a hooked model hands out: shapes, the graph behind it, nothing kept, and clear words where there is nothing."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distillation.prompt.hooked import HookedSam, as_maps, mask_tokens
from distillation.prompt.hooks import COMPONENTS, Hook
from distillation.prompt.losses import dense_mask_logits_loss, encoder_patch_loss, mask_token_loss, prompt_embed_loss
from distillation.prompt.prompts import Prompts
from sam3.sam.mask_decoder import DecodedMasks
from sam3.sam.sam1 import Sam1, build_sam1

SIDE, GRID, C = 256, 16, 256
SMALL = 128  # where there is a backward pass
ALL = dict.fromkeys(COMPONENTS)


def build(type: str, seed: int = 0, side: int = SIDE) -> Sam1:
    torch.manual_seed(seed)
    return build_sam1(type, side).eval()  # eval: batch-norm statistics stay


@pytest.fixture(scope="module")
def mobile() -> Sam1:
    return build("vit_t")


def pictures(count: int, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def clicks(count: int) -> Prompts:
    points = torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(2)) * SMALL
    return Prompts(points, torch.ones(count, 1, dtype=torch.int64))


def boxes(count: int) -> Prompts:
    return Prompts(boxes=torch.tensor([[20.0, 30.0, 200.0, 180.0]]).repeat(count, 1))


def features(hooked: HookedSam, images: Tensor, prompts: Prompts) -> dict[str, Tensor]:
    """Of all components, and the dense mask logits."""
    encoded = hooked.encode(images)
    decoded = hooked.decode(encoded.embedding, prompts, multimask=False)
    return {**encoded.features, **decoded.features, "dense_mask_logits": decoded.masks}


LOSSES = {
    "encoder_patch": encoder_patch_loss,
    "prompt_embed": prompt_embed_loss,
    "decoder_mask_token": mask_token_loss,
    "dense_mask_logits": dense_mask_logits_loss,
}


@pytest.mark.parametrize("tap", ["input_keys", "output_keys"])
@pytest.mark.parametrize("prompts", [clicks(3), boxes(3)], ids=["points", "boxes"])
def test_shapes_of_mobile_sam(mobile: Sam1, tap: str, prompts: Prompts) -> None:
    hooked = HookedSam(mobile, ALL, tap)
    with torch.no_grad():
        found = features(hooked, pictures(3), prompts)
    hooked.remove()
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "encoder_patch": (3, 256, GRID, GRID),
        "prompt_embed": (3, C, GRID, GRID),
        "decoder_mask_token": (3, 4, C),
        "dense_mask_logits": (3, 1, 4 * GRID, 4 * GRID),
    }


def test_shapes_of_a_vit() -> None:
    model = build("vit_tiny")
    hooked = HookedSam(model, ALL)
    with torch.no_grad():
        found = features(hooked, pictures(2), clicks(2))
    assert tuple(found["encoder_patch"].shape) == (2, 192, GRID, GRID)
    assert hooked.hooks["encoder_patch"].path == "image_encoder.blocks.2"


def test_an_embedding_shared_by_all_prompts_is_given_once_before_they_reach_it(mobile: Sam1) -> None:
    with torch.no_grad():
        for tap, rows in (("input_keys", 1), ("output_keys", 3)):
            hooked = HookedSam(mobile, {"prompt_embed": None}, tap)
            embedding = hooked.encode(pictures(1)).embedding
            decoded = hooked.decode(embedding, clicks(3), multimask=True)
            hooked.remove()
            assert tuple(decoded.features["prompt_embed"].shape) == (rows, C, GRID, GRID)
            assert tuple(decoded.masks.shape) == (3, 3, 4 * GRID, 4 * GRID)
            assert tuple(decoded.ious.shape) == (3, 3)


def test_the_features_are_what_the_decoder_computes_with(mobile: Sam1) -> None:
    hooked = HookedSam(mobile, ALL)
    with torch.no_grad():
        encoded = hooked.encode(pictures(2))
        decoded = hooked.decode(encoded.embedding, clicks(2), multimask=False)
        sparse, dense = mobile.prompt_encoder((clicks(2).points, clicks(2).labels), None)
        every = mobile.mask_decoder.forward_all(encoded.embedding, mobile.prompt_encoder.get_dense_pe(), sparse, dense)
    hooked.remove()
    torch.testing.assert_close(decoded.features["decoder_mask_token"], every.tokens, rtol=0, atol=0)
    torch.testing.assert_close(decoded.features["prompt_embed"], encoded.embedding + dense, rtol=0, atol=0)
    assert encoded.features["encoder_patch"] is encoded.embedding  # the neck's output, itself and no copy
    torch.testing.assert_close(decoded.masks, every.masks[:, :1], rtol=0, atol=0)


def test_the_embedding_of_the_mask_tokens_never_fires(mobile: Sam1) -> None:
    """Why its name stands for another place."""
    fired = []
    handle = mobile.mask_decoder.mask_tokens.register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        features(HookedSam(mobile, {}), pictures(1), clicks(1))
    handle.remove()
    assert fired == []


def test_a_hook_that_never_fires_is_named_with_its_component(mobile: Sam1) -> None:
    hooked = HookedSam(mobile, {"decoder_mask_token": "mask_decoder.iou_token"}, name="teacher A")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"teacher A: the decoder_mask_token hook 'mask_decoder.iou_to"),
    ):
        hooked.decode(hooked.encode(pictures(1)).embedding, clicks(1), False)
    hooked.remove()
    hooked = HookedSam(mobile, {"encoder_patch": "mask_decoder.output_upscaling"})  # fires, but not in the encoder
    with torch.no_grad(), pytest.raises(ValueError, match="never fired while the model ran its encode"):
        hooked.encode(pictures(1))
    hooked.remove()


def test_only_what_is_asked_for_is_hooked_and_remove_takes_it_off() -> None:
    model = build("vit_t")

    def hook_count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hook_count() == 0
    hooked = HookedSam(model, {"prompt_embed": None, "decoder_mask_token": None})
    assert hook_count() == 2
    with torch.no_grad():
        assert set(features(hooked, pictures(1), clicks(1))) == {*COMPONENTS[1:], "dense_mask_logits"}
        hooked.remove()
        assert set(features(hooked, pictures(1), clicks(1))) == {"dense_mask_logits"}
    assert hook_count() == 0


def test_each_hook_is_logged_once(mobile: Sam1, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sam3.distillation"):
        hooked = HookedSam(mobile, {"encoder_patch": "image_encoder.mv2_blocks[-2]"}, name="student")
        with torch.no_grad():
            hooked.encode(pictures(1))
            hooked.encode(pictures(1))
    hooked.remove()
    line = "student: encoder_patch is taken from image_encoder.neck (image_encoder.mv2_blocks[-2])"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_captures_of_several_calls_in_one_are_joined() -> None:
    model = build("vit_t")
    once = model.encode
    model.encode = lambda images: torch.cat([once(image[None]) for image in images])
    hooked = HookedSam(model, {"encoder_patch": None})
    with torch.no_grad():
        encoded = hooked.encode(pictures(2))
    torch.testing.assert_close(encoded.features["encoder_patch"], encoded.embedding, rtol=0, atol=0)


def test_nothing_is_kept_between_calls(mobile: Sam1) -> None:
    hooked = HookedSam(mobile, ALL)
    found = features(hooked, pictures(1), clicks(1))
    watched = [weakref.ref(value) for value in found.values()]
    with torch.no_grad():
        mobile.encode(pictures(1))  # not through the hooked model
    del found
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4
    hooked.remove()


def test_an_error_inside_leaves_nothing_behind(mobile: Sam1) -> None:
    hooked = HookedSam(mobile, {"encoder_patch": None})
    with pytest.raises(ValueError, match="takes 256x256 pictures"):
        hooked.encode(torch.zeros(1, 3, 64, 64))
    assert hooked._kept == {}
    hooked.remove()


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


@pytest.mark.parametrize("where", ["calls", "modules"])
@pytest.mark.parametrize("tap", ["input_keys", "output_keys"])
def test_gradients_through_recomputed_calls_and_modules(where: str, tap: str) -> None:
    """Recomputing repeats the forward, hooks and all, in the backward pass; the features' gradients stay the same."""
    model = build("vit_t", side=SMALL)
    hooked = HookedSam(model, ALL, tap)
    images, prompts = pictures(2, SMALL), clicks(2)

    def total(recompute: bool) -> Tensor:
        def run(function, *args):
            return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)

        encoded = run(hooked.encode, images)
        decoded = run(hooked.decode, encoded.embedding, prompts, False)
        found = {**encoded.features, **decoded.features}
        return sum((value * value.detach().cos()).sum() for value in found.values()) + decoded.masks.sum()

    plain = gradients(model, total(False))
    if where == "calls":
        again = gradients(model, total(True))
    else:  # what a model that recomputes its own blocks does: the hooked modules are called inside the checkpoint
        for module in (model.image_encoder, model.mask_decoder.transformer, model.mask_decoder):
            inner = module.forward
            module.forward = lambda *args, inner=inner, **kw: checkpoint(inner, *args, use_reentrant=False, **kw)
        again = gradients(model, total(False))
    assert set(again) == set(plain)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()) + 1e-9)
    assert hooked._kept == {}


def test_equal_models_have_no_loss(mobile: Sam1) -> None:
    student, teacher = HookedSam(copy.deepcopy(mobile), ALL), HookedSam(mobile, ALL)
    ours = features(student, pictures(2), clicks(2))
    with torch.no_grad():
        theirs = features(teacher, pictures(2), clicks(2))
    teacher.remove()
    for name, loss in LOSSES.items():
        parts = loss(ours[name], theirs[name])
        assert abs(parts.parts["kl"] if name == "dense_mask_logits" else parts.total).item() <= 1e-6, name


# Which parts of the student each loss reaches, and which it cannot.
REACHED = {
    "encoder_patch": {"image_encoder"},
    "prompt_embed": {"image_encoder", "prompt_encoder"},  # the embedding of "no mask" is added to the image's
    "decoder_mask_token": {"image_encoder", "prompt_encoder", "mask_decoder"},
    "dense_mask_logits": {"image_encoder", "prompt_encoder", "mask_decoder"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_teaches_the_student_alone(name: str) -> None:
    model, other = build("vit_t", side=SMALL), build("vit_t", seed=7, side=SMALL)
    hooks = {name: None} if name in COMPONENTS else {}
    student, teacher = HookedSam(model, hooks), HookedSam(other, hooks)
    ours = features(student, pictures(2, SMALL), clicks(2))
    theirs = features(
        teacher, pictures(2, SMALL), clicks(2)
    )  # with a graph of its own, which the loss must leave alone
    LOSSES[name](ours[name], theirs[name]).total.backward()
    reached = {
        key.split(".")[0] for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == REACHED[name]
    assert all(p.grad is None for p in other.parameters())


class TransformersSam(nn.Module):
    """The model of the transformers library with the two calls of ours; its modules keep their own names."""

    type = "vit_b"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.vision_encoder, self.mask_decoder = model.vision_encoder, model.mask_decoder

    def encode(self, images: Tensor) -> Tensor:
        return self.vision_encoder(images).last_hidden_state

    def decode(self, embedding: Tensor, points, boxes, multimask: bool) -> DecodedMasks:
        coords, labels = points
        result = self.model(
            image_embeddings=embedding,
            input_points=coords[None],
            input_labels=labels[None],
            multimask_output=multimask,
        )
        return DecodedMasks(result.pred_masks[0], result.iou_scores[0], tokens=None, object_logits=None)


@pytest.fixture(scope="module")
def foreign() -> TransformersSam:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 64,
        "image_size": SIDE, "global_attn_indexes": [1], "window_size": 4,
    }  # fmt: skip
    config = library.SamConfig(vision_config=vision, prompt_encoder_config={"image_size": SIDE})
    return TransformersSam(library.SamModel(config).eval())


@pytest.mark.parametrize("tap", ["input_keys", "output_keys"])
def test_a_model_with_the_names_of_transformers(foreign: TransformersSam, tap: str) -> None:
    """Three prompts of one picture, whose features have an axis more than ours."""
    out = "in.keys" if tap == "input_keys" else "out.1"
    given = {
        "encoder_patch": "vision_encoder.layers[-2]",
        "prompt_embed": f"mask_decoder.transformer.layers[0]@{out}",
        "decoder_mask_token": "mask_decoder.transformer@out.0",
    }
    for hooks in (ALL, given):
        hooked = HookedSam(foreign, hooks, tap)
        with torch.no_grad():
            encoded = hooked.encode(pictures(1))
            decoded = hooked.decode(encoded.embedding, clicks(3), True)
        assert hooked.hooks["encoder_patch"].path == "vision_encoder.layers.1"
        hooked.remove()
        rows = 1 if tap == "input_keys" else 3
        assert tuple(encoded.features["encoder_patch"].shape) == (1, 32, GRID, GRID)
        assert tuple(decoded.features["prompt_embed"].shape) == (rows, C, GRID, GRID)
        assert tuple(decoded.features["decoder_mask_token"].shape) == (3, 4, C)
        if tap == "input_keys":
            no_mask = foreign.model.prompt_encoder.no_mask_embed.weight.view(1, C, 1, 1)
            torch.testing.assert_close(decoded.features["prompt_embed"], encoded.embedding + no_mask)


HOOK = Hook("encoder_patch", "a.b", "a.b", "out", nn.Identity())


def test_layouts() -> None:
    maps = torch.arange(2.0 * 3 * 4 * 4).view(2, 3, 4, 4)
    for form in (maps, maps.permute(0, 2, 3, 1), maps.flatten(2).transpose(1, 2)):
        assert torch.equal(as_maps(form, HOOK), maps)
        assert as_maps(form, HOOK).data_ptr() == maps.data_ptr()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 4, 4), "may have its channels first or last"),
        ((2, 12, 8), r"gives a tensor of shape \(2, 12, 8\), which is not square maps"),
        ((2, 3, 4, 5), "which is not square maps"),
        ((2, 4), "which is not square maps"),
    ],
)
def test_layouts_that_are_none(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"encoder_patch hook 'a.b'.*{message}"):
        as_maps(torch.zeros(shape), HOOK)


def test_mask_tokens_are_found_among_all_tokens() -> None:
    tokens = torch.arange(7.0)[None, :, None].expand(2, 7, 5)
    wanted = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None].expand(2, 4, 5)
    assert torch.equal(mask_tokens(tokens, HOOK), wanted)
    assert torch.equal(mask_tokens(tokens[None], HOOK), wanted)
    assert torch.equal(mask_tokens(wanted, HOOK), wanted)  # nothing but these
    with pytest.raises(ValueError, match=r"gives a tensor of shape \(2, 3, 5\)"):
        mask_tokens(tokens[:, :3], HOOK)


def test_features_of_windows_are_refused() -> None:
    hooked = HookedSam(build("vit_tiny"), {"encoder_patch": "image_encoder.blocks[0].attn"})
    with torch.no_grad(), pytest.raises(ValueError, match=r"gives \d+ rows for 1 pictures; is it inside windowed"):
        hooked.encode(pictures(1))
