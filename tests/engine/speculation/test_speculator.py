"""Speculation in the engine: drafts change no answer, and are verified only where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import godwit
from godwit.engine import Engine, GenerationRequest, SamplingParams
from godwit.engine.scheduler import Work
from godwit.engine.speculation.controller import BatchKind, Controller, DraftChoice, TimedStep
from godwit.engine.speculation.mtp import MAX_MTP_DEPTH, MAX_PENDING, MTPDrafts
from godwit.engine.speculation.speculator import MAX_DEPTH, MAX_SEQUENCES, Speculator
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model
from godwit.models.native import pack_model
from godwit.text.tokenizer import Tokenizer
from tests.engine.steps import Core
from tests.engine.test_core import ALL, HYBRID, alone, answer, asked, text
from tests.engine.tiny import tiny_model, tiny_tokenizer

ENDLESS = {258: -float("inf")}  # the only stop token

FEW = dict.fromkeys(range(40, 46), 12.0)  # answers of few different tokens repeat themselves


def num_drafted(core: Core) -> int:
    return core.counts.drafted + sum(one.drafted for one in core._generations.values())


class Steady(Controller):
    """Considers drafts in every step."""

    def wants_drafts(self, kind: BatchKind) -> bool:
        return True

    def may_draft(self, source: int, ahead: int = 0) -> bool:
        return True

    def learn(self, step: TimedStep) -> int:
        super().learn(step)
        return 0


class Eager(Steady):
    """Drafts as much as it can, from one source after the other."""

    turn = 0

    def choose(self, size: int, rates: Sequence[Sequence[Sequence[float]]]) -> DraftChoice | None:
        self.turn += 1
        source = min(len(rates) - 1, self.turn % 3)
        depths = [min(len(each), 1 + (self.turn + i) % MAX_DEPTH) for i, each in enumerate(rates[source])]
        return DraftChoice(source, depths) if any(depths) else None


class Never(Steady):
    """Considers drafts in every step and makes none."""

    def choose(self, size: int, rates: Sequence[Sequence[Sequence[float]]]) -> DraftChoice | None:
        return None


class Drafting(Core):
    """An error would turn speculation off, and the answers would be right all the same."""

    def turn(self) -> None:
        super().turn()
        assert self.drafter is not None


def eager(model: CausalLM, **how: Any) -> Drafting:
    drafter = Speculator(controller=Eager(), max_sequences=64)
    return Drafting(model, drafter=drafter, **({"max_rollback": MAX_DEPTH} | how))


def mtp_of(core: Core) -> MTPDrafts:
    assert isinstance(core.drafter, Speculator)
    source = core.drafter.sources[-1]
    assert isinstance(source, MTPDrafts)
    return source


def repeating(seed: int, times: int = 3) -> list[int]:
    return text(13, seed) * times + text(2, seed)


# answers


@ALL
@pytest.mark.parametrize("chunk", [19, 512])
def test_greedy_and_seeded_answers_are_those_without_drafts(model: CausalLM, chunk: int) -> None:
    prompts = [repeating(1), text(50, 2), text(31, 3), repeating(4, 6), text(1, 5)]
    core = eager(model, chunk_size=chunk)
    runs = []
    for seed, ids in enumerate(prompts):
        runs.append(core.submit(ids, asked(seed, 40, logit_bias=FEW)))
        core.turn()
    core.run()
    assert [answer(run) for run in runs] == [
        alone(model, ids, asked(i, 40, logit_bias=FEW)) for i, ids in enumerate(prompts)
    ]
    assert core.counts.drafted > 5
    assert sum(run.finish.drafted for run in runs if run.finish) == core.counts.drafted


@ALL
def test_answers_that_are_easy_to_draft_take_few_steps(model: CausalLM) -> None:
    params = asked(0, 100, logit_bias={40: 40.0, 41: 38.0})
    core = eager(model)
    run = core.submit(text(30), params)
    core.run()
    assert answer(run) == alone(model, text(30), params)
    assert run.finish is not None and run.finish.accepted > 10 and core.counts.steps < 90


@ALL
def test_making_room_and_cancelling_change_no_answer(model: CausalLM) -> None:
    prompts = [repeating(length) for length in range(4)]
    core = eager(model, num_blocks=10)
    runs = [core.submit(ids, asked(seed, 60, logit_bias=FEW)) for seed, ids in enumerate(prompts)]
    for _ in range(12):
        core.turn()
    runs[1].channel.cancel()
    core.run()
    assert core.scheduler.num_preemptions > 0 and core.counts.drafted > 0
    assert runs[1].finish is not None and runs[1].finish.reason == "cancelled"
    for seed in (0, 2, 3):
        assert answer(runs[seed]) == alone(model, prompts[seed], asked(seed, 60, logit_bias=FEW))
    assert isinstance(core.drafter, Speculator)
    for source in core.drafter.sources:
        assert not (source.windows if isinstance(source, MTPDrafts) else source.indexes)  # type: ignore[attr-defined]


@ALL
def test_turns_that_reuse_what_was_drafted(model: CausalLM) -> None:
    core = eager(model, num_blocks=100)
    talks = [repeating(seed) for seed in range(3)]
    for turn in range(4):
        runs = [core.submit(ids, asked(turn + i, 25)) for i, ids in enumerate(talks)]
        core.run()
        for i, (ids, run) in enumerate(zip(talks, runs, strict=True)):
            assert answer(run) == alone(model, ids, asked(turn + i, 25))
            ids += [*run.made, *text(9, turn)]
    assert core.counts.cached > core.counts.prompt // 2


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_whatever_comes_answers_are_right(data: st.DataObject) -> None:
    core = eager(HYBRID, num_blocks=data.draw(st.integers(9, 30)), num_rows=data.draw(st.integers(1, 4)))
    live = []
    for number in range(8):
        ids = [*repeating(data.draw(st.integers(0, 1)))[: data.draw(st.integers(0, 41))], number]
        params = asked(number, data.draw(st.integers(1, 40)))
        live.append((core.submit(ids, params), ids, params))
        if data.draw(st.booleans()):
            data.draw(st.sampled_from(live))[0].channel.cancel()
        for _ in range(data.draw(st.integers(0, 8))):
            core.turn()
    core.run()
    for run, ids, params in live:
        assert run.finish is not None
        if run.finish.reason != "cancelled":
            assert answer(run) == alone(HYBRID, ids, params)
    core.runner.index.evict(10**6)
    assert core.runner.cache.blocks.num_free == core.settings.num_blocks


def test_a_failed_draft_ends_speculation_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(HYBRID, drafter=Speculator(controller=Eager()), max_rollback=MAX_DEPTH)
    run = core.submit(repeating(1), asked(0))
    core.turn()

    def fail(*arguments: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(HYBRID, "forward_mtp", fail)
        core.run()
    assert core.drafter is None and core.counts.failures == 1
    assert answer(run) == alone(HYBRID, repeating(1), asked(0))
    again = core.submit(repeating(1), asked(0))
    core.run()
    assert answer(again) == alone(HYBRID, repeating(1), asked(0))


# the MTP module's cache


def whole_text(model: CausalLM, ids: list[int], depth: int) -> list[int]:
    """Drafts after ``ids`` from nothing but the text: a fresh core that reads all of it, then drafts."""
    core = Core(model, drafter=Speculator(controller=Eager()), max_rollback=MAX_DEPTH)
    core.submit(ids[:-1], asked(0, 5, logit_bias={ids[-1]: 1000.0}))
    core.turn()
    seq = core.scheduler.running[0]
    assert seq.ids == ids and len(mtp_of(core).rates(seq, depth)) == depth
    return mtp_of(core).draft({seq: depth})[seq]


@pytest.mark.parametrize("length", [5, 15, 16, 31, 46])
def test_drafts_after_many_steps_are_those_of_one_pass(length: int) -> None:
    """Slots of drafts are overwritten, and wrong drafts leave nothing behind."""
    core = eager(HYBRID, chunk_size=7)
    run = core.submit(text(length), asked(0, 60, logit_bias=ENDLESS))
    for _ in range(100):
        if len(run.sequence.ids) <= 57:
            core.turn()
    seq = run.sequence
    mtp = mtp_of(core)
    assert num_drafted(core) > 0 and len(mtp.rates(seq, 6)) == MAX_MTP_DEPTH
    assert mtp.windows[seq].start == 0
    drafts = mtp.draft({seq: 4})[seq]
    assert drafts == whole_text(HYBRID, list(seq.ids), 4)
    core.check_integrity()


def test_a_reused_prefix_opens_a_window_at_a_block() -> None:
    core = eager(HYBRID)
    core.submit(text(40), asked(0, 3))
    core.run()
    run = core.submit([*text(40), *text(20, 1)], asked(0, 30))
    core.turn()
    assert mtp_of(core).rates(run.sequence, 1)
    window = mtp_of(core).windows[run.sequence]
    assert (window.start, window.end) == (48, 60) and core.runner.hits == {}
    core.run()
    assert answer(run) == alone(HYBRID, [*text(40), *text(20, 1)], asked(0, 30))


def test_without_drafts_few_states_are_kept_and_drafting_begins_with_them() -> None:
    core = Core(HYBRID, drafter=Speculator(controller=Never()), max_rollback=MAX_DEPTH)
    run = core.submit(text(300), asked(0, 100, logit_bias=ENDLESS))
    for _ in range(90):
        core.turn()
    seq, mtp = run.sequence, mtp_of(core)
    assert mtp.rates(seq, 2) == [0.5, 0.5]
    window = mtp.windows[seq]
    assert MAX_PENDING - 16 < len(window.pending) == window.end - window.filled <= MAX_PENDING
    assert mtp.catch_up([seq]) and len(window.pending) == 1 and not mtp.catch_up([seq])
    assert isinstance(core.drafter, Speculator)
    core.drafter.controller = Eager()
    core.run()
    assert answer(run) == alone(HYBRID, text(300), asked(0, 100, logit_bias=ENDLESS))
    assert core.counts.drafted > 0


def test_catching_up_changes_no_draft() -> None:
    drafts = []
    for catch_up in (False, True):
        core = Core(HYBRID, drafter=Speculator(controller=Never()), max_rollback=MAX_DEPTH)
        run = core.submit(text(60), asked(0, 40, logit_bias=ENDLESS))
        for _ in range(5):
            core.turn()
        mtp = mtp_of(core)
        assert len(mtp.rates(run.sequence, 4)) == 4
        assert not catch_up or mtp.catch_up([run.sequence])
        drafts.append(mtp.draft({run.sequence: 4}))
    first, second = (list(one.values()) for one in drafts)
    assert first == second


def test_of_a_long_step_little_is_kept() -> None:
    core = Core(HYBRID, drafter=Speculator(controller=Never()), max_rollback=MAX_DEPTH)
    run = core.submit(text(500), asked(0, 100, logit_bias=ENDLESS))
    core.turn()
    window = mtp_of(core).windows[run.sequence]
    assert (len(window.pending), window.end) == (MAX_PENDING, 500)
    assert {state.untyped_storage().nbytes() for state in window.pending} == {MAX_PENDING * 32 * 4}


def test_states_that_were_not_recorded_start_a_new_window() -> None:
    core = eager(HYBRID)
    run = core.submit(text(40), asked(0, 60, logit_bias=ENDLESS))
    core.run_until(lambda: len(run.sequence.ids) > 50)
    assert isinstance(core.drafter, Speculator)
    core.drafter.controller, core.drafter._recording = Never(), []
    core.turn()
    core.drafter.controller = Eager()
    core.turn()
    end = len(run.sequence.ids) - 1
    window = mtp_of(core).windows[run.sequence]
    assert (window.end, len(window.pending)) == (end, 1)
    core.run()
    assert window.start % 16 == 0 and 48 < window.start <= end + 16
    assert answer(run) == alone(HYBRID, text(40), asked(0, 60, logit_bias=ENDLESS))


# when it pays


class Machine:
    """Tells the time where a step takes 1, and so much more for each draft in it."""

    def __init__(self, each: float) -> None:
        self.each, self.now = each, 0.0

    def __call__(self) -> float:
        return self.now

    def drive(self, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
        run = core.runner.run

        def timed(works: Sequence[Work]) -> Any:
            self.now += 1 + self.each * sum(work.num_drafts for work in works)
            return run(works)

        monkeypatch.setattr(core.runner, "run", timed)


@pytest.mark.parametrize(("each", "least"), [(0.01, 200), (5.0, 0)])
def test_drafts_are_verified_only_where_that_is_cheap(
    each: float, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(each)
    core = Core(HYBRID, drafter=Speculator(clock=machine), max_rollback=MAX_DEPTH)
    machine.drive(core, monkeypatch)
    bias = {token: 60.0 for token in (40, 258)} | {258: -float("inf")}
    run = core.submit(text(30), asked(0, 600, logit_bias=bias))
    core.run()
    assert run.finish is not None and run.finish.reason == "length"
    assert least <= run.finish.accepted and (least > 0 or run.finish.drafted < 60)
    saved = run.sequence.saved_seconds
    assert saved is not None and (saved > 50 if least else saved <= 0)
    decoding = machine.now - 1
    assert (decoding + saved) / decoding == pytest.approx(599 / decoding, rel=0.05)


def test_with_many_sequences_nothing_is_drafted() -> None:
    core = Core(HYBRID, drafter=Speculator(controller=Eager()), max_rollback=MAX_DEPTH)
    runs = [core.submit(repeating(seed), asked(seed, 30)) for seed in range(MAX_SEQUENCES + 1)]
    for _ in range(20):
        core.turn()
    assert num_drafted(core) == 0
    runs[0].channel.cancel()
    core.run()
    assert core.counts.drafted > 0
    for seed, run in enumerate(runs[1:], 1):
        assert answer(run) == alone(HYBRID, repeating(seed), asked(seed, 30))


def test_without_drafts_there_is_no_estimate_of_what_they_gave() -> None:
    core = Core(HYBRID, drafter=Speculator(controller=Never()), max_rollback=MAX_DEPTH)
    run = core.submit(text(30), asked(0, 30))
    core.run()
    assert run.finish is not None and run.finish.drafted == 0 and run.finish.speedup is None


# the engine


@pytest.fixture(scope="module")
def default() -> tuple[CausalLM, Tokenizer]:
    place = Path(godwit.__file__).parent / "default_model"
    return pack_model(load_model(place), "bf16"), Tokenizer.from_dir(place)


@pytest.fixture
def engines(default: tuple[CausalLM, Tokenizer]) -> Iterator[list[Engine]]:
    made = [Engine(*default, max_context=512, speculate=speculate, debug=True) for speculate in (False, True)]
    yield made
    for engine in made:
        engine.close()
        engine.check_integrity()


def test_the_default_model_says_the_same(default: tuple[CausalLM, Tokenizer], engines: list[Engine]) -> None:
    texts = [
        "One day a fox ",
        "red, green, blue, red, green, blue, red,",
        "def add(a, b):\n",
        "1 2 3 4 1 2 3 4 1",
    ]
    answers = []
    for engine in engines:
        streams = [
            engine.submit(
                GenerationRequest(
                    tuple(default[1].encode(prompt)),
                    SamplingParams(temperature=0.7 * (seed % 2), seed=seed, max_tokens=40, logprobs=1),
                )
            )
            for seed, prompt in enumerate(texts * 2)
        ]
        streams[3].cancel()
        answers.append([stream.result() for stream in streams])
    for number, (plain, drafted) in enumerate(zip(*answers, strict=True)):
        if number != 3:
            assert plain[0] == drafted[0] and plain[1].token_ids == drafted[1].token_ids
    assert engines[0].stats().drafted == 0 and all(f.speedup is None for _, f in answers[0])


def test_the_mtp_module_of_the_default_model_drafts_well(default: tuple[CausalLM, Tokenizer]) -> None:
    class OnlyMTP(Steady):
        def choose(self, size: int, rates: Sequence[Sequence[Sequence[float]]]) -> DraftChoice | None:
            depths = [min(2, len(each)) for each in rates[1]]
            return DraftChoice(1, depths) if any(depths) else None

    model, tokenizer = default
    drafter = Speculator(controller=OnlyMTP())
    with Engine(model, tokenizer, max_context=512, drafter=drafter, max_rollback=MAX_DEPTH) as engine:
        prompt = tuple(tokenizer.encode("One day a little girl went to the park with her mother. She saw a"))
        finish = engine.submit(
            GenerationRequest(prompt, SamplingParams(temperature=0, max_tokens=60))
        ).result()[1]
    assert finish.drafted > 20 and finish.accepted > 0.25 * finish.drafted


def test_only_packed_models_are_drafted_for() -> None:
    for model, wanted in ((tiny_model("hybrid"), 0), (HYBRID, MAX_DEPTH)):
        with Engine(model, tiny_tokenizer(), max_context=64, speculate=True) as engine:
            assert engine.settings.max_rollback == wanted == (MAX_DEPTH if engine.core.drafter else 0)
