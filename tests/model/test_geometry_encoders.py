"""Prompts and their encoder: padding, order, and tokens worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sam3.model.geometry_encoders import Prompt, SequenceGeometryEncoder, concat_padded

DIM, GRID = 16, (8, 8)


def make_encoder() -> SequenceGeometryEncoder:
    torch.manual_seed(0)
    return SequenceGeometryEncoder(DIM, num_heads=2, ffn_dim=24, num_layers=2).eval()


def make_image(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, HW, C), the same for each pair, and positions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, 64, DIM, generator=generator).expand(batch, -1, -1)
    return tokens, torch.randn(1, 64, DIM, generator=generator).expand(batch, -1, -1)


def test_concat_moves_the_second_sequence_behind_the_valid_part_of_the_first():
    first = torch.tensor([[[1.0], [2.0]], [[3.0], [9.0]]])
    first_mask = torch.tensor([[False, False], [False, True]])
    second = torch.tensor([[[4.0], [9.0]], [[5.0], [6.0]]])
    second_mask = torch.tensor([[False, True], [False, False]])
    joined, mask = concat_padded(first, first_mask, second, second_mask)
    assert mask.tolist() == [[False, False, False, True], [False, False, False, True]]
    assert joined[..., 0][~mask].tolist() == [1, 2, 4, 3, 5, 6]


def test_concat_without_padding_is_plain_concatenation():
    first, second = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    none = torch.zeros(2, 3, dtype=torch.bool)
    joined, mask = concat_padded(first, none, second, none[:, :2])
    assert torch.equal(joined, torch.cat((first, second), dim=1))
    assert not mask.any()


def test_append_keeps_boxes_labels_and_padding_together():
    prompt = Prompt(
        box_embeddings=torch.tensor([[[0.1] * 4, [0.2] * 4], [[0.3] * 4, [0.0] * 4]]),
        box_labels=torch.tensor([[1, 0], [0, 0]]),
        box_mask=torch.tensor([[False, False], [False, True]]),
    )
    before = prompt.clone()
    prompt.append_boxes(torch.tensor([[[0.4] * 4, [0.5] * 4]]), torch.tensor([[True, True]]))
    assert prompt.box_embeddings.shape == (3, 2, 4)
    assert prompt.box_mask.tolist() == [[False] * 3, [False, False, True]]
    assert prompt.box_labels[:, 0].tolist() == [1, 0, 1]
    assert prompt.box_labels[:2, 1].tolist() == [0, 1]
    assert torch.equal(prompt.box_embeddings[:2, 1, 0], torch.tensor([0.2, 0.5]))
    assert before.box_embeddings.shape == (2, 2, 4), "a clone does not grow with the original"


def test_prompts_fill_in_labels_and_masks_and_refuse_wrong_shapes():
    prompt = Prompt(point_embeddings=torch.rand(2, 3, 2))
    assert prompt.point_labels.tolist() == [[1] * 3] * 2
    assert prompt.box_embeddings.shape == (0, 3, 4)
    with pytest.raises(ValueError, match=r"wanted \(count, 3, 4\)"):
        Prompt(box_embeddings=torch.rand(2, 3, 2))
    with pytest.raises(ValueError, match="needs boxes or points"):
        Prompt()
    with pytest.raises(ValueError, match=r"labels \(1, 3\)"):
        Prompt(box_embeddings=torch.rand(2, 3, 4), box_labels=torch.ones(1, 3))


def test_an_empty_prompt_is_the_cls_token_alone():
    tokens, mask = make_encoder()(Prompt.empty(2), *make_image(2), GRID)
    assert tokens.shape == (2, 1, DIM)
    assert not mask.any()


def test_padding_changes_nothing_and_cls_comes_right_after_the_valid_tokens():
    encoder = make_encoder()
    box, point = torch.tensor([0.4, 0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7])
    alone, _ = encoder(Prompt(box[None, None], point_embeddings=point[None, None]), *make_image(1), GRID)
    padded = Prompt(
        box_embeddings=torch.stack((box.expand(2, 4), torch.rand(2, 4))),
        box_mask=torch.tensor([[False, True], [False, False]]),
        point_embeddings=torch.stack((point.expand(2, 2), torch.rand(2, 2))),
        point_mask=torch.tensor([[False, True], [False, False]]),
    )
    tokens, mask = encoder(padded, *make_image(2), GRID)
    assert mask.tolist() == [[False, False, False, True, True], [False] * 5]
    torch.testing.assert_close(tokens[0, :3], alone[0], rtol=0, atol=1e-5)  # point, box, CLS


def test_the_order_of_boxes_does_not_matter_for_cls():
    encoder, boxes, labels = make_encoder(), torch.rand(2, 1, 4), torch.tensor([[1], [0]])
    tokens, _ = encoder(Prompt(boxes, box_labels=labels), *make_image(1), GRID)
    swapped, _ = encoder(Prompt(boxes.flip(0), box_labels=labels.flip(0)), *make_image(1), GRID)
    torch.testing.assert_close(tokens[:, [1, 0, 2]], swapped, rtol=0, atol=1e-5)


@torch.no_grad()
def silence(encoder: SequenceGeometryEncoder, keep: str) -> None:
    """Zeroes every parameter whose name does not start with `keep`."""
    for name, parameter in encoder.named_parameters():
        if not name.startswith(keep):
            parameter.zero_()


def column_ramp() -> torch.Tensor:
    """(1, C, 8, 8) map whose channel 0 holds the column number."""
    features = torch.zeros(1, DIM, *GRID)
    features[0, 0] = torch.arange(8.0)
    return features


@torch.no_grad()
def test_boxes_pool_without_the_half_cell_shift():
    encoder = make_encoder()
    silence(encoder, keep="boxes_pool_project.weight")
    encoder.boxes_pool_project.weight[0, 0] = 1 / 49  # channel 0 = mean over the pooled box
    box = torch.tensor([[[0.5, 0.5, 0.5, 0.25]]])  # columns 2 to 6 of the grid
    token = encoder._encode_boxes(box, torch.ones(1, 1, dtype=torch.long), column_ramp())
    weight_elsewhere = encoder.boxes_pool_project.weight[0, 1:].abs().sum()
    assert weight_elsewhere > 0, "other channels hold zeros in the map, not in the weight"
    assert token[0, 0, 0].item() == pytest.approx(4.0, abs=1e-5)  # a half-cell shift would give 3.5


@torch.no_grad()
def test_points_pool_between_cell_centres():
    encoder = make_encoder()
    silence(encoder, keep="points_pool_project.weight")
    encoder.points_pool_project.weight.copy_(torch.eye(DIM))
    token = encoder._encode_points(
        torch.tensor([[[0.5, 0.5], [0.3125, 0.5]]]), torch.ones(1, 2, dtype=torch.long), column_ramp()
    )
    assert token[0, :, 0].tolist() == pytest.approx([3.5, 2.0])  # 8 x - 0.5


@torch.no_grad()
def test_box_codes_are_y_then_x_then_height_then_width():
    encoder = make_encoder()
    silence(encoder, keep="nothing")
    encoder.label_embed.weight[1] = 100
    encoder.boxes_pos_enc_project.weight[:, :DIM] = torch.eye(DIM)
    encoder.boxes_direct_project.weight[0, 2] = 1  # width into channel 0
    box = torch.tensor([[[0.25, 0.5, 0.125, 0.0625]]])
    token = encoder._encode_boxes(box, torch.ones(1, 1, dtype=torch.long), column_ramp())[0, 0] - 100
    # First sine and cosine of each half: y = 0.5 -> angle pi, x = 0.25 -> angle pi / 2.
    assert token[:2].tolist() == pytest.approx([0.0 + 0.125, -1.0], abs=1e-4)
    assert token[DIM // 2 : DIM // 2 + 2].tolist() == pytest.approx([1.0, 0.0], abs=1e-4)
    encoder.boxes_pos_enc_project.weight.zero_()
    encoder.boxes_pos_enc_project.weight[0, DIM], encoder.boxes_pos_enc_project.weight[1, DIM + 1] = 1, 1
    token = encoder._encode_boxes(box, torch.zeros(1, 1, dtype=torch.long), column_ramp())[0, 0]
    assert token[:2].tolist() == pytest.approx([0.0625 + 0.125, 0.125])
