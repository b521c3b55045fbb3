"""The engine step by step: what is undone, cancelled, refused or fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from godwit.engine import scheduler
from godwit.engine.core import EngineCore
from godwit.engine.runner import ModelRunner
from godwit.models.batch import ForwardBatch
from godwit.models.causal_lm import CausalLM
from tests.engine.steps import TOKENIZER, Core
from tests.engine.test_core import ALL, HYBRID, alone, answer, asked, text


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
