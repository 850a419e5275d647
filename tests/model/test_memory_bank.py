"""The bank forgets only what no plan asks for, and does forget."""

from __future__ import annotations

from random import Random

import pytest
import torch

from sam3.model.memory_bank import MemoryBank, MemoryRecord, memory_score
from sam3.model.memory_plan import PlanSettings

NUM_TOKENS = 9


def record(score: float | None = None) -> MemoryRecord:
    return MemoryRecord(torch.zeros(1, NUM_TOKENS, 4).bfloat16(), torch.zeros(1, 16), torch.ones(1, 1), score)


class TwoBanks:
    """The same tracking with a bank that forgets and one that does not."""

    def __init__(self, num_frames: int, selection: bool, seed: int, settings: PlanSettings | None = None):
        random = Random(seed)
        # a third of the frames is below the threshold, so that selected frames lie far apart
        self.scores = [random.choice((0.0, 0.4, 0.9)) for _ in range(num_frames)]
        self.num_frames = num_frames
        self.pruned, self.full = (MemoryBank(settings or PlanSettings(), selection) for _ in range(2))

    def prompt(self, frame: int) -> None:
        for bank in (self.pruned, self.full):
            bank.add(frame, record(), cond=True)
        self.pruned.prune(frame, self.num_frames)

    def track(self, start: int, end: int) -> int:
        """From `start` to `end`, both included, in either direction; how many plans were compared."""
        step = 1 if end >= start else -1
        compared = 0
        for t in range(start, end + step, step):
            if t in self.full.cond:
                continue
            self.check(t, reverse=step < 0)
            compared += 1
            for bank in (self.pruned, self.full):
                bank.add(t, record(self.scores[t]), cond=False)
            self.pruned.prune(t, self.num_frames)
        return compared

    def check(self, t: int, reverse: bool) -> None:
        plan = self.pruned.plan(t, self.num_frames, reverse)
        assert plan == self.full.plan(t, self.num_frames, reverse)
        assert all(self.pruned.records[frame].tokens is not None for frame, _ in plan.spatial)
        assert all(frame in self.pruned.records for frame, _ in plan.pointers)


@pytest.mark.parametrize("selection", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_plans_do_not_miss_what_was_forgotten(selection, seed):
    random = Random(100 + seed)
    num_frames = random.choice((1, 2, 9, 40, 120))
    banks = TwoBanks(num_frames, selection, seed)
    prompts = sorted(random.sample(range(num_frames), min(num_frames, random.choice((1, 2, 6)))))
    for frame in prompts:
        banks.prompt(frame)
    last = num_frames - 1
    start = random.choice(prompts)
    compared = banks.track(start, last)  # forwards from a prompt
    compared += banks.track(start, 0)  # backwards from there
    compared += banks.track(random.choice(prompts), last)  # over frames that are known
    compared += banks.track(last, 0)  # turning around at the end
    compared += banks.track(0, last)  # and at the start
    assert compared >= num_frames - len(prompts)


@pytest.mark.parametrize("selection", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_pass_may_stop_and_go_on_or_turn_around_anywhere_new(selection, seed):
    random = Random(seed)
    banks = TwoBanks(200, selection, seed)
    prompt = random.randrange(80, 120)
    banks.prompt(prompt)
    middle = random.randrange(130, 160)
    banks.track(prompt, middle)
    banks.track(middle, 199 - seed)  # the same frame once more, and on
    banks.track(199 - seed, random.randrange(40))  # turn around, past the prompt
    banks.track(prompt, 199)


@pytest.mark.parametrize("selection", [False, True])
def test_size_does_not_grow_with_the_video(selection):
    sizes = {}
    for num_frames in (100, 1000):
        banks = TwoBanks(num_frames, selection, seed=0)
        prompts = (0, 30, 60)
        for frame in prompts:
            banks.prompt(frame)
        banks.track(0, num_frames - 1)
        sizes[num_frames] = banks.pruned.num_tokens, len(banks.pruned.records)
        around = len(prompts) + 1  # anchors: the prompts and the current frame
        assert banks.pruned.num_tokens <= NUM_TOKENS * (len(prompts) + around * 13)
        assert len(banks.pruned.records) <= len(prompts) + around * 33
        assert banks.full.num_tokens == NUM_TOKENS * num_frames
    if not selection:  # with it, both sizes depend on the scores
        assert sizes[1000] == sizes[100]


def test_what_is_left_of_a_long_video():
    banks = TwoBanks(1000, selection=False, seed=0)
    banks.prompt(0)
    banks.track(0, 500)
    bank = banks.pruned
    assert list(bank.cond) == [0]
    assert sorted(bank.others) == [*range(1, 16), *range(485, 501)]
    kept = [frame for frame in bank.others if bank.others[frame].tokens is not None]
    assert kept == [*range(1, 7), *range(494, 501)]
    assert bank.num_tokens == 14 * NUM_TOKENS


def test_selection_reaches_over_a_long_absence():
    banks = TwoBanks(400, selection=True, seed=0)
    banks.scores[20:350] = [0.0] * 330
    banks.prompt(0)
    banks.track(0, 349)
    plan = banks.pruned.plan(350, 400)
    seen = [frame for frame in range(1, 20) if banks.scores[frame] > 0.01]
    assert [frame for frame, _ in plan.spatial] == [0, *seen[-5:], 349]


def test_settings_set_what_is_kept():
    banks = TwoBanks(100, False, seed=0, settings=PlanSettings(num_maskmem=3, max_obj_ptrs=5))
    banks.prompt(0)
    banks.track(0, 99)
    assert sorted(banks.pruned.others) == [1, 2, 3, 4, 95, 96, 97, 98, 99]
    assert banks.pruned.num_tokens == NUM_TOKENS * (1 + 2 + 3)


def test_a_frame_is_either_prompted_or_not():
    bank = MemoryBank()
    first, second, third = record(), record(), record()
    bank.add(3, first, cond=False)
    bank.add(3, second, cond=True)
    assert bank.cond == {3: second} and not bank.others
    bank.add(3, third, cond=False)  # its last prompt was taken back
    assert bank.others == {3: third} and not bank.cond
    assert bank.records[3] is third
    bank.remove(3)
    bank.remove(3)
    assert not bank.records


def test_conditioning_frames_keep_the_order_of_their_prompts():
    bank = MemoryBank()
    for frame in (5, 2, 9):
        bank.add(frame, record(), cond=True)
    bank.add(2, record(), cond=True)  # one more click
    assert [frame for frame, _ in bank.plan(7, 10).spatial] == [5, 2, 9]


def test_score_by_hand():
    logits = torch.tensor([[0.0], [-3.0], [torch.tensor(3.0).log()]])  # certainties 0, 0 and 2 * 0.75 - 1
    assert memory_score(logits, torch.tensor([0.9, 0.3, 0.6])) == pytest.approx(0.5 / 3 * 0.6)


def test_frames_without_a_score_are_not_selected():
    bank = MemoryBank(selection=True)
    bank.add(0, record(), cond=True)
    for frame, score in ((1, 0.5), (2, None), (3, 0.5)):
        bank.add(frame, record(score), cond=False)
    assert [frame for frame, _ in bank.plan(4, 10).spatial] == [0, 1, 3]
