"""The engine step by step: exact whatever runs beside or is reused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.engine import scheduler
from godwit.engine.cache import CacheSize
from godwit.engine.core import MIN_PREFILL, divide
from godwit.engine.sampling import SamplingParams
from godwit.engine.stream import Piece
from godwit.errors import MemoryBudgetError
from godwit.models.causal_lm import CausalLM
from godwit.models.native import pack_model
from tests.engine.steps import Core, Run
from tests.engine.tiny import CONFIGS, tiny_model

MODELS = {
    (kind, format): pack_model(tiny_model(kind), format)
    for kind, format in (("hybrid", "bf16"), ("hybrid", "q4"), ("attention", "q4"), ("delta", "q8"))
}
ALL = pytest.mark.parametrize("model", MODELS.values(), ids=["-".join(name) for name in MODELS])
HYBRID, ATTENTION = MODELS["hybrid", "q4"], MODELS["attention", "q4"]


def text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def asked(seed: int, length: int = 12, **how: Any) -> SamplingParams:
    """Greedy for even seeds; with logprobs, which tell whether a bit differs."""
    defaults = {"temperature": float(seed % 2), "seed": seed, "max_tokens": length, "logprobs": 2}
    return SamplingParams(**(defaults | how))


def answer(run: Run) -> tuple[Any, ...]:
    """All that a client sees, but for times and reuse."""
    assert run.finish is not None
    pieces = [event for event in run.events if isinstance(event, Piece)]
    logprobs = [one for piece in pieces for one in piece.logprobs or ()]
    assert [one.token_id for one in logprobs] == [token for piece in pieces for token in piece.token_ids]
    return run.text, run.finish.reason, run.finish.token_ids, logprobs


def alone(model: CausalLM, ids: list[int], params: SamplingParams, **request: Any) -> tuple[Any, ...]:
    core = Core(model)
    run = core.submit(ids, params, **request)
    core.run()
    return answer(run)


# exact in company


@ALL
@pytest.mark.parametrize("chunk", [1, 19, 512])
def test_company_changes_no_bit(model: CausalLM, chunk: int) -> None:
    prompts = [text(length, length) for length in (1, 16, 45, 33, 80)]
    core = Core(model, chunk_size=chunk)
    runs = []
    for seed, ids in enumerate(prompts):
        runs.append(core.submit(ids, asked(seed)))
        core.turn()
    core.run()
    assert [answer(run) for run in runs] == [alone(model, ids, asked(i)) for i, ids in enumerate(prompts)]
    assert len({run.text for run in runs}) > 3


@ALL
def test_making_room_changes_no_bit(model: CausalLM) -> None:
    prompts = [text(length, length) for length in (20, 30, 40)]
    core = Core(model, num_blocks=9)
    runs = [core.submit(ids, asked(seed, 60)) for seed, ids in enumerate(prompts)]
    core.run()
    assert core.scheduler.num_preemptions > 0
    finishes = [run.finish for run in runs]
    assert sum(finish.preemptions for finish in finishes if finish) == core.scheduler.num_preemptions
    assert [answer(run) for run in runs] == [alone(model, ids, asked(i, 60)) for i, ids in enumerate(prompts)]


# exact with reuse


@ALL
def test_turns_of_conversations_reuse_all_before(model: CausalLM) -> None:
    core = Core(model, num_blocks=200, chunk_size=50)
    talks = [text(length, length) for length in (37, 50, 64)]
    before = [0, 0, 0]
    for turn in range(4):
        runs = [core.submit(ids, asked(turn + i)) for i, ids in enumerate(talks)]
        core.run()
        for i, (ids, run) in enumerate(zip(talks, runs, strict=True)):
            assert answer(run) == alone(model, ids, asked(turn + i)) and run.finish is not None
            assert run.finish.cached_tokens >= before[i] - (16 if model is ATTENTION else 1)
            ids += [*run.made, *text(9, turn)]
        before = [len(ids) - 9 for ids in talks]
    assert core.counts.cached > core.counts.prompt * 0.6


@pytest.mark.parametrize("format", ["bf16", "q4"])
@pytest.mark.parametrize("position", [16, 57, 95])
def test_an_edit_reuses_what_precedes_the_last_boundary(format: str, position: int) -> None:
    model, ids = MODELS["hybrid", format], text(120)
    core = Core(model)
    core.submit(ids, cuts=(10, position))
    core.run()
    edited = [*ids[: position + 1], *text(30, 1)]
    run = core.submit(edited, asked(3))
    core.run()
    assert run.finish is not None and run.finish.cached_tokens == position
    assert answer(run) == alone(model, edited, asked(3))
    assert core.runner.index.stats.num_snapshots > 4


def test_a_prompt_that_goes_on_from_another_one_is_read_to_its_end() -> None:
    """Although the scores after the other one are known."""
    core = Core(HYBRID)
    core.submit(text(50), asked(1))
    core.run()
    longer = [*text(50), 7, 8]
    run = core.submit(longer, asked(0))
    core.run()
    assert run.finish is not None and run.finish.cached_tokens == 50
    assert answer(run) == alone(HYBRID, longer, asked(0))


def test_a_repeated_prompt_needs_no_step_for_its_first_token() -> None:
    core = Core(HYBRID)
    first = core.submit(text(50), asked(1))
    core.run()
    again = core.submit(text(50), asked(1, 1))
    steps = core.counts.steps
    core.run()
    assert core.counts.steps == steps and again.finish is not None and again.finish.cached_tokens == 50
    assert again.made == first.made[:1] and again.finish.reuse_note == ""


def test_blocks_can_be_shared_as_soon_as_they_are_full() -> None:
    core = Core(ATTENTION, chunk_size=40)
    core.submit(text(100), asked(0))
    for count in (2, 5, 6):
        core.turn()
        assert core.runner.index.stats.num_blocks == count


def test_even_a_request_alone_is_admitted_only_where_it_fits() -> None:
    runner = Core(HYBRID, num_blocks=4).runner
    slot = runner.cache.add_sequence()
    runner.cache.extend(slot, 40)
    seq = scheduler.Sequence(0, text(20), 20, 30)
    assert not runner.admit(seq, 0, alone=True) and seq.slot is None
    runner.cache.free(slot)
    assert runner.admit(seq, 0, alone=True) and seq.slot is not None


@ALL
def test_salts_share_nothing(model: CausalLM) -> None:
    core = Core(model)
    runs = []
    for salt in ("a", "b", "a"):
        runs.append(core.submit(text(70), asked(2), salt=salt))
        core.run()
    cached = [run.finish.cached_tokens for run in runs if run.finish]
    assert cached[:2] == [0, 0] and cached[2] >= 64
    assert answer(runs[0]) == answer(runs[1]) == answer(runs[2])


@ALL
def test_what_comes_together_is_read_once(model: CausalLM) -> None:
    core = Core(model, num_blocks=200, chunk_size=40)
    common = text(150)
    prompts = [[*common, *text(20, seed)] for seed in range(4)]
    runs = [core.submit(ids, asked(seed)) for seed, ids in enumerate(prompts)]
    core.run()
    assert [answer(run) for run in runs] == [alone(model, ids, asked(i)) for i, ids in enumerate(prompts)]
    least = 150 if core.runner.recurrent else 150 - scheduler.MIN_SHARED
    assert [run.finish.cached_tokens >= least for run in runs if run.finish] == [False, True, True, True]


def test_where_texts_part_a_state_is_kept_for_the_next() -> None:
    core = Core(HYBRID)
    cached = []
    for seed in range(3):
        run = core.submit([*text(100), *text(20, seed + 5)], asked(seed))
        core.run()
        cached.append(run.finish.cached_tokens if run.finish else None)
    assert cached == [0, 0, 96]


@ALL
def test_pressure_evicts_and_changes_no_bit(model: CausalLM) -> None:
    core = Core(model, num_blocks=12, snapshot_bytes=40_000)
    rng = random.Random(5)
    for seed in range(25):
        ids = [*text(60, rng.randrange(3)), *text(rng.randrange(1, 40), seed)]
        run = core.submit(ids, asked(seed, 5), cuts=(60,))
        core.run()
        assert answer(run) == alone(model, ids, asked(seed, 5))
    stats = core.runner.index.stats
    assert stats.num_evicted_blocks > 10 and 0 < core.counts.cached < core.counts.prompt


def test_without_room_for_a_state_nothing_is_remembered() -> None:
    core = Core(HYBRID, snapshot_bytes=CacheSize.of(HYBRID).per_row - 1)
    for _ in range(2):
        run = core.submit(text(50), asked(1))
        core.run()
        assert run.finish is not None and run.finish.cached_tokens == 0
    assert core.runner.cache.blocks.num_free == 64 and core.runner.index.stats.num_blocks == 0


def test_without_room_for_a_copy_less_is_reused() -> None:
    core = Core(HYBRID, num_blocks=4)
    core.submit(text(50), asked(0, 1))
    core.run()
    run = core.submit([*text(50), 7], asked(0, 13))
    core.run()
    assert answer(run) == alone(HYBRID, [*text(50), 7], asked(0, 13))
    assert run.finish is not None and run.finish.reuse_note.startswith("the caches are too small")


# order


@pytest.mark.parametrize("length", [3000, 900])
def test_a_short_request_beside_a_long_prompt_waits_two_steps_at_most(length: int) -> None:
    core = Core(ATTENTION, num_blocks=256, chunk_size=64)
    core.submit(text(length), asked(0))
    core.turn()
    short = core.submit(text(30, 1), asked(1))
    for _ in range(2):
        core.turn()
    assert short.made
    made = len(short.made)
    core.turn()
    assert len(short.made) == made + 1


@pytest.mark.parametrize("length", [MIN_PREFILL - 1, MIN_PREFILL])
def test_only_steps_of_many_tokens_tell_how_long_one_takes(length: int) -> None:
    core = Core(ATTENTION)
    core.submit(text(length), asked(0))
    core.run()
    assert (core._seconds_per_token > 0) == (length == MIN_PREFILL)


def test_steps_become_small_where_reading_holds_up_answers() -> None:
    core = Core(ATTENTION, num_blocks=256, chunk_size=512, step_seconds=0.5)
    core._seconds_per_token = 0.01
    assert core._budget() == 512
    core.submit(text(5), asked(0, 400))
    core.turn()
    core._seconds_per_token = 0.01
    assert core._budget() == 51
    core._seconds_per_token = 1.0
    assert core._budget() == 33


@settings(max_examples=25, deadline=None)
@given(data=st.data(), model=st.sampled_from([HYBRID, ATTENTION]))
def test_whatever_comes_the_books_balance_and_answers_are_right(data: st.DataObject, model: CausalLM) -> None:
    core = Core(
        model,
        num_blocks=data.draw(st.integers(9, 30)),
        num_rows=data.draw(st.integers(1, 4)),
        chunk_size=data.draw(st.integers(1, 100)),
        snapshot_bytes=data.draw(st.sampled_from([0, 20_000, 200_000])),
    )
    live: list[tuple[Run, list[int], SamplingParams]] = []
    for number in range(12):
        ids = [*text(80, data.draw(st.integers(0, 1)))[: data.draw(st.integers(0, 80))], number]
        cuts = tuple(sorted(data.draw(st.sets(st.integers(1, 80), max_size=3))))
        params = asked(number, data.draw(st.integers(1, 40)))
        live.append((core.submit(ids, params, cuts=cuts, priority=number % 2), ids, params))
        if data.draw(st.booleans()):
            data.draw(st.sampled_from(live))[0].channel.cancel()
        for _ in range(data.draw(st.integers(0, 8))):
            core.turn()
    core.run()
    for run, ids, params in live:
        assert run.finish is not None
        if run.finish.reason != "cancelled":
            assert answer(run) == alone(model, ids, params)
    core.runner.index.evict(10**6)
    assert core.runner.cache.blocks.num_free == core.settings.num_blocks


@pytest.mark.parametrize("kind", CONFIGS)
def test_memory_is_divided(kind: str) -> None:
    size = CacheSize.of(tiny_model(kind))
    assert divide(size, 100, None, 4) == (28, 4) == divide(size, 100, size.total(100, 4), 4)
    for budget in (size.total(100) * 3, size.total(100), size.total(60)):
        blocks, rows = divide(size, 100, budget, 64)
        assert rows >= 1 and blocks >= 2
        assert blocks * size.per_block + rows * size.per_row <= budget or not size.per_block
        assert blocks * 16 >= 100 or budget < size.total(100)
    small = CacheSize(per_block=10, per_row=100)
    assert divide(small, 160, 1200, 64) == (60, 6)  # half of what one context leaves is for rows
    assert divide(small, 16, 110, 64) == (1, 1)
    with pytest.raises(MemoryBudgetError, match="one sequence of 32 tokens takes"):
        divide(size, 100, size.per_row + 2 * size.per_block - 1, 4)
