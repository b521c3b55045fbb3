from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.engine.cache import num_blocks
from godwit.engine.scheduler import MIN_PIECE, MIN_SHARED, Plan, Scheduler, Sequence


class Blocks:
    """Memory that only counts."""

    remembers = True

    def __init__(self, total: int, rows: int = 100) -> None:
        self.total, self.rows = total, rows
        self.held: dict[Sequence, int] = {}  # tokens
        self.known_tokens: dict[Sequence, int] = {}

    @property
    def free(self) -> int:
        return self.total - sum(map(num_blocks, self.held.values()))

    def admit(self, seq: Sequence, reserve: int, *, alone: bool) -> bool:
        if len(self.held) == self.rows or num_blocks(len(seq.ids) + 1) + reserve > self.free:
            return False
        self.held[seq] = seq.num_computed = self.known(seq)
        return True

    def is_loading(self, seq: Sequence) -> bool:
        return False

    def known(self, seq: Sequence) -> int:
        return self.known_tokens.get(seq, 0)

    def extend(self, seq: Sequence, count: int) -> bool:
        if num_blocks(self.held[seq] + count) - num_blocks(self.held[seq]) > self.free:
            return False
        self.held[seq] += count
        return True

    def release(self, seq: Sequence) -> None:
        del self.held[seq]
        seq.num_computed = 0


def sequence(number: int, length: int, limit: int = 10**6, priority: int = 0) -> Sequence:
    return Sequence(number, list(range(length)), length, limit, priority=priority)


def run(plan: Plan) -> None:
    """What a step does, the new tokens being zeros."""
    for work in plan.works:
        work.sequence.num_computed += len(work.tokens)
        if work.sequence.num_computed == len(work.sequence.ids):
            work.sequence.ids.append(0)


def steps(scheduler: Scheduler, memory: Blocks, budget: int) -> Iterator[dict[int, int]]:
    """Step by step: number -> tokens."""
    while True:
        plan = scheduler.plan(memory, budget)
        yield {work.sequence.number: len(work.tokens) for work in plan.works}
        run(plan)


def make(lengths: list[int], total: int = 10**6, max_running: int = 64) -> tuple[Scheduler, Blocks]:
    scheduler = Scheduler(max_running)
    for number, length in enumerate(lengths):
        scheduler.add(sequence(number, length))
    return scheduler, Blocks(total)


def test_a_prompt_is_read_in_pieces_and_then_goes_token_by_token() -> None:
    plans = steps(*make([100]), 48)
    assert [next(plans) for _ in range(5)] == [{0: 48}, {0: 48}, {0: 4}, {0: 1}, {0: 1}]


def test_answers_come_first_and_never_pause() -> None:
    scheduler, memory = make([3, 5])
    plans = steps(scheduler, memory, 40)
    assert next(plans) == {0: 3, 1: 5}
    scheduler.add(sequence(2, 1000))
    for _ in range(20):
        assert next(plans) == {0: 1, 1: 1, 2: 38}


def test_prompts_get_a_share_even_if_answers_use_up_the_budget() -> None:
    scheduler, memory = make([1] * 30)
    plans = steps(scheduler, memory, 30)
    next(plans)
    scheduler.add(sequence(30, 100))
    assert next(plans)[30] == MIN_PIECE


def test_a_long_prompt_does_not_hold_up_short_ones() -> None:
    scheduler, memory = make([10**5, 20, 30])
    plans = steps(scheduler, memory, 90)
    assert next(plans) == {0: 40, 1: 20, 2: 30}
    assert next(plans) == {0: 88, 1: 1, 2: 1}


def test_many_prompts_take_turns() -> None:
    scheduler, memory = make([100] * 10)
    plans = steps(scheduler, memory, 2 * MIN_PIECE)
    read = [next(plans) for _ in range(5)]
    assert all(list(step.values()) == [16, 16] for step in read)
    assert sorted(number for step in read for number in step) == list(range(10))


def test_steps_end_at_cuts() -> None:
    scheduler, memory = make([100])
    scheduler.waiting[0].cuts = [10, 60]
    plans = steps(scheduler, memory, 32)
    assert [next(plans)[0] for _ in range(6)] == [10, 32, 18, 32, 8, 1]


def test_nobody_overtakes_who_waits_for_memory() -> None:
    scheduler, memory = make([160, 320, 16], total=25)
    assert list(next(steps(scheduler, memory, 1000))) == [0]
    assert [seq.number for seq in scheduler.waiting] == [1, 2]


def test_priority_overtakes() -> None:
    scheduler, memory = make([16, 16], max_running=1)
    scheduler.add(sequence(2, 16, priority=1))
    assert list(next(steps(scheduler, memory, 1000))) == [2]


def test_the_youngest_makes_room_and_comes_back_in_its_old_place() -> None:
    scheduler, memory = make([30, 30, 30], total=7)
    plans = steps(scheduler, memory, 1000)
    assert next(plans) == {0: 30, 1: 30}  # the third would leave no block to go on with
    old, young = scheduler.running
    for _ in range(40):
        if young.num_preemptions:
            break
        next(plans)
    assert (old.num_preemptions, young.num_preemptions, scheduler.num_preemptions) == (0, 1, 1)
    assert [seq.number for seq in scheduler.waiting] == [1, 2] and memory.held.keys() == {old}
    scheduler.remove(old)
    memory.release(old)
    assert next(plans) == {1: len(young.ids), 2: 30} and scheduler.running[0] is young


