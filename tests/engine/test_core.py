"""The engine step by step: exact whatever runs beside, is reused, undone or fails."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from godwit.engine import scheduler
from godwit.engine.cache import CacheSize
from godwit.engine.core import MIN_PREFILL, EngineCore, divide
from godwit.engine.runner import ModelRunner
from godwit.engine.sampling import SamplingParams
from godwit.engine.stream import Piece
from godwit.errors import MemoryBudgetError
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from godwit.models.native import pack_model
from tests.engine.steps import TOKENIZER, Core, Run
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


# what is undone, cancelled, refused or fails


class Guesses:
    """Drafts that are right until a given place, then wrong."""

    def __init__(self, right: Mapping[int, Sequence[int]], wrong_every: int) -> None:
        self.right, self.wrong_every = right, wrong_every
        self.observed = 0

    def start(self, runner: ModelRunner) -> None:
        assert runner.cache.rows.num_free == runner.cache.rows.num_rows

    def wants(self, num_sequences: int) -> bool:
        return num_sequences > 0

    def propose(self, limits: Mapping[scheduler.Sequence, int]) -> dict[scheduler.Sequence, list[int]]:
        drafts = {}
        for seq, limit in limits.items():
            assert 0 < limit < seq.limit - len(seq.ids)  # the last token of an answer needs no draft after it
            start = len(seq.ids) - seq.num_prompt
            tokens = list(self.right.get(seq.number, ())[start : start + limit])
            drafts[seq] = [
                token if (start + i) % self.wrong_every else (token + 1) % 200
                for i, token in enumerate(tokens)
            ]
        return drafts

    def observe(
        self, works: Sequence[scheduler.Work], kept: Sequence[int], batch: ForwardBatch, hidden: Tensor
    ) -> None:
        assert hidden.shape[0] == sum(len(work.tokens) for work in works) == batch.cu_seqlens[-1]
        self.observed += sum(kept)

    def forget(self, seq: scheduler.Sequence) -> None:
        self.observed += 1000


@ALL
@pytest.mark.parametrize("wrong_every", [1, 3, 7])
def test_drafts_change_no_bit(model: CausalLM, wrong_every: int) -> None:
    prompts = [text(length, length) for length in (20, 31, 45)]
    wanted = [alone(model, ids, asked(i, 30)) for i, ids in enumerate(prompts)]
    guesses = Guesses({i: one[2] for i, one in enumerate(wanted)}, wrong_every)
    core = Core(model, num_blocks=20, max_rollback=4, drafter=guesses)
    runs = [core.submit(ids, asked(i, 30)) for i, ids in enumerate(prompts)]
    core.run()
    assert [answer(run) for run in runs] == wanted
    assert core.counts.drafted > 30 and guesses.observed > 3000
    assert (core.counts.accepted > 20) == (wrong_every > 1)
    following = [core.submit([*run.sequence.ids, 5], asked(9)) for run in runs]
    core.run()
    for run in following:
        assert answer(run) == alone(model, run.sequence.ids[: run.sequence.num_prompt], asked(9))
        assert run.finish is not None and run.finish.cached_tokens > 32


class TooMany(Guesses):
    """Drafts more than it may."""

    def propose(self, limits: Mapping[scheduler.Sequence, int]) -> dict[scheduler.Sequence, list[int]]:
        return {seq: [0] * 50 for seq in limits}


def test_a_drafter_that_knows_no_limit_is_limited() -> None:
    core = Core(HYBRID, max_rollback=4, drafter=TooMany({}, 1))
    run = core.submit(text(20), asked(1, 10))
    core.run()
    assert answer(run) == alone(HYBRID, text(20), asked(1, 10))
    assert not core.counts.failures and 8 <= core.counts.drafted <= 9 * 4


@ALL
@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancelling_frees_all_within_a_step(model: CausalLM, after: int) -> None:
    core = Core(model, chunk_size=20)
    run, other = core.submit(text(50), asked(0, 50)), core.submit(text(10, 1), asked(1, 50))
    for _ in range(after):
        core.turn()
    run.channel.cancel()
    core.turn()
    assert run.finish is not None and run.finish.reason == "cancelled"
    assert core.scheduler.running == [other.sequence] and core.runner.cache.rows.num_free == 7
    owned = core.runner.cache.num_owned()
    assert owned == len(core.runner.cache.blocks_of(other.sequence.slot or 0))
    core.run()
    assert answer(other) == alone(model, text(10, 1), asked(1, 50))


def test_what_is_read_of_a_prompt_counts_with_the_first_token() -> None:
    core = Core(HYBRID, chunk_size=20)
    runs = [core.submit(text(50, seed), asked(seed)) for seed in range(2)]
    core.turn()
    runs[0].channel.cancel()
    core.run()
    assert [run.finish.prefill_tokens for run in runs if run.finish] == [0, 50]


def test_a_failed_step_ends_what_runs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(HYBRID, num_rows=2)
    runs = [core.submit(text(20, seed), asked(seed)) for seed in range(3)]
    core.turn()

    def fail(*arguments: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "run", fail)
        core.turn()
    assert (core.failed_steps, core.last_error, core.counts.failures) == (1, "RuntimeError: secret", 1)
    for run in runs[:2]:
        assert run.finish is not None and run.finish.reason == "error"
        assert run.finish.error == "an internal error ended this request; try again"
    assert runs[2].finish is None
    core.run()
    assert core.failed_steps == 0 and answer(runs[2]) == alone(HYBRID, text(20, 2), asked(2))
    assert core.runner.cache.rows.num_free == 2


@pytest.mark.parametrize("method", ["run", "settle", "admit"])
def test_failed_steps_are_counted_in_a_row(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(HYBRID)

    def fail(*arguments: object, **how: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, method, fail)
        for count in range(1, 4):
            run = core.submit(text(20), asked(1))
            core.run()
            core.turn()  # nothing is to be done
            assert core.failed_steps == core.counts.failures == count
            assert run.finish is not None and run.finish.reason == "error"
    run = core.submit(text(20), asked(1))
    core.run()
    assert answer(run) == alone(HYBRID, text(20), asked(1))
    assert (core.failed_steps, core.counts.failures) == (0, 3)


def test_several_faults_of_one_step_count_once_and_the_books_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = Core(HYBRID)
    runs = [core.submit(text(20, seed), asked(seed)) for seed in range(2)]
    faults = iter(("first", "second"))

    def fail(*arguments: object) -> None:
        raise RuntimeError(next(faults))

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "settle", fail)
        EngineCore.turn(core)
    assert [run.finish.reason for run in runs if run.finish] == ["error", "error"]
    assert (core.counts.failures, core.failed_steps, core.last_error) == (1, 1, "RuntimeError: first")
    assert core.counts.checks == 1
    core.submit(text(20), asked(1))
    EngineCore.turn(core)
    assert (core.counts.failures, core.counts.checks) == (1, 1)


def test_no_step_runs_on_books_that_do_not_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(HYBRID)
    first = core.submit(text(20), asked(1, 50))
    core.turn()
    add = core.runner.cache.add_sequence

    def lose() -> int:
        add()
        raise RuntimeError

    monkeypatch.setattr(core.runner.cache, "add_sequence", lose)
    second = core.submit(text(20, 1), asked(1))
    steps = core.counts.steps
    core.turn()
    assert core.counts.steps == steps and not core.busy
    assert [run.finish.reason for run in (first, second) if run.finish] == ["error", "error"]
    third = core.submit(text(20), asked(1))
    core.run()
    assert answer(third) == alone(HYBRID, text(20), asked(1))


def test_scores_that_are_not_numbers_are_a_failure_but_a_refusal_is_not() -> None:
    core = Core(HYBRID)
    banned = core.submit(text(20), asked(0, logit_bias={token: -float("inf") for token in range(263)}))
    core.run()
    assert banned.finish is not None and banned.finish.refused and core.failed_steps == 0
    assert core.runner.index.stats.num_snapshots == 0  # nothing is kept of what failed
    forward = core.model.compute_logits
    core.model.compute_logits = lambda *how: forward(*how) * float("nan")  # type: ignore[method-assign]
    try:
        wrong = core.submit(text(20), asked(1))
        core.run()
    finally:
        del core.model.compute_logits
    assert wrong.finish is not None and "not numbers" in str(wrong.finish.error)
    assert not wrong.finish.refused and core.failed_steps == 1


def test_a_request_that_leaves_no_token_fails_alone() -> None:
    core = Core(HYBRID)
    banned = asked(0, logit_bias={token: -float("inf") for token in range(263)})
    wrong, right = core.submit(text(20), banned), core.submit(text(20), asked(1))
    core.run()
    assert wrong.finish is not None and wrong.finish.reason == "error"
    assert wrong.finish.error is not None and "leave no token" in wrong.finish.error
    assert answer(right) == alone(HYBRID, text(20), asked(1)) and core.counts.failures == 0


class Fixed:
    """A constraint that leaves one token at a time."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def allowed(self) -> Tensor:
        return torch.arange(263) == self.tokens[0]

    def accept(self, token: int) -> None:
        assert token == self.tokens.pop(0)


