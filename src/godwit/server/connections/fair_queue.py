"""A bounded queue in front of work that blocks: a few pieces at a time, and the clients take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from godwit.errors import GodwitError
from godwit.server.errors import from_engine, overloaded

BUSY = "too many requests are waiting to be prepared; send the request again in a moment"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Lines(Generic[_Item]):
    """One line for each key; the keys take turns."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[_Item]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, key: str, item: _Item) -> None:
        """Put an item at the end of a key's line."""
        self._lines.setdefault(key, deque()).append(item)
        self._size += 1

    def pop(self) -> _Item:
        """Take the first item of the key whose turn it is, which then goes behind the other keys.

        Raises:
            IndexError: all lines are empty.
        """
        if not self._lines:
            raise IndexError("nobody is waiting")
        key = next(iter(self._lines))
        line = self._lines.pop(key)
        item = line.popleft()
        if line:
            self._lines[key] = line
        self._size -= 1
        return item

    def pop_from_longest(self) -> _Item:
        """Take the last item of the longest line, of several the one that had its turn last.

        Raises:
            IndexError: all lines are empty.
        """
        if not self._lines:
            raise IndexError("nobody is waiting")
        key = max(reversed(self._lines), key=lambda one: len(self._lines[one]))
        item = self._lines[key][-1]
        self.remove(key, item)
        return item

    def length(self, key: str) -> int:
        """How many items a key has."""
        return len(self._lines.get(key, ()))

    def longest(self) -> int:
        """The length of the longest line."""
        return max(map(len, self._lines.values()), default=0)

    def remove(self, key: str, item: _Item) -> None:
        """Take an item out of its line; one that is not there is no error."""
        line = self._lines.get(key)
        if line is None or item not in line:
            return
        line.remove(item)
        self._size -= 1
        if not line:
            del self._lines[key]


class FairQueue:
    """Runs blocking work in threads, a few pieces at a time. For one event loop.

    A full queue drops the newest entry of whoever has most of them in it, so that one client cannot keep the
    others out.

    Args:
        workers: pieces of work under way at a time.
        waiting: pieces of work that may wait.
    """

    def __init__(self, workers: int, waiting: int) -> None:
        self._workers = workers
        self._free = workers
        self._waiting = waiting
        self._lines: Lines[asyncio.Future[None]] = Lines()
        self._limiter: CapacityLimiter | None = None

    async def run(self, key: str, work: Callable[[], _Result]) -> _Result:
        """Do the work in a thread when it is the turn of ``key``.

        Cancelling this takes work that has not begun out of the queue. Work that has begun is finished, and
        holds its place until then.

        Raises:
            ApiError: too many are waiting (503), or the work failed.
        """
        await self._turn(key)
        task = asyncio.ensure_future(self._do(work))
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except GodwitError as error:
            raise from_engine(error) from error

    async def _do(self, work: Callable[[], _Result]) -> _Result:
        if self._limiter is None:  # it belongs to the event loop
            self._limiter = CapacityLimiter(self._workers)
        return await run_sync(work, limiter=self._limiter)

    async def _turn(self, key: str) -> None:
        if self._free:
            self._free -= 1
            return
        self._make_room(key)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.push(key, place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._release()  # the turn came and the client left at the same moment
            self._lines.remove(key, place)
            raise

    def _make_room(self, key: str) -> None:
        if len(self._lines) < self._waiting:
            return
        if not self._waiting or self._lines.length(key) + 1 >= self._lines.longest():
            raise overloaded(BUSY)
        self._lines.pop_from_longest().set_exception(overloaded(BUSY))

    def _ended(self, task: asyncio.Task[_Result]) -> None:
        if not task.cancelled():
            task.exception()  # nobody may be left to look at it
        self._release()

    def _release(self) -> None:
        if len(self._lines):
            self._lines.pop().set_result(None)
        else:
            self._free += 1
