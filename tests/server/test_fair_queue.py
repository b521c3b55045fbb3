"""Who waits for whom in front of blocking work."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from godwit.errors import UsageError
from godwit.server.connections.fair_queue import SWITCH_SECONDS, FairQueue, Lines
from godwit.server.errors import ApiError


class Held:
    """Work that goes on until it is let go, and notes in which order pieces began."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.go = threading.Event()

    def piece(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.order.append(name)
            assert self.go.wait(60)
            return name

        return work


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def with_queue(steps: Callable[[FairQueue, Held], Awaitable[None]], waiting: int = 8) -> Held:
    held = Held()

    async def main() -> None:
        try:
            await steps(FairQueue(1, waiting), held)
        finally:
            held.go.set()

    asyncio.run(main())
    return held


def begin(queue: FairQueue, held: Held, key: str, name: str) -> asyncio.Task[str]:
    return asyncio.ensure_future(queue.run(key, held.piece(name)))


def test_keys_take_turns() -> None:
    async def steps(queue: FairQueue, held: Held) -> None:
        tasks = [begin(queue, held, name[0], name) for name in ("a0", "a1", "a2", "a3", "b0", "b1", "c0")]
        await settled()
        held.go.set()
        assert await asyncio.gather(*tasks) == ["a0", "a1", "a2", "a3", "b0", "b1", "c0"]

    assert with_queue(steps).order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


def test_a_full_queue_refuses_whoever_fills_it() -> None:
    async def steps(queue: FairQueue, held: Held) -> None:
        first = [begin(queue, held, "a", name) for name in ("a0", "a1", "a2")]
        await settled()
        with pytest.raises(ApiError) as refused:
            await queue.run("a", held.piece("a3"))
        assert refused.value.status == 503 and refused.value.headers["Retry-After"] == "1"
        other = begin(queue, held, "b", "b0")
        await settled()
        with pytest.raises(ApiError) as dropped:  # the newest of the longest line made room
            await first[2]
        assert dropped.value.status == 503
        with pytest.raises(ApiError):
            await queue.run("c", held.piece("c0"))  # no line is longer than what it would have itself
        held.go.set()
        assert await asyncio.gather(*first[:2], other) == ["a0", "a1", "b0"]

    assert with_queue(steps, waiting=2).order == ["a0", "a1", "b0"]


def test_a_queue_without_places_to_wait_refuses_all_but_what_can_begin() -> None:
    async def steps(queue: FairQueue, held: Held) -> None:
        first = begin(queue, held, "a", "a0")
        await settled()
        with pytest.raises(ApiError):
            await queue.run("b", held.piece("b0"))
        held.go.set()
        assert await first == "a0"

    with_queue(steps, waiting=0)


def test_whoever_leaves_is_not_waited_for() -> None:
    async def steps(queue: FairQueue, held: Held) -> None:
        first, gone, last = (begin(queue, held, "a", name) for name in ("a0", "a1", "a2"))
        await settled()
        gone.cancel()
        await settled()
        held.go.set()
        assert [*await asyncio.gather(first, last)] == ["a0", "a2"] and gone.cancelled()

    assert with_queue(steps).order == ["a0", "a2"]


def test_work_that_has_begun_keeps_its_place_until_it_ends() -> None:
    async def steps(queue: FairQueue, held: Held) -> None:
        gone, next_one = (begin(queue, held, "a", name) for name in ("a0", "a1"))
        await settled()
        gone.cancel()
        await settled()
        assert gone.cancelled() and not next_one.done() and "a1" not in held.order
        held.go.set()
        assert await next_one == "a1"
        assert await queue.run("a", lambda: "again") == "again"

    with_queue(steps)


def test_a_turn_that_comes_as_the_client_leaves_goes_to_the_next() -> None:
    async def steps(queue: FairQueue, held: Held) -> None:
        held.go.set()
        await queue._turn("a")
        gone, last = (begin(queue, held, "a", name) for name in ("a1", "a2"))
        await settled()
        queue._release()
        gone.cancel()
        assert await last == "a2" and held.order == ["a2"]

    with_queue(steps)


def test_errors_of_the_work_are_told_and_free_the_place() -> None:
    def fail() -> Any:
        raise UsageError("no such form")

    async def steps(queue: FairQueue, held: Held) -> None:
        for _ in range(3):
            with pytest.raises(ApiError, match="no such form") as error:
                await queue.run("a", fail)
            assert error.value.status == 400
        with pytest.raises(ZeroDivisionError):
            await queue.run("a", lambda: 1 // 0)
        assert await queue.run("a", lambda: 7) == 7

    with_queue(steps)


def test_empty_lines() -> None:
    lines: Lines[int] = Lines()
    lines.remove("a", 1)
    with pytest.raises(IndexError):
        lines.pop()
    with pytest.raises(IndexError):
        lines.pop_from_longest()
    lines.push("a", 1)
    lines.remove("a", 2)
    assert len(lines) == lines.longest() == lines.length("a") == 1 and lines.pop() == 1
    assert len(lines) == lines.longest() == 0


def test_jobs_hand_over_the_interpreter_soon_and_leave_the_interval_as_it_was() -> None:
    usual = sys.getswitchinterval()
    seen: list[float] = []

    async def steps(queue: FairQueue, held: Held) -> None:
        task = begin(queue, held, "a", "a")
        other = asyncio.ensure_future(queue.run("b", lambda: seen.append(sys.getswitchinterval())))
        held.go.set()
        await asyncio.gather(task, other)

    with_queue(steps)
    assert seen == [pytest.approx(min(usual, SWITCH_SECONDS))]
    assert sys.getswitchinterval() == usual
