"""Whatever the engine calls may raise an error: it ends the requests concerned, and the engine goes on."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from godwit.engine.cache import BlockPool, HybridCache, StatePool
from godwit.engine.cache.disk import DiskCache
from godwit.engine.cache.prefix import PrefixIndex
from godwit.engine.constraint.masks import Masks
from godwit.engine.ending import Ending
from godwit.engine.generation import Generation
from godwit.engine.runner import ModelRunner
from godwit.engine.sampling import Sampler
from godwit.engine.scheduler import Scheduler, Sequence
from godwit.engine.scoring import PromptScores
from godwit.engine.stop_matcher import StopMatcher
from godwit.engine.stream import Channel
from godwit.models.causal_lm import CausalLM
from godwit.text.detokenizer import StreamDecoder
from tests.engine.steps import Core, Run
from tests.engine.test_core import HYBRID, alone, answer, asked, text
from tests.engine.test_core_faults import Fixed, Guesses

SYSTEM, OTHER = text(75), text(66, 8)
#: (prompt, parameters, further fields of the request); the blocks do not suffice for all at a time.
REQUESTS: tuple[tuple[list[int], Any, dict[str, Any]], ...] = (
    ([*SYSTEM, *text(20, 1)], asked(0, 32), {}),
    ([*SYSTEM, *text(9, 2)], asked(1, 40, stop=("zzz",)), {}),
    (text(25, 3), asked(2), {"constraint": [40, 41, 42, 258]}),
    (text(40, 4), asked(3, 5, logprobs=1), {"score_prompt": True}),
    ([*text(40, 4), *text(10, 5)], asked(4, 32), {"priority": 1}),
    ([*OTHER, 1], asked(5, 32), {"priority": -1}),
    ([*OTHER, 2], asked(6, 32), {"priority": -1}),
)
Faults = tuple[int, int]
LATER = ([*SYSTEM, *text(20, 1), 7], asked(5))
#: What works for one request at a time.
OF_ONE: dict[type, tuple[str, ...]] = {
    ModelRunner: ("admit", "known", "extend", "release", "settle", "remember"),
    HybridCache: ("adopt", "copy_block", "restore", "extend", "rollback", "replace_block"),
    PrefixIndex: ("match", "use", "commit", "add_snapshot", "end_of"),
    DiskCache: ("fetch", "save"),
    Sequence: ("add_cut", "shared_with", "is_cut"),
    Sampler: ("sample", "record"),
    StreamDecoder: ("push", "flush"),
    StopMatcher: ("push", "flush"),
    Ending: ("ends", "allowed"),
    Masks: ("begin", "take", "accept"),
    Fixed: ("allowed", "accept"),
    PromptScores: ("read",),
    Generation: ("begin", "score", "choose", "push"),
}  # fmt: skip
#: What works for the whole step, or may leave the books in disorder.
OF_ALL: dict[type, tuple[str, ...]] = {
    ModelRunner: ("run", "discard"),
    HybridCache: ("add_sequence", "snapshot", "batch", "free"),
    BlockPool: ("allocate", "share", "free"),
    StatePool: ("allocate", "free"),
    PrefixIndex: ("evict",),
    CausalLM: ("forward", "compute_logits"),
    Scheduler: ("plan", "remove"),
    Masks: ("ready", "end"),
    Channel: ("put",),
}
#: No request depends on drafts.
OF_NONE: dict[type, tuple[str, ...]] = {Guesses: ("wants", "propose", "observe", "forget")}


class Drafts(Guesses):
    """May be started anew at any time."""

    def start(self, runner: ModelRunner) -> None:
        pass


class Broken:
    """Counts the calls of a method, and fails before the first and after a later one of them."""

    def __init__(self, owner: type, name: str, patch: pytest.MonkeyPatch, later: int = 0) -> None:
        self.calls = self.raised = 0
        self.later = later
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **how: Any) -> Any:
            self.calls += 1
            number = self.calls
            if self.later and number == 1:
                self.raised += 1
                raise RuntimeError("planted")
            result = original(*args, **how)
            if number == self.later:
                self.raised += 1
                raise RuntimeError("planted")
            return result

        patch.setattr(owner, name, call)


@functools.cache
def wanted() -> list[tuple[Any, ...]]:
    """The answers without any fault."""
    return [alone(HYBRID, ids, params, **made(more)) for ids, params, more in (*REQUESTS, (*LATER, {}))]


def made(more: dict[str, Any]) -> dict[str, Any]:
    return {name: Fixed(list(value)) if name == "constraint" else value for name, value in more.items()}


@contextmanager
def run_all(folder: Path) -> Iterator[tuple[Core, list[Run]]]:
    """All requests at a time and one that is cancelled, beside drafts, with too few blocks and a disk."""
    drafts = Drafts({number: one[2] for number, one in enumerate(wanted(), 2)}, 5)
    disk = DiskCache(folder, HYBRID, 1 << 20)
    core = Core(HYBRID, 15, 4, drafts, disk, max_rollback=3, chunk_size=64, snapshot_bytes=60_000)
    try:
        core.submit(SYSTEM, asked(9, 1), cuts=(30,))
        core.run()
        cancelled = core.submit(text(30, 7), asked(6, 30))
        runs = [core.submit(ids, params, **made(more)) for ids, params, more in REQUESTS]
        for _ in range(3):
            core.turn()
        cancelled.channel.cancel()
        core.run()
        assert cancelled.finish is not None
        yield core, runs
    finally:
        disk.close()


def check(core: Core, runs: list[Run]) -> int:
    """No answer is wrong, the next request is answered; how many failed."""
    failed = 0
    for run, right in zip(runs, wanted(), strict=False):
        assert run.finish is not None and run.sequence.slot is None
        assert [type(event) for event in run.events].count(type(run.finish)) == 1
        if run.finish.reason == "error":
            assert run.finish.error == "an internal error ended this request; try again"
            assert not run.finish.refused
            failed += 1
        else:
            assert answer(run) == right
    core.runner.disk = None  # it is closed
    later = core.submit(*LATER)
    core.run()
    assert answer(later) == wanted()[-1] and core.failed_steps == 0
    assert not core.busy and core.runner.cache.rows.num_free == core.settings.num_rows
    return failed


@functools.cache
def num_calls() -> dict[tuple[type, str], int]:
    """How often each method is called where nothing fails."""
    wanted()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        broken = {place: Broken(*place, patch) for place in places({**OF_ONE, **OF_NONE})}
        broken |= {place: Broken(*place, patch) for place in places(OF_ALL)}
        with run_all(Path(folder)) as (core, runs):
            calls = {place: one.calls for place, one in broken.items()}
            assert not core.counts.failures and check(core, runs) == 0
        assert core.scheduler.num_preemptions and core.counts.accepted
        return calls


def places(groups: dict[type, tuple[str, ...]]) -> list[tuple[type, str]]:
    return [(owner, name) for owner, names in groups.items() for name in names]


def planted(groups: dict[type, tuple[str, ...]]) -> list[Any]:
    return [pytest.param(*place, id=f"{place[0].__name__}.{place[1]}") for place in places(groups)]


@pytest.fixture
def faults(owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """How many calls of the method failed, and how many requests did."""
    usual = num_calls()[owner, name]
    assert usual
    broken = Broken(owner, name, monkeypatch, max(2, usual // 2))
    with run_all(tmp_path) as (core, runs):
        broken.later = 0  # what follows has no faults
        assert core.last_error == "RuntimeError: planted" and 1 <= core.counts.failures <= broken.raised
        return broken.raised, check(core, runs)


@pytest.mark.parametrize(("owner", "name"), planted(OF_ONE))
def test_a_fault_in_the_work_for_one_request_ends_no_other(owner: type, name: str, faults: Faults) -> None:
    assert faults[1] <= faults[0] in (1, 2)


@pytest.mark.parametrize(("owner", "name"), planted(OF_ALL))
def test_after_a_fault_of_a_whole_step_the_engine_goes_on(owner: type, name: str, faults: Faults) -> None:
    assert faults[0] in (1, 2) and faults[1] < len(REQUESTS)


@pytest.mark.parametrize(("owner", "name"), planted(OF_NONE))
def test_a_fault_of_the_drafter_ends_no_request(owner: type, name: str, faults: Faults) -> None:
    assert faults == (1, 0)
