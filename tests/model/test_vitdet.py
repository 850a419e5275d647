"""The trunk: rotary positions by hand, token order against a plain implementation, sizes, casts, training."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sam3.model.vitdet import SLICE_TOKENS, ViT, from_windows, in_slices, rotary_table, to_windows


def small_vit(**changes) -> ViT:
    torch.manual_seed(0)
    sizes = {
        "img_size": 56,
        "patch_size": 14,
        "pretrain_img_size": 28,
        "dim": 16,
        "depth": 3,
        "heads": 2,
        "mlp_dim": 20,
    }
    sizes |= {"window_size": 2, "global_blocks": (2,), "drop_path": 0.0}
    vit = ViT(**sizes | changes)
    with torch.no_grad():
        for parameter in vit.parameters():  # the usual start is too close to zero to tell blocks apart
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit.eval()


def plain_forward(vit: ViT, images: torch.Tensor) -> torch.Tensor:
    """The trunk as usually written: a map in image order, cut into windows and joined again in every block."""
    x = vit.patch_embed.proj(images).permute(0, 2, 3, 1)
    side = math.isqrt(vit.pos_embed.shape[1] - 1)
    rows = torch.arange(vit.grid) % side
    x = vit.ln_pre(x + vit.pos_embed[0, 1:].view(side, side, -1)[rows][:, rows])
    batch, grid = len(x), vit.grid
    for block in vit.blocks:
        h = block.norm1(x)
        side = block.attn.side
        pad = -grid % side
        h = F.pad(h, (0, 0, 0, pad, 0, pad))
        n = (grid + pad) // side
        h = h.view(batch, n, side, n, side, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch * n * n, side * side, -1)
        q, k, v = block.attn.qkv(h).view(*h.shape[:2], 3, vit_heads(vit), -1).permute(2, 0, 3, 1, 4)
        q, k = turn(q, block.attn.freqs_cis), turn(k, block.attn.freqs_cis)
        h = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = block.attn.proj(h.transpose(1, 2).flatten(2))
        h = h.view(batch, n, n, side, side, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch, n * side, n * side, -1)
        x = x + h[:, :grid, :grid]
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return x.permute(0, 3, 1, 2)


def turn(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2)


def vit_heads(vit: ViT) -> int:
    return vit.blocks[0].attn.heads


@pytest.mark.parametrize(("img_size", "window"), [(56, 2), (56, 4), (70, 2), (70, 3), (42, 4)])
@torch.no_grad()
def test_same_as_the_plain_way(img_size: int, window: int):
    """Grids of 4, 5 and 3: windows that fit, windows that need padding, one window larger than the grid."""
    vit = small_vit(img_size=img_size, window_size=window)
    images = torch.randn(2, 3, img_size, img_size)
    (found,) = vit(images)
    assert found.shape == (2, 16, img_size // 14, img_size // 14)
    torch.testing.assert_close(found, plain_forward(vit, images), atol=1e-4, rtol=1e-4)


def test_rotary_table_by_hand():
    table = rotary_table(3, 8, scale=0.5)
    assert table.shape == (9, 4) and table.dtype == torch.complex64
    # frequencies 1 and 10000 ** -(4 / 8) = 0.01; token 5 stands in row 1, column 2
    angles = torch.tensor([2 * 0.5, 2 * 0.5 * 0.01, 1 * 0.5, 1 * 0.5 * 0.01])
    torch.testing.assert_close(table[5], torch.polar(torch.ones(4), angles))
    assert torch.equal(table[0], torch.ones(4, dtype=torch.complex64))


def test_windows_and_back():
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert to_windows(x, 2)[:, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(from_windows(to_windows(x, 2), 2, 4), x)


def test_slices_are_used_without_gradients_only():
    calls = []

    def double(part):
        calls.append(len(part))
        return 2 * part

    x = torch.randn(10, 4)
    with torch.inference_mode():
        assert torch.equal(in_slices(double, x, 4), 2 * x)
    assert calls == [4, 4, 2]
    in_slices(double, x, 4)
    assert calls[3:] == [10]
    assert SLICE_TOKENS > 0


def test_another_size_is_refused_with_both_named():
    with pytest.raises(ValueError, match=r"takes 56x56 pictures \(grid 4x4\), got 70x56"):
        small_vit()(torch.zeros(1, 3, 70, 56))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 57}, "img_size 57 is not a multiple of the patch size 14"),
        ({"pretrain_img_size": 30}, "pretrain_img_size 30"),
        ({"global_blocks": (3,)}, r"must name blocks 0\.\.2"),
        ({"global_blocks": ()}, "at least one"),
        ({"heads": 3}, "multiple of 4 channels"),
    ],
)
def test_impossible_sizes(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small_vit(**changes)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half().float(), lambda m: m.double()]
)
def test_casts_keep_the_rotary_tables(cast):
    vit = small_vit()
    tables = {key: value.clone() for key, value in vit.state_dict().items() if key.endswith("freqs_cis")}
    cast(vit)
    assert len(tables) == 3
    for key, table in tables.items():
        assert vit.state_dict()[key].dtype == torch.complex64
        assert torch.equal(vit.state_dict()[key], table)


def test_bfloat16_is_close_to_float32():
    vit, images = small_vit(), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        exact = vit(images)[0]
        half = vit.to(torch.bfloat16)(images.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(exact, half.float(), dim=1).min() > 0.999


def test_empty_weights_come_with_right_tables():
    vit = small_vit()
    with torch.device("meta"):
        hollow = ViT(56, 14, 28, 16, 3, 2, 20, 2, (2,))
    assert hollow.blocks[0].attn.freqs_cis.is_meta
    filled = hollow.to_empty(device="cpu")
    for a, b in zip(filled.blocks, vit.blocks, strict=True):
        assert torch.equal(a.attn.freqs_cis, b.attn.freqs_cis)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for recompute in (False, True):
        vit = small_vit(grad_checkpointing=recompute).train()
        torch.manual_seed(1)
        vit(torch.randn(1, 3, 56, 56))[0].square().mean().backward()
        gradients.append(vit.blocks[0].attn.qkv.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_drop_path_acts_on_whole_pictures_in_training_only():
    vit = small_vit(drop_path=1.0, depth=2, global_blocks=(1,))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        evaluated = vit(images)[0]
        trained = vit.train()(images)[0]
        vit.last_block = 0  # which never drops, while block 1 always does
        first = vit(images)[0]
    assert not torch.equal(evaluated, trained)
    torch.testing.assert_close(trained, first)
