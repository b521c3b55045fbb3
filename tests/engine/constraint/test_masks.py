"""Masks that are late: they hold up their own answer only, and change no token of it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from godwit.engine import core as module
from godwit.engine.constraint.masks import MaskPool, Masks
from godwit.engine.sampling import SamplingParams
from godwit.errors import UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.native import pack_model
from tests.engine.speculation.test_speculator import eager, repeating
from tests.engine.steps import Core, Run
from tests.engine.tiny import tiny_model

VOCAB = 263
HYBRID, ATTENTION = (pack_model(tiny_model(kind), "q4") for kind in ("hybrid", "attention"))
BOTH = pytest.mark.parametrize("model", [HYBRID, ATTENTION], ids=["hybrid", "attention"])


class Some:
    """Two letters may come next; which ones depends on the last, so that texts soon repeat themselves."""

    def __init__(self) -> None:
        self.last = 0

    def allowed(self) -> Tensor | None:
        mask = torch.zeros(VOCAB, dtype=torch.bool)
        mask[[40 + (3 * self.last + 1) % 7, 40 + (5 * self.last + 2) % 7]] = True
        return mask

    def accept(self, token: int) -> None:
        self.last = token


class Anything(Some):
    def allowed(self) -> Tensor | None:
        return None


class Costly(Some):
    def accept(self, token: int) -> None:
        raise UsageError("the form is too costly to follow")


class LatePool(MaskPool):
    """Masks are computed at once or when they are let go."""

    def __init__(self, punctual: float = 0.0) -> None:
        super().__init__()
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._punctual, self._chance = punctual, random.Random(7)

    def submit(self, spent: float, work: Callable[[], Any]) -> Future[Any]:
        job: Future[Any] = Future()
        self.held.append((job, work))
        if self._chance.random() < self._punctual:
            self.let_go(-1)
        return job

    def let_go(self, number: int = 0) -> None:
        job, work = self.held.pop(number)
        if job.set_running_or_notify_cancel():
            job.set_result(work())


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LatePool]:
    monkeypatch.setattr(module, "MASK_SECONDS", 0.0)

    def hold(core: Core, punctual: float = 0.0) -> LatePool:
        pool = core.masks = LatePool(punctual)
        return pool

    return hold


def params(seed: int, length: int = 40) -> SamplingParams:
    return SamplingParams(temperature=float(seed % 2), seed=seed, max_tokens=length)


def prompt(seed: int) -> list[int]:
    return repeating(seed)


def submit(core: Core, seed: int, **how: Any) -> Run:
    return core.submit(prompt(seed), params(seed), constraint=Some(), **how)


def alone(model: CausalLM, seed: int) -> list[int]:
    core = Core(model)
    run = submit(core, seed)
    core.run()
    return run.made


@BOTH
@pytest.mark.parametrize("drafting", [False, True], ids=["plain", "drafts"])
def test_late_masks_change_no_answer(model: CausalLM, drafting: bool, late: Any) -> None:
    core = eager(model) if drafting else Core(model)
    pool, chance = late(core, 0.6 if drafting else 0.0), random.Random(4)
    runs = [submit(core, seed) for seed in range(4)]
    free = core.submit(prompt(9), params(9, 30))
    for _ in range(2000):
        if not core.busy:
            break
        core.turn()
        for _ in range(chance.randrange(4)):
            if pool.held:
                pool.let_go(chance.randrange(len(pool.held)))
    assert [run.made for run in runs] == [alone(model, seed) for seed in range(4)]
    assert len(free.made) == 30
    if drafting:
        assert core.counts.accepted > 2


def test_an_answer_whose_mask_never_comes_holds_up_nobody(late: Any) -> None:
    core = Core(HYBRID)
    pool = late(core)
    stuck = submit(core, 0)
    other = core.submit(prompt(1), params(1, 25))
    steps = core.run_until(lambda: other.finish is not None)
    assert len(other.made) == 25 and steps <= 27 and stuck.made == []
    for _ in range(3):  # nothing else to do, and no step is run in vain
        before = core.counts.steps
        core.turn()
        assert core.counts.steps == before
    stuck.channel.cancel()
    core.turn()
    assert stuck.finish is not None and stuck.finish.reason == "cancelled" and not core.busy
    assert pool.held[0][0].cancelled()
    after = core.submit(prompt(2), params(2, 5))
    core.run()
    assert len(after.made) == 5 and core.counts.failures == 0


def test_a_late_answer_that_has_to_make_room_is_computed_again(late: Any) -> None:
    core = Core(ATTENTION, num_blocks=9)
    pool = late(core)
    first = core.submit(prompt(1), params(1, 70))
    second = submit(core, 0)
    core.run_until(lambda: second.sequence.num_preemptions > 0)
    assert first.finish is None and second.made == []
    while core.busy:
        core.turn()
        while pool.held:
            pool.let_go()
    assert second.made == alone(ATTENTION, 0)


def test_scores_from_before_an_answer_made_room_are_not_used(
    late: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(ATTENTION, num_blocks=9)
    pool, run = late(core), core.runner.run
    core.submit(prompt(1), params(1, 70))
    second = core.submit(prompt(0), params(0), constraint=Anything())
    core.run_until(lambda: second.sequence.num_preemptions > 0)
    pool._punctual = 1.0

    def timely(works: Any) -> Any:
        """The mask comes while the step runs that computes the scores again."""
        if pool.held and any(work.sequence is second.sequence for work in works):
            pool.let_go()
        return run(works)

    monkeypatch.setattr(core.runner, "run", timely)
    core.run()
    free = Core(ATTENTION)
    wanted = free.submit(prompt(0), params(0))
    free.run()
    assert not pool.held and second.made == wanted.made and second.made[0] != second.made[1]


def test_a_form_that_fails_ends_its_own_answer_and_is_its_client_s_fault() -> None:
    core = Core(HYBRID)
    bad = core.submit(prompt(1), params(1), constraint=Costly())
    good = submit(core, 2)
    core.run()
    assert bad.finish is not None and bad.finish.reason == "error" and bad.finish.refused
    assert bad.finish.error == "the form is too costly to follow"
    assert good.made == alone(HYBRID, 2) and core.counts.failures == 0


def test_masks_of_answers_that_took_little_time_come_first() -> None:
    pool, gate, order = MaskPool(1), threading.Event(), list[float]()
    busy = pool.submit(0.0, lambda: order.append(0.0) if gate.wait() else None)
    jobs = [pool.submit(spent, lambda spent=spent: order.append(spent)) for spent in (3.0, 1.0, 2.0)]  # type: ignore[misc]
    gone = pool.submit(0.5, lambda: order.append(0.5))
    assert gone.cancel()
    gate.set()
    for job in (busy, *jobs):
        job.result()
    pool.close()
    assert order == [0.0, 1.0, 2.0, 3.0]


def test_no_mask_is_computed_for_a_token_that_is_known() -> None:
    calls: list[str] = []

    class Noting(Some):
        def allowed(self) -> Tensor | None:
            calls.append("allowed")
            return super().allowed()

        def accept(self, token: int) -> None:
            calls.append(f"accept {token}")

    pool = MaskPool()
    masks = Masks(Noting(), pool)
    masks.begin()
    assert masks.take() is not None
    masks.accept(5, foreseen=True)
    assert masks.take() is None
    masks.accept(6, foreseen=False)
    assert masks.take() is not None
    pool.close()
    assert calls == ["allowed", "accept 5", "accept 6", "allowed"]