def test_a_planned_piece_of_one_who_has_to_go_is_not_run() -> None:
    scheduler, memory = make([32], total=8)
    plan = scheduler.plan(memory, 1000)
    run(plan)
    scheduler.add(sequence(1, 20, priority=-1))
    run(scheduler.plan(memory, 8))
    reading = scheduler.running[1]
    scheduler.running[0].num_computed -= 1  # as if it had yet to be read: a piece that needs all blocks
    scheduler.running[0].ids += [0] * 100
    plan = scheduler.plan(memory, 1000)
    assert plan.preempted[0] is reading and reading not in {work.sequence for work in plan.works}


def test_nobody_is_admitted_in_a_step_that_had_to_make_room() -> None:
    """Whoever comes then waits for the next step, even before all others."""
    scheduler, memory = make([30, 30], total=7)
    plan = Plan()
    for _ in range(40):
        scheduler.add(sequence(2, 5, priority=1))
        scheduler.max_running = 2
        plan = scheduler.plan(memory, 1000)
        run(plan)
        if plan.preempted:
            break
        scheduler.remove(scheduler.waiting[0])
    assert plan.preempted and not plan.admitted
    assert [seq.number for seq in scheduler.plan(memory, 1000).admitted] == [2]


def with_chain(seq: Sequence) -> Sequence:
    seq.chain = [str(seq.ids[: 16 * (i + 1)]).encode() for i in range(len(seq.ids) // 16)]
    return seq


def test_what_another_one_is_reading_is_waited_for() -> None:
    scheduler, memory = Scheduler(8), Blocks(10**6)
    first, second, third = (with_chain(sequence(n, 300)) for n in range(3))
    second.ids[200] = -1
    second.chain.clear()
    with_chain(second)
    third.salt = "other"
    for seq in (first, second, third):
        scheduler.add(seq)
    plans = steps(scheduler, memory, 100)
    assert next(plans) == {0: 50, 2: 50}
    assert second.shared_with(first) == 200 and first.cuts == [200] and third.shared_with(first) == 0
    for _ in range(3):
        assert 1 not in next(plans)
    memory.known_tokens[second] = first.num_computed + 50
    assert 1 in next(plans)


def test_what_was_read_but_not_kept_is_not_waited_for() -> None:
    scheduler, memory = Scheduler(8), Blocks(10**6)
    first, second = (with_chain(sequence(number, 300)) for number in range(2))
    second.ids[200:], second.chain[12:] = [-1] * 100, []
    for seq in (first, with_chain(second)):
        scheduler.add(seq)
    plans = steps(scheduler, memory, 100)
    assert [next(plans) for _ in range(3)] == [{0: 100}, {0: 100}, {0: 50, 1: 50}]


@pytest.mark.parametrize("shared", [MIN_SHARED - 1, MIN_SHARED])
def test_only_a_prefix_that_is_long_enough_is_waited_for(shared: int) -> None:
    scheduler, memory = Scheduler(8), Blocks(10**6)
    second = sequence(1, 100)
    second.ids[shared:] = [-1] * (100 - shared)
    for seq in (sequence(0, 100), second):
        scheduler.add(with_chain(seq))
    assert (1 in next(steps(scheduler, memory, 40))) == (shared < MIN_SHARED)


@pytest.mark.parametrize(("remembers", "scored"), [(False, False), (True, True)])
def test_nobody_waits_for_a_prefix_that_it_cannot_use(remembers: bool, scored: bool) -> None:
    scheduler, memory = Scheduler(8), Blocks(10**6)
    memory.remembers = remembers
    for number in range(2):
        scheduler.add(with_chain(sequence(number, 300)))
    scheduler.waiting[1].scored = scored
    assert next(steps(scheduler, memory, 100)) == {0: 50, 1: 50}


def test_a_text_that_only_begins_another_leaves_its_last_token_to_read() -> None:
    scheduler, memory = Scheduler(8), Blocks(10**6)
    scheduler.add(with_chain(sequence(0, 300)))
    scheduler.add(with_chain(sequence(1, 150)))
    next(steps(scheduler, memory, 10))
    assert scheduler.running[0].cuts == [149] and scheduler.waiting[0].number == 1


def test_the_scores_after_a_whole_prompt_are_kept_for_an_equal_one() -> None:
    scheduler, memory = Scheduler(8), Blocks(10**6)
    for number in range(2):
        scheduler.add(with_chain(sequence(number, 150)))
    next(steps(scheduler, memory, 10))
    assert scheduler.running[0].cuts == [150] and scheduler.waiting[0].number == 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    budget=st.integers(1, 100),
    total=st.integers(14, 40),
    max_running=st.integers(1, 5),
    answer=st.integers(1, 20),
)
def test_everyone_is_served(
    lengths: list[int], budget: int, total: int, max_running: int, answer: int
) -> None:
    scheduler, memory = make(lengths, total, max_running)
    everyone = list(scheduler.waiting)
    for _ in range(20000):
        plan = scheduler.plan(memory, budget)
        assert plan.works and sum(map(num_blocks, memory.held.values())) <= total
        assert memory.held.keys() == set(scheduler.running) and len(scheduler.running) <= max_running
        run(plan)
        for seq in list(scheduler.running):
            assert memory.held[seq] == seq.num_computed
            if len(seq.ids) >= seq.num_prompt + answer:
                scheduler.remove(seq)
                memory.release(seq)
        if not scheduler.running and not scheduler.waiting:
            break
    assert all(len(seq.ids) == seq.num_prompt + answer for seq in everyone)


@pytest.mark.parametrize("computed", [0, 10, 60, 99])
def test_longest_pieces(computed: int) -> None:
    seq = sequence(0, 100)
    for cut in (60, 10, 10):
        seq.add_cut(cut)
    seq.num_computed = computed
    assert seq.cuts == [10, 60] and seq.is_cut(60) and not seq.is_cut(61)
    assert seq.longest_piece == {0: 10, 10: 50, 60: 40, 99: 1}[computed]
