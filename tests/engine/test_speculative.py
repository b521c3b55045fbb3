"""Speculation: guesses that change no answer, and a choice that gives up where they do not pay."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import godwit
from godwit.engine import Engine, GenerationRequest, SamplingParams
from godwit.engine.scheduler import Work
from godwit.engine.speculative import MAX_DEPTH, MAX_MTP_DEPTH, MAX_SEQUENCES, Speculator
from godwit.engine.speculative_control import (
    REFRESH,
    REST,
    TRY_SHARE,
    WARM_UP,
    Choice,
    Controller,
    Measured,
    Option,
)
from godwit.engine.speculative_learned import Curve, Median, Patience
from godwit.engine.speculative_lookup import MAX_INDEXED, MAX_MATCH, PromptLookup, continuation
from godwit.models.causal_lm import CausalLM
from godwit.models.loader import load_model
from godwit.models.native import pack_model
from godwit.text.tokenizer import Tokenizer
from tests.engine.steps import Core
from tests.engine.test_core import ALL, HYBRID, alone, answer, asked, text
from tests.engine.tiny import tiny_model, tiny_tokenizer

ENDLESS = {258: -float("inf")}  # the only stop token

FEW = dict.fromkeys(range(40, 46), 12.0)  # texts of few tokens repeat themselves


def num_drafted(core: Core) -> int:
    return core.counts.drafted + sum(one.drafted for one in core._generations.values())


class Steady(Controller):
    """Looks in every step."""

    def wants(self, num_sequences: int) -> bool:
        return True

    def rest(self, num_sequences: int) -> int:
        return 0

    def allows_mtp(self, num_sequences: int, ahead: int = 0) -> bool:
        return True


class Eager(Steady):
    """Drafts as much as it can, from one source and the other in turn."""

    turn = 0

    def choose(self, options: Sequence[Option]) -> list[Choice]:
        self.turn += 1
        return [self._one(option, self.turn + number) for number, option in enumerate(options)]

    def _one(self, option: Option, turn: int) -> Choice:
        source = option.mtp if turn % 3 else option.lookup
        return Choice(min(len(source), 1 + turn % MAX_DEPTH), mtp=bool(turn % 3))


def eager(model: CausalLM, **how: Any) -> Core:
    drafter = Speculator(controller=Eager(MAX_DEPTH), max_sequences=64)
    return Core(model, drafter=drafter, **({"max_rollback": MAX_DEPTH} | how))


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
def test_answers_that_are_easy_to_guess_take_few_steps(model: CausalLM) -> None:
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
    assert isinstance(core.drafter, Speculator) and not core.drafter._histories
    assert core.drafter._mtp is None or not core.drafter._mtp.windows


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


def test_a_failed_draft_ends_what_runs_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    core = eager(HYBRID)
    run = core.submit(repeating(1), asked(0))
    core.turn()

    def fail(*arguments: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(HYBRID, "forward_mtp", fail)
        for _ in range(3):
            core.turn()
    assert run.finish is not None and run.finish.reason == "error" and core.counts.failures == 1
    again = core.submit(repeating(1), asked(0))
    core.run()
    assert answer(again) == alone(HYBRID, repeating(1), asked(0))


# the MTP module's cache


def whole_text(model: CausalLM, ids: list[int], depth: int) -> list[int]:
    """Drafts after ``ids`` from nothing but the text: a fresh core that reads all of it, then drafts."""
    core = Core(model, drafter=Speculator(controller=Eager(MAX_DEPTH)), max_rollback=MAX_DEPTH)
    core.submit(ids[:-1], asked(0, 5, logit_bias={ids[-1]: 1000.0}))
    core.turn()
    seq = core.scheduler.running[0]
    assert seq.ids == ids and isinstance(core.drafter, Speculator) and core.drafter._mtp is not None
    assert core.drafter._mtp.catch_up([seq]) == [seq]
    return core.drafter._mtp.draft({seq: depth})[seq]


@pytest.mark.parametrize("length", [5, 15, 16, 31, 46])
def test_drafts_after_many_steps_are_those_of_one_pass(length: int) -> None:
    """Guessed slots are overwritten, and wrong guesses leave nothing behind."""
    core = eager(HYBRID, chunk_size=7)
    run = core.submit(text(length), asked(0, 60, logit_bias=ENDLESS))
    for _ in range(100):
        if len(run.sequence.ids) <= 57:
            core.turn()
    seq = run.sequence
    assert num_drafted(core) > 0 and isinstance(core.drafter, Speculator) and core.drafter._mtp is not None
    assert core.drafter._mtp.catch_up([seq]) == [seq]
    assert core.drafter._mtp.windows[seq].start == 0
    drafts = core.drafter._mtp.draft({seq: 4})[seq]
    assert drafts == whole_text(HYBRID, list(seq.ids), 4)
    core.check_integrity()


def test_a_reused_prefix_opens_a_window_at_a_block() -> None:
    core = eager(HYBRID)
    core.submit(text(40), asked(0, 3))
    core.run()
    run = core.submit([*text(40), *text(20, 1)], asked(0, 30))
    core.turn()
    assert isinstance(core.drafter, Speculator) and core.drafter._mtp is not None
    assert core.drafter._mtp.catch_up([run.sequence]) == [run.sequence]
    window = core.drafter._mtp.windows[run.sequence]
    assert (window.start, window.end) == (48, 60) and core.runner.hits == {}
    core.run()
    assert answer(run) == alone(HYBRID, [*text(40), *text(20, 1)], asked(0, 30))


def test_without_drafts_few_states_are_kept() -> None:
    core = Core(HYBRID, drafter=Speculator(controller=Lazy(MAX_DEPTH)), max_rollback=MAX_DEPTH)
    run = core.submit(text(300), asked(0, 100, logit_bias=ENDLESS))
    for _ in range(90):
        core.turn()
    assert isinstance(core.drafter, Speculator) and core.drafter._mtp is not None
    mtp = core.drafter._mtp
    assert len(mtp._steps) == 64 and not mtp.windows
    assert mtp.catch_up([run.sequence]) == [run.sequence]
    window = mtp.windows[run.sequence]
    held = sum(part.untyped_storage().nbytes() for part in window.pending)
    assert 45 <= window.end - window.filled == sum(map(len, window.pending)) <= 64
    assert held <= 64 * 32 * 4
    core.drafter.controller = Eager(MAX_DEPTH)
    core.run()
    assert (
        answer(run) == alone(HYBRID, text(300), asked(0, 100, logit_bias=ENDLESS)) and core.counts.drafted > 0
    )


class Lazy(Steady):
    """Never drafts."""

    def choose(self, options: Sequence[Option]) -> list[Choice]:
        return [Choice()] * len(options)


def test_of_long_pieces_of_prompts_little_is_kept() -> None:
    core = Core(HYBRID, drafter=Speculator(controller=Lazy(MAX_DEPTH)), max_rollback=MAX_DEPTH)
    run = core.submit(text(500), asked(0, 100, logit_bias=ENDLESS))
    core.turn()
    assert isinstance(core.drafter, Speculator) and core.drafter._mtp is not None
    ((seq, states, position),) = core.drafter._mtp._steps[0]  # type: ignore[misc]
    assert seq is run.sequence and (len(states), position) == (64, 436)
    assert states.untyped_storage().nbytes() == 64 * 32 * 4


# repeats


def test_the_longest_repeat_is_found() -> None:
    lookup = PromptLookup()
    ids = [1, 2, 3, 4, 5, 6, 7, 9, 3, 4, 5, 8, 0, 1, 2, 3, 4, 5]
    assert lookup.match(ids) == (11, 3)  # the newest: fewer than six tokens agree anywhere
    assert lookup.match([*ids, 6]) == (6, 6)
    assert continuation([*ids, 6], 6, 3) == [7, 9, 3]
    assert lookup.match([*ids, 6, 99]) == (0, 0)


def test_a_loop_is_continued_beyond_the_end() -> None:
    ids = [5, 1, 2, 3, 1, 2, 3, 1, 2]
    place, length = PromptLookup().match(ids)
    assert length >= 2 and continuation(ids, place, 7) == [3, 1, 2, 3, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=60), step=st.integers(1, 9))
def test_matches_are_true_and_none_is_missed(ids: list[int], step: int) -> None:
    lookup = PromptLookup()
    for end in [*range(0, len(ids), step), len(ids)]:
        known = ids[:end]
        place, length = lookup.match(known)
        assert known[place - length : place] == known[end - length :] if length else place == 0
        assert length <= MAX_MATCH and place < max(end, 1)
        triples = [known[i : i + 3] for i in range(end - 3)]
        assert (length >= 3) == (known[-3:] in triples)
        if known[-6:] in [known[i : i + 6] for i in range(end - 6)]:
            assert length >= 6


def test_a_long_prompt_is_indexed_bit_by_bit() -> None:
    ids = [*range(100), *range(1000, 1000 + 2 * MAX_INDEXED), *range(100)]
    lookup = PromptLookup()
    counts = []
    for _ in range(4):
        before = lookup._num_indexed
        lookup.match(ids)
        counts.append(lookup._num_indexed - before)
    assert counts == [MAX_INDEXED, MAX_INDEXED, 200, 0]
    assert lookup.match([*ids, 500][:-1]) == (100, MAX_MATCH)


# the choice


class Simulation:
    """Steps of a machine with given costs, and drafts that are right with given probabilities."""

    def __init__(self, row: float, draft: float, right: float, num: int = 1, *, lookup: bool = False) -> None:
        self.row, self.draft, self.right, self.num, self.lookup = row, draft, right, num, lookup
        self.controller = Controller(MAX_DEPTH)
        self.rng = random.Random(0)
        self.seconds = self.plain = 0.0
        self.drafted = self.tries = self.looks = self.rests = self.slept = 0

    def run(self, steps: int, estimate: float | None = None) -> float:
        """Speed, relative to no drafts at all, in these steps."""
        self.seconds = self.plain = 0.0
        self.drafted = self.tries = self.looks = 0
        for _ in range(steps):
            self._step(self.right if estimate is None else estimate)
        return self.plain / self.seconds

    def _step(self, estimate: float) -> None:
        noise = self.rng.uniform(0.9, 1.1) + (self.rng.random() < 0.03)
        if self.rests:
            self.rests -= 1
            self.seconds += noise
            self.plain += noise
            return
        choices, look = [Choice()] * self.num, 0.0
        if self.controller.wants(self.num):
            look = 0.05
            self.looks += 1
            choices = self._choose(estimate)
            if not any(choice.depth for choice in choices):
                self.controller.looked(self.num, look)
        drafts = sum(choice.depth for choice in choices)
        depth = 0 if self.lookup else max(choice.depth for choice in choices)
        drafting, verifying = self.draft * depth, 1 + self.row * drafts / self.num
        made = sum(1 + self._accepted(choice.depth) for choice in choices)
        seconds = noise * (drafting + verifying) + look
        self.controller.learn(Measured(self.num, drafts, made, seconds, depth, noise * drafting, self.slept))
        self.rests = self.slept = self.controller.rest(self.num)
        self.seconds += seconds
        self.plain += noise * made / self.num
        self.drafted += drafts
        self.tries += self.controller.trying

    def _choose(self, estimate: float) -> list[Choice]:
        chances = [estimate] * (MAX_DEPTH if self.lookup else MAX_MTP_DEPTH)
        if not self.lookup and not self.controller.allows_mtp(self.num):
            chances = []
        option = Option(lookup=chances) if self.lookup else Option(mtp=chances)
        return self.controller.choose([option] * self.num)

    def _accepted(self, depth: int) -> int:
        return next((i for i in range(depth) if self.rng.random() >= self.right), depth)


@pytest.mark.parametrize("num", [1, 5, 40])
@pytest.mark.parametrize(("row", "right"), [(1.0, 0.3), (0.9, 0.6), (0.3, 0.05), (1.0, 0.0), (8.0, 0.9)])
def test_it_turns_off_where_verifying_costs_too_much(row: float, right: float, num: int) -> None:
    simulation = Simulation(row, 0.3, right, num)
    assert simulation.run(2000) > 0.96
    assert simulation.run(2000) > 0.985 and simulation.tries < 40


@pytest.mark.parametrize("num", [1, 5, 40])
def test_it_turns_on_and_goes_deep_where_it_pays(num: int) -> None:
    assert Simulation(0.1, 0.05, 0.9, num).run(500) > 2.2
    assert Simulation(0.1, 0.0, 0.95, num, lookup=True).run(500) > 2.7
    assert 1.15 < Simulation(0.3, 0.15, 0.8, num).run(500) < 1.6


def test_it_follows_when_the_machine_changes() -> None:
    simulation = Simulation(0.1, 0.1, 0.7)
    assert simulation.run(300) > 1.4
    simulation.row = 1.5
    simulation.run(200)
    assert simulation.run(2000) > 0.97
    simulation.row = 0.1
    simulation.run(20000)
    assert simulation.run(300) > 1.25


@pytest.mark.parametrize("lookup", [False, True])
def test_promises_that_are_never_kept_cost_a_small_share_of_the_time(lookup: bool) -> None:
    simulation = Simulation(3.0, 1.0, 0.0, lookup=lookup)
    speed = simulation.run(6000, estimate=0.8)
    assert simulation.drafted > 3
    assert speed > 1 - 2 * TRY_SHARE - 0.01


def test_drafting_that_only_just_loses_ends_too() -> None:
    """No single step tells; what was gained since it began does."""
    simulation = Simulation(0.28, 0.0, 0.2, lookup=True)
    assert simulation.run(6000, estimate=0.9) > 0.97


def test_off_almost_no_step_is_looked_at() -> None:
    simulation = Simulation(3.0, 1.0, 0.0)
    simulation.run(500)
    simulation.run(3000)
    assert not simulation.controller.level(1).on and 0 < simulation.looks < 3000 / REST


def test_without_measurements_nothing_is_wanted() -> None:
    controller = Controller(4)
    sure = Option(lookup=[0.99] * 4)
    for _ in range(WARM_UP):
        assert not controller.wants(1) and controller.plain_seconds(1) is None
        controller.learn(Measured(1, 0, 1, 0.01))
    assert controller.wants(1) and controller.choose([Option()]) == [Choice()]
    assert controller.choose([sure]) == [Choice(1)]  # with care, for costs are unknown
    controller.learn(Measured(1, 1, 2, 0.011))
    assert controller.wants(1) and controller.choose([sure]) == [Choice(2)]
    assert not controller.wants(2)  # two at a time were not measured yet


def test_while_drafting_the_plain_step_is_measured_anew() -> None:
    controller = Controller(4)
    sure, plain = Option(lookup=[0.99] * 4), 0
    for _ in range(WARM_UP):
        controller.wants(1)
        controller.learn(Measured(1, 0, 1, 0.02))
    for _ in range(4 * REFRESH):
        depth = controller.choose([sure])[0].depth if controller.wants(1) else 0
        plain += not depth
        controller.learn(Measured(1, depth, 1 + depth, 0.03 if depth else 0.02))
        assert controller.rest(1) == 0
    assert plain == 3 and controller.plain_seconds(1) == 0.02


def test_drafts_go_to_the_sequences_where_they_are_likeliest() -> None:
    controller = Controller(4)
    for _ in range(20):
        controller.wants(3)
        controller.learn(Measured(3, 0, 3, 0.01))
        controller.learn(Measured(3, 3, 6, 0.0118, 1, 0.001))
    likely, poor, guessed = Option(lookup=[0.95] * 4), Option(lookup=[0.1] * 4), Option([0.1], [0.9, 0.2])
    chosen = controller.choose([likely, poor, guessed])
    assert chosen[0].depth >= 2 and not chosen[0].mtp
    assert chosen[1].depth == 0 and chosen[2] == Choice(1, mtp=True)
    assert controller.gain([likely, poor, guessed], chosen) > 1.1


def test_failures_in_a_row_are_tried_ever_more_rarely() -> None:
    patience, waits = Patience(), []
    for _ in range(10):
        patience.fail()
        waits.append(patience.wait)
    assert waits[:3] == [32, 64, 128] and waits[-1] == 8192
    patience.succeed()
    patience.fail()
    assert patience.wait == 32


def test_a_median_ignores_disturbances() -> None:
    median = Median()
    for value in (3.0, 90.0, 2.0, 80.0, 2.5):
        median.learn(value)
    assert median.value == 3.0 and median.count == 5


def test_a_curve_learns_where_it_is_asked() -> None:
    curve = Curve(4, 0.2)
    for _ in range(30):
        curve.learn(1, 0.5)
    assert curve.at(0) == 0 and curve.at(1) == pytest.approx(0.5)
    assert curve.at(3) == pytest.approx(1.5) and curve.at(0.5) == pytest.approx(0.25)
    curve.learn(1, 50.0)
    assert curve.at(1) < 0.7
    curve.learn(2.2, 0.66)
    assert curve.at(2) == pytest.approx(0.6) and curve.at(4) == pytest.approx(1.2)


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
    core = Core(HYBRID, drafter=Speculator(controller=Eager(MAX_DEPTH)), max_rollback=MAX_DEPTH)
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
    core = Core(HYBRID, drafter=Speculator(controller=Lazy(MAX_DEPTH)), max_rollback=MAX_DEPTH)
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
    for number, (plain, guessed) in enumerate(zip(*answers, strict=True)):
        if number != 3:
            assert plain[0] == guessed[0] and plain[1].token_ids == guessed[1].token_ids
    assert engines[0].stats().drafted == 0 and all(f.speedup is None for _, f in answers[0])


def test_the_mtp_module_of_the_default_model_is_worth_its_name(default: tuple[CausalLM, Tokenizer]) -> None:
    class OnlyMTP(Steady):
        def choose(self, options: Sequence[Option]) -> list[Choice]:
            return [Choice(min(2, len(option.mtp)), mtp=True) for option in options]

    model, tokenizer = default
    drafter = Speculator(controller=OnlyMTP(MAX_DEPTH))
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