def test_a_constraint_is_obeyed() -> None:
    core = Core(HYBRID)
    runs = [core.submit(text(20), asked(seed), constraint=Fixed([40, 41, 42, 258])) for seed in range(2)]
    core.run()
    assert [run.made for run in runs] == [[40, 41, 42, 258]] * 2
    assert all(run.finish and run.finish.reason == "stop" for run in runs)


@pytest.mark.parametrize("saved", [None, 0.0, 1e6, -1e6])
def test_the_speedup_compares_with_the_time_without_drafts(saved: float | None) -> None:
    core = Core(HYBRID)
    run = core.submit(text(20), asked(1))
    run.sequence.saved_seconds = saved
    core.run()
    assert run.finish is not None and run.finish.decode_seconds > 0
    seconds = run.finish.decode_seconds
    assert run.finish.speedup == (None if saved is None else max(0.0, seconds + saved) / seconds)


def test_half_a_character_comes_after_what_was_held_back() -> None:
    core = Core(HYBRID)
    tokens = TOKENIZER.encode("a🦙")[:2]
    run = core.submit(text(20), asked(0, 2, stop=("ab",)), constraint=Fixed(tokens))
    core.run()
    assert run.text == "a\ufffd" and run.finish is not None and run.finish.reason == "length"


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
