"""What the MTP module has read of a sequence, and what is pending."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from godwit.engine.cache import BlockPool
from godwit.engine.scheduler import Sequence
from godwit.engine.speculation.estimates import Acceptance
from godwit.engine.speculation.mtp import MAX_PENDING, MTPDrafts, MTPWindow
from godwit.models.batch import BLOCK_SIZE
from tests.engine.speculation.test_speculator import eager, repeating
from tests.engine.test_core import HYBRID, asked


def window() -> MTPWindow:
    return MTPWindow(Acceptance())


def states(first: int, end: int) -> Tensor:
    """Of each token its position."""
    return torch.arange(first, end)[:, None]


def extent(one: MTPWindow) -> tuple[int, int, int, list[int]]:
    return one.start, one.filled, one.end, [int(state) for state in one.pending]


def test_states_follow_each_other_or_start_a_new_window() -> None:
    one = window()
    one.add(states(0, 3), 0)
    one.add(states(3, 5), 3)
    assert extent(one) == (0, 0, 5, [0, 1, 2, 3, 4])
    one.add(states(7, 9), 7)
    assert extent(one) == (7, 7, 9, [7, 8])
    one.add(states(9, 9 + MAX_PENDING), 9)
    assert extent(one) == (9, 9, 9 + MAX_PENDING, list(range(9, 9 + MAX_PENDING)))


def test_a_window_begins_at_a_block() -> None:
    one = window()
    one.add(states(5, 16), 5)
    assert not one.is_ready([0])
    one.add(states(16, 18), 16)
    assert one.is_ready([0, 1]) and extent(one) == (16, 16, 18, [16, 17])
    one.fill(2, [0, 1])
    assert extent(one) == (16, 18, 18, []) and one.blocks == [1] and not one.is_ready([0, 1])
    one.add(states(18, 19), 18)
    assert one.is_ready([5, 1]) and one.is_ready([0, 1, 2])


def test_other_blocks_with_the_same_tokens_start_a_new_window() -> None:
    one = window()
    one.add(states(0, 20), 0)
    assert one.is_ready([3, 4])
    one.fill(18, [3, 4])
    assert one.is_ready([3, 4]) and not one.is_ready([6, 4])
    assert extent(one) == (18, 18, 20, [18, 19]) and one.blocks == []


def test_there_are_drafts_only_after_the_newest_state() -> None:
    drafts, seq = MTPDrafts(eager(HYBRID).runner, Acceptance()), Sequence(0, [1] * 4, 1, 9)
    drafts.windows[seq] = window()
    drafts.windows[seq].add(states(0, 3), 0)
    assert len(drafts.rates(seq, 2)) == 2
    seq.ids.append(1)  # a step that was not recorded
    assert drafts.rates(seq, 2) == []


def test_only_drafts_that_were_judged_are_learned_from() -> None:
    drafts, seq = MTPDrafts(eager(HYBRID).runner, Acceptance()), Sequence(0, [1], 1, 9)
    for number, accepted in ((4, 1), (2, 2), (3, 0)):
        drafts.windows[seq], wanted = window(), Acceptance()
        drafts.judge(seq, number, accepted)
        for right in [True] * accepted + [False] * (accepted < number):
            wanted.learn(0, right)
        assert drafts.windows[seq].acceptance.rate(0) == wanted.rate(0)


def test_each_sequence_gets_as_many_drafts_as_were_chosen() -> None:
    core = eager(HYBRID)
    runs = [core.submit(repeating(number), asked(number, 40)) for number in range(2)]
    for _ in range(6):
        core.turn()
    drafts = MTPDrafts(core.runner, Acceptance())
    depths = {run.sequence: depth for run, depth in zip(runs, (1, 3), strict=True)}
    for seq in depths:  # the states are of no matter here
        drafts.windows[seq] = window()
        drafts.windows[seq].add(torch.randn(len(seq.ids) - 1, HYBRID.config.hidden_size), 0)
        assert drafts.windows[seq].is_ready(core.runner.cache.blocks_of(seq.slot or 0))
    assert [len(tokens) for tokens in drafts.draft(depths).values()] == [1, 3]


class Full:
    """A pool and a prefix index with a number of free blocks, and one that can be evicted."""

    def __init__(self, num_free: int) -> None:
        self.blocks = BlockPool(num_free + 1)
        self.evictable = self.blocks.allocate(1)
        self.cache = self.index = self

    def evict(self, count: int) -> int:
        self.blocks.free(self.evictable[:count])
        return 1

    def blocks_of(self, slot: int) -> list[int]:
        return [7]


def test_no_more_blocks_are_borrowed_than_drafts_need() -> None:
    runner: Any = Full(2)
    drafts, seq = MTPDrafts(runner, Acceptance()), Sequence(0, [1] * BLOCK_SIZE, 1, 99)
    seq.slot = 0
    assert [len(drafts._borrow(seq, depth)) for depth in (1, 2, 3)] == [0, 0, 1]


def test_what_is_only_remembered_makes_room_for_drafts() -> None:
    runner: Any = Full(0)
    drafts, seq = MTPDrafts(runner, Acceptance()), Sequence(0, [1] * BLOCK_SIZE, 1, 99)
    seq.slot = 0
    assert drafts._borrow(seq, 3) == runner.evictable
