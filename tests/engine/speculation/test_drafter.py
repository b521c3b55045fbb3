"""What the speculator asks of its sources and tells its controller, step by step, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from godwit.engine.cache import CacheSize
from godwit.engine.core import divide
from godwit.engine.scheduler import Sequence as Request
from godwit.engine.scheduler import Work
from godwit.engine.speculation import speculator as module
from godwit.engine.speculation.controller import BatchKind, Controller, DraftChoice, TimedStep
from godwit.engine.speculation.mtp import MAX_PENDING
from godwit.engine.speculation.source import DraftSource
from godwit.engine.speculation.speculator import MAX_DEPTH, Speculator, leaves_room
from tests.engine.tiny import tiny_model


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Told(Controller):
    """Chooses what it is told to choose, and keeps the steps that it hears of."""

    def __init__(self, choice: DraftChoice | None = None, rests: int = 0) -> None:
        super().__init__()
        self.choice, self.rests = choice, rests
        self.allowed = {0: 0, 1: 0}  # source -> steps until it may draft
        self.rates: Sequence[Sequence[Sequence[float]]] = ()
        self.steps: list[TimedStep] = []

    def wants_drafts(self, kind: BatchKind) -> bool:
        return True

    def plain_seconds(self, kind: BatchKind) -> float | None:
        return 1.0

    def may_draft(self, source: int, ahead: int = 0) -> bool:
        return ahead >= self.allowed[source]

    def choose(self, size: int, rates: Sequence[Sequence[Sequence[float]]]) -> DraftChoice | None:
        self.rates = rates
        return self.choice

    def learn(self, step: TimedStep) -> int:
        self.steps.append(step)
        return self.rests


class Noting(DraftSource):
    """Takes 1 second for its rates, 10 to catch up and 100 for drafts."""

    def __init__(self, clock: Clock, behind: bool = False) -> None:
        self.clock, self.behind, self.calls = clock, behind, list[tuple[Any, ...]]()

    def rates(self, seq: Request, limit: int) -> list[float]:
        self.clock.now += 1
        return [0.5] * limit

    def catch_up(self, seqs: Any) -> bool:
        self.clock.now += 10
        return self.behind

    def draft(self, depths: Mapping[Request, int]) -> dict[Request, list[int]]:
        self.clock.now += 100
        return {seq: [7] * depth for seq, depth in depths.items()}

    def judge(self, seq: Request, num_drafts: int, num_accepted: int) -> None:
        self.calls.append(("judge", seq.number, num_drafts, num_accepted))

    def record(self, works: Any, kept: Any, batch: Any, hidden: Any) -> None:
        self.calls.append(("record",))

    def forget(self, seq: Request) -> None:
        self.calls.append(("forget", seq.number))


def request(number: int, length: int = 20) -> Request:
    return Request(number, [1] * length, length - 1, 1000, num_computed=length - 1)


def make(controller: Controller, behind: bool = False) -> tuple[Speculator, list[Noting], Clock]:
    clock = Clock()
    drafter = Speculator(controller=controller, clock=clock)
    sources = [Noting(clock, behind), Noting(clock, behind)]
    drafter.sources = drafter._recording = list[DraftSource](sources)
    return drafter, sources, clock


def observe(drafter: Speculator, works: list[Work], kept: list[int]) -> None:
    drafter.observe(works, kept, cast(Any, None), cast(Any, None))


def plain(*numbers: int) -> list[Work]:
    return [Work(request(number), [1]) for number in numbers]


def test_rests_are_counted_and_end_when_the_batch_changes() -> None:
    controller = Told(rests=5)
    drafter, _, _ = make(controller)
    assert drafter.wants(1)
    observe(drafter, plain(0), [1])
    assert [drafter.wants(1) for _ in range(2)] == [False, False]
    assert drafter.propose({request(0): 3}) == {}
    assert drafter.wants(2)
    observe(drafter, plain(0, 1), [1, 1])
    assert [step.num_untimed for step in controller.steps] == [0, 2]
    assert [drafter.wants(2) for _ in range(6)] == [False] * 5 + [True]


def test_nothing_is_drafted_nor_recorded_for_many_sequences() -> None:
    drafter, sources, _ = make(Told())
    assert drafter.wants(drafter.max_sequences) and not drafter.wants(drafter.max_sequences + 1)
    observe(drafter, plain(0), [1])
    assert sources[0].calls == [] and drafter.controller.steps == []  # type: ignore[attr-defined]


def test_sources_are_asked_within_limits_and_only_if_they_may_draft() -> None:
    controller = Told()
    controller.allowed[1] = 1
    drafter, _, _ = make(controller)
    drafter.wants(2)
    assert drafter.propose({request(0): 2, request(1): 100}) == {}
    assert controller.rates == [[[0.5] * 2, [0.5] * MAX_DEPTH], []]
    observe(drafter, plain(0, 1), [1, 1])
    assert controller.steps[0].search_seconds == 2


@pytest.mark.parametrize("behind", [False, True])
def test_drafts_are_made_timed_and_judged(behind: bool) -> None:
    controller = Told(DraftChoice(1, [3, 0]))
    drafter, sources, clock = make(controller, behind)
    first, second = request(0), request(1)
    drafter.wants(2)
    drafts = drafter.propose({first: 4, second: 4})
    assert drafts == {first: [7, 7, 7]}
    clock.now += 1000
    observe(drafter, [Work(first, [1, 7, 7, 7], 3), Work(second, [1])], [3, 1])
    assert sources[1].calls == [("record",), ("judge", 0, 3, 2)] and sources[0].calls == [("record",)]
    (step,) = controller.steps
    assert (step.source, step.num_drafts, step.num_tokens, step.search_seconds) == (1, 3, 4, 0)
    assert step.seconds == 1114 and step.catch_up_seconds == (10 if behind else 0)
    assert (first.saved_seconds, second.saved_seconds) == (3 - 1114, 1 - 1114)


def test_steps_that_tell_nothing_of_drafts_are_not_learned_from() -> None:
    controller = Told(DraftChoice(0, [2]))
    drafter, _, _ = make(controller)
    drafter.wants(1)
    drafter.propose({request(0): 4})
    observe(drafter, plain(0), [1])  # there was no room for the drafts
    drafter.wants(2)
    observe(drafter, [Work(request(1), [1] * 8), *plain(0)], [8, 1])  # a prompt is read beside
    assert controller.steps == []
    drafter.wants(1)
    observe(drafter, plain(0), [1])
    assert len(controller.steps) == 1


def test_steps_are_compared_with_those_of_texts_about_as_long() -> None:
    controller = Told()
    drafter, _, _ = make(controller)
    for length in (20, 500, 16_000):
        drafter.wants(1)
        observe(drafter, [Work(request(0, length), [1])], [1])
    assert [step.kind for step in controller.steps] == [BatchKind(1, 2), BatchKind(1, 4), BatchKind(1, 7)]


def test_a_source_is_recorded_from_a_window_before_it_may_draft() -> None:
    controller = Told()
    drafter, sources, _ = make(controller)
    controller.allowed = {0: MAX_PENDING, 1: MAX_PENDING + 1}
    for _ in range(2):
        drafter.wants(1)
        observe(drafter, plain(0), [1])
    assert [len(source.calls) for source in sources] == [2, 1]


def test_all_sources_forget() -> None:
    drafter, sources, _ = make(Told())
    drafter.forget(request(3))
    assert [source.calls for source in sources] == [[("forget", 3)]] * 2


def test_drafts_get_their_room_unless_texts_become_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("hybrid")
    plain_size, size = CacheSize.of(model), CacheSize.of(model, MAX_DEPTH)
    assert leaves_room(model, 4096, None, 4) and leaves_room(model, 4096, size.total(4096), 4)
    scarce = plain_size.total(160)
    assert divide(size, 4096, scarce, 1)[0] < 10 and not leaves_room(model, 4096, scarce, 1)
    several = plain_size.total(64, 4)  # of which drafts leave one whole context
    assert divide(size, 64, several, 4)[0] < divide(plain_size, 64, several, 4)[0]
    assert leaves_room(model, 64, several, 4)
    assert not leaves_room(model, 4096, plain_size.total(32), 1)
    monkeypatch.setattr(module, "_MIN_CONTEXT", 0.0)
    assert leaves_room(model, 4096, scarce, 1)
