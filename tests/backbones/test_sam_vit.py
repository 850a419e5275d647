"""The ViT of the first SAM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.backbones.sam_vit import RelativeAttention, SamViT
from tests.backbones.samples import pictures
from tests.parity.fill import fill_


def encoder(img_size: int = 96, depth: int = 3, global_blocks: tuple[int, ...] = (1,), window_size: int = 3) -> SamViT:
    vit = SamViT(img_size, 48, depth, 2, global_blocks, window_size)
    fill_(vit.state_dict(), "sam_vit.")
    return vit.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("img_size", "window_size", "global_blocks"),
    [(96, 3, (1,)), (96, 4, (1, 2)), (112, 4, ()), (80, 14, (0,))],
    ids=["whole windows", "padded windows", "no global block", "a window larger than the grid"],
)
def test_equals_transformers(img_size: int, window_size: int, global_blocks: tuple[int, ...]) -> None:
    hf_sam = pytest.importorskip("tests.sam.hf_sam")
    ours = encoder(img_size, 3, global_blocks, window_size)
    theirs = hf_sam.vision_encoder(ours, 2, global_blocks, window_size)
    x = pictures(2, img_size)
    torch.testing.assert_close(ours(x), theirs(x).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_bias_is_the_product_of_query_and_distance() -> None:
    """Token by token: the logit of query (2, 0) and key (0, 1) has the vectors of 2 rows and -1 columns."""
    side, dim, heads = 3, 10, 2
    attention = RelativeAttention(dim, heads, side)
    fill_(attention.state_dict(), "attention.")
    x = torch.randn(1, side * side, dim, generator=torch.Generator().manual_seed(0))
    q, k, v = attention.qkv(x)[0].view(side * side, 3, heads, dim // heads).unbind(1)  # each (L, h, d)
    logits = torch.einsum("qhd,khd->hqk", q, k) / (dim // heads) ** 0.5
    for query in range(side * side):
        for key in range(side * side):
            rows, columns = query // side - key // side, query % side - key % side
            bias = attention.rel_pos_h[rows + side - 1] + attention.rel_pos_w[columns + side - 1]
            logits[:, query, key] += q[query] @ bias
    wanted = attention.proj(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1))
    torch.testing.assert_close(attention(x)[0], wanted)


def test_blocks_give_channels_last_maps_to_hooks() -> None:
    vit, seen = encoder(112, window_size=4), []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    out = vit(pictures(2, 112))
    assert out.shape == (2, 256, 7, 7)
    assert [tuple(x.shape) for x in seen] == [(2, 7, 7, 48)] * 3
    seen[1].square().sum().backward()  # they are the tensors of the graph, not copies
    assert vit.pos_embed.grad.abs().sum() > 0


def test_recomputing_gives_the_same_gradients() -> None:
    vit = encoder(112, window_size=4)
    x, gradients = pictures(2, 112), []
    for vit.grad_checkpointing in (False, True):
        vit.zero_grad()
        vit(x).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in vit.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_stays_near() -> None:
    vit, x = encoder(112, window_size=4), pictures(1, 112)
    with torch.no_grad():
        exact = vit(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = vit(x)
        half = vit.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for other in (rough, half):
        assert similarity(exact, other) > 0.99


def similarity(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0).item()


def test_position_tables_do_not_decay() -> None:
    names = encoder().no_weight_decay()
    assert names == {"pos_embed", *(f"blocks.{i}.attn.rel_pos_{way}" for i in range(3) for way in "hw")}


@pytest.mark.parametrize("size", [0, 100])
def test_sizes_off_the_patches_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"img_size {size} is not a multiple of the patch size 16"):
        SamViT(size, 48, 1, 2, ())


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 48 is not a multiple of its 5 heads"):
        SamViT(96, 48, 1, 5, ())
