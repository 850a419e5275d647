"""The models of the first SAM family: layouts, outputs, gradients, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sam3.engine.weights import save_weights
from sam3.sam.sam1 import MEAN, SAM1_TYPES, STD, Sam1, build_sam1, infer_type
from sam3.sam1_files import load_sam1, save_sam1
from sam3.transforms import Preprocess
from tests.sam.parts import filled, normals

SIDE = 256


@pytest.fixture(scope="module")
def tiny() -> Sam1:
    return filled(build_sam1("vit_tiny"))


@pytest.fixture(scope="module")
def mobile() -> Sam1:
    return filled(build_sam1("vit_t", 128))


def on_meta(type: str) -> Sam1:
    with torch.device("meta"):
        return build_sam1(type)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def prompts(seed: int = 0) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Points of three prompts with their labels, and three boxes, in pixels of a 256-pixel frame."""
    normal = normals(seed)
    boxes = (normal(3, 2, 2).sigmoid() * SIDE).sort(dim=1).values.flatten(1)
    return (normal(3, 2, 2).sigmoid() * SIDE, torch.tensor([[1, 0], [1, 1], [1, -1]])), boxes


@pytest.mark.parametrize(
    ("type", "entries", "in_encoder", "in_all"),
    [
        ("vit_h", 594, 637_026_048, 641_090_608),
        ("vit_l", 482, 308_278_272, 312_342_832),
        ("vit_b", 314, 89_670_912, 93_735_472),
        ("vit_t", 439, 6_065_532, 10_130_092),
    ],
)
def test_the_published_layouts(type: str, entries: int, in_encoder: int, in_all: int) -> None:
    model = on_meta(type)
    state = model.state_dict()
    assert len(state) == entries
    assert (count(model.image_encoder), count(model)) == (in_encoder, in_all)
    assert (count(model.prompt_encoder), count(model.mask_decoder)) == (6_220, 4_058_340)
    assert model.image_size == 1024
    assert model.preprocess == Preprocess(1024, "pad", MEAN, STD)
    assert infer_type(state) == model.type == type


