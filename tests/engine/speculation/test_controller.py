"""The controller on simulated machines: a fake clock, given costs, given acceptance."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from operator import mul

import pytest

from godwit.engine.speculation import controller
from godwit.engine.speculation.controller import BatchKind, Controller, DraftChoice, TimedStep, best_depths
from godwit.engine.speculation.estimates import Acceptance

LOOKUP, MTP = 0, 1
MAX_DEPTH = 6
BUDGET = 0.01  # what the documentation promises


class Simulation:
    """One batch on a machine whose plain step takes ``plain`` seconds.

    Attributes:
        cost: of one draft for each sequence, in plain steps, by source.
        chance: that a draft is accepted, by source; drafts of a source without one do not exist.
        search, catch_up: what looking for drafts and catching up take, in plain steps.
        noise: multiplies the time of each step.
        right: decides whether a draft is accepted, by its source and its place in the step.
    """

    def __init__(
        self, cost: dict[int, float], chance: dict[int, float], size: int = 1, length: int = 3
    ) -> None:
        self.cost, self.chance, self.kind = cost, chance, BatchKind(size, length)
        self.plain, self.search, self.catch_up = 0.001, 0.02, 0.0
        self.controller = Controller()
        self.rng = random.Random(0)
        self.noise: Callable[[], float] = lambda: 1.0
        self.right: Callable[[int, int], bool] = lambda source, _: self.rng.random() < self.chance[source]
        self.acceptance = [[Acceptance() for _ in range(size)] for _ in range(2)]
        self.depths: list[int] = []
        self.seconds = self.plain_seconds = 0.0
        self.searches = self.timed = 0
        self._rests = self._untimed = 0

    def run(self, tokens: int) -> float:
        """Speed in so many tokens of each sequence, relative to no drafts at all."""
        self.seconds = self.plain_seconds = 0.0
        self.searches = self.timed = 0
        self.depths = []
        made = 0.0
        while made < tokens:
            made += self._step()
        return self.plain_seconds / self.seconds

    def tokens_until(self, done: Callable[[list[int]], bool], most: int) -> int:
        """Tokens until the depths of the newest ten steps satisfy ``done``."""
        made = 0.0
        while made < most:
            made += self._step()
            if len(self.depths) >= 10 and done(self.depths[-10:]):
                return round(made)
        raise AssertionError(f"not within {most} tokens")

    def _step(self) -> float:
        size = self.kind.size
        if self._rests:
            self._rests -= 1
            self.depths.append(0)
            return self._pass(self.plain * self.noise(), 1.0)
        self.timed += 1
        source, depths, search, catch_up = LOOKUP, [0] * size, 0.0, 0.0
        if self.controller.wants_drafts(self.kind):
            self.searches += 1
            search = self.search * self.plain
            choice = self.controller.choose(size, self._rates())
            if choice is not None:
                (source, depths), search = choice, 0.0
                catch_up = 0.0 if any(self.depths[-1:]) else self.catch_up * self.plain
        drafted = sum(depths)
        made = size + sum(self._accepted(source, number, depth) for number, depth in enumerate(depths))
        seconds = self.plain * (1 + self.cost.get(source, 0.0) * drafted / size) * self.noise()
        seconds += self.search * self.plain if drafted else search
        self._rests = self.controller.learn(
            TimedStep(
                self.kind,
                made,
                seconds + catch_up,
                source,
                drafted,
                search,
                catch_up,
                num_untimed=self._untimed,
            )
        )
        self._untimed = self._rests
        self.depths.append(max(depths))
        return self._pass(seconds + catch_up, made / size)

    def _pass(self, seconds: float, made: float) -> float:
        self.seconds += seconds
        self.plain_seconds += self.plain * made
        return made

    def _rates(self) -> list[list[list[float]]]:
        return [
            [[each.rate(0)] * MAX_DEPTH for each in self.acceptance[source]]
            if source in self.chance and self.controller.may_draft(source)
            else []
            for source in (LOOKUP, MTP)
        ]

    def _accepted(self, source: int, number: int, depth: int) -> int:
        for place in range(depth):
            right = self.right(source, place)
            self.acceptance[source][number].learn(0, right)
            if not right:
                return place
        return depth


def both(value: float) -> dict[int, float]:
    return {LOOKUP: value, MTP: value}


def mostly_on(depths: list[int]) -> bool:
    return sum(depth > 0 for depth in depths) >= 9


def off(depths: list[int]) -> bool:
    return not any(depths)


# it never loses


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("cost", "chance"),
    [(0.3, 0.0), (0.3, 0.25), (0.9, 0.6), (1.0, 1.0), (8.0, 0.9), (0.05, 0.0), (0.5, 0.45), (0.2, 0.2)],
)
def test_where_drafts_do_not_pay_they_cost_no_more_than_the_budget(
    cost: float, chance: float, size: int
) -> None:
    simulation = Simulation(both(cost), both(chance), size)
    assert simulation.run(6000) > 1 / (1 + 1.2 * BUDGET)


@pytest.mark.parametrize("cost", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("period", [3, 17, 150])
def test_acceptance_that_switches_loses_no_more_than_the_budget(cost: float, period: int) -> None:
    simulation = Simulation(both(cost), both(0.5))
    simulation.right = lambda source, place: len(simulation.depths) // period % 2 == 0
    assert simulation.run(6000) > 1 / (1 + 1.2 * BUDGET)


@pytest.mark.parametrize("cost", [0.1, 0.4])
def test_an_adversary_who_accepts_probes_only_gains_nothing(cost: float) -> None:
    """Single drafts are right, so that deeper ones seem to pay, and those are wrong."""
    simulation = Simulation(both(cost), both(0.5))
    depth = 0

    def right(source: int, place: int) -> bool:
        return depth == 1

    def choose(size: int, rates: object) -> object:
        nonlocal depth
        choice = original(size, rates)  # type: ignore[arg-type]
        depth = 0 if choice is None else max(choice.depths)
        return choice

    original, simulation.right = simulation.controller.choose, right
    simulation.controller.choose = choose  # type: ignore[method-assign, assignment]
    assert simulation.run(6000) > 1 / (1 + 1.2 * BUDGET)


def test_catching_up_is_paid_from_the_budget_too() -> None:
    simulation = Simulation(both(0.5), {MTP: 0.0})
    simulation.catch_up = 4.0
    assert simulation.run(6000) > 1 / (1 + 1.2 * BUDGET)
    assert any(simulation.depths[-3000:])


def test_catching_up_is_no_part_of_what_a_draft_costs() -> None:
    simulation = Simulation(both(0.2), {MTP: 0.0})
    simulation.catch_up = 4.0
    simulation.run(3000)
    choice = simulation.controller.choose(1, [[], [[0.9] * 4]])
    assert choice is not None and choice.depths == [4]


def test_searching_is_paid_from_the_budget_too() -> None:
    simulation = Simulation(both(0.5), {})
    simulation.search = 0.5
    assert simulation.run(6000) > 1 / (1 + 1.2 * BUDGET)
    assert simulation.searches > 100


def test_a_search_is_no_part_of_a_plain_step() -> None:
    kind, measured = BatchKind(1, 3), Controller()
    for _ in range(5):
        measured.learn(TimedStep(kind, 1, 0.0013, search_seconds=0.0003))
    assert measured.plain_seconds(kind) == pytest.approx(0.001)


def test_the_budget_is_used_so_that_changes_are_noticed() -> None:
    simulation = Simulation(both(0.5), both(0.0))
    simulation.search = 0.0
    speed = simulation.run(6000)
    assert 1 / (1 + 1.1 * BUDGET) < speed < 1 / (1 + 0.7 * BUDGET)


# it drafts where that pays


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("cost", "chance", "best"), [(0.1, 0.9, 2.9), (0.05, 0.95, 4.0), (0.3, 0.8, 1.45), (0.6, 0.9, 1.17)]
)
def test_where_drafts_pay_it_drafts_nearly_as_well_as_possible(
    cost: float, chance: float, best: float, size: int
) -> None:
    simulation = Simulation(both(cost), both(chance), size)
    simulation.search = 0.0
    simulation.run(1000)
    best = max((1 + sum(accumulate([chance] * k, mul))) / (1 + cost * k) for k in range(MAX_DEPTH + 1))
    assert simulation.run(3000) > 1 + 0.8 * (best - 1)


def test_it_turns_on_soon_after_the_start() -> None:
    assert Simulation(both(0.2), both(0.9)).tokens_until(mostly_on, 300) < 150


def test_it_turns_on_soon_when_drafts_become_right() -> None:
    simulation = Simulation(both(0.3), both(0.0))
    simulation.run(3000)
    simulation.chance = both(0.95)
    assert simulation.tokens_until(mostly_on, 1000) < 400


def test_it_turns_on_soon_when_drafts_become_cheap() -> None:
    simulation = Simulation(both(1.5), both(0.7))
    simulation.run(3000)
    simulation.cost = both(0.1)
    assert simulation.tokens_until(mostly_on, 3000) < 1500


def test_it_turns_off_at_once_when_drafts_become_wrong() -> None:
    simulation = Simulation(both(0.3), both(0.9))
    simulation.run(3000)
    simulation.chance = both(0.0)
    assert simulation.tokens_until(off, 200) < 40


def test_it_turns_off_at_once_when_drafts_become_dear() -> None:
    simulation = Simulation(both(0.1), both(0.9))
    simulation.run(3000)
    simulation.cost = both(3.0)
    assert simulation.tokens_until(off, 200) < 40


def test_a_few_refused_drafts_do_not_end_drafting_that_pays() -> None:
    simulation = Simulation(both(0.3), both(0.9))
    simulation.run(3000)
    simulation.chance = both(0.0)
    simulation.run(2)
    simulation.chance = both(0.9)
    assert simulation.tokens_until(mostly_on, 300) < 60


def test_the_better_source_is_used() -> None:
    for better in (LOOKUP, MTP):
        simulation = Simulation({LOOKUP: 0.3, MTP: 0.3}, {**both(0.5), better: 0.9})
        used: list[int] = []

        def right(source: int, place: int, simulation: Simulation = simulation) -> bool:
            used.append(source)  # noqa: B023
            return simulation.rng.random() < simulation.chance[source]

        simulation.right = right
        simulation.run(3000)
        assert used[-1000:].count(better) > 900


def test_probes_of_the_sources_take_turns() -> None:
    rates = [[[0.1] * 3], [[0.1] * 3]]
    probes = [Controller().choose(1, [rates[0], []]), Controller().choose(1, [[], rates[1]])]
    assert probes == [DraftChoice(LOOKUP, [1]), DraftChoice(MTP, [1])]
    chosen, fresh = [], Controller()
    for _ in range(4):
        choice = fresh.choose(1, rates)
        assert choice is not None
        chosen.append(choice.source)
    assert sorted(chosen[:2]) == sorted(chosen[2:]) == [LOOKUP, MTP]


def test_probes_wait_for_a_rest_unless_the_cost_is_unknown() -> None:
    fresh, unlikely = Controller(), [[[0.01]], []]
    fresh._may_probe = False
    assert fresh.choose(1, unlikely) == DraftChoice(LOOKUP, [1])
    fresh._accounts[LOOKUP].costs[1].add(0.5)
    assert fresh.choose(1, unlikely) is None
    fresh._may_probe = True
    assert fresh.choose(1, unlikely) == DraftChoice(LOOKUP, [1])


def test_no_more_gain_is_kept_than_a_few_steps_may_lose() -> None:
    fresh, kind = Controller(), BatchKind(1, 3)
    for _ in range(controller.WARM_UP):
        fresh.learn(TimedStep(kind, 1, 1.0))
    fresh.learn(TimedStep(kind, 7, 1.0, LOOKUP, 6))
    assert fresh._accounts[LOOKUP].balance == controller.MAX_GAIN


# costs


def test_costs_are_those_of_the_batch() -> None:
    """Drafts pay beside one sequence, not beside four."""
    one, four = Simulation(both(0.1), both(0.9)), Simulation(both(2.0), both(0.9), size=4)
    four.controller = one.controller
    for _ in range(5):
        assert one.run(1000) > 2.0
        assert four.run(1000) > 0.98  # gains may be lost again elsewhere


def test_a_longer_context_is_measured_on_its_own() -> None:
    simulation = Simulation(both(0.2), both(0.9))
    simulation.run(3000)
    simulation.plain, simulation.kind = 0.003, BatchKind(1, 6)
    assert simulation.tokens_until(mostly_on, 200) < 60
    simulation.plain, simulation.kind = 0.001, BatchKind(1, 3)
    assert simulation.tokens_until(mostly_on, 200) < 60


def test_a_machine_that_becomes_slower_is_measured_again() -> None:
    """Without a change of the batch: plain steps are timed now and then while drafting, too."""
    simulation = Simulation(both(0.2), both(0.9))
    simulation.run(3000)
    simulation.plain = 0.0015
    assert simulation.run(3000) > 1.7
    assert simulation.controller.plain_seconds(simulation.kind) == pytest.approx(0.0015)


def test_while_drafting_few_steps_go_without() -> None:
    simulation = Simulation(both(0.1), both(1.0))
    simulation.run(600)
    simulation.run(3000)
    plain = simulation.depths.count(0) / len(simulation.depths)
    assert 0.02 < plain < 0.05


def test_one_slow_step_changes_nothing_for_long() -> None:
    simulation = Simulation(both(0.3), both(0.9))
    simulation.run(2000)
    for _ in range(5):
        stall = iter([50.0])
        simulation.noise = lambda stall=stall: next(stall, 1.0)  # type: ignore[misc]
        simulation.run(10)
        assert simulation.tokens_until(mostly_on, 300) < 60


@pytest.mark.parametrize("at", range(8))
def test_one_slow_step_at_the_start_is_made_good(at: int) -> None:
    simulation = Simulation(both(0.2), {LOOKUP: 0.9})
    times = iter([*[1.0] * at, 500.0])
    simulation.noise = lambda: next(times, 1.0)
    assert simulation.tokens_until(mostly_on, 5000) < 2500


def test_noise_neither_starts_drafting_nor_ends_it() -> None:
    for cost, chance, least, most in ((0.3, 0.9, 1.5, 3.0), (0.9, 0.5, 0.985, 1.01)):
        simulation = Simulation(both(cost), both(chance))
        rng = random.Random(1)
        simulation.noise = lambda rng=rng: rng.uniform(0.9, 1.1)  # type: ignore[misc]
        simulation.run(500)
        assert least < simulation.run(10000) < most


def test_the_first_steps_are_not_compared_with() -> None:
    """They take longer; drafts would seem to pay beside them."""
    simulation = Simulation(both(1.5), both(0.6))
    times = iter([6.0, 2.0, 1.0])
    simulation.noise = lambda: next(times, 1.0)
    for _ in range(3):
        assert not simulation.controller.wants_drafts(simulation.kind)
        assert simulation.controller.plain_seconds(simulation.kind) is None
        simulation._step()
    assert simulation.controller.plain_seconds(simulation.kind) == pytest.approx(0.002)
    assert simulation.controller.wants_drafts(simulation.kind)


# rests


def test_while_off_few_steps_are_timed() -> None:
    simulation = Simulation(both(0.5), {})
    simulation.run(100)
    simulation.run(3200)
    assert simulation.timed == pytest.approx(3200 / (1 + controller.MAX_REST), abs=2)


def test_a_source_is_recorded_only_shortly_before_it_may_draft() -> None:
    simulation = Simulation(both(2.0), {MTP: 0.0})
    simulation.run(1000)
    simulation.tokens_until(lambda depths: depths[-1] > 0, 1000)
    assert not simulation.controller.may_draft(MTP, 64)
    simulation.tokens_until(lambda depths: simulation.controller.may_draft(MTP, 64), 1000)
    assert not simulation.controller.may_draft(MTP)


# how much


def test_depths_follow_the_chances_of_each_sequence() -> None:
    gain, depths = best_depths(3, [[0.95] * 4, [0.1] * 4, []], 0.3)
    assert depths == [4, 0, 0] and gain == pytest.approx(
        (3 + 0.95 + 0.9025 + 0.857375 + 0.81450625) / 3 / 1.4
    )
    assert best_depths(1, [[0.3, 0.9]], 0.4) == (1.0, [0])
    assert best_depths(2, [[0.5], [0.9]], 0.45)[1] == [0, 1]
    assert best_depths(1, [], 0.1) == (1.0, [])


@pytest.mark.parametrize("cost", [0.01, 0.1, 0.3, 0.7])
def test_no_other_depths_are_better(cost: float) -> None:
    rng = random.Random(2)
    for _ in range(30):
        rates = [[rng.random() for _ in range(3)] for _ in range(2)]
        gain, depths = best_depths(2, rates, cost)
        gains = {
            (a, b): (2 + sum(accumulate(rates[0][:a], mul)) + sum(accumulate(rates[1][:b], mul)))
            / (2 + cost * (a + b))
            for a in range(4)
            for b in range(4)
        }
        assert gain == pytest.approx(gains[depths[0], depths[1]]) == max(gains.values())
