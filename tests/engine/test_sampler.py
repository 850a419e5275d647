from __future__ import annotations

import itertools

import pytest

from sam3.engine.sampler import EpochSampler


def indices(sampler: EpochSampler) -> list[int]:
    return [i for batch in sampler for i in batch]


def interleaved(ranks: list[list[list[int]]]) -> list[int]:
    """Global order of batches given per process: entry j of process r is the permutation's entry R j + r."""
    order = []
    for batches in zip(*ranks, strict=True):
        for entries in itertools.zip_longest(*batches):
            order += [e for e in entries if e is not None]
    return order


def test_unshuffled_batches_by_hand():
    samplers = [EpochSampler(10, 2, rank=r, world_size=2, shuffle=False) for r in range(2)]
    assert [list(s) for s in samplers] == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert [len(s) for s in samplers] == [2, 2]


def test_padding_repeats_from_the_start():
    samplers = [EpochSampler(7, 2, rank=r, world_size=3, shuffle=False, drop_last=False) for r in range(3)]
    assert [list(s) for s in samplers] == [[[0, 3], [6]], [[1, 4], [0]], [[2, 5], [1]]]
    assert [len(s) for s in samplers] == [2, 2, 2]


def test_padding_of_a_set_smaller_than_the_world():
    ranks = [indices(EpochSampler(2, 4, rank=r, world_size=5, shuffle=False, drop_last=False)) for r in range(5)]
    assert ranks == [[0], [1], [0], [1], [0]]


def test_without_padding_each_sample_occurs_once():
    samplers = [EpochSampler(7, 2, rank=r, world_size=3, drop_last=False, padding=False) for r in range(3)]
    assert sorted(i for s in samplers for i in indices(s)) == list(range(7))
    assert [len(s) for s in samplers] == [len(list(s)) for s in samplers] == [2, 1, 1]
    idle = EpochSampler(2, 2, rank=2, world_size=3, drop_last=False, padding=False)
    assert (len(idle), list(idle)) == (0, [])


def test_order_depends_on_seed_and_epoch_only():
    first = EpochSampler(100, 10, seed=1)
    order = indices(first)
    assert sorted(order) == list(range(100))
    assert indices(EpochSampler(100, 10, seed=1)) == order
    assert indices(EpochSampler(100, 10, seed=2)) != order
    first.set_position(1)
    assert indices(first) != order
    assert sorted(indices(first)) == list(range(100))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_together_follow_one_permutation(world_size):
    whole = EpochSampler(24, 2, seed=5).permutation().tolist()
    ranks = [list(EpochSampler(24, 2, rank=r, world_size=world_size, seed=5)) for r in range(world_size)]
    assert interleaved(ranks) == whole


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3), (4, 2)])
def test_position_is_exact_and_elastic(before, after):
    """Some batches with one number of processes, the rest with another: the permutation once, in order."""
    whole = EpochSampler(24, 2, seed=5).permutation().tolist()
    samplers = [EpochSampler(24, 2, rank=r, world_size=before, seed=5) for r in range(before)]
    start = interleaved([list(s)[:2] for s in samplers])
    samplers[0].advance(2)
    state = samplers[0].state_dict()
    assert state["consumed"] == len(start)
    rest = []
    for r in range(after):
        resumed = EpochSampler(24, 2, rank=r, world_size=after, seed=5)
        resumed.load_state_dict(state)
        batches = list(resumed)
        assert len(resumed) == len(batches)
        rest.append(batches)
    order = start + interleaved(rest)
    assert order == whole[: len(order)]
    assert len(order) > 24 - 2 * after


def test_an_iterator_under_way_is_not_moved():
    sampler = EpochSampler(8, 2, shuffle=False)
    batches = iter(sampler)
    assert next(batches) == [0, 1]
    sampler.advance(3)
    assert next(batches) == [2, 3]
    assert list(sampler) == [[6, 7]]
    sampler.advance(9)
    assert (sampler.consumed, len(sampler), list(sampler)) == (8, 0, [])


def test_bad_sizes():
    with pytest.raises(ValueError, match="the data set is empty"):
        EpochSampler(0, 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EpochSampler(3, 0)
    with pytest.raises(ValueError, match="batch of 4 on each of 2 processes needs 8 samples, but the data set has 7"):
        EpochSampler(7, 4, world_size=2)


@pytest.mark.parametrize("change", [{"num_samples": 9}, {"seed": 1}, {"shuffle": False}])
def test_a_position_in_another_order_is_refused(change):
    state = EpochSampler(8, 2).state_dict()
    with pytest.raises(ValueError, match=f"go over {next(iter(change))} "):
        EpochSampler(**{"num_samples": 8, "batch_size": 2, **change}).load_state_dict(state)