def test_shapes_of_some_published_entries() -> None:
    huge, mobile = on_meta("vit_h").state_dict(), on_meta("vit_t").state_dict()
    for key, shape in {
        "image_encoder.pos_embed": (1, 64, 64, 1280),
        "image_encoder.patch_embed.proj.weight": (1280, 3, 16, 16),
        "image_encoder.blocks.6.attn.rel_pos_h": (27, 80),
        "image_encoder.blocks.7.attn.rel_pos_w": (127, 80),
        "image_encoder.blocks.0.attn.qkv.weight": (3840, 1280),
        "image_encoder.blocks.0.mlp.lin1.weight": (5120, 1280),
        "image_encoder.neck.0.weight": (256, 1280, 1, 1),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "mask_decoder.mask_tokens.weight": (4, 256),
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight": (128, 256),
        "mask_decoder.transformer.layers.0.mlp.lin1.weight": (2048, 256),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
    }.items():
        assert tuple(huge[key].shape) == shape, key
    for key, shape in {
        "image_encoder.patch_embed.seq.0.c.weight": (32, 3, 3, 3),
        "image_encoder.layers.0.blocks.1.conv2.c.weight": (256, 1, 3, 3),
        "image_encoder.layers.2.downsample.conv3.bn.num_batches_tracked": (),
        "image_encoder.layers.2.blocks.5.attn.attention_biases": (5, 196),
        "image_encoder.layers.3.blocks.1.local_conv.c.weight": (320, 1, 3, 3),
        "image_encoder.head.weight": (1000, 320),
        "image_encoder.neck.3.weight": (256,),
    }.items():
        assert tuple(mobile[key].shape) == shape, key
    assert {key for key in huge if not key.startswith("image_encoder.")} == {
        key for key in mobile if not key.startswith("image_encoder.")
    }


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", ["points", "boxes", "both"])
def test_equals_transformers(tiny: Sam1, kind: str, multimask: bool) -> None:
    theirs = pytest.importorskip("tests.sam.hf_sam").whole_model(tiny)
    (coords, labels), boxes = prompts()
    with_points, with_boxes = kind != "boxes", kind != "points"
    images = normals(1)(1, 3, SIDE, SIDE)
    out = theirs(
        pixel_values=images,
        input_points=coords[None] if with_points else None,
        input_labels=labels[None] if with_points else None,
        input_boxes=boxes[None] if with_boxes else None,
        multimask_output=multimask,
    )
    embedding = tiny.encode(images)
    ours = tiny.decode(embedding, (coords, labels) if with_points else None, boxes if with_boxes else None, multimask)
    torch.testing.assert_close(embedding, theirs.get_image_embeddings(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.masks, out.pred_masks[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.ious, out.iou_scores[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mask_0_is_kept_also_where_it_is_unstable(tiny: Sam1) -> None:
    points, _ = prompts()
    embedding = tiny.encode(normals(2)(1, 3, SIDE, SIDE))
    sparse, dense = tiny.prompt_encoder(points)
    every = tiny.mask_decoder.forward_all(embedding, tiny.prompt_encoder.get_dense_pe(), sparse, dense)
    torch.testing.assert_close(tiny.decode(embedding, points, None, False).masks, every.masks[:, :1])
    torch.testing.assert_close(tiny.decode(embedding, points, None, True).ious, every.ious[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
def test_one_embedding_serves_all_prompts(mobile: Sam1, multimask: bool) -> None:
    (coords, labels), boxes = prompts()
    embedding = mobile.encode(normals(3)(1, 3, 128, 128))
    for points, given in (((coords / 2, labels), None), (None, boxes / 2)):
        shared = mobile.decode(embedding, points, given, multimask)
        own = mobile.decode(embedding.expand(3, -1, -1, -1).contiguous(), points, given, multimask)
        masks = 3 if multimask else 1
        assert shared.masks.shape == (3, masks, 32, 32) and shared.ious.shape == (3, masks)
        torch.testing.assert_close(own.masks, shared.masks, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.ious, shared.ious, atol=1e-5, rtol=1e-4)


def test_the_two_way_blocks_are_called_by_name_and_the_transformer_by_position(mobile: Sam1) -> None:
    seen: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = []
    transformer = mobile.mask_decoder.transformer
    handles = [
        module.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        for module in (transformer, *transformer.layers)
    ]
    never = mobile.mask_decoder.mask_tokens.register_forward_hook(lambda *_: pytest.fail("an embedding nobody calls"))
    (coords, labels), _ = prompts()
    embedding = normals(4)(3, 256, 8, 8)
    mobile.decode(embedding, (coords / 2, labels), None, False)
    for handle in (*handles, never):
        handle.remove()
    (whole, nothing), *blocks = seen
    assert len(whole) == 3 and nothing == {}
    for positional, named in blocks:
        assert positional == ()
        assert {key: tuple(value.shape) for key, value in named.items()} == {
            "queries": (3, 8, 256),  # IoU, four masks, two points and one for "no box"
            "keys": (3, 64, 256),
            "query_pe": (3, 8, 256),
            "key_pe": (1, 64, 256),
        }
    dense = mobile.prompt_encoder.no_mask_embed.weight[:, :, None, None]
    keys = blocks[0][1]["keys"]
    torch.testing.assert_close(keys.transpose(1, 2).unflatten(2, (8, 8)), embedding + dense)
    assert keys.requires_grad  # through the dense prompt: nothing is detached on the way


@pytest.mark.parametrize("name", ["tiny", "mobile"])
def test_gradients_of_masks_and_ious_reach_the_encoder(name: str, request: pytest.FixtureRequest) -> None:
    model: Sam1 = request.getfixturevalue(name)
    points, _ = prompts()
    for read in (lambda out: out.masks, lambda out: out.ious):
        model.zero_grad()
        embedding = model.encode(normals(5)(1, 3, model.image_size, model.image_size))
        read(model.decode(embedding, points, None, False)).square().mean().backward()
        for key, parameter in model.image_encoder.named_parameters():
            unused = key.startswith(("norm_head", "head"))
            assert unused == (parameter.grad is None), key
            assert unused or parameter.grad.isfinite().all(), key
        first = model.image_encoder.patch_embed.parameters()
        assert sum(parameter.grad.abs().sum() for parameter in first) > 0
    model.zero_grad()


def test_pictures_of_another_size_are_refused(tiny: Sam1) -> None:
    with pytest.raises(ValueError, match="this vit_tiny takes 256x256 pictures, got 256x128; prepare them"):
        tiny.encode(torch.zeros(1, 3, 256, 128))


def test_unknown_types_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of the type 'vit_x'; choose one of vit_h, vit_l, vit_b, vit_t, vit_tiny"):
        build_sam1("vit_x")
    for size in (0, 1000):
        with pytest.raises(ValueError, match=f"image size {size} is not a multiple of the patch size 16"):
            build_sam1("vit_t", size)


def test_types_are_inferred() -> None:
    assert [infer_type(on_meta(type).state_dict()) for type in SAM1_TYPES] == list(SAM1_TYPES)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"detector.a.weight": torch.zeros(1), "tracker.b": torch.zeros(1)},
            "found 2 entries below detector, tracker,",
        ),
        ({f"part{i}.weight": torch.zeros(1) for i in range(9)}, r"below part0, .*, part5, \.\.\., none of them"),
        (
            {"image_encoder.patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)},
            r"found a ViT image encoder of width 384; wanted 1280 \(vit_h\), 1024 \(vit_l\), 768 \(vit_b\)",
        ),
    ],
)
def test_what_is_no_sam_1_is_named(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_type(tensors)


@pytest.mark.parametrize(("type", "size"), [("vit_tiny", 64), ("vit_t", 64)])
def test_files_are_flat_and_load_as_they_were_written(tmp_path: Path, type: str, size: int) -> None:
    model, path = filled(build_sam1(type, size)), tmp_path / "model.pt"
    save_sam1(model, path)
    assert torch.load(path, weights_only=True).keys() == model.state_dict().keys()
    loaded = load_sam1(path, image_size=size if type == "vit_t" else None)
    assert (loaded.type, loaded.image_size, loaded.training) == (type, size, False)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    images, (points, _) = normals(6)(1, 3, size, size), prompts()
    with torch.no_grad():
        pairs = [net.decode(net.encode(images), points, None, True).masks for net in (model, loaded)]
    assert torch.equal(*pairs)


def test_a_loaded_model_trains_without_touching_its_file(tmp_path: Path, mobile: Sam1) -> None:
    path = tmp_path / "model.pt"
    save_sam1(mobile, path)
    before, model = path.read_bytes(), load_sam1(path, image_size=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.encode(normals(7)(1, 3, 128, 128)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.image_encoder.neck[0].weight, mobile.image_encoder.neck[0].weight)
    assert path.read_bytes() == before


def test_half_precision_files_become_float32(tmp_path: Path, mobile: Sam1) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in mobile.state_dict().items()}
    save_weights(tmp_path / "half.safetensors", half)
    loaded = load_sam1(tmp_path / "half.safetensors").state_dict()
    assert loaded["image_encoder.head.weight"].dtype == torch.float32
    assert loaded["image_encoder.patch_embed.seq.0.bn.num_batches_tracked"].dtype == torch.int64


def test_a_file_of_another_type_is_refused(tmp_path: Path, mobile: Sam1) -> None:
    path = tmp_path / "mobile_sam.pt"
    save_sam1(mobile, path)
    with pytest.raises(ValueError, match=r"mobile_sam\.pt holds a vit_t, but a vit_h was asked for; give its file"):
        load_sam1(path, "vit_h")


def test_a_sam3_file_is_refused(teacher_file: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file of a SAM-1 model: found \d+ entries below detector, tracker"):
        load_sam1(teacher_file)


def test_gaps_additions_and_other_shapes_are_named(tmp_path: Path, mobile: Sam1) -> None:
    state = dict(mobile.state_dict())
    del state["image_encoder.norm_head.weight"]
    state["ema.weight"] = torch.zeros(1)
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(3, 256)
    save_weights(tmp_path / "bad.pt", state, entry=None)
    wanted = (
        "1 missing: image_encoder.norm_head.weight; 1 unexpected: ema.weight; "
        "1 misshapen: mask_decoder.mask_tokens.weight (3, 256) instead of (4, 256)"
    )
    with pytest.raises(ValueError, match=f"does not fit Sam1: {re.escape(wanted)}"):
        load_sam1(tmp_path / "bad.pt", "vit_t")


def test_another_image_size_than_the_position_table_is_refused(tmp_path: Path) -> None:
    save_sam1(build_sam1("vit_tiny", 64), tmp_path / "small.pt")
    assert load_sam1(tmp_path / "small.pt", "vit_tiny", 64).image_size == 64
    with pytest.raises(ValueError, match=r"made for pictures of 64 pixels .* image size 1024 was asked for; set it to"):
        load_sam1(tmp_path / "small.pt", image_size=1024)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        load_sam1(tmp_path / "none.pth")
