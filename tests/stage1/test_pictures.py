"""Pictures of embeddings."""

from __future__ import annotations

import torch

from stage1.pictures import compare_embeddings, principal_colours


def grids() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 4, 4, generator=generator)
    mask = torch.ones(1, 4, 4)
    mask[:, 3] = 0
    return teacher, mask


def test_equal_embeddings_have_equal_colours_and_padding_is_black():
    teacher, mask = grids()
    first, second = principal_colours(teacher, teacher.clone(), mask)
    assert torch.equal(first, second)
    assert first[:, 3].abs().max() == 0
    assert first[:, :3].max() > 0.9
    other, changed = principal_colours(teacher, -teacher, mask)
    assert torch.equal(first, other)
    assert (other - changed).abs().max() > 0.5


def test_row_of_three_panels_is_cut_to_the_picture_and_leaves_the_random_state():
    teacher, mask = grids()
    image = torch.arange(3 * 56 * 56, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(3, 56, 56)
    state = torch.get_rng_state()
    row = compare_embeddings(image, (42, 56), teacher, teacher, mask)
    assert torch.equal(state, torch.get_rng_state())
    assert row.shape == (3, 42, 3 * 56)
    assert torch.equal(row[:, :, :56], image[:, :42])


def test_a_picture_with_hardly_any_cells_is_blank():
    teacher, _ = grids()
    first, _ = principal_colours(teacher, teacher, torch.zeros(1, 4, 4))
    assert first.abs().max() == 0
